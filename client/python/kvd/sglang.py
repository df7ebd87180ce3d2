"""SGLang's HiCache on kvd: pages that left the GPU and host memory stay in the node's daemon, for every engine there.

Written against ``HiCacheStorage`` of SGLang 0.5.23, and turned on by::

    --enable-hierarchical-cache --hicache-mem-layout page_first --hicache-storage-backend dynamic
    --hicache-storage-backend-extra-config '{"backend_name": "kvd", "module_path": "kvd.sglang",
                                             "class_name": "KvdStore", "interface_v1": 1}'

Further keys of that object are the fields of :class:`Settings`.

SGLang names a page by the hash of all tokens up to its end, and keeps it in a *host pool*. One page of one pool on one
rank is one block. A pool says at which addresses the pieces of a page lie; a block is these pieces one after another::

    page_first, page 7:   | K: token, layer, head, dim | V: token, layer, head, dim |     2 pieces
    layer_first, page 7:  | K of layer 0 | V of layer 0 | K of layer 1 | ...              2 pieces a layer

Without ``interface_v1`` SGLang hands over tensors instead, in another order of the same bytes (``flat``). These are
blocks of their own: what was stored one way is not found the other way.

SGLang calls from threads of its own, which may wait; each call ends within :attr:`Settings.call_seconds` and one
deadline. While the daemon is away nothing is there and nothing can be stored; nothing here raises into the engine
after its pools were registered.
"""

import ctypes
import hashlib
import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeVar

import numpy as np
import sglang
import torch
from sglang.srt.mem_cache.hicache_storage import (
    HiCacheStorage,
    HiCacheStorageConfig,
    HiCacheStorageExtraInfo,
    PoolHitPolicy,
    PoolName,
    PoolTransfer,
    PoolTransferResult,
)
from sglang.srt.observability.metrics_collector import StorageMetrics
from sglang.srt.runtime_context import get_serving, get_server_args

import kvd
from kvd._engine import (
    TENANT,
    WAIT_SECONDS,
    WEIGHTS_BYTES,
    Link,
    checked,
    has_weights,
    held,
    model_name,
    number,
    settings,
    text,
    weights_of,
)

__all__ = ["KvdStore", "Settings"]

logger = logging.getLogger("sglang.kvd")

T = TypeVar("T")

_Order: TypeAlias = Literal["pieces", "flat"]
_Pieces: TypeAlias = list[tuple[int, int]]
"""Addresses and lengths of the parts of a page."""

VERSIONS = {"0.5.23"}
"""The versions of SGLang whose host pools are known."""
POOLS = {
    "MHATokenToKVPoolHost": {"layer_first", "page_first", "page_first_direct", "page_head"},
    "MLATokenToKVPoolHost": {"layer_first", "page_first", "page_first_direct"},
    "DSAIndexerPoolHost": {"page_first", "page_first_direct"},
    "MambaPoolHost": {"page_first", "page_first_direct"},
}
"""Host pools whose pages we know how to name, and their layouts. Exactly these: a subclass may keep something else."""
DTYPES = {torch.float32, torch.float16, torch.bfloat16}
THEIRS = {"backend_name", "module_path", "class_name", "interface_v1", "allocator", "file_storage_path"}
"""Keys of the extra configuration that SGLang reads or writes."""
BATCH_BYTES = 32 << 20
"""What a call has open at once; at least one page."""
PREFIX = 256
"""Pages to a lookup of a prefix."""


@dataclass(frozen=True)
class Settings:
    """What ``--hicache-storage-backend-extra-config`` may say besides the keys of SGLang."""

    socket: str = text(most=4096)
    """Where the daemon is; see :func:`kvd.connect`. Empty: the default of this node."""
    tenant: str = text("default", form=TENANT)
    """Who pays for the pages: ``[a-z0-9-]{1,63}``."""
    model: str = text()
    """What the model is called in names of pages. Empty: as SGLang calls it, a directory by its last part."""
    weights: str = text(most=WEIGHTS_BYTES)
    """Revision of the weights. Empty: a digest of the model's directory, else ``--revision``; one of them must be."""
    deadline: float = number(1.0, least=0.001, most=WAIT_SECONDS)
    """Seconds that one call to the daemon may take."""
    call_seconds: float = number(5.0, least=0.001, most=WAIT_SECONDS)
    """Seconds after which a call of SGLang begins nothing more: the pages left are misses, or not stored."""
    peers: bool = True
    """Whether pages count that only peers of the daemon or its object store have. A read fetches them, within
    ``deadline``."""


@dataclass(frozen=True)
class _Pool:
    """A host pool, and what its pages are called."""

    host: Any
    name: str
    scope: dict[str, Any]
    """Arguments of :class:`kvd.Scope`, but for what changes while the engine runs."""
    part: tuple[int, int, int, int]
    """Layers, heads of all ranks, and this rank's range of heads."""
    page_slots: int
    """Entries of ``host_indices`` to a page."""
    page_bytes: int


class KvdStore(HiCacheStorage):
    """See the top of the file. Raises ``ValueError`` when SGLang starts with what is not supported, naming it."""

    def __init__(self, storage_config: HiCacheStorageConfig, kwargs: Any = None):
        if sglang.__version__ not in VERSIONS:
            raise _unsupported(f"SGLang {sglang.__version__}", f"{', '.join(sorted(VERSIONS))} is")
        extra = storage_config.extra_config or {}
        chosen = settings(Settings, {k: v for k, v in extra.items() if k not in THEIRS}, "extra config")
        if storage_config.dcp_size > 1:
            raise _unsupported(f"dcp_size = {storage_config.dcp_size}", "1 is")
        if storage_config.should_split_heads:
            raise _unsupported(f"tp_lcm_size = {storage_config.tp_lcm_size}", "leave it out")
        self._config, self._settings = storage_config, chosen
        self._order: _Order = "pieces" if extra.get("interface_v1") else "flat"
        self._identity = _identity(storage_config, chosen)
        self._pools: dict[str, _Pool] = {}
        self._kv: _Pool | None = None
        self._cleared = 0
        self._closed = False
        self._lock = threading.Lock()
        self._stats = StorageMetrics()
        self._link = Link(
            f"sglang {self._identity['model']} rank {storage_config.tp_rank}",
            endpoint=chosen.socket or None,
            deadline=chosen.deadline,
            log=logger,
        )

    # Pools

    def register_mem_pool_host(self, mem_pool_host: Any) -> None:
        super().register_mem_pool_host(mem_pool_host)
        self._kv = self._pools[str(PoolName.KV)] = self._described(mem_pool_host, str(PoolName.KV))

    def register_mem_host_pool_v2(self, host_pool: Any, host_pool_name: Any) -> None:
        name = str(host_pool_name)
        if name != PoolName.KV and self._order == "flat":
            raise _unsupported(f"the pool {name!r} without interface_v1", 'set "interface_v1": 1')
        super().register_mem_host_pool_v2(host_pool, host_pool_name)
        self._pools[name] = self._described(host_pool, name)

    # Zero copy: pages in the host pools

    def batch_get_v1(
        self, keys: list[str], host_indices: torch.Tensor, extra_info: HiCacheStorageExtraInfo | None = None
    ) -> list[bool]:
        return self._read(self._kv, "pieces", keys, lambda pool: _pages(pool, keys, host_indices))

    def batch_set_v1(
        self, keys: list[str], host_indices: torch.Tensor, extra_info: HiCacheStorageExtraInfo | None = None
    ) -> list[bool]:
        return self._write(self._kv, "pieces", keys, lambda pool: _pages(pool, keys, host_indices))

    def batch_get_v2(
        self, transfers: list[PoolTransfer], extra_info: HiCacheStorageExtraInfo | None = None
    ) -> dict[str, list[bool]]:
        return {one.name: self._transfer(self._read, one) for one in transfers}

    def batch_set_v2(
        self, transfers: list[PoolTransfer], extra_info: HiCacheStorageExtraInfo | None = None
    ) -> dict[str, list[bool]]:
        return {one.name: self._transfer(self._write, one) for one in transfers}

    # Tensors

    def get(self, key: str, target_location: Any = None, target_sizes: Any = None) -> torch.Tensor | None:
        return self.batch_get([key], [target_location])[0]

    def batch_get(
        self, keys: list[str], target_locations: Any = None, target_sizes: Any = None
    ) -> list[torch.Tensor | None]:
        """Fills the tensors, of one page each; ``None`` where a page is not there."""
        targets = target_locations if target_locations is not None else [None] * len(keys)
        good = self._read(self._kv, "flat", keys, lambda pool: [_tensor(pool, one) for one in targets])
        return [target if found else None for target, found in zip(targets, good, strict=False)]

    def set(self, key: str, value: Any = None, target_location: Any = None, target_sizes: Any = None) -> bool:
        return self.batch_set([key], [value])

    def batch_set(
        self, keys: list[str], values: Any = None, target_locations: Any = None, target_sizes: Any = None
    ) -> bool:
        """Stores one tensor for each page; whether all are stored now."""
        held_on = [one.contiguous() if isinstance(one, torch.Tensor) else None for one in values or [None] * len(keys)]
        return all(self._write(self._kv, "flat", keys, lambda pool: [_tensor(pool, one) for one in held_on]))

    # What is there

    def exists(self, key: str) -> bool:
        return self.batch_exists([key]) == 1

    def batch_exists(self, keys: list[str], extra_info: HiCacheStorageExtraInfo | None = None) -> int:
        """How many pages are there from the first on."""
        return self._ask(self._kv, self._order, lambda s, b: self._prefix(s, b, keys)) or 0

    def batch_exists_v2(
        self,
        keys: list[str],
        pool_transfers: list[PoolTransfer] | None = None,
        extra_info: HiCacheStorageExtraInfo | None = None,
    ) -> PoolTransferResult:
        """To how many pages all pools can be brought back: not the sum, for some need only the last pages."""
        pages = self._ask(self._kv, self._order, lambda s, b: self._prefix(s, b, keys))
        if pages is None:
            return PoolTransferResult.empty()
        hits = {PoolName.KV: pages}
        lengths = set(range(1, pages + 1))
        for transfer in pool_transfers or []:
            seconds = self._settings.call_seconds
            here = self._ask(
                self._pools.get(str(transfer.name)),
                "pieces",
                lambda s, b: held(self._link, s, b, keys[:pages], seconds=seconds, peers=self._settings.peers),
            )
            good = _restorable(transfer, here or [False] * pages)
            hits[transfer.name] = max(good, default=0)
            lengths &= good
        return PoolTransferResult(max(lengths, default=0), hits, sorted(lengths))

    # Housekeeping

    def clear(self) -> None:
        """Begins anew: what was stored until now is not found any more by this engine. Its room comes back as new blocks
        need it, or at once with ``kvctl purge``."""
        self._cleared += 1
        logger.info("kvd: cleared; pages stored before are not used by this engine")

    def get_stats(self) -> StorageMetrics | None:
        """Pages and GB/s of each call since the last time, if SGLang wants them."""
        if not self._config.enable_storage_metrics:
            return None
        with self._lock:
            stats, self._stats = self._stats, StorageMetrics()
        return stats

    def close(self) -> None:
        """From now on nothing is there."""
        self._closed = True

    # Transfers

    def _transfer(self, how: Callable[..., list[bool]], transfer: PoolTransfer) -> list[bool]:
        keys = transfer.keys or []
        pool = self._pools.get(str(transfer.name))
        return how(pool, "pieces", keys, lambda known: _pages(known, keys, transfer.host_indices))

    def _read(
        self, pool: _Pool | None, order: _Order, keys: list[str], pages: Callable[[_Pool], list[_Pieces]]
    ) -> list[bool]:
        """Which pages were found, checked and copied."""

        def some(session: kvd.Session, binding: kvd.Binding, keys: list[str], pages: list[_Pieces]) -> list[bool]:
            blocks = checked(session, binding, keys, logger)
            for block, pieces in zip(blocks, pages, strict=True):
                if block is not None:
                    with block:
                        _scatter(block, pieces)
            return [block is not None for block in blocks]

        return self._batches(pool, order, keys, pages, some, self._stats_of_reads)

    def _write(
        self, pool: _Pool | None, order: _Order, keys: list[str], pages: Callable[[_Pool], list[_Pieces]]
    ) -> list[bool]:
        """Which pages are stored, or about to be by somebody else."""

        def some(session: kvd.Session, binding: kvd.Binding, keys: list[str], pages: list[_Pieces]) -> list[bool]:
            for key, pieces in zip(keys, pages, strict=True):
                if (room := session.reserve(binding, key)) is not None:
                    with room:
                        _gather(pieces, room)
                        room.commit()
            return [True] * len(keys)

        return self._batches(pool, order, keys, pages, some, self._stats_of_writes)

    def _batches(
        self,
        pool: _Pool | None,
        order: _Order,
        keys: list[str],
        pages: Callable[[_Pool], list[_Pieces]],
        some: Callable[[kvd.Session, kvd.Binding, list[str], list[_Pieces]], list[bool]],
        count: Callable[[int, float], None],
    ) -> list[bool]:
        """Does ``some`` for so many pages at a time as may be open at once, until one batch has no answer."""
        begun, done = time.perf_counter(), list[bool]()
        if pool is not None and keys:
            try:
                where = pages(pool)
                step = max(1, BATCH_BYTES // pool.page_bytes)
                while len(done) < len(keys) and time.perf_counter() - begun < self._settings.call_seconds:
                    batch = slice(len(done), len(done) + step)
                    answer = self._ask(pool, order, lambda s, b: some(s, b, keys[batch], where[batch]))
                    if answer is None:
                        break
                    done += answer
                count(sum(done), sum(done) * pool.page_bytes / (time.perf_counter() - begun) / 1e9)
            except ValueError as error:
                logger.error("kvd: SGLang asks for what is not there: %s", error)
        return done + [False] * (len(keys) - len(done))

    def _ask(
        self, pool: _Pool | None, order: _Order, what: Callable[[kvd.Session, kvd.Binding], T]
    ) -> T | None:
        """What the daemon says of pages of a pool; ``None`` when it says nothing."""
        if pool is None or self._closed:
            return None
        try:
            scope = {**pool.scope, "layout": f"{pool.scope['layout']},{order}"}
            scope["weights"] += self._life()
            return self._link.ask(lambda s: what(s, self._link.binding(s, scope, pool.page_bytes, pool.part)))
        except Exception:
            logger.exception("kvd: a defect of the store; the engine goes on without it. Please report it")
            return None

    def _prefix(self, session: kvd.Session, binding: kvd.Binding, keys: Sequence[str]) -> int:
        found = 0
        while found < len(keys):
            asked = keys[found : found + PREFIX]
            prefix = session.lookup(binding, asked).prefix
            found += prefix
            if prefix < len(asked):
                break
        if self._settings.peers:
            for one in self._link.sightings(session, binding, keys[found:]):
                if one.tier is None:
                    break
                found += 1
        return found

    def _stats_of_reads(self, pages: int, gigabytes_per_second: float) -> None:
        if pages and self._config.enable_storage_metrics:
            with self._lock:
                self._stats.prefetch_pgs.append(pages)
                self._stats.prefetch_bandwidth.append(gigabytes_per_second)

    def _stats_of_writes(self, pages: int, gigabytes_per_second: float) -> None:
        if pages and self._config.enable_storage_metrics:
            with self._lock:
                self._stats.backup_pgs.append(pages)
                self._stats.backup_bandwidth.append(gigabytes_per_second)

    # Names

    def _life(self) -> str:
        """Tells weights apart that were exchanged while the engine ran, and what was stored before it was cleared."""
        version = _weight_version()
        life = f"+{version}" if version else ""
        return f"{life}+{_launch()}.{self._cleared}" if self._cleared else life

    def _described(self, host: Any, name: str) -> _Pool:
        """Raises ``ValueError`` that names what is not supported."""
        config, kind, layout = self._config, type(host).__name__, host.layout
        if layout not in POOLS.get(kind, {layout}):
            raise _unsupported(f"layout {layout!r} of {kind}", f"{', '.join(sorted(POOLS[kind]))} are")
        if kind not in POOLS:
            raise _unsupported(f"the pool {name!r}, a {kind}", f"{', '.join(POOLS)} are")
        for flag in ("_layer_shard_enabled", "_is_dummy", "slot_state_device_tensors"):
            if getattr(host, flag, False):
                raise _unsupported(f"{flag} = {getattr(host, flag)} of the pool {name!r}", "pools without it are")
        for info in getattr(host, "_buffer_infos", ()):
            if info.scales is not None or info.buffers.layout.value != "nhd":
                raise _unsupported(f"layout {info.buffers.layout.value!r} or scales of the pool {name!r}", "nhd is")
        _, sizes = host.get_page_buffer_meta(torch.arange(host.page_size))
        replicated = config.is_mla_model and kind in ("MLATokenToKVPoolHost", "DSAIndexerPoolHost")
        layers = int(getattr(host, "layer_num", None) or host.num_mamba_layers)
        # Heads of the K and V tensors where there are some, else one for each rank.
        heads = host.head_num if kind == "MHATokenToKVPoolHost" else 1
        rank, ranks = (0, 1) if replicated else (config.tp_rank, config.tp_size)
        told = {
            "pool": name,
            "tag": host.storage_format_tag,
            "sizes": sizes,
            "pp": (config.pp_rank, config.pp_size),
            "cp": (config.attn_cp_rank, config.attn_cp_size),
            **{field: getattr(host, field, None) for field in ("start_layer", "end_layer", "target_layer_num")},
            **{field: getattr(host, field, None) for field in ("head_num", "head_dim", "v_head_dim", "kv_cache_dim")},
            **{field: str(getattr(host, field, None)) for field in ("indexer_dtype", "temporal_dtype", "conv_dtype")},
        }
        digest = hashlib.blake2b(repr(told).encode(), digest_size=16).hexdigest()
        attention = "mla" if kind == "MLATokenToKVPoolHost" else "full"
        scope = {
            **self._identity,
            "tenant": self._settings.tenant,
            # Hashes are of pages of the KV pool, whatever a pool keeps for each.
            "block_tokens": self._kv.host.page_size if self._kv is not None else host.page_size,
            "dtype": _dtype(host, name),
            "attention": attention if name == PoolName.KV else f"pool:{name}",
            "layout": f"sglang-1,{kind},{layout};parts={digest}",
        }
        kvd.Scope(**scope)  # refuses what cannot be a name, now and not at the first call
        part = (layers, heads * ranks, heads * rank, heads * (rank + 1))
        return _Pool(host, name, scope, part, page_slots=host.page_size, page_bytes=sum(sizes))


def _pages(pool: _Pool, keys: list[str], host_indices: torch.Tensor | None) -> list[_Pieces]:
    """Where the pages are that ``host_indices`` (``[keys * page_slots]``) say, in order."""
    count = 0 if host_indices is None else len(host_indices)
    if count != len(keys) * pool.page_slots:
        raise ValueError(f"{count} indices for {len(keys)} pages of {pool.page_slots} in the pool {pool.name!r}")
    addresses, sizes = pool.host.get_page_buffer_meta(host_indices)
    each, rest = divmod(len(addresses), len(keys))
    pages = [list(zip(addresses[at : at + each], sizes[at : at + each], strict=True)) for at in range(0, len(addresses), each)]
    if rest or any(sum(size for _, size in pieces) != pool.page_bytes for pieces in pages):
        raise ValueError(f"the pool {pool.name!r} has pages of other sizes than when it was registered")
    return pages


def _tensor(pool: _Pool, tensor: Any) -> _Pieces:
    """Where the one page in ``tensor`` is."""
    if not isinstance(tensor, torch.Tensor) or not tensor.is_contiguous() or tensor.device.type != "cpu":
        raise ValueError(f"{type(tensor).__name__} is no contiguous tensor in host memory")
    if tensor.nbytes != pool.page_bytes:
        raise ValueError(f"a tensor of {tensor.nbytes} bytes for a page of {pool.page_bytes}")
    return [(tensor.data_ptr(), tensor.nbytes)]


def _scatter(block: kvd.Block, pieces: _Pieces) -> None:
    source = np.frombuffer(memoryview(block), np.uint8).ctypes.data
    for address, size in pieces:
        # Other threads run meanwhile.
        ctypes.memmove(address, source, size)
        source += size


def _gather(pieces: _Pieces, room: kvd.Reservation) -> None:
    target = np.frombuffer(memoryview(room), np.uint8).ctypes.data
    for address, size in pieces:
        ctypes.memmove(target, address, size)
        target += size


def _restorable(transfer: PoolTransfer, here: list[bool]) -> "set[int]":
    """The numbers of pages to which a pool can be brought back, given which of its pages are there."""
    lengths = range(1, len(here) + 1)
    if transfer.hit_policy == PoolHitPolicy.ALL_PAGES:
        return {length for length in lengths if all(here[:length])}
    if transfer.hit_policy == PoolHitPolicy.TRAILING_PAGES:
        last = max(1, len(transfer.keys or ()))
        return {length for length in lengths if all(here[max(0, length - last) : length])}
    return {*()}


def _server() -> Any:
    """SGLang's arguments, where there is a server."""
    try:
        return get_server_args()
    except ValueError:
        return None


def _weight_version() -> str:
    """What those who exchange weights in a running engine call them; empty until then."""
    try:
        version = get_serving().weight_version
    except ValueError:
        return ""
    return "" if version in (None, "default") else str(version)


def _launch() -> str:
    """Names this launch of the engine: the same in all ranks of a node, which are children of one process, and never
    the same again."""
    parent = os.getppid()
    started = Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2].split()[19]
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}.{parent}.{started}"


def _identity(config: HiCacheStorageConfig, chosen: Settings) -> dict[str, Any]:
    """Model and weights, as arguments of :class:`kvd.Scope`."""
    server = _server()
    model = chosen.model or (model_name(server.model_path) if server else config.model_name)
    if not model:
        raise ValueError("extra config: 'model' is needed: SGLang does not say what the model is called")
    weights = chosen.weights
    if not weights and server and (has_weights(server.model_path) or not os.path.isdir(server.model_path)):
        weights = weights_of(server.model_path, server.revision)
    if not weights:
        raise ValueError(
            "extra config: 'weights' is needed: SGLang was given no directory with weights and no --revision, so nothing "
            "says which weights it has loaded; name the revision"
        )
    return {"model": model, "weights": weights + (_altered(server) if server else "")}


def _altered(server: Any) -> str:
    """What else decides about the bytes: arguments that change the model, and the model that drafts."""
    told: dict[str, Any] = {}
    usual = {"json_model_override_args": "{}", "dtype": "auto", "quantization": None, "quantization_param_path": None}
    for field, value in ((field, getattr(server, field)) for field in usual):
        if value not in (usual[field], None):
            told[field] = value
    if told.get("quantization_param_path"):
        told["scales"] = hashlib.blake2b(Path(server.quantization_param_path).read_bytes()).hexdigest()
    if draft := server.speculative_draft_model_path:
        told["draft"] = (model_name(draft), weights_of(draft, server.speculative_draft_model_revision))
    return "+" + hashlib.blake2b(repr(told).encode(), digest_size=8).hexdigest() if told else ""


def _dtype(host: Any, name: str) -> str:
    if host.dtype in DTYPES:
        return str(host.dtype).removeprefix("torch.")
    server = _server()
    if host.dtype != torch.uint8 or server is None:
        raise _unsupported(f"dtype {host.dtype} of the pool {name!r}", f"{sorted(map(str, DTYPES))} and fp8 are")
    # SGLang keeps both kinds of fp8 as bytes, and AMD's are not NVIDIA's.
    return f"{server.kv_cache_dtype}{'-fnuz' if torch.version.hip else ''}"


def _unsupported(what: str, instead: str) -> ValueError:
    return ValueError(f"kvd.sglang does not support {what}: {instead}")
