"""The tier under vLLM's own tiering manager, over vLLM's own shared memory; only the GPU's side is played here."""

import itertools
import random
import threading
import uuid

import pytest

import kvd
from conftest import soon

pytest.importorskip("vllm", reason="vLLM is not installed here; engines/install-vllm makes an environment that has it")

import numpy as np
from vllm.v1.kv_offload.base import LookupResult, ReqContext, ScheduleEndContext, get_offload_block_hash, make_offload_key
from vllm.v1.kv_offload.config import (
    OffloadingCacheConfig,
    OffloadingConfig,
    OffloadingGroupConfig,
    OffloadingModelConfig,
    OffloadingParallelConfig,
)
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion
from vllm.v1.kv_offload.tiering.base import TransferJob
from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec

from kvd import _engine
from kvd.vllm_tier import KvdTier

WORKERS = 2
WORKER_BYTES = 6000
"""Bytes of a chunk in one worker; two of them are padded to three pages."""
ROW_BYTES = 3 * 4096


def config(daemon, *, chunks=64, tier=None, parallel=None, model="m", **changed) -> OffloadingConfig:
    entry = {"type": "KvdTier", "module_path": "kvd.vllm_tier", "socket": str(daemon.run), "weights": "r1"}
    fields = {
        "groups": (OffloadingGroupConfig(tokens_per_block=16, layer_names=("layer.0", "layer.1"), group_id=0),),
        "worker_kv_bytes_per_block": WORKER_BYTES // 2,
        "enable_kv_cache_events": False,
        "extra_config": {"cpu_bytes_to_use": chunks * ROW_BYTES, "secondary_tiers": [{**entry, **(tier or {})}]},
        "engine_id": f"kvd-test-{uuid.uuid4().hex}",
        "model": OffloadingModelConfig(name=model, dtype="bfloat16"),
        "cache": OffloadingCacheConfig(tokens_per_hash=16, blocks_per_chunk=2),
        "parallel": OffloadingParallelConfig(
            **{
                "rank": 0,
                "world_size": WORKERS,
                "tp_size": WORKERS,
                "pp_size": 1,
                "pcp_size": 1,
                "dcp_size": 1,
                "data_parallel_index": 0,
                "data_parallel_size": 1,
                "data_parallel_rank_local": None,
                "is_parallelism_agnostic": False,
                **(parallel or {}),
            }
        ),
        "kv_cache_layout": "LBHNC",
        **changed,
    }
    return OffloadingConfig(**fields)


class Engine:
    """vLLM's scheduler side, whole, and its workers as far as they write and read shared memory."""

    def __init__(self, config: OffloadingConfig):
        self.spec = TieringOffloadingSpec(config)
        self.manager = self.spec.get_manager()
        [self.tier] = self.manager.secondary_tiers
        self.regions = [
            SharedOffloadRegion(config.engine_id, self.spec.num_chunks, rank, ROW_BYTES, WORKER_BYTES)
            for rank in range(WORKERS)
        ]
        self.pages = [region.create_next_worker_view(WORKER_BYTES).numpy().view(np.uint8) for region in self.regions]
        self.requests = itertools.count()

    def step(self) -> None:
        self.manager.on_schedule_end(ScheduleEndContext((), ()))

    def until_idle(self) -> None:
        def idle() -> bool:
            self.step()
            return not self.manager.has_pending_work()

        soon(idle)

    def request(self) -> ReqContext:
        request = ReqContext(req_id=f"r{next(self.requests)}")
        self.manager.on_new_request(request)
        return request

    def end(self, request: ReqContext) -> None:
        self.manager.on_request_finished(request)
        self.step()

    def store(self, chunks: dict[bytes, bytes]) -> None:
        """A prompt is computed: its chunks come from the GPU, and go on to the tier."""
        request = self.request()
        prepared = self.manager.prepare_store(list(chunks), request)
        assert prepared is not None
        for key, row in zip(prepared.keys_to_store, prepared.store_spec.chunk_ids, strict=True):
            for rank, page in enumerate(self.pages):
                page[row] = np.frombuffer(chunks[key], np.uint8)[rank * WORKER_BYTES :][:WORKER_BYTES]
        if prepared.keys_to_store:
            self.manager.complete_store(prepared.keys_to_store, request)
        self.until_idle()
        self.end(request)

    def load(self, keys: list[bytes]) -> dict[bytes, bytes]:
        """A prompt comes: what of it is found, byte for byte, as the workers see it."""
        request = self.request()
        answers: dict[bytes, LookupResult] = {}

        def all_answered() -> bool:
            self.step()
            answers.update((key, self.manager.lookup(key, request)) for key in keys)
            return not {LookupResult.RETRY, LookupResult.HIT_PENDING} & set(answers.values())

        soon(all_answered)
        hits = [key for key in keys if answers[key] is LookupResult.HIT]
        rows = self.manager.prepare_load(hits, request).chunk_ids
        found = {
            key: b"".join(page[row].tobytes() for page in self.pages) for key, row in zip(hits, rows, strict=True)
        }
        self.manager.complete_load(hits, request)
        self.end(request)
        return found

    def forget(self) -> None:
        """The host memory loses everything; the tier is not asked to."""
        self.manager.primary_tier.reset_cache()
        for page in self.pages:
            page[:] = 0xEE

    def close(self) -> None:
        self.manager.shutdown()
        self.pages.clear()
        for region in self.regions:
            region.cleanup()


@pytest.fixture
def engines():
    started = []

    def start(config: OffloadingConfig) -> Engine:
        started.append(Engine(config))
        return started[-1]

    yield start
    for engine in started:
        engine.close()


def key(number: int, group: int = 0) -> bytes:
    return make_offload_key(number.to_bytes(32, "big"), group)


def chunk(number: int) -> bytes:
    return random.Random(number).randbytes(WORKERS * WORKER_BYTES)


def chunks(numbers) -> dict[bytes, bytes]:
    return {key(number): chunk(number) for number in numbers}


def names(numbers) -> list[bytes]:
    return [key(number) for number in numbers]


def test_what_one_engine_stored_another_finds_byte_for_byte(daemon, engines):
    engines(config(daemon)).store(chunks(range(20)))
    second = engines(config(daemon))
    assert second.load(names(range(25))) == chunks(range(20))
    assert second.manager.get_stats() is not None


def test_what_the_host_memory_lost_comes_back(daemon, engines):
    engine = engines(config(daemon))
    engine.store(chunks(range(20)))
    engine.forget()
    assert engine.load(names([3, 99, 4])) == chunks([3, 4])


@pytest.mark.parametrize("daemon", [("disk.admission=all",)], indirect=True)
def test_what_went_to_disk_comes_back(daemon, engines):
    engine = engines(config(daemon))
    session = daemon.client().session("to disk")
    binding = session.register(kvd.Scope(**engine.tier._scopes[0]), ROW_BYTES)
    hashes = [get_offload_block_hash(key(number)) for number in range(10)]
    for number, name in enumerate(hashes):
        session.put(binding, name, chunk(number).ljust(ROW_BYTES, b"\0"), durable=True)
    assert session.evict(binding, hashes, tier="host").evicted == 10
    assert session.lookup(binding, hashes).tiers == ["disk"] * 10
    assert engine.load(names(range(12))) == chunks(range(10))


def test_gaps_are_looked_over(daemon, engines):
    engines(config(daemon)).store(chunks(range(0, 40, 3)))
    assert engines(config(daemon)).load(names(range(40))) == chunks(range(0, 40, 3))


def test_chunks_of_another_node_are_found_and_loaded(nodes, engines):
    a, b = nodes
    engines(config(a)).store(chunks(range(0, 20)))
    engines(config(b)).store(chunks(range(18, 22)))
    engine = engines(config(b))
    assert engine.load(names([1, 2, 19, 21, 30])) == chunks([1, 2, 19, 21])
    assert engines(config(b, tier={"peers": False})).load(names([1, 5, 21])) == chunks([1, 21]), "1 has come, 5 has not"
    a.kill()
    assert engine.load(names([7, 20])) == chunks([20])


def test_chunks_of_the_object_store_are_found_and_loaded(sharing, engines):
    a, b = sharing
    engines(config(a)).store(chunks(range(0, 20)))
    engines(config(b)).store(chunks(range(18, 22)))
    engine = engines(config(b))
    soon(lambda: all(engine.tier._held(names(range(20)))))
    # Who stored them is gone for good.
    a.kill()
    assert engines(config(b, tier={"peers": False})).load(names([1, 5, 21])) == chunks([21])
    assert engine.load(names([1, 2, 19, 21, 30])) == chunks([1, 2, 19, 21])
    assert engine.load(names(range(20))) == chunks(range(20))


def test_many_prompts_over_a_small_memory_never_give_a_wrong_byte(daemon, engines):
    dice, stored = random.Random(1), set()
    pair = [engines(config(daemon, chunks=12)) for _ in range(2)]
    for _ in range(60):
        engine, first = dice.choice(pair), dice.randrange(60)
        numbers = range(first, first + dice.randrange(1, 8))
        if dice.random() < 0.5:
            engine.store(chunks(numbers))
            stored.update(numbers)
        else:
            # Nothing was evicted from kvd: it has room for all of them.
            assert engine.load(names(numbers)) == chunks(stored.intersection(numbers))


def test_a_damaged_block_is_a_miss_and_its_neighbours_are_not(daemon, engines):
    engines(config(daemon)).store(chunks(range(5)))
    assert daemon.damage(chunk(2)) >= 1
    second = engines(config(daemon))
    assert second.load(names(range(5))) == chunks([0, 1, 3, 4])
    second.store(chunks([2]))
    assert engines(config(daemon)).load(names(range(5))) == chunks(range(5)), "it was stored again"


def test_a_promotion_that_fails_in_part_says_which_part(daemon, engines):
    engines(config(daemon)).store(chunks(range(3)))
    tier = engines(config(daemon)).tier
    keys = names([0, 7, 2])
    tier.submit_load(TransferJob(5, keys, np.array([4, 5, 6], np.int32), True, ReqContext("r")))
    results = []
    soon(lambda: results.extend(tier.get_finished_jobs()) or results)
    [result] = results
    assert (result.job_id, result.success, set(result.successful_keys)) == (5, False, set(names([0, 2])))
    assert result.transfer_bytes == 2 * ROW_BYTES
    assert bytes(tier._rows[4][: len(chunk(0))]) == chunk(0)
    assert not tier._rows[5].any(), "nothing was written where nothing was found"


def test_killed_and_back(daemon, engines):
    engine = engines(config(daemon))
    engine.store(chunks(range(5)))
    daemon.kill()
    engine.store(chunks(range(5, 8)))
    engine.forget()
    # What lies in shared memory may still be read, until it is noticed that nobody looks after it.
    assert engine.load(names(range(8))).items() <= chunks(range(5)).items()
    daemon.start()

    def found() -> bool:
        return engine.load(names(range(8))) == chunks(range(5))

    soon(found)
    engine.store(chunks(range(5, 8)))
    engine.forget()
    assert engine.load(names(range(8))) == chunks(range(8))


def test_an_engine_starts_before_its_daemon(daemon, engines):
    daemon.kill()
    engine = engines(config(daemon))
    engine.store(chunks(range(3)))
    engine.forget()
    assert engine.load(names(range(3))) == {}
    daemon.start()

    def stored() -> bool:
        engine.forget()
        engine.store(chunks(range(3)))
        engine.forget()
        return engine.load(names(range(3))) == chunks(range(3))

    soon(stored)


def test_a_daemon_that_stands_still_fails_jobs_and_holds_nobody_up(daemon, engines, monkeypatch):
    monkeypatch.setattr(_engine, "PAUSE_SECONDS", (0.05, 0.2))
    engine = engines(config(daemon, tier={"deadline": 0.3}))
    asking, ask = set(), engine.tier._link.ask

    def noted(what):
        asking.add(threading.current_thread())
        return ask(what)

    monkeypatch.setattr(engine.tier._link, "ask", noted)
    with daemon.standing_still():
        request = ReqContext("r")
        rows = np.arange(4, dtype=np.int32)
        assert engine.tier.lookup(key(50), request) is LookupResult.RETRY
        engine.tier.submit_store(TransferJob(900, names(range(50, 54)), rows, False, request))
        engine.tier.submit_load(TransferJob(901, names(range(60, 64)), rows, True, request))
        results = []
        soon(lambda: results.extend(engine.tier.get_finished_jobs()) or len(results) == 2)
        assert not any(result.success for result in results)
        engine.tier.on_request_finished(request)
        engine.forget()
        assert engine.load(names(range(50, 54))) == {}

    def back() -> bool:
        engine.store(chunks(range(4)))
        engine.forget()
        return engine.load(names(range(4))) == chunks(range(4))

    soon(back)
    assert asking and threading.current_thread() not in asking, "vLLM's thread never waits for the daemon"


def test_a_reset_ends_all_jobs_and_forgets_what_older_weights_computed(daemon, engines):
    engine = engines(config(daemon))
    engine.store(chunks(range(4)))
    request = engine.request()
    prepared = engine.manager.prepare_store(names(range(4, 40)), request)
    engine.manager.complete_store(prepared.keys_to_store, request)
    engine.manager.reset_cache()
    assert not engine.manager.has_pending_work()
    engine.end(request)
    assert engine.load(names(range(40))) == {}
    engine.store({key(1): chunk(111)})
    engine.forget()
    assert engine.load(names(range(3))) == {key(1): chunk(111)}
    # Another engine, which still has the old weights, is not concerned.
    assert engines(config(daemon)).load(names([1])) == chunks([1])


@pytest.mark.parametrize(
    "changed",
    [
        {"model": OffloadingModelConfig(name="other", dtype="bfloat16")},
        {"model": OffloadingModelConfig(name="m", dtype="float16")},
        {"kv_cache_layout": "LBNHC"},
        {"groups": (OffloadingGroupConfig(tokens_per_block=16, layer_names=("layer.1", "layer.0"), group_id=0),)},
        {"canonical_layout": True},
        {"parallel": {"tp_size": 1, "pp_size": 2}},
        {"tier": {"weights": "r2"}},
        {"tier": {"tenant": "t"}},
    ],
    ids=str,
)
def test_bytes_of_another_meaning_are_not_found(daemon, engines, changed):
    engines(config(daemon)).store(chunks(range(3)))
    other = config(daemon, **{k: v for k, v in changed.items() if k != "model"})
    if "model" in changed:
        other = config(daemon)
        object.__setattr__(other, "model", changed["model"])
    assert engines(other).load(names(range(3))) == {}


def test_canonical_bytes_are_shared_by_engines_that_split_the_model_otherwise(daemon, engines):
    agnostic = {"is_parallelism_agnostic": True}
    engines(config(daemon, canonical_layout=True, parallel=agnostic)).store(chunks(range(3)))
    other = config(daemon, canonical_layout=True, parallel={**agnostic, "tp_size": 1, "pp_size": 2})
    assert engines(other).load(names(range(3))) == chunks(range(3))


def test_groups_with_equal_hashes_are_different_blocks(daemon, engines):
    groups = tuple(
        OffloadingGroupConfig(tokens_per_block=16, layer_names=(f"layer.{n}",), group_id=n) for n in (0, 2)
    )
    engines(config(daemon, groups=groups)).store({key(1, 0): chunk(1), key(1, 2): chunk(2)})
    found = engines(config(daemon, groups=groups)).load([key(1, 0), key(1, 2), key(2, 0)])
    assert found == {key(1, 0): chunk(1), key(1, 2): chunk(2)}


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"kv_cache_layout": None}, "kv_cache_layout = None"),
        ({"kv_cache_layout": "LBCNH"}, "kv_cache_layout = 'LBCNH'"),
        ({"model": "m", "dtype": "fp3"}, "dtype = 'fp3'"),
        ({"tier": {"weights": ""}}, "'weights' is needed"),
        ({"tier": {"sockte": "/run"}}, "did you mean 'socket'"),
        ({"tier": {"deadline": "soon"}}, "'deadline' is 'soon'; expected float"),
    ],
    ids=str,
)
def test_what_is_not_supported_is_refused_at_the_start_by_name(daemon, changed, named):
    dtype = changed.pop("dtype", None)
    wrong = config(daemon, **changed)
    if dtype:
        object.__setattr__(wrong, "model", OffloadingModelConfig(name="m", dtype=dtype))
    with pytest.raises(ValueError, match=named):
        TieringOffloadingSpec(wrong).get_manager()


def test_another_version_of_vllm_is_refused(daemon, monkeypatch):
    monkeypatch.setattr("vllm.__version__", "0.33.1")
    with pytest.raises(ValueError, match=r"vLLM 0\.33\.1"):
        TieringOffloadingSpec(config(daemon)).get_manager()


def test_operators_see_the_engine_and_why(daemon, engines):
    engine = engines(config(daemon))
    engine.store(chunks([1]))
    session = daemon.client().session("look")
    scope = kvd.Scope(**engine.tier._scopes[0])
    binding = session.register(scope, ROW_BYTES)
    assert session.get(binding, (1).to_bytes(32, "big"))[: len(chunk(1))] == chunk(1)
    assert isinstance(engine.tier, KvdTier) and engine.tier.tier_type == "KvdTier"
