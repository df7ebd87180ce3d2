"""The store behind SGLang's own host pools and storage factory; the GPU's side and the controller are not in it."""

import hashlib
import sys
from types import SimpleNamespace

import pytest

import kvd
from conftest import soon

pytest.importorskip(
    "sglang", reason="SGLang is not installed here; engines/install-sglang makes an environment that has it"
)

import torch
from sglang.srt.mem_cache.hicache_storage import HiCacheStorageConfig, PoolHitPolicy, PoolName, PoolTransfer
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, MLATokenToKVPool
from sglang.srt.mem_cache.pool_host.mha import MHATokenToKVPoolHost
from sglang.srt.mem_cache.pool_host.mla import MLATokenToKVPoolHost
from sglang.srt.mem_cache.storage import StorageBackendFactory

from kvd import _engine
from kvd import sglang as ours

PAGE = 16
"""Tokens in a page."""
TOKENS = 1024

MHA = ["layer_first", "page_first", "page_first_direct", "page_head"]
MLA = ["layer_first", "page_first", "page_first_direct"]
KINDS = [("mha", layout) for layout in MHA] + [("mla", layout) for layout in MLA]


def pool(kind="mha", layout="page_first", dtype=torch.bfloat16):
    if kind == "mha":
        device = MHATokenToKVPool(TOKENS, PAGE, dtype, 2, 8, 3, "cpu", False)
        shape, special = MHATokenToKVPoolHost, {}
    else:
        device = MLATokenToKVPool(TOKENS, PAGE, dtype, 24, 8, 3, "cpu", False)
        shape, special = MLATokenToKVPoolHost, {"target_layer_num": 3}
    return shape(
        device.get_device_pool_infos()[0].buffer_info,
        1.0,
        0,
        PAGE,
        layout,
        pin_memory=False,
        device_capacity_tokens=TOKENS,
        start_layer=0,
        end_layer=2,
        **special,
    )


def config(daemon, *, mla=False, extra=None, **changed) -> HiCacheStorageConfig:
    named = {"backend_name": "kvd", "module_path": "kvd.sglang", "class_name": "KvdStore", "interface_v1": 1}
    fields = {
        "tp_rank": 0,
        "tp_size": 1,
        "pp_rank": 0,
        "pp_size": 1,
        "attn_cp_rank": 0,
        "attn_cp_size": 1,
        "is_mla_model": mla,
        "enable_storage_metrics": True,
        "is_page_first_layout": False,
        "model_name": "m",
        **changed,
    }
    return HiCacheStorageConfig(
        extra_config={**named, "socket": str(daemon.run), "weights": "r1", "deadline": 5.0, **(extra or {})}, **fields
    )


def store(config: HiCacheStorageConfig, host):
    """As SGLang's controller makes one."""
    made = StorageBackendFactory.create_backend("dynamic", config, host)
    made.register_mem_pool_host(host)
    made.on_host_pools_registered()
    return made


def names(numbers) -> list[str]:
    return [hashlib.sha256(str(number).encode()).hexdigest() for number in numbers]


def fill(host, numbers) -> torch.Tensor:
    """Pages with bytes of their own, in SGLang's order of them; where they are."""
    numbers = list(numbers)
    indices = host.alloc(len(numbers) * PAGE)
    for at, number in enumerate(numbers):
        host.set_from_flat_data_page(int(indices[at * PAGE]), flat(host, number))
    return indices


def flat(host, number) -> torch.Tensor:
    count = host.get_data_page(0).numel()
    return torch.rand(count, generator=torch.Generator().manual_seed(number)).to(host.dtype)


def pages(host, indices) -> list[torch.Tensor]:
    return [host.get_data_page(int(index)).clone() for index in indices[::PAGE]]


def blank(host, count) -> torch.Tensor:
    indices = host.alloc(count * PAGE)
    for index in indices[::PAGE]:
        host.set_from_flat_data_page(int(index), torch.zeros(host.get_data_page(0).numel(), dtype=host.dtype))
    return indices


def equal(found, numbers, host) -> bool:
    return all(torch.equal(page, flat(host, number)) for page, number in zip(found, numbers, strict=True))


@pytest.mark.parametrize(("kind", "layout"), KINDS)
def test_pages_come_back_byte_for_byte_in_another_engine(daemon, kind, layout):
    mine, other = pool(kind, layout), pool(kind, layout)
    first = store(config(daemon, mla=kind == "mla"), mine)
    # Not from page 0 on, and not in order: addresses count, not numbers.
    fill(mine, [90])
    indices = fill(mine, range(6)).view(-1, PAGE).flip(0).reshape(-1)
    assert first.batch_set_v1(names(reversed(range(6))), indices) == [True] * 6
    assert first.batch_exists(names(range(8))) == 6 and first.exists(names([0])[0])
    second = store(config(daemon, mla=kind == "mla"), other)
    fill(other, [91, 92])
    target = blank(other, 8)
    assert second.batch_exists(names(range(8))) == 6
    assert second.batch_get_v1(names(range(8)), target) == [True] * 6 + [False] * 2
    found = pages(other, target)
    assert equal(found[:6], range(6), other)
    assert not any(page.any() for page in found[6:]), "nothing is written where nothing was found"
    assert sum(second.get_stats().prefetch_pgs) == 6 and sum(first.get_stats().backup_pgs) == 6
    assert first.get_stats().backup_pgs == []


def test_pages_of_another_node_are_found_and_read(nodes):
    a, b = nodes
    host = pool()
    store(config(a), host).batch_set_v1(names(range(6)), fill(host, range(6)))
    store(config(b), host).batch_set_v1(names(range(2)), fill(host, range(2)))
    made = store(config(b), host)
    assert store(config(b, extra={"peers": False}), host).batch_exists(names(range(8))) == 2
    assert made.batch_exists(names(range(8))) == 6
    assert made.batch_exists_v2(names(range(8))).kv_hit_pages == 6
    target = blank(host, 8)
    assert made.batch_get_v1(names(range(8)), target) == [True] * 6 + [False] * 2
    assert equal(pages(host, target)[:6], range(6), host)
    a.kill()
    assert made.batch_exists(names(range(8))) == 6, "they are here now"


def test_pages_of_the_object_store_are_found_and_read(sharing):
    a, b = sharing
    host = pool()
    store(config(a), host).batch_set_v1(names(range(6)), fill(host, range(6)))
    store(config(b), host).batch_set_v1(names(range(2)), fill(host, range(2)))
    made = store(config(b), host)
    soon(lambda: made.batch_exists(names(range(8))) == 6)
    # Who stored them is gone for good.
    a.kill()
    assert store(config(b, extra={"peers": False}), host).batch_exists(names(range(8))) == 2
    assert made.batch_exists_v2(names(range(8))).kv_hit_pages == 6
    target = blank(host, 8)
    assert made.batch_get_v1(names(range(8)), target) == [True] * 6 + [False] * 2
    assert equal(pages(host, target)[:6], range(6), host)


@pytest.mark.parametrize("daemon", [("disk.admission=all",)], indirect=True)
def test_pages_come_back_from_disk(daemon):
    host = pool()
    made = store(config(daemon), host)
    session, known = daemon.client().session("to disk"), made._pools["kv"]
    scope = kvd.Scope(**{**known.scope, "layout": f"{known.scope['layout']},pieces"})
    binding = session.register(scope, known.page_bytes, slice=kvd.Slice(3, 2))
    for number, name in enumerate(names(range(10))):
        # With this layout, the pieces of a page one after another are the page as a tensor.
        session.put(binding, name, flat(host, number).view(torch.uint8).numpy(), durable=True)
    assert session.evict(binding, names(range(10)), tier="host").evicted == 10
    assert session.lookup(binding, names(range(10))).tiers == ["disk"] * 10
    assert made.batch_exists(names(range(12))) == 10
    target = blank(host, 12)
    assert made.batch_get_v1(names(range(12)), target) == [True] * 10 + [False] * 2
    assert equal(pages(host, target)[:10], range(10), host)


@pytest.mark.parametrize(("kind", "layout"), KINDS)
def test_tensors_come_back_byte_for_byte(daemon, kind, layout):
    host = pool(kind, layout)
    made = store(config(daemon, mla=kind == "mla", extra={"interface_v1": 0}), host)
    assert made.set(names([0])[0], flat(host, 0))
    assert made.batch_set(names([1, 2]), [flat(host, 1), flat(host, 2)])
    assert made.batch_exists(names(range(5))) == 3
    targets = [torch.zeros_like(flat(host, 0)) for _ in range(5)]
    found = made.batch_get(names(range(5)), targets)
    assert equal(found[:3], range(3), host) and found[3:] == [None, None]
    target = torch.zeros_like(flat(host, 0))
    assert made.get(names([1])[0], target) is target and torch.equal(target, flat(host, 1))
    assert made.get(names([7])[0], target) is None


def test_what_makes_no_sense_is_a_miss(daemon):
    host = pool()
    made = store(config(daemon), host)
    assert made.get(names([1])[0]) is None
    assert not made.set(names([1])[0], torch.zeros(3)) and not made.set(names([1])[0], "text")
    assert made.batch_get_v1(names([1, 2]), host.alloc(PAGE)) == [False, False]
    assert made.batch_get_v2([PoolTransfer(PoolName.MAMBA, host_indices=None, keys=names([1]))]) == {"mamba": [False]}
    unregistered = StorageBackendFactory.create_backend("dynamic", config(daemon), None)
    assert unregistered.batch_exists(names([1])) == 0 and unregistered.get(names([1])[0], torch.zeros(1)) is None


def test_the_two_orders_of_bytes_are_never_mixed_up(daemon):
    host = pool("mha", "layer_first")
    store(config(daemon), host).batch_set_v1(names([1]), fill(host, [1]))
    legacy = store(config(daemon, extra={"interface_v1": 0}), host)
    assert legacy.batch_exists(names([1])) == 0
    assert legacy.get(names([1])[0], torch.zeros_like(flat(host, 1))) is None


@pytest.mark.parametrize("tokens", [PAGE, 64])
def test_a_damaged_page_is_a_miss_and_its_neighbours_are_not(daemon, monkeypatch, tokens):
    # Short pages come as copies, long ones are read in place.
    monkeypatch.setattr(sys.modules[__name__], "PAGE", tokens)
    host = pool("mla", "page_first")
    store(config(daemon, mla=True), host).batch_set_v1(names(range(3)), fill(host, range(3)))
    assert daemon.damage(flat(host, 1).view(torch.uint8).numpy().tobytes()) >= 1
    fresh = pool("mla", "page_first")
    target = blank(fresh, 3)
    made = store(config(daemon, mla=True), fresh)
    assert made.batch_get_v1(names(range(3)), target) == [True, False, True]
    found = pages(fresh, target)
    assert equal([found[0], found[2]], [0, 2], fresh) and not found[1].any()
    assert made.batch_set_v1(names([1]), fill(fresh, [1])) == [True]
    assert made.batch_get_v1(names(range(3)), target) == [True] * 3, "it was stored again"
    assert equal(pages(fresh, target), range(3), fresh)


def test_killed_and_back(daemon):
    host = pool()
    made = store(config(daemon, extra={"deadline": 1.0}), host)
    indices = fill(host, range(4))
    made.batch_set_v1(names(range(4)), indices)
    daemon.kill()
    target = blank(host, 4)
    # What lies in shared memory may still be read, until it is noticed that nobody looks after it.
    for number, good in enumerate(made.batch_get_v1(names(range(4)), target)):
        assert not good or equal([pages(host, target)[number]], [number], host)
    assert made.batch_set_v1(names(range(4, 8)), indices) == [False] * 4
    soon(lambda: made.batch_exists(names(range(4))) == 0)
    assert made.batch_exists_v2(names(range(4))).extra_pool_hit_pages == {}
    daemon.start()
    soon(lambda: made.batch_exists(names(range(4))) == 4)
    target = blank(host, 4)
    assert made.batch_get_v1(names(range(4)), target) == [True] * 4
    assert equal(pages(host, target), range(4), host)


def test_an_engine_starts_before_its_daemon(daemon):
    daemon.kill()
    host = pool()
    made = store(config(daemon, extra={"deadline": 1.0}), host)
    indices = fill(host, range(2))
    assert made.batch_set_v1(names(range(2)), indices) == [False, False]
    daemon.start()
    soon(lambda: all(made.batch_set_v1(names(range(2)), indices)))


def test_a_daemon_that_stands_still_stores_nothing_and_every_call_ends(daemon, monkeypatch):
    monkeypatch.setattr(_engine, "PAUSE_SECONDS", (0.05, 0.2))
    host = pool()
    made = store(config(daemon, extra={"deadline": 0.3, "call_seconds": 1.0}), host)
    with daemon.standing_still():
        assert not any(made.batch_set_v1(names(range(10, 20)), fill(host, range(10, 20))))
        made.batch_exists(names(range(30, 40)))
        made.batch_get_v1(names(range(30, 34)), blank(host, 4))
    indices = fill(host, range(2))
    soon(lambda: all(made.batch_set_v1(names(range(2)), indices)))
    assert made.batch_exists(names(range(2))) == 2


def test_each_rank_has_pages_of_its_own_but_replicas_share_theirs(daemon):
    host = pool()
    ranks = [store(config(daemon, tp_rank=rank, tp_size=2), host) for rank in range(2)]
    ranks[0].batch_set_v1(names([1]), fill(host, [1]))
    assert [rank.batch_exists(names([1])) for rank in ranks] == [1, 0]
    mla = pool("mla")
    replicas = [store(config(daemon, mla=True, tp_rank=rank, tp_size=2), mla) for rank in range(2)]
    replicas[0].batch_set_v1(names([1]), fill(mla, [1]))
    assert [rank.batch_exists(names([1])) for rank in replicas] == [1, 1]


@pytest.mark.parametrize(
    "changed",
    [
        {"pp_rank": 1, "pp_size": 2},
        {"attn_cp_rank": 1, "attn_cp_size": 2},
        {"tp_size": 2},
        {"extra": {"weights": "r2"}},
        {"extra": {"model": "other"}},
        {"extra": {"tenant": "t"}},
    ],
    ids=str,
)
def test_bytes_of_another_meaning_are_not_found(daemon, changed):
    host = pool()
    store(config(daemon), host).batch_set_v1(names([1]), fill(host, [1]))
    assert store(config(daemon, **changed), host).batch_exists(names([1])) == 0


def test_layouts_and_dtypes_are_different_pages(daemon):
    written, kinds = pool(), [("mha", layout, torch.bfloat16) for layout in MHA] + [("mha", "page_first", torch.float16)]
    store(config(daemon), written).batch_set_v1(names([1]), fill(written, [1]))
    found = [store(config(daemon), pool(*kind)).batch_exists(names([1])) for kind in kinds]
    assert found == [int(kind == ("mha", "page_first", torch.bfloat16)) for kind in kinds]


def test_exchanged_weights_and_a_cleared_store_find_nothing_of_before(daemon, monkeypatch):
    host = pool()
    made, other = store(config(daemon), host), store(config(daemon), host)
    indices = fill(host, [1])
    made.batch_set_v1(names([1]), indices)
    serving = SimpleNamespace(weight_version="default")
    monkeypatch.setattr(ours, "get_serving", lambda: serving)
    assert made.batch_exists(names([1])) == 1
    serving.weight_version = "step-200"
    assert made.batch_exists(names([1])) == 0
    serving.weight_version = "default"
    assert made.clear() is None
    assert made.batch_exists(names([1])) == 0
    assert made.batch_set_v1(names([1]), indices) == [True] and made.batch_exists(names([1])) == 1
    assert other.batch_exists(names([1])) == 1, "others are not concerned"
    other.clear()
    assert other.batch_exists(names([1])) == 1, "ranks of one engine that were cleared together share again"
    made.close()
    assert made.batch_exists(names([1])) == 0 and made.batch_set_v1(names([1]), indices) == [False]


def test_pools_beside_the_kv_pool(daemon):
    host, side = pool(), pool("mha", "page_first_direct")
    made = store(config(daemon), host)
    made.register_mem_host_pool_v2(host, PoolName.KV)
    made.register_mem_host_pool_v2(side, PoolName.SWA)
    made.batch_set_v1(names(range(6)), fill(host, range(6)))
    # Of a sliding window, the last pages of what was offloaded: 2 and 3, and 5.
    window = PoolTransfer(PoolName.SWA, host_indices=fill(side, [102, 103, 105]), keys=names([2, 3, 5]))
    assert made.batch_set_v2([window]) == {PoolName.SWA: [True] * 3}

    def exists(policy, keys):
        asked = PoolTransfer(PoolName.SWA, keys=keys, hit_policy=policy)
        told = made.batch_exists_v2(names(range(8)), [asked])
        return told.kv_hit_pages, told.restorable_prefix_pages, told.extra_pool_hit_pages

    kv, swa = PoolName.KV, PoolName.SWA
    assert exists(PoolHitPolicy.TRAILING_PAGES, names([6, 7])) == (4, [4], {kv: 6, swa: 4})
    assert exists(PoolHitPolicy.TRAILING_PAGES, names([7])) == (6, [3, 4, 6], {kv: 6, swa: 6})
    assert exists(PoolHitPolicy.ALL_PAGES, None) == (0, [], {kv: 6, swa: 0})
    assert exists(PoolHitPolicy.BLOCK_GROUPS, None) == (0, [], {kv: 6, swa: 0})
    assert made.batch_exists_v2(names(range(8))).kv_hit_pages == 6
    target, kv_target = blank(side, 2), blank(host, 1)
    transfers = [
        PoolTransfer(PoolName.SWA, host_indices=target, keys=names([2, 5])),
        PoolTransfer(PoolName.KV, host_indices=kv_target, keys=names([2])),
    ]
    assert made.batch_get_v2(transfers) == {PoolName.SWA: [True, True], PoolName.KV: [True]}
    assert equal(pages(side, target), [102, 105], side) and equal(pages(host, kv_target), [2], host)


class Stranger(MHATokenToKVPoolHost):
    """A pool that keeps who knows what."""


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"extra": {"weights": ""}}, "'weights' is needed"),
        ({"extra": {"tenant": "Team-A"}}, "'tenant' is 'Team-A'; expected the form"),
        ({"extra": {"deadline": 0.0}}, "'deadline' is 0.0; expected 0.001 to 600"),
        ({"extra": {"call_seconds": float("nan")}}, "'call_seconds' is nan; expected"),
        ({"extra": {"tennant": "t"}}, "did you mean 'tenant'"),
        ({"extra": {"call_seconds": "soon"}}, "'call_seconds' is 'soon'; expected float"),
        ({"model_name": None}, "'model' is needed"),
        ({"tp_lcm_size": 4, "should_split_heads": True}, "tp_lcm_size = 4"),
        ({"mla": True, "dcp_size": 2, "tp_size": 2, "logical_page_size": 32}, "dcp_size = 2"),
    ],
    ids=str,
)
def test_what_is_not_supported_is_refused_at_the_start_by_name(daemon, changed, named):
    with pytest.raises(ValueError, match=named):
        StorageBackendFactory.create_backend("dynamic", config(daemon, **changed), None)


def test_unknown_pools_are_refused_by_name(daemon, monkeypatch):
    made = StorageBackendFactory.create_backend("dynamic", config(daemon), None)
    host = pool()
    for field, value, named in [
        ("__class__", Stranger, "a Stranger"),
        ("layout", "page_unified", "layout 'page_unified'"),
        ("dtype", torch.uint8, "dtype torch.uint8"),
        ("_layer_shard_enabled", True, "_layer_shard_enabled"),
    ]:
        with monkeypatch.context() as patch:
            patch.setattr(host, field, value, raising=False)
            with pytest.raises(ValueError, match=named):
                made.register_mem_pool_host(host)
    legacy = store(config(daemon, extra={"interface_v1": 0}), host)
    with pytest.raises(ValueError, match="'swa' without interface_v1"):
        legacy.register_mem_host_pool_v2(pool(), PoolName.SWA)
    with pytest.raises(ValueError, match="tenant"):
        store(config(daemon, extra={"tenant": "No!"}), host)
    monkeypatch.setattr("sglang.__version__", "0.5.99")
    with pytest.raises(ValueError, match=r"SGLang 0\.5\.99"):
        store(config(daemon), host)
