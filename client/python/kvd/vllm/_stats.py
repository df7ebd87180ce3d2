"""What the connector did, through vLLM's own hooks: a line in the engine's log, and counters at ``/metrics``."""

from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

if TYPE_CHECKING:
    from vllm.config import VllmConfig

COUNTERS = {
    "lookups": "requests looked up in kvd",
    "hit_tokens": "prompt tokens promised to vLLM",
    "peer_blocks": "blocks that were fetched from another node for such a promise",
    "object_blocks": "blocks that were fetched from the object store for it",
    "loaded_blocks": "blocks copied into the KV cache of a rank",
    "loaded_bytes": "their bytes",
    "load_seconds": "time to copy them",
    "failed_blocks": "blocks that were promised and could not be loaded, and were computed",
    "damaged_blocks": "blocks whose checksum did not fit, and were evicted",
    "stored_blocks": "blocks stored by a rank",
    "stored_bytes": "their bytes",
    "store_seconds": "time to copy and hand them over",
    "unstored_blocks": "blocks that kvd did not take: it was away, or full",
}
"""Everything counted since the last report."""


class Stats(KVConnectorStats):
    """Counters by name; see :data:`COUNTERS`."""

    data: dict[str, Any]

    def __init__(self, data: dict[str, Any] | None = None):
        super().__init__(data=dict(data or {}))

    def add(self, name: str, more: float = 1) -> None:
        assert name in COUNTERS
        self.data[name] = self.data.get(name, 0) + more

    def reset(self) -> None:
        self.data.clear()

    def take(self) -> "Stats | None":
        """What was counted since the last call."""
        taken, self.data = self.data, {}
        return Stats(taken) if taken else None

    def aggregate(self, other: KVConnectorStats) -> "Stats":
        for name, more in other.data.items():
            self.data[name] = self.data.get(name, 0) + more
        return self

    def reduce(self) -> dict[str, int | float]:
        return {name: round(count, 6) for name, count in self.data.items()}

    def is_empty(self) -> bool:
        return not self.data


class PromStats(KVConnectorPromMetrics):
    """``vllm:kvd_loaded_blocks_total`` and so on."""

    def __init__(
        self,
        vllm_config: "VllmConfig",
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ):
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self._counters: dict[tuple[int, str], Any] = {}
        for name, text in COUNTERS.items():
            counter = self._counter_cls(name=f"vllm:kvd_{name}", documentation=f"kvd: {text}.", labelnames=labelnames)
            for engine, values in per_engine_labelvalues.items():
                self._counters[engine, name] = counter.labels(*values)

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        for name, more in transfer_stats_data.items():
            if (counter := self._counters.get((engine_idx, name))) is not None:
                counter.inc(more)
