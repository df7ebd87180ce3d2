"""Find, read and store blocks of KV cache in the node's kvd daemon.

A worker opens a session, says once what its blocks mean, and from then on names them by the engine's own
hashes. Blocks are read where they lie, without a copy; what is not there says why::

    import kvd

    session = kvd.connect().session("rank 0")
    binding = session.register(kvd.Scope("m", block_tokens=16, dtype="bf16"), block_bytes=64 << 10)

    here = session.lookup(binding, hashes).prefix
    for block in session.acquire(binding, hashes[:here], wait=1.0):
        if block:
            use(memoryview(block))  # read-only, of ``binding.block_bytes`` bytes
        else:
            print("recompute:", block.reason)
    session.put(binding, hashes[here], data)

Lengths are bytes, times are seconds. Hashes are the engine's: 8 to 64 ``bytes``, their hex form, or an integer of
64 bits. Each call ends by its deadline, with an answer or with one of :mod:`kvd.errors`; while it waits or copies,
other Python threads run. Objects may be shared between threads, not across ``fork``.
"""

from kvd._native import (
    Binding,
    Block,
    CacheLayout,
    Client,
    Description,
    DeviceCache,
    Event,
    EventBatch,
    Events,
    Evicted,
    LayerSave,
    Load,
    Lookup,
    Miss,
    Pinned,
    Prefetched,
    Reservation,
    Scope,
    Session,
    Sighting,
    Slice,
    __version__,
    connect,
)
from kvd.errors import (
    Busy,
    Corrupt,
    DeadlineExceeded,
    Denied,
    Fenced,
    Full,
    Internal,
    Invalid,
    KvdError,
    LeaseExpired,
    Moved,
    NotFound,
    Unavailable,
    Unsupported,
)

__all__ = [
    "Binding",
    "Block",
    "Busy",
    "CacheLayout",
    "Client",
    "Corrupt",
    "DeadlineExceeded",
    "Denied",
    "Description",
    "DeviceCache",
    "Event",
    "EventBatch",
    "Events",
    "Evicted",
    "Fenced",
    "Full",
    "Internal",
    "Invalid",
    "KvdError",
    "LayerSave",
    "LeaseExpired",
    "Load",
    "Lookup",
    "Miss",
    "Moved",
    "NotFound",
    "Pinned",
    "Prefetched",
    "Reservation",
    "Scope",
    "Session",
    "Sighting",
    "Slice",
    "Unavailable",
    "Unsupported",
    "__version__",
    "connect",
]
