"""vLLM on kvd: prompts that any engine of the node, of its peers, or of nodes with the same object store has computed are
loaded instead of computed again.

One line turns it on::

    vllm serve MODEL --kv-transfer-config '{"kv_connector": "KvdConnector", "kv_connector_module_path": "kvd.vllm",
                                            "kv_role": "kv_both"}'

``kv_connector_extra_config`` takes the fields of :class:`Settings`. Written against ``KVConnectorBase_V1`` of vLLM 0.32.

The scheduler's half (``_scheduler.py``) looks a request's blocks up by vLLM's own hashes and promises only what it has
read and checked. The workers' half (``_worker.py``) copies, or has the daemon copy (``_device.py``). What goes wrong, from a
damaged block to a daemon that is away, ends in vLLM computing what it would have loaded; nothing here raises into the
engine after its start.
"""

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorTransferResults,
    SupportsHMA,
)
from vllm.distributed.parallel_state import get_tensor_model_parallel_rank
from vllm.logger import init_logger

import kvd
from kvd._engine import STAGING_BYTES, TENANT, WAIT_SECONDS, WEIGHTS_BYTES, Link, fits, number, settings, text
from kvd.vllm._identity import weights_named
from kvd.vllm._layout import check_backends, layout_of
from kvd.vllm._plan import Step
from kvd.vllm._scheduler import Events, Scheduler
from kvd.vllm._stats import PromStats, Stats
from kvd.vllm._worker import Worker

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.distributed.kv_events import KVCacheEvent
    from vllm.forward_context import ForwardContext
    from vllm.v1.attention.backend import AttentionMetadata
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.metrics.cache_hit_source import CacheHitSource
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

__all__ = ["KvdConnector", "Settings"]

logger = init_logger("vllm.kvd")

EXTRA = "kv_connector_extra_config"

T = TypeVar("T")


@dataclass(frozen=True)
class Settings:
    """``kv_connector_extra_config``."""

    socket: str = text(most=4096)
    """Where the daemon is; see :func:`kvd.connect`. Empty: the default of this node."""
    tenant: str = text("default", form=TENANT)
    """Who pays for the blocks: ``[a-z0-9-]{1,63}``."""
    model: str = text()
    """What the model is called in names of blocks. Empty: as vLLM calls it, a directory by its last part."""
    weights: str = text(most=WEIGHTS_BYTES)
    """Which weights these are, in names of blocks. Empty: a digest of the files, or the revision."""
    deadline: float = number(1.0, least=0.001, most=WAIT_SECONDS)
    """Seconds that one call to the daemon may take."""
    wait: float = number(2.0, least=0.0, most=WAIT_SECONDS)
    """Seconds that a request waits for blocks which another engine has announced and not yet stored."""
    request_wait_max: float = number(60.0, least=0.0, most=WAIT_SECONDS)
    """Seconds that a request may say it waits for blocks which nobody has announced."""
    match_seconds: float = number(2.0, least=0.001, most=WAIT_SECONDS)
    """Seconds in which the blocks of a request must have been brought up and checked; what is not is computed."""
    peer_seconds: float = number(2.0, least=0.0, most=WAIT_SECONDS)
    """Seconds in which blocks that other nodes or the object store have must have been found and fetched; what has not come
    is computed. 0: neither is asked. Where the daemon has no peers and no object store, nobody is."""
    load_seconds: float = number(5.0, least=0.001, most=WAIT_SECONDS)
    """Seconds in which a rank must have opened the blocks that a request was promised."""
    staging_bytes: int = number(64 << 20, least=1, most=STAGING_BYTES)
    """What a rank may have announced and not yet stored."""
    layerwise: bool = True
    """Load each layer while those before it are computed, once vLLM was seen to ask for each."""
    device_copies: bool = False
    """Have the daemon copy between its tiers and the KV cache in a GPU's memory. Where it cannot, ranks do. Blocks have names
    of their own with it."""
    store_seconds: float = number(10.0, least=0.001, most=WAIT_SECONDS)
    """With ``device_copies``: seconds in which the blocks of a step must have been computed and stored; the others are not
    stored. The next step waits for that."""


def _harmless(otherwise: Callable[[], Any]) -> Callable[[Callable[..., T]], Callable[..., T]]:
    """What goes wrong in our code is in the log, and the engine goes on with ``otherwise``."""

    def decorate(call: Callable[..., T]) -> Callable[..., T]:
        @functools.wraps(call)
        def harmless(*arguments: Any, **named: Any) -> T:
            try:
                return call(*arguments, **named)
            except Exception:
                logger.exception("kvd: a defect of the connector; the engine goes on without it. Please report it")
                return otherwise()  # type: ignore[no-any-return]

        return harmless

    return decorate


_nothing = _harmless(lambda: None)


def _device_copies(chosen: Settings, config: "VllmConfig") -> bool:
    if chosen.device_copies and config.model_config.enable_sleep_mode:
        # An engine that wakes up has other memory at the same addresses, and nobody tells us.
        logger.warning("kvd: with enable_sleep_mode the daemon cannot copy to and from pages; the ranks copy by themselves")
        return False
    return chosen.device_copies


class KvdConnector(KVConnectorBase_V1, SupportsHMA):
    """See the top of the file. Raises ``ValueError`` when the engine starts with what is not supported, naming it."""

    def __init__(self, vllm_config: "VllmConfig", role: KVConnectorRole, kv_cache_config: "KVCacheConfig"):
        super().__init__(vllm_config, role, kv_cache_config)
        transfer = vllm_config.kv_transfer_config
        assert transfer is not None, "vLLM made a connector without a configuration for it"
        chosen = settings(Settings, transfer.kv_connector_extra_config, EXTRA)
        layout = layout_of(vllm_config, kv_cache_config, chosen.model, by_axes=chosen.device_copies)
        # vLLM's default is to fail the request; a cache must not do that.
        transfer.kv_load_failure_policy = "recompute"
        rank = get_tensor_model_parallel_rank() if role == KVConnectorRole.WORKER else 0
        what = "scheduler" if role == KVConnectorRole.SCHEDULER else f"rank {rank}"
        link = Link(
            f"vllm {layout.model} {what}",
            endpoint=chosen.socket or None,
            deadline=chosen.deadline,
            log=logger,
            staging_bytes=chosen.staging_bytes if role == KVConnectorRole.WORKER else None,
        )
        for group in layout.groups:
            kvd.Scope(**layout.scope(group, chosen.tenant, ""))  # refuses what cannot be a name, now and not at a request
            if transfer.is_kv_producer:
                fits(chosen.staging_bytes, group.block_bytes, f"a block of group {group.index}", EXTRA)
        self._config = vllm_config
        self._scheduler: Scheduler | None = None
        self._worker: Worker | None = None
        if role == KVConnectorRole.SCHEDULER:
            wants_events = vllm_config.kv_events_config and vllm_config.kv_events_config.enable_kv_cache_events
            self._scheduler = Scheduler(
                link,
                layout,
                chosen.tenant,
                weights_named(vllm_config, chosen.weights),
                wait=chosen.wait,
                match_seconds=chosen.match_seconds,
                peer_seconds=chosen.peer_seconds,
                request_wait_max=chosen.request_wait_max,
                loads=transfer.is_kv_consumer,
                stores=transfer.is_kv_producer,
                events=Events(link, layout, chosen.tenant) if wants_events else None,
            )
        else:
            self._worker = Worker(
                link,
                layout,
                chosen.tenant,
                rank,
                layerwise=chosen.layerwise,
                load_seconds=chosen.load_seconds,
                staging_bytes=chosen.staging_bytes,
                store_seconds=chosen.store_seconds if _device_copies(chosen, vllm_config) else None,
            )

    # What vLLM asks before it starts

    @property
    def requires_kv_delivery(self) -> bool:
        """A block that was not stored is a miss, no more."""
        return False

    @classmethod
    def requires_piecewise_for_cudagraph(cls, extra_config: dict[str, Any]) -> bool:
        """Captured graphs do not call the hooks of layers."""
        return settings(Settings, extra_config, EXTRA).layerwise

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> Stats:
        return Stats(data)

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: "VllmConfig",
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> PromStats:
        return PromStats(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    # Scheduler

    @_nothing
    def on_new_request(self, request: "Request") -> None:
        self._there(self._scheduler).begin(request)

    @_harmless(lambda: (0, False))
    def get_num_new_matched_tokens(self, request: "Request", num_computed_tokens: int) -> tuple[int | None, bool]:
        scheduler = self._there(self._scheduler)
        tokens = scheduler.matched(request, num_computed_tokens)
        return tokens, bool(tokens) and scheduler.waits_for_loads

    @_harmless(dict)
    def get_external_cache_hit_sources(
        self, request: "Request", num_external_tokens: int
    ) -> "dict[CacheHitSource, int]":
        return self._there(self._scheduler).sources(request, num_external_tokens)

    def update_state_after_alloc(self, request: "Request", blocks: "KVCacheBlocks", num_external_tokens: int) -> None:
        # Not harmless: vLLM counts on the load from here on, and must not go on without it.
        self._there(self._scheduler).allocated(request, blocks, num_external_tokens)

    def build_connector_meta(self, scheduler_output: "SchedulerOutput") -> Step:
        # As above.
        return self._there(self._scheduler).step(scheduler_output)

    @_nothing
    def update_connector_output(self, connector_output: "KVConnectorOutput") -> None:
        failed = connector_output.failed_recving or ()
        self._there(self._scheduler).failed(failed, bool(connector_output.invalid_block_ids))

    def request_finished(self, request: "Request", block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        return self.request_finished_all_groups(request, (block_ids,))

    @_harmless(lambda: (False, None))
    def request_finished_all_groups(
        self, request: "Request", block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        self._there(self._scheduler).end(request)
        return False, None

    @_harmless(tuple)
    def take_events(self) -> "Iterable[KVCacheEvent]":
        events = self._there(self._scheduler).events
        return () if events is None else events.take()

    @_harmless(lambda: False)
    def reset_cache(self) -> bool:
        self._there(self._scheduler).forget()
        return True

    # Worker

    def register_kv_caches(self, kv_caches: "dict[str, torch.Tensor]") -> None:
        worker = self._there(self._worker)
        check_backends(self._config, worker.layout)
        worker.register(kv_caches)

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        super().bind_connector_metadata(connector_metadata)
        self._begin()

    @_nothing
    def _begin(self) -> None:
        self._there(self._worker).begin(self._step())

    def start_load_kv(self, forward_context: "ForwardContext", **kwargs: Any) -> None:
        worker, step = self._there(self._worker), self._step()
        try:
            worker.load(step)
        except Exception:
            worker.fail(step)

    def wait_for_layer_load(self, layer_name: str) -> None:
        self._there(self._worker).before_layer(layer_name)

    @_nothing
    def save_kv_layer(
        self, layer_name: str, kv_layer: "torch.Tensor", attn_metadata: "AttentionMetadata", **kwargs: Any
    ) -> None:
        self._there(self._worker).after_layer(layer_name)

    @_nothing
    def wait_for_save(self) -> None:
        self._there(self._worker).end()

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        received, failed = self._there(self._worker).take_received()
        return KVConnectorTransferResults(finished_recving=received, failed_recving=failed)

    def get_block_ids_with_load_errors(self) -> set[int]:
        return self._there(self._worker).take_bad_blocks()

    # Both

    @_nothing
    def get_kv_connector_stats(self) -> Stats | None:
        return self._worker.take_stats() if self._worker is not None else self._there(self._scheduler).stats.take()

    @_nothing
    def shutdown(self) -> None:
        if self._worker is not None:
            self._worker.close()
        if self._scheduler is not None:
            self._scheduler.close()

    def _step(self) -> Step:
        step: KVConnectorMetadata | None = self._connector_metadata
        assert isinstance(step, Step)
        return step

    def _there(self, half: T | None) -> T:
        assert half is not None, "vLLM asked the other half of the connector"
        return half
