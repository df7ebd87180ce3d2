"""What is written in Rust. This file is its reference."""

import sys
from collections.abc import Sequence
from os import PathLike
from types import TracebackType
from typing import Any, Literal, Protocol, Self, TypeAlias, final

from typing_extensions import Buffer

__all__ = [
    "Binding",
    "Block",
    "CacheLayout",
    "Client",
    "Description",
    "DeviceCache",
    "Event",
    "EventBatch",
    "Events",
    "Evicted",
    "LayerSave",
    "Load",
    "Lookup",
    "Miss",
    "Pinned",
    "Prefetched",
    "Reservation",
    "Scope",
    "Session",
    "Sighting",
    "Slice",
    "__version__",
    "connect",
]

__version__: str

_Hash: TypeAlias = bytes | str | int
"""The engine's name of a token prefix: 8 to 64 bytes, their hex form, or an integer of 64 bits, signed or not."""

_Tier: TypeAlias = Literal["device", "host", "disk", "object"]
_Priority: TypeAlias = Literal["low", "normal", "high"]
_Content: TypeAlias = Literal["key_value", "latent"]
_Tensors: TypeAlias = Literal["one", "layers", "halves", "halves_of_layers"]

class _DeviceTensor(Protocol):
    """A tensor in device memory, such as PyTorch's and CuPy's."""

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]: ...

_Memory: TypeAlias = _DeviceTensor | tuple[int, int]
"""A tensor, or where one is: its address and its length in bytes."""

_PagedBlock: TypeAlias = tuple[_Hash, Sequence[int]]
"""A block and the pages that hold its tokens, in their order."""

def connect(
    endpoint: str | PathLike[str] | None = None,
    *,
    deadline: float = 2.0,
    tls_ca: str | PathLike[str] | None = None,
    tls_identity: tuple[str | PathLike[str], str | PathLike[str]] | None = None,
    tls_name: str | None = None,
) -> Client:
    """Connect to the daemon of this machine, or to another.

    ``endpoint`` is the daemon's run directory, its ``kvd.sock``, or ``http://host:port`` / ``https://host:port``;
    ``None`` is what ``KVD_SOCKET`` says, else ``/run/kvd``, else this user's own. ``deadline`` is how many seconds a
    call may take when nobody says otherwise, 600 at most. For ``https``, ``tls_ca`` is a PEM file, ``tls_identity``
    our certificate and its key, ``tls_name`` the name in the daemon's certificate when it is not the host.

    Raises :class:`kvd.Unavailable` when nobody listens there.
    """

@final
class Client:
    """A connection."""

    def session(
        self,
        name: str = "",
        *,
        staging_bytes: int | None = None,
        hazards: int | None = None,
        ring_entries: int | None = None,
        numa_node: int | None = None,
        trusted: bool = False,
        grpc_only: bool = False,
    ) -> Session:
        """Open a session: through shared memory where it can be had, else over gRPC.

        ``name`` is what operators see (``kvctl get clients``). ``staging_bytes`` (default 64 MiB) is what may be on
        its way into the store at once, per shard; ``hazards`` (4096) how many blocks of a shard can be open for
        reading at once; ``ring_entries`` (1024) how many requests can be under way. ``numa_node``: blocks go to that
        node's shard. ``trusted`` asks to fill arena slots in place. ``grpc_only``: no shared memory.
        """

    def describe(self) -> Description:
        """What the daemon says of itself."""

    def watch(
        self,
        *,
        tenants: Sequence[str] | None = None,
        cursors: Sequence[tuple[int, int, int]] | None = None,
    ) -> Events:
        """Follow what happens to blocks, without gaps, across restarts of the daemon.

        ``tenants``: only blocks of these; none means all that the caller may see. ``cursors``: where to go on, of
        earlier batches (:attr:`EventBatch.cursor`), the last one of each shard; a shard without one begins with its
        inventory.
        """

@final
class Description:
    """What the daemon says of itself."""

    @property
    def node(self) -> str: ...
    @property
    def version(self) -> str: ...
    @property
    def epoch(self) -> int:
        """Life of the daemon: one more after each start."""

    @property
    def shards(self) -> int: ...
    @property
    def keys_per_request_max(self) -> int: ...
    @property
    def block_bytes_max(self) -> int: ...
    @property
    def principal(self) -> str:
        """Whose blocks the caller sees: the name of its group of users, empty without one."""

    @property
    def peers(self) -> list[str]:
        """The nodes that it fetches blocks from."""

    @property
    def object(self) -> bool:
        """Whether it has an object tier, which it shares with other nodes."""


@final
class Scope:
    """What the bytes of a block mean. Two scopes that differ in any field never share a byte."""

    def __new__(
        cls,
        model: str,
        *,
        block_tokens: int,
        tenant: str = "default",
        weights: str = "",
        tokenizer: str = "",
        dtype: str = "",
        attention: str = "full",
        layout: str = "",
        lora: str = "",
        salt: str = "",
        kind: Literal["kv", "embedding", "weights"] = "kv",
    ) -> Self:
        """``block_tokens`` is the tokens in one block; ``weights`` and ``tokenizer`` a revision or digest; ``dtype``
        the element type, such as ``bf16``; ``attention`` the group: ``full``, ``sliding:4096``, ``mla``, ``state:...``;
        ``layout`` the order of memory, such as ``layer,kv,head,token,dim``; ``lora`` adapter and revision; ``tenant``
        who pays, of the form ``[a-z0-9-]{1,63}``; ``salt`` the tenant's secret, which is never logged.

        Raises ``ValueError`` that names the field.
        """

    @property
    def model(self) -> str: ...
    @property
    def block_tokens(self) -> int: ...
    @property
    def tenant(self) -> str: ...

@final
class Slice:
    """Which part of a block's tensor a piece is: layers (pipeline parallel) and KV heads (tensor parallel)."""

    def __new__(
        cls,
        layers: int,
        heads: int,
        *,
        layer_range: tuple[int, int] | None = None,
        head_range: tuple[int, int] | None = None,
    ) -> Self:
        """A tensor of ``layers`` x ``heads``, and the half-open ranges of this piece; ``None`` is all of them."""

@final
class Binding:
    """A scope, a slice and a block length, registered. Stays good across restarts of the daemon."""

    @property
    def block_bytes(self) -> int: ...
    @property
    def scope(self) -> Scope: ...
    @property
    def scope_id(self) -> str:
        """Digest of the scope, 64 hex digits."""

    def key(self, hash: _Hash) -> bytes:
        """Name of a block on every tier and node: 16 bytes, what ``kvctl why`` takes in hex."""

@final
class Miss:
    """Why a block is not there. False in a condition, as a :class:`Block` is true."""

    @property
    def reason(self) -> str:
        """``never_stored``, ``evicted_capacity``, ``evicted_quota``, ``evicted_request``, ``evicted_reclaim``,
        ``expired``, ``scope_differs``, ``corrupt``, ``tier_degraded``, ``not_complete``, ``quota``, ``tier_timeout``,
        ``admission_rejected``, ``overloaded``, ``peer_down``, ``path_failed`` or ``peer_evicted``."""

    @property
    def fields(self) -> list[str]:
        """For ``scope_differs``: the fields in which the nearest stored scope differs."""

    def __bool__(self) -> Literal[False]: ...

@final
class Lookup:
    """What is here of a sequence of blocks."""

    @property
    def prefix(self) -> int:
        """Blocks here from the first on, without a gap."""

    @property
    def tiers(self) -> list[_Tier]:
        """The fastest tier of each of them."""

    @property
    def miss(self) -> Miss | None:
        """Why the next one is absent; ``None`` when all are here."""

@final
class Sighting:
    """Where a block is, as far as this node and its peers know."""

    @property
    def node(self) -> str | None:
        """The peer that has it, or expects it; ``None`` when it is here, in the object store, or nowhere."""

    @property
    def tier(self) -> _Tier | None:
        """The fastest tier that has it, ``object`` when only the object store does; ``None`` when nobody has it. With a
        :attr:`node` that one expects it then: somebody there is about to store it."""

    @property
    def miss(self) -> Miss | None:
        """Why it is nowhere; ``None`` when somebody has or expects it."""


@final
class Block(Buffer):
    """A block open for reading: a read-only buffer of ``Binding.block_bytes`` bytes, which stay as they are until it is
    released. ``memoryview(block)``, ``numpy.frombuffer(block, dtype)`` and ``torch.frombuffer`` do not copy.

    Released by :meth:`release`, at the end of ``with``, or when nobody refers to it or to a view of it.
    """

    if sys.version_info >= (3, 12):
        def __buffer__(self, flags: int, /) -> memoryview: ...

    @property
    def key(self) -> bytes: ...
    @property
    def is_zero_copy(self) -> bool:
        """Whether the bytes are read where they lie; else they are a checked copy."""

    @property
    def is_valid(self) -> bool:
        """Whether the daemon would still give these bytes. False once the block was evicted; they stay readable."""

    def verify(self) -> bool:
        """Read all bytes and compare them with the checksum."""

    def tobytes(self) -> bytes:
        """A copy."""

    def copy_into(self, target: Buffer) -> None:
        """Copy over a contiguous writable buffer of the same length, while other threads run."""

    def release(self) -> None:
        """Let go of the block. Raises ``BufferError`` while views of it exist."""

    def __len__(self) -> int: ...
    def __bool__(self) -> Literal[True]: ...
    def __enter__(self) -> Self: ...
    def __exit__(
        self, c: type[BaseException] | None, e: BaseException | None, t: TracebackType | None, /
    ) -> None: ...

@final
class Reservation(Buffer):
    """Room for one announced block: a writable buffer of ``Binding.block_bytes`` bytes. Fill it and :meth:`commit`; at
    the end of ``with``, or when nobody refers to it, what was not committed is taken back.

    From the announcement on, others can wait for the block. The bytes are undefined until they are written.
    """

    if sys.version_info >= (3, 12):
        def __buffer__(self, flags: int, /) -> memoryview: ...

    @property
    def key(self) -> bytes: ...
    def write(self, data: Buffer) -> None:
        """Copy a whole block, faster than through a view, while other threads run."""

    def commit(self) -> bool:
        """Store the bytes; whoever waits for the block gets it. False when it was stored by somebody else meanwhile.

        Raises ``BufferError`` while views of the memory exist: nobody may write to what is stored.
        """

    def abort(self) -> None:
        """Take the announcement back. Raises ``BufferError`` while views of the memory exist."""

    def __len__(self) -> int: ...
    def __enter__(self) -> Self: ...
    def __exit__(
        self, c: type[BaseException] | None, e: BaseException | None, t: TracebackType | None, /
    ) -> None: ...

@final
class Pinned:
    """What a pin did, in blocks."""

    @property
    def pinned(self) -> int: ...
    @property
    def absent(self) -> int: ...

@final
class Prefetched:
    """What a prefetch did, in blocks."""

    @property
    def started(self) -> int: ...
    @property
    def resident(self) -> int: ...

@final
class Evicted:
    """What an eviction did, in blocks."""

    @property
    def evicted(self) -> int: ...
    @property
    def in_use(self) -> int: ...
    @property
    def absent(self) -> int: ...

@final
class Session:
    """A worker's session. When the daemon goes away, calls raise :class:`kvd.Unavailable` at once, and the session
    reconnects by itself; open blocks stay readable."""

    @property
    def uses_shared_memory(self) -> bool: ...
    @property
    def doors(self) -> str:
        """How the session talks to the daemon, and why not through shared memory."""

    @property
    def is_connected(self) -> bool: ...
    @property
    def epoch(self) -> int:
        """Life of the daemon that the session belongs to."""

    @property
    def deadline(self) -> float:
        """How many seconds a call may take."""

    def with_deadline(self, deadline: float) -> Session:
        """The same session with another deadline, 600 s at most."""

    def wait_until_connected(self, timeout: float) -> bool:
        """Wait until the session is up; whether it is."""

    def register(self, scope: Scope, block_bytes: int, *, slice: Slice | None = None) -> Binding:
        """Say what this worker's blocks mean. The same again gives a binding of the same blocks."""

    def register_kv_cache(
        self, tensors: Sequence[_Memory], layout: CacheLayout, *, events: Sequence[bytes] | None = None
    ) -> DeviceCache:
        """Make a KV cache in the memory of a GPU known, so that the daemon copies blocks to and from its pages by itself.

        ``tensors`` are the engine's own, as many as the layout is of, in its sequence; nothing is copied, and they must
        live as long as the cache. ``events``: handles of events that were made to be shared
        (``torch.cuda.Event(interprocess=True).ipc_handle()``, 64 bytes each); later calls name them by their place here.

        The blocks of a binding lie as the ``layout`` of its scope says: an order of axes such as
        ``layer,kv,head,token,dim``.

        Raises :class:`kvd.Unsupported` without a CUDA driver, for memory that was not made to be shared, and when the
        daemon has no use for GPUs; :class:`kvd.Invalid` when there is no device memory at an address, or too little.
        """

    def lookup(self, binding: Binding, hashes: Sequence[_Hash]) -> Lookup:
        """What is here, from the first block on. Holds nothing; wakes nobody up where there is shared memory."""

    def locate(self, binding: Binding, hashes: Sequence[_Hash], *, node: str | None = None) -> list[Sighting]:
        """Where each block is: here, with a peer, which the daemon asks, or in the object store. Nothing moves: that is for
        :meth:`prefetch`, or for :meth:`acquire` with time to wait.

        ``node`` is a peer to ask in any case, where there are more than are asked for one block.
        """

    def acquire(
        self, binding: Binding, hashes: Sequence[_Hash], *, wait: float = 0.0
    ) -> list[Block | Miss]:
        """Open blocks for reading, one answer for each, in order: those in host memory at once; those on slower tiers, with
        peers of the node, in the object store, or announced by others and not stored yet, if they are there within
        ``wait`` seconds (else they are misses, such as ``tier_timeout`` and ``not_complete``).

        In the order of their prefix, where they have one: a tier below may keep them together; nothing else depends on
        it.
        """

    def wait(self, binding: Binding, hashes: Sequence[_Hash], timeout: float) -> int:
        """Wait for announced blocks; how many are readable from the first on. Holds nothing afterwards."""

    def get(self, binding: Binding, hash: _Hash) -> bytes | None:
        """A checked copy of one block; ``None`` when it is not there."""

    def put(
        self,
        binding: Binding,
        hash: _Hash,
        data: Buffer,
        *,
        priority: _Priority = "normal",
        ttl: float | None = None,
        durable: bool = False,
    ) -> bool:
        """Store one block: any contiguous buffer of ``binding.block_bytes`` bytes. False when it was there before.

        ``ttl``: seconds until it expires. ``durable``: return only when it is on disk.
        """

    def put_many(
        self,
        binding: Binding,
        blocks: Sequence[tuple[_Hash, Buffer]],
        *,
        priority: _Priority = "normal",
        ttl: float | None = None,
        durable: bool = False,
    ) -> list[bool | Exception]:
        """Store many blocks, all under way at once; for each what :meth:`put` would return, or raise.

        In the order of their prefix, where they have one: a tier below may keep them together; nothing else depends on
        it.
        """

    def reserve(
        self,
        binding: Binding,
        hash: _Hash,
        *,
        priority: _Priority = "normal",
        ttl: float | None = None,
        durable: bool = False,
    ) -> Reservation | None:
        """Announce a block and get room to fill. ``None`` when it is there, or announced by somebody else."""

    def pin(self, binding: Binding, hashes: Sequence[_Hash], ttl: float) -> Pinned:
        """Keep blocks from being evicted for ``ttl`` seconds, one at least."""

    def unpin(self, binding: Binding, hashes: Sequence[_Hash]) -> int:
        """End pins; how many there were."""

    def prefetch(
        self, binding: Binding, hashes: Sequence[_Hash], *, node: str | None = None
    ) -> Prefetched:
        """Start to bring blocks up to host memory, from disk, from a peer or from the object store, and return at once.

        ``node`` is the peer to ask first for what is not here.

        In the order of their prefix, where they have one: a tier below may keep them together; nothing else depends on
        it.
        """

    def evict(
        self, binding: Binding, hashes: Sequence[_Hash], *, tier: _Tier | None = None
    ) -> Evicted:
        """Remove blocks from one tier, or from all."""

    def explain(self, binding: Binding, hash: _Hash) -> Miss | None:
        """Why a block is not here, down to the fields of the scope that differ; ``None`` when it is here."""

@final
class CacheLayout:
    """How an engine's KV cache lies in its tensors: which layers and heads, what a page is, and which bytes of it are what.

    ``order`` is a letter for each axis, outermost first: ``L`` layer, ``B`` page (vLLM: block), ``2`` K and V, ``H`` head,
    ``N`` token of a page, ``D`` element of a vector; ``C`` is ``2D`` (vLLM's ``LBNHC``, to 0.25 ``LB2NHD`` and so on). Or a
    name of SGLang's: ``layer_first``, ``page_first``, ``page_first_direct``, ``page_head``, ``page_unified``. Every axis has
    its place, also one of length 1.

    ``tensors`` says how the cache is handed over: as ``one``, as one for each of the ``layers``, as ``halves`` (K, V), or as
    ``halves_of_layers`` (K of each layer, then V of each). Where the axis is not the outermost of the order, the tensors
    are views of one cache.

    ``slice``: layers and KV heads of this worker, of how many. ``head_dim``: elements of a vector; ``element_bits``: bits
    of one, whole bytes. ``content``: a key and a value, or one ``latent`` vector as in MLA.
    """

    def __new__(
        cls,
        order: str,
        *,
        slice: Slice,
        page_count: int,
        page_tokens: int,
        head_dim: int,
        element_bits: int,
        content: _Content = "key_value",
        tensors: _Tensors = "layers",
    ) -> Self: ...
    @staticmethod
    def strided(
        strides: dict[str, int],
        tensors: dict[str, int] | None = None,
        *,
        slice: Slice,
        page_count: int,
        page_tokens: int,
        head_dim: int,
        element_bits: int,
        content: _Content = "key_value",
        first: tuple[int, int] | None = None,
    ) -> CacheLayout:
        """A cache with gaps, or in an order without a name.

        ``strides``: bytes from one index to the next, of ``layer``, ``kv``, ``page``, ``head``, ``token`` and ``dim``.
        ``tensors``: for ``layer`` and ``kv`` instead, how many tensors further the next one is, at the same byte. An axis
        of length 1 may be left out. ``first``: tensor and byte of the first element of page 0; the first of all when it is not
        said.

        Raises ``ValueError`` for strides of which it cannot be said that no two elements share a byte.
        """

    @property
    def tensor_count(self) -> int:
        """Tensors that there must be."""

    @property
    def tensor_bytes(self) -> int:
        """Bytes that each of them must have."""

    def block_bytes(self, pages: int) -> int:
        """Length of a block of so many pages, of all that this worker has: what to register its binding with."""

    def __eq__(self, other: object, /) -> bool: ...
    def __ne__(self, other: object, /) -> bool: ...

@final
class DeviceCache:
    """A KV cache that the daemon knows. It lets go of it when nobody refers to it any more.

    The pages of a :meth:`save` hold still until it has returned; those of a :meth:`load` are nobody else's until
    :meth:`Load.finish` has. **When a call ends with an error that is not a refusal (:class:`kvd.DeadlineExceeded`,
    :class:`kvd.Unavailable`, :class:`kvd.Fenced`, :class:`kvd.Internal`), copies may be under way for a moment: call**
    :meth:`quiesce`, **and use the pages when it has returned.**

    While the daemon is away, calls raise :class:`kvd.Unavailable`; the session registers the cache again by itself. One
    that is not taken back says why when it is used.
    """

    @property
    def deadline(self) -> float:
        """How many seconds a call may take."""

    def with_deadline(self, deadline: float) -> DeviceCache:
        """The same cache with another deadline, 600 s at most."""

    def save(
        self,
        binding: Binding,
        blocks: Sequence[_PagedBlock],
        *,
        priority: _Priority = "normal",
        ttl: float | None = None,
        durable: bool = False,
        after: _Hash | None = None,
        event: int | None = None,
    ) -> list[bool | Exception]:
        """Store blocks from pages; for each, in order, what :meth:`Session.put` would return, or raise.

        ``after``: the block before the first in its prefix, where that is known. ``event``: which of the cache's events
        the copies wait for, on the device; record it before. Without, the pages are complete.

        In the order of their prefix, where they have one: a tier below may keep them together; nothing else depends on
        it.
        """

    def save_by_layer(
        self,
        binding: Binding,
        blocks: Sequence[_PagedBlock],
        *,
        priority: _Priority = "normal",
        ttl: float | None = None,
        durable: bool = False,
        after: _Hash | None = None,
    ) -> LayerSave:
        """The same while the pages fill: each layer is copied when it is ready. The deadline counts from now until all is
        stored, so allow for the time that the layers take (:meth:`with_deadline`)."""

    def load(
        self,
        binding: Binding,
        blocks: Sequence[_PagedBlock],
        *,
        wait: float = 0.0,
        node: str | None = None,
        by_layer: bool = False,
        event: int | None = None,
        events: Sequence[int] | None = None,
    ) -> Load:
        """Bring blocks into pages, from whichever tier has them. Returns when it is known which come and the device has
        the copies in its queue.

        ``wait``: how many seconds to wait for blocks that are announced, on disk, with a peer of the node, or in the
        object store; ``node``: the peer to ask first. ``by_layer``: copy layer by layer, each behind the one before.
        ``event``: which of the cache's events the copies wait for, recorded before the call behind what still uses the
        pages. ``events``: which of them are recorded, with ``by_layer`` one behind each layer, else one behind all;
        streams that wait for them need to wait for nothing else.
        """

    def quiesce(self) -> None:
        """Wait until no copy of this cache is under way any more that had begun before."""

    def forget(self) -> None:
        """Have the daemon let go of the cache now. Copies that have not begun fail; waits for the others."""

@final
class LayerSave:
    """Blocks that are stored layer by layer. Given up when nobody refers to it before :meth:`finish`."""

    def ready(self, layers: int, event: int | None = None) -> None:
        """Say that the first ``layers`` of the binding's slice are ready; their copies wait for ``event`` on the device,
        recorded behind the last of them. Raises when the save has failed already."""

    def finish(self) -> list[bool | Exception]:
        """Wait until all is stored, as :meth:`DeviceCache.save` does. All layers must be ready."""

    def abort(self) -> None:
        """Give it up; nothing is stored. Call :meth:`DeviceCache.quiesce` before the pages are used for something else."""

@final
class Load:
    """Blocks on their way into pages. It goes on when nobody refers to it any more."""

    @property
    def found(self) -> list[_Tier | Miss]:
        """For each block, in order, the tier that its bytes come from, or why it does not come: its pages are left as they
        are then."""

    @property
    def layers_arrived(self) -> int:
        """Layers that have arrived by now, from the first on; all at once when it is not by layer."""

    def wait_for_layers(self, layers: int) -> None:
        """Wait until the first ``layers`` have arrived."""

    def finish(self) -> None:
        """Wait until the device is done with all copies; raises when that failed. Once."""

@final
class Event:
    """What happened to a block."""

    @property
    def kind(self) -> Literal["stored", "removed", "cleared"]: ...
    @property
    def key(self) -> bytes | None:
        """Which block, 16 bytes; ``None`` when a whole tier was cleared."""

    @property
    def tier(self) -> _Tier: ...
    @property
    def binding_tag(self) -> int | None:
        """What it was stored under; only with ``stored``."""

    @property
    def number(self) -> int:
        """Position in this life of the shard's log, without gaps."""


@final
class EventBatch:
    """Some events of one shard, in order."""

    @property
    def cursor(self) -> tuple[int, int, int]:
        """Position after it: shard, epoch, number."""

    @property
    def snapshot(self) -> bool:
        """The events are the shard's inventory. What was known of the shard before is void when one begins."""

    @property
    def snapshot_end(self) -> bool:
        """The inventory is complete with this batch."""

    @property
    def events(self) -> list[Event]: ...

@final
class Events:
    """A subscription."""

    def next(self, timeout: float) -> EventBatch | None:
        """The next batch; ``None`` when none came within ``timeout`` seconds."""
