"""vLLM's own offloading on kvd: a second tier behind the host memory of ``OffloadingConnector``.

vLLM copies blocks from the GPU to host memory itself; this tier keeps what is there in the node's daemon, where other
engines find it and where it outlives them. It is written against ``SecondaryTierManager`` of vLLM 0.32, and turned on in
``kv_connector_extra_config`` of the connector::

    "secondary_tiers": [{"type": "KvdTier", "module_path": "kvd.vllm_tier"}]

Further keys of that entry are the fields of :class:`Settings`.

vLLM's host memory is one shared mapping of rows. A row is one chunk, ``blocks_per_chunk`` blocks of the GPU with the
pages of all workers one after another, and becomes one block of kvd, padding included::

    row:  | worker 0: tensor 0, tensor 1, ... | worker 1: ... | padding to 4 KiB |

The bytes are never looked into. So the scope of a block says everything that their order depends on: the layout, the
sizes of all axes of parallelism, the layers of all groups, and the version of vLLM.

All calls come from vLLM's scheduler, which must not wait. They only hand over to threads and pick up what has ended:
one thread answers whether chunks are there, a few copy. While the daemon is away, jobs fail and lookups are misses.
"""

import hashlib
import logging
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import vllm
from vllm.config.cache import CacheDType
from vllm.platforms import current_platform
from vllm.v1.kv_cache_layout import KVCacheLayout
from vllm.v1.kv_offload.base import (
    Locality,
    LookupResult,
    OffloadKey,
    ReqContext,
    RequestOffloadingContext,
    ScheduleEndContext,
    get_offload_block_hash,
    get_offload_group_idx,
)
from vllm.v1.kv_offload.tiering.async_lookup import AsyncLookupManager
from vllm.v1.kv_offload.tiering.base import JobResult, SecondaryTierManager, TransferJob

import kvd
from kvd._engine import (
    STAGING_BYTES,
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

if TYPE_CHECKING:
    from vllm.v1.kv_offload.base import OffloadingSpec
    from vllm.v1.kv_offload.tiering.backpressure import BackpressureDetector

__all__ = ["KvdTier", "Settings"]

logger = logging.getLogger("vllm.kvd")

VERSION = "0.32"
"""The minor version of vLLM whose order of bytes this is."""
DTYPES = {"float16", "bfloat16", "float32", *get_args(CacheDType)} - {"auto"}
BATCH_BYTES = 32 << 20
"""What a job has open, or under way, at once; at least one row."""


@dataclass(frozen=True)
class Settings:
    """What an entry of ``secondary_tiers`` may say besides ``type``, ``module_path`` and ``backpressure``."""

    socket: str = text(most=4096)
    """Where the daemon is; see :func:`kvd.connect`. Empty: the default of this node."""
    tenant: str = text("default", form=TENANT)
    """Who pays for the blocks: ``[a-z0-9-]{1,63}``."""
    model: str = text()
    """What the model is called in names of blocks. Empty: as vLLM calls it, a directory by its last part."""
    weights: str = text(most=WEIGHTS_BYTES)
    """Revision of the weights, and of adapters if there are any. Empty: a digest of the model's directory. Must be given
    when the model is no directory: vLLM does not tell the tier which revision it has loaded."""
    deadline: float = number(1.0, least=0.001, most=WAIT_SECONDS)
    """Seconds that one call to the daemon may take."""
    job_seconds: float = number(10.0, least=0.001, most=WAIT_SECONDS)
    """Seconds that a job may take; what it has not copied by then has failed."""
    threads: int = number(2, least=1, most=64)
    """Threads that load, and as many that store."""
    staging_bytes: int = number(64 << 20, least=1, most=STAGING_BYTES)
    """What may be on its way into the daemon at once; four rows at least."""
    peers: bool = True
    """Whether chunks count that only peers of the daemon or its object store have. A load fetches them, within
    ``deadline``."""


@dataclass
class _Job:
    job: TransferJob
    future: "Future[list[OffloadKey]]"
    """The keys that were copied."""
    begun: float


class KvdTier(SecondaryTierManager):
    """See the top of the file. Raises ``ValueError`` when vLLM starts with what is not supported, naming it."""

    medium = None
    """Host memory, disk and beyond: which of them a chunk comes from is the daemon's business."""

    def __init__(
        self,
        offloading_spec: "OffloadingSpec",
        primary_kv_view: memoryview,
        tier_type: str,
        backpressure_detector: "BackpressureDetector | None" = None,
        **tier_config: Any,
    ):
        """``primary_kv_view``: vLLM's host memory, ``[chunk, byte]``."""
        super().__init__(offloading_spec, primary_kv_view, tier_type, backpressure_detector)
        self.locality = Locality.LOCAL
        chosen = settings(Settings, tier_config, "secondary_tiers")
        self._settings = chosen
        self._scopes = _scopes(offloading_spec, chosen)
        self._life = ""
        # The memory itself, not a copy of it.
        rows = np.asarray(primary_kv_view)
        if rows.ndim != 2 or not rows.flags.c_contiguous or not rows.flags.writeable:
            raise _unsupported(f"primary_kv_view of shape {rows.shape}, strides {rows.strides}", "writable rows are")
        self._rows: np.ndarray[Any, np.dtype[np.uint8]] | None = rows.view(np.uint8)
        self._row_bytes = self._rows.shape[1]
        self._link = Link(
            f"vllm {next(iter(self._scopes.values()))['model']} tier",
            endpoint=chosen.socket or None,
            deadline=chosen.deadline,
            log=logger,
            staging_bytes=max(chosen.staging_bytes, 4 * self._row_bytes),
        )
        self._batch = max(1, min(BATCH_BYTES, chosen.staging_bytes // 2) // self._row_bytes)
        self._lookups = _Lookups(tier_type, self._held)
        self._loaders = ThreadPoolExecutor(chosen.threads, "kvd-load")
        self._storers = ThreadPoolExecutor(chosen.threads, "kvd-store")
        self._jobs: dict[int, _Job] = {}

    # vLLM's calls

    def on_new_request(self, req_context: ReqContext) -> RequestOffloadingContext:
        return RequestOffloadingContext()

    def lookup(self, key: OffloadKey, req_context: ReqContext) -> LookupResult:
        """``RETRY`` until a thread has asked the daemon."""
        if (found := self._lookups.lookup(key, req_context)) is None:
            return LookupResult.RETRY
        return LookupResult.HIT if found else LookupResult.MISS

    def on_schedule_end(self, context: ScheduleEndContext) -> None:
        self._lookups.flush()

    def on_request_finished(self, req_context: ReqContext) -> None:
        self._lookups.cleanup(req_context.req_id)

    def submit_load(self, job_metadata: TransferJob) -> None:
        self._submit(self._loaders, self._load_batch, job_metadata)

    def submit_store(self, job_metadata: TransferJob) -> None:
        self._submit(self._storers, self._store_batch, job_metadata)

    def get_finished_jobs(self) -> Iterable[JobResult]:
        """Jobs that have ended since the last call. Of a load that failed in part, which keys are good."""
        ended = [one for one in self._jobs.values() if one.future.done()]
        return [self._result(one) for one in ended]

    def drain_jobs(self) -> None:
        """Ends all jobs: those under way are waited for, the others fail.

        vLLM calls this before it empties its caches because the weights may have been exchanged. What was stored until
        now was computed with the old ones, and has the same hashes; so it is not found any more by this engine.
        """
        futures = [one.future for one in self._jobs.values()]
        for future in futures:
            future.cancel()
        wait(futures)
        self._life = f"+{time.time_ns():x}"
        logger.info("kvd: a new life begins; chunks stored before it are not used by this engine")

    def shutdown(self) -> None:
        """Ends the threads and lets go of vLLM's memory."""
        for pool in (self._loaders, self._storers):
            pool.shutdown(wait=True, cancel_futures=True)
        self._lookups.shutdown()
        self._rows = None

    # Jobs

    def _submit(
        self,
        pool: ThreadPoolExecutor,
        copy: Callable[[kvd.Session, kvd.Binding, list[tuple[OffloadKey, int]]], list[OffloadKey]],
        job: TransferJob,
    ) -> None:
        future = pool.submit(self._run, copy, job, self._life)
        self._jobs[job.job_id] = _Job(job, future, time.monotonic())

    def _run(
        self,
        copy: Callable[[kvd.Session, kvd.Binding, list[tuple[OffloadKey, int]]], list[OffloadKey]],
        job: TransferJob,
        life: str,
    ) -> list[OffloadKey]:
        """On a thread: copies a job batch by batch; the keys that were copied."""
        until = time.monotonic() + self._settings.job_seconds
        done: list[OffloadKey] = []
        try:
            for group, pairs in _by_group(job).items():
                for at in range(0, len(pairs), self._batch):
                    batch = pairs[at : at + self._batch]
                    if time.monotonic() > until:
                        return done
                    done += self._link.ask(lambda s: copy(s, self._binding(s, group, life), batch)) or []
        except Exception:
            logger.exception("kvd: a defect of the tier; the engine goes on without it. Please report it")
        return done

    def _result(self, one: _Job) -> JobResult:
        del self._jobs[one.job.job_id]
        done = [] if one.future.cancelled() else one.future.result()
        success = len(done) == len(one.job.keys)
        if one.job.is_promotion and not success:
            # Else vLLM would look, find and fail to load them again, for as long as the request lives.
            self._lookups.mark_miss(set(one.job.keys).difference(done))
        return JobResult(
            one.job.job_id,
            success,
            successful_keys=tuple(done) if one.job.is_promotion and not success else None,
            transfer_time=time.monotonic() - one.begun,
            transfer_bytes=len(done) * self._row_bytes,
        )

    def _load_batch(
        self, session: kvd.Session, binding: kvd.Binding, pairs: list[tuple[OffloadKey, int]]
    ) -> list[OffloadKey]:
        rows, loaded = self._memory(), []
        blocks = checked(session, binding, [get_offload_block_hash(key) for key, _ in pairs], logger)
        for (key, chunk), block in zip(pairs, blocks, strict=True):
            if block is not None:
                with block:
                    block.copy_into(rows[chunk])
                loaded.append(key)
        return loaded

    def _store_batch(
        self, session: kvd.Session, binding: kvd.Binding, pairs: list[tuple[OffloadKey, int]]
    ) -> list[OffloadKey]:
        rows = self._memory()
        answers = session.put_many(binding, [(get_offload_block_hash(key), rows[chunk]) for key, chunk in pairs])
        failed = [answer for answer in answers if isinstance(answer, Exception)]
        if failed and len(failed) == len(answers):
            raise failed[0]
        return [key for (key, _), answer in zip(pairs, answers, strict=True) if isinstance(answer, bool)]

    def _memory(self) -> "np.ndarray[Any, np.dtype[np.uint8]]":
        assert self._rows is not None, "vLLM submitted a job after shutdown"
        return self._rows

    # Names

    def _binding(self, session: kvd.Session, group: int, life: str) -> kvd.Binding:
        scope = self._scopes[group]
        scope = {**scope, "weights": scope["weights"] + life}
        return self._link.binding(session, scope, self._row_bytes, (1, 1, 0, 1))

    def _held(self, keys: list[OffloadKey]) -> list[bool]:
        """Which chunks the daemon, a peer of it or its object store has; on the thread of lookups."""
        life, found = self._life, dict.fromkeys(keys, False)
        by_group: dict[int, list[OffloadKey]] = {}
        for key in keys:
            by_group.setdefault(get_offload_group_idx(key), []).append(key)
        for group, some in by_group.items():
            names = [get_offload_block_hash(key) for key in some]
            seconds, peers = self._settings.deadline, self._settings.peers
            here = self._link.ask(
                lambda s: held(self._link, s, self._binding(s, group, life), names, seconds=seconds, peers=peers)
            )
            found.update(zip(some, here or [], strict=False))
        return [found[key] for key in keys]


class _Lookups(AsyncLookupManager):
    """vLLM's keeper of answers that are still to come, with our question."""

    def __init__(self, tier_type: str, held: Callable[[list[OffloadKey]], list[bool]]):
        # Before the thread starts, which asks.
        self._ask = held
        super().__init__(tier_type)

    def batch_lookup(self, keys: list[OffloadKey], req_context: ReqContext) -> Iterable[bool]:
        return self._ask(keys)


def _by_group(job: TransferJob) -> dict[int, list[tuple[OffloadKey, int]]]:
    """Keys and rows of a job, by the KV cache group of the keys."""
    groups: dict[int, list[tuple[OffloadKey, int]]] = {}
    for key, chunk in zip(job.keys, job.chunk_ids, strict=True):
        groups.setdefault(get_offload_group_idx(key), []).append((key, int(chunk)))
    return groups


def _scopes(spec: "OffloadingSpec", chosen: Settings) -> dict[int, dict[str, Any]]:
    """For each KV cache group the arguments of :class:`kvd.Scope`.

    Raises ``ValueError`` that names what is not supported.
    """
    version = vllm.__version__
    if version.split(".")[:2] != VERSION.split("."):
        raise _unsupported(f"vLLM {version}", f"{VERSION} is")
    config = spec.config
    if config.kv_cache_layout not in KVCacheLayout.__members__:
        raise _unsupported(f"kv_cache_layout = {config.kv_cache_layout!r}", f"{', '.join(KVCacheLayout.__members__)} are")
    if config.model.dtype not in DTYPES:
        raise _unsupported(f"dtype = {config.model.dtype!r}", f"{', '.join(sorted(DTYPES))} are")
    found = weights_of(config.model.name) if has_weights(config.model.name) else ""
    if not (weights := chosen.weights or found):
        raise ValueError(
            f"secondary_tiers: 'weights' is needed: vLLM was given {config.model.name!r}, which is no directory with "
            "weights, and does not say which revision of it was loaded; name the revision"
        )
    parallel = config.parallel
    sizes = [parallel.tp_size, parallel.pp_size, parallel.pcp_size, parallel.dcp_size]
    if config.canonical_layout and parallel.is_parallelism_agnostic:
        # vLLM checks in the workers that these bytes are the same however the model is split.
        order = "canonical"
    else:
        kind = "canonical" if config.canonical_layout else "replicated" if spec.replicated_layout else "direct"
        order = f"{kind},tp{sizes[0]},pp{sizes[1]},pcp{sizes[2]},dcp{sizes[3]}"
    chunk = config.cache.blocks_per_chunk
    # Groups share tensors, so where a layer lies in a row depends on all of them.
    told = [(group.group_id, group.tokens_per_block, group.layer_names) for group in config.groups]
    digest = hashlib.blake2b(repr((config.cache.tokens_per_hash, told)).encode(), digest_size=16).hexdigest()
    row = f"vllm-{VERSION}-row,{current_platform.device_name},{config.kv_cache_layout},{order}"
    scopes: dict[int, dict[str, Any]] = {
        group.group_id: {
            "model": chosen.model or model_name(config.model.name),
            "weights": weights,
            "tenant": chosen.tenant,
            "block_tokens": group.tokens_per_block * chunk,
            "dtype": config.model.dtype,
            "attention": f"group:{group.group_id}",
            "layout": f"{row},blocks{chunk};layers={digest}",
        }
        for group in config.groups
    }
    for scope in scopes.values():
        kvd.Scope(**scope)  # refuses what cannot be a name, now and not at the first job
    return scopes


def _unsupported(what: str, instead: str) -> ValueError:
    return ValueError(f"kvd.vllm_tier does not support {what}: {instead}")
