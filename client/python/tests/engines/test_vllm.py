"""The vLLM connector's halves on vLLM's own classes, with a real daemon and no engine; ``engines/run`` has whole engines."""

import contextlib
import dataclasses
import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed here; engines/install-vllm makes an environment that has it")

import torch
import vllm
from conftest import Daemon, soon
from safetensors.torch import save_file
from vllm.config import KVTransferConfig
from vllm.distributed.kv_events import BlockRemoved, BlockStored
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVQuantMode,
    MambaSpec,
    SlidingWindowSpec,
)
from vllm.v1.metrics.cache_hit_source import CacheHitSource

import kvd
from kvd._engine import Link, settings, weights_of
from kvd.vllm import KvdConnector, Settings, _layout, _scheduler, logger
from kvd.vllm._identity import computed_as, weights_named
from kvd.vllm._layout import check_backends, pages_of
from kvd.vllm._layout import layout_of as kvd_layout
from kvd.vllm._plan import Owner, Piece, Step, Work
from kvd.vllm._scheduler import Events, Scheduler
from kvd.vllm._worker import Worker
from kvd.vllm_tier import Settings as TierSettings

Nodes = tuple[Daemon, Daemon]
BLOCKS, TOKENS = 64, 16
FULL = FullAttentionSpec(block_size=TOKENS, num_kv_heads=2, head_size=32, dtype=torch.bfloat16)
WINDOW = SlidingWindowSpec(block_size=TOKENS, num_kv_heads=2, head_size=32, dtype=torch.bfloat16, sliding_window=40)


def cache(*specs: Any, layers: int = 3, **more: Any) -> KVCacheConfig:
    groups = [
        KVCacheGroupSpec([f"group{at}.layer{layer}" for layer in range(layers)], spec) for at, spec in enumerate(specs)
    ]
    return KVCacheConfig(BLOCKS, [], groups, hash_block_size=TOKENS, **more)


MODEL = {
    **{"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "torch_dtype": "float32", "vocab_size": 2048},
    **{"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 8192},
}
LONGROPE = {
    **{"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 1024},
    **{"short_factor": [1.0] * 32, "long_factor": [1.5] * 32},
}


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The configuration of a model."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(MODEL))
    return folder


@pytest.fixture
def config(model: Path) -> Callable[..., Any]:
    """Makes vLLM's configuration from what ``vllm serve`` is given."""

    def make(rope: dict[str, Any] | None = None, **given: Any) -> Any:
        usual = {"model": str(model), "skip_tokenizer_init": True, "load_format": "dummy", "enforce_eager": True}
        if rope:
            given["hf_overrides"] = {"rope_parameters": rope}
        parallel = {name: given.pop(name) for name in list(given) if name.endswith("parallel_size")}
        made = EngineArgs(**{**usual, "block_size": TOKENS, **given}).create_engine_config()
        for name, size in parallel.items():
            setattr(made.parallel_config, name, size)
        return made

    return make


@pytest.fixture
def layout_of(config: Callable[..., Any]) -> Callable[..., Any]:
    """Makes the layout of groups of such layers, for an engine that was given such arguments."""
    return lambda cached, **given: kvd_layout(config(**given), cached)


OWNER = Owner("w")


def tensors(layout: Any, seed: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return {
        layer: torch.randn(BLOCKS, group.heads, TOKENS, 64).to(torch.bfloat16)
        for group in layout.groups
        for layer in group.layers
    }


def link(daemon: Daemon, name: str = "test") -> Link:
    return Link(name, endpoint=str(daemon.run), deadline=10, log=logger)


def worker(daemon: Daemon, layout: Any, caches: dict[str, torch.Tensor], rank: int = 0, **more: Any) -> Worker:
    chosen = {"layerwise": True, "load_seconds": 10, "staging_bytes": 1 << 20, **more}
    made = Worker(link(daemon), layout, "default", rank, **chosen)
    made.register(caches)
    return made


def scheduler(daemon: Daemon, layout: Any, **more: Any) -> Scheduler:
    chosen = {"wait": 0.0, "match_seconds": 10, "peer_seconds": 10, "request_wait_max": 60, **more}
    chosen = {"loads": True, "stores": True, "events": None, **chosen}
    return Scheduler(link(daemon), layout, "default", "w", **chosen)


def names(count: int, seed: int = 0) -> list[bytes]:
    return [seed.to_bytes(4, "big") + b"\x07" * 24 + at.to_bytes(4, "big") for at in range(count)]


def request(hashes: list[bytes], **more: Any) -> Any:
    fields = {"lora_request": None, "cache_salt": None, "kv_transfer_params": None, "request_id": "r"}
    return SimpleNamespace(block_hashes=hashes, num_tokens=len(hashes) * TOKENS + 5, **{**fields, **more})


def planned(blocks: int) -> Any:
    """vLLM's plan of a step that computes so many blocks of the request from its start."""
    return SimpleNamespace(
        num_scheduled_tokens={"r": blocks * TOKENS},
        scheduled_new_reqs=[SimpleNamespace(req_id="r", num_computed_tokens=0)],
        scheduled_cached_reqs=SimpleNamespace(req_ids=[], num_computed_tokens=[]),
        kv_connector_block_state=SimpleNamespace(get_block_ids=lambda name: (list(range(1, blocks + 1)),)),
    )


def work(pieces: list[Piece], owner: Owner = OWNER) -> Work:
    return Work("r", owner, pieces)


def store(one: Worker, pieces: list[Piece], owner: Owner = OWNER, hooks: bool = True) -> None:
    step(one, Step(stores=[work(pieces, owner)]), hooks)
    soon(lambda: not one._commits or (one._settle(wait=False), not one._commits)[1])


def step(one: Worker, what: Step, hooks: bool = True) -> None:
    """What vLLM does in a step."""
    one.begin(what)
    one.load(what)
    for layer in one.place if hooks else ():
        one.before_layer(layer)
        one.after_layer(layer)
    one.end()


def matched(one: Scheduler, asked: Any, computed: int = 0) -> int:
    answer: list[int | None] = [None]

    def known() -> bool:
        answer[0] = one.matched(asked, computed)
        return answer[0] is not None

    soon(known)
    assert answer[0] is not None
    return answer[0]


@pytest.mark.parametrize("hooks", [True, False], ids=["layer by layer", "vLLM skips its hooks"])
@pytest.mark.parametrize("specs", [(FULL,), (FULL, WINDOW)], ids=["one group", "two groups"])
def test_blocks_come_back_as_they_were_on_every_rank(daemon: Daemon, layout_of: Any, specs: Any, hooks: bool):
    layout = layout_of(cache(*specs), tensor_parallel_size=2)
    sources = [tensors(layout, rank) for rank in range(2)]
    pieces = [Piece(group.index, names(10, group.index), list(range(1, 11))) for group in layout.groups]
    for rank, caches in enumerate(sources):
        store(worker(daemon, layout, caches, rank), pieces, hooks=hooks)
    for rank, caches in enumerate(sources):
        target = tensors(layout, 99)
        reader = worker(daemon, layout, target, rank)
        # Twice: layers are loaded one by one only after vLLM was seen to ask for each.
        for base in (20, 40):
            numbers = list(range(base, base + 10))
            step(reader, Step(loads=[work([dataclasses.replace(p, numbers=numbers) for p in pieces])]), hooks=hooks)
            assert not reader.take_bad_blocks()
            for layer, tensor in target.items():
                assert torch.equal(tensor[base : base + 10], caches[layer][1:11]), layer
                assert not torch.equal(tensor[base + 10], caches[layer][11])
        assert reader._hooks_work == hooks
        reader.close()


def test_more_blocks_than_there_is_room_for_are_stored_all(daemon: Daemon, layout_of: Any):
    layout = layout_of(cache(FULL))
    block_bytes = layout.groups[0].block_bytes
    one = worker(daemon, layout, tensors(layout, 1), staging_bytes=3 * block_bytes)
    store(one, [Piece(0, names(20), list(range(1, 21)))])
    assert one.take_stats().data["stored_blocks"] == 20
    assert matched(scheduler(daemon, layout), request(names(20))) == 20 * TOKENS


def test_a_layer_that_did_not_ask_makes_its_step_computed_again(daemon: Daemon, layout_of: Any):
    layout = layout_of(cache(FULL))
    one = worker(daemon, layout, tensors(layout, 1))
    store(one, [Piece(0, names(4), [1, 2, 3, 4])])
    assert one._hooks_work
    step(one, Step(loads=[work([Piece(0, names(4), [11, 12, 13, 14])])]), hooks=False)
    assert one.take_bad_blocks() == {11, 12, 13, 14}
    step(one, Step(loads=[work([Piece(0, names(4), [11, 12, 13, 14])])]), hooks=False)
    assert not one.take_bad_blocks(), "from then on all is loaded before the first layer"


def test_only_what_every_rank_has_is_promised(daemon: Daemon, layout_of: Any):
    layout = layout_of(cache(FULL), tensor_parallel_size=2)
    ranks = [worker(daemon, layout, tensors(layout, rank), rank) for rank in range(2)]
    store(ranks[0], [Piece(0, names(8), list(range(1, 9)))])
    one = scheduler(daemon, layout)
    assert matched(one, request(names(8), request_id="a")) == 0
    store(ranks[1], [Piece(0, names(5), list(range(1, 6)))])
    assert matched(one, request(names(8), request_id="b")) == 5 * TOKENS
    assert matched(one, request(names(8), request_id="c"), computed=2 * TOKENS) == 3 * TOKENS
    assert matched(one, request(names(8), request_id="d"), computed=6 * TOKENS) == 0


def test_the_last_token_is_always_left_to_vllm(daemon: Daemon, layout_of: Any):
    layout = layout_of(cache(FULL))
    store(worker(daemon, layout, tensors(layout, 1)), [Piece(0, names(8), list(range(1, 9)))])
    asked = request(names(8))
    asked.num_tokens = 8 * TOKENS
    assert matched(scheduler(daemon, layout), asked) == 7 * TOKENS


def test_a_sliding_window_needs_its_last_blocks_alone(daemon: Daemon, layout_of: Any):
    layout = layout_of(cache(FULL, WINDOW))
    one = worker(daemon, layout, tensors(layout, 1))
    store(one, [Piece(0, names(10), list(range(1, 11)))])
    # A window of 40 tokens before token 160 reaches into block 7 of 16.
    store(one, [Piece(1, names(10)[7:10], [21, 22, 23])])
    assert matched(scheduler(daemon, layout), request(names(10))) == 10 * TOKENS
    # Ends that need a block of the window which is not there are not offered.
    assert matched(scheduler(daemon, layout), request(names(9), request_id="b")) == 0


def test_salts_adapters_and_lives_never_meet(daemon: Daemon, layout_of: Any):
    layout = layout_of(cache(FULL))
    one = worker(daemon, layout, tensors(layout, 1))
    store(one, [Piece(0, names(4), [1, 2, 3, 4])], Owner("w", salt="mine"))
    asks = scheduler(daemon, layout)
    assert matched(asks, request(names(4), request_id="a")) == 0
    assert matched(asks, request(names(4), request_id="b", cache_salt="yours")) == 0
    lora = SimpleNamespace(lora_name="mine", lora_path="mine")
    assert matched(asks, request(names(4), request_id="c", lora_request=lora, cache_salt="mine")) == 0
    assert matched(asks, request(names(4), request_id="d", cache_salt="mine")) == 4 * TOKENS
    asks.forget()
    assert matched(asks, request(names(4), request_id="e", cache_salt="mine")) == 0


def test_what_is_evicted_between_promise_and_load_is_reported(daemon: Daemon, layout_of: Any):
    layout = layout_of(cache(FULL))
    one = worker(daemon, layout, tensors(layout, 1))
    store(one, [Piece(0, names(4), [1, 2, 3, 4])])
    session = daemon.client().session("other")
    binding = one._binding(session, OWNER, layout.groups[0])
    assert session.evict(binding, names(4)[2:3]).evicted == 1
    load = work([Piece(0, names(4), [11, 12, 13, 14])])
    step(one, Step(loads=[load]))
    assert one.take_bad_blocks() == {11, 12, 13, 14}
    step(one, Step(later=[load]))
    assert one.take_received() == ({"r"}, {"r"})
    assert one.take_stats().data["failed_blocks"] == 8


def test_a_promise_is_pinned_until_the_ranks_have_loaded_it(daemon: Daemon, layout_of: Any):
    layout = layout_of(cache(FULL))
    store(worker(daemon, layout, tensors(layout, 1)), [Piece(0, names(4), [1, 2, 3, 4])])
    one, asked = scheduler(daemon, layout), request(names(4))
    assert matched(one, asked) == 4 * TOKENS
    session = daemon.client().session("other")
    binding = one._bindings(session, OWNER, layout.groups[0])[0]
    assert session.evict(binding, names(4)).in_use == 4
    one.end(asked)
    soon(lambda: session.evict(binding, names(4)).evicted or session.lookup(binding, names(4)).prefix == 0)


def test_announced_blocks_are_waited_for(daemon: Daemon, layout_of: Any):
    layout = layout_of(cache(FULL))
    one = worker(daemon, layout, tensors(layout, 1))
    one.begin(Step(stores=[work([Piece(0, names(4), [1, 2, 3, 4])])]))
    asks, asked = scheduler(daemon, layout, wait=20.0), request(names(4))
    assert asks.matched(asked, 0) is None, "they are on their way"
    one.end()
    assert matched(asks, asked) == 4 * TOKENS


def test_a_request_that_says_so_waits_for_blocks_nobody_has_announced(daemon: Daemon, layout_of: Any):
    layout = layout_of(cache(FULL))
    asks = scheduler(daemon, layout)
    asked = request(names(4), kv_transfer_params={"kvd": {"wait": 20}})
    assert asks.matched(asked, 0) is None
    store(worker(daemon, layout, tensors(layout, 1)), [Piece(0, names(4), [1, 2, 3, 4])])
    assert matched(asks, asked) == 4 * TOKENS
    # One that is aborted waits no more.
    lost = request(names(4, 9), request_id="lost", kv_transfer_params={"kvd": {"wait": 600}})
    assert asks.matched(lost, 0) is None
    looking = asks._tracks["lost"].looking
    asks.end(lost)
    soon(looking.done)
    for wrong in ({"wait": -1}, {"wait": "long"}, {"weight": 1}, 7.5, True):
        odd = request(names(9, 5), request_id=str(wrong), kv_transfer_params={"kvd": wrong})
        assert asks._track(odd).wait == 0


def test_a_load_begins_where_vllm_was_last_told_that_it_begins(daemon: Daemon, layout_of: Any):
    layout = layout_of(cache(FULL))
    store(worker(daemon, layout, tensors(layout, 1)), [Piece(0, names(8), list(range(1, 9)))])
    one, asked = scheduler(daemon, layout), request(names(8))
    assert matched(one, asked) == 8 * TOKENS
    # Meanwhile another request has brought three blocks of the prefix into vLLM's own cache.
    assert matched(one, asked, computed=3 * TOKENS) == 5 * TOKENS
    table = SimpleNamespace(get_block_ids=lambda: ([30 + at for at in range(9)],))
    one.allocated(asked, table, 5 * TOKENS)
    (load,) = one._loads
    assert load.pieces == [Piece(0, names(8)[3:], [33, 34, 35, 36, 37])]
    assert sum(one.sources(asked, 5 * TOKENS).values()) == 5 * TOKENS


def test_what_was_computed_with_a_failed_load_is_never_stored(daemon: Daemon, layout_of: Any):
    layout = layout_of(cache(FULL))
    one = worker(daemon, layout, tensors(layout, 1))
    here = scheduler(daemon, layout)
    absent, garbage = work([Piece(0, names(2, 9), [11, 12])]), names(6)

    def stored(first: int, numbers: list[int]) -> list[Work]:
        return [work([Piece(0, garbage[first : first + 2], numbers)])]

    step(one, Step(loads=[absent], stores=stored(0, [13, 14])))
    assert one.take_bad_blocks() == {11, 12}
    # Planned before the scheduler knew.
    step(one, Step(stores=stored(2, [15, 16])))
    assert matched(here, request(garbage, request_id="a")) == 0
    assert not here._held(garbage, OWNER, 6 * TOKENS)[2], "nor is it announced any more"
    step(one, Step(stores=stored(0, [17, 18]), failures_seen=1))
    soon(lambda: here._held(garbage, OWNER, 6 * TOKENS)[0] == 2 * TOKENS)


def test_the_room_of_a_failed_step_is_given_back(daemon: Daemon, layout_of: Any):
    layout = layout_of(cache(FULL))
    one = worker(daemon, layout, tensors(layout, 1), staging_bytes=2 * layout.groups[0].block_bytes)
    absent = work([Piece(0, names(2, 9), [11, 12])])
    for failures in range(3):
        stored = work([Piece(0, names(2, failures), [13, 14])])
        step(one, Step(loads=[absent], stores=[stored], failures_seen=failures))
    step(one, Step(stores=[work([Piece(0, names(2), [1, 2])])], failures_seen=3))
    soon(lambda: matched(scheduler(daemon, layout), request(names(2))) == 2 * TOKENS)


def test_a_new_life_takes_nothing_along(daemon: Daemon, layout_of: Any):
    layout = layout_of(cache(FULL))
    one, running = scheduler(daemon, layout), request(names(8))
    one.begin(running)
    output = planned(8)
    assert one.step(output).stores, "it would be stored"
    one._tracks["r"].stored = {}
    one.forget()
    assert not one.step(output).stores
    assert one.matched(running, 0) == 0


def test_requests_that_wait_are_in_nobodys_way(daemon: Daemon, layout_of: Any):
    layout = layout_of(cache(FULL))
    store(worker(daemon, layout, tensors(layout, 1)), [Piece(0, names(4), [1, 2, 3, 4])])
    one = scheduler(daemon, layout)
    patient = [
        request(names(4, 5), request_id=str(at), kv_transfer_params={"kvd": {"wait": 500}}) for at in range(200)
    ]
    for asked in patient:
        assert one.matched(asked, 0) is None
    assert matched(one, request(names(4))) == 4 * TOKENS
    assert all(one.matched(asked, 0) is None for asked in patient)
    assert {one._tracks[asked.request_id].wait for asked in patient} == {60.0}, "no longer than the operator allows"


# Two nodes: "a" has what "b" is asked for.


@pytest.mark.parametrize("specs", [(FULL,), (FULL, WINDOW)], ids=["one group", "two groups"])
def test_blocks_of_another_node_are_here_and_checked_before_they_are_promised(nodes: Nodes, layout_of: Any, specs: Any):
    a, b = nodes
    layout = layout_of(cache(*specs), tensor_parallel_size=2)
    sources = [tensors(layout, rank) for rank in range(2)]
    for rank, caches in enumerate(sources):
        pieces = [Piece(group.index, names(10), list(range(1, 11))) for group in layout.groups]
        store(worker(a, layout, caches, rank), pieces)
    one, asked = scheduler(b, layout), request(names(12))
    assert matched(one, asked) == 10 * TOKENS
    # Of a window of 40 tokens, three blocks are needed.
    wanted = 2 * sum(10 if group.window is None else 3 for group in layout.groups)
    assert one.stats.take().data["peer_blocks"] == wanted
    assert one.sources(asked, 10 * TOKENS) == {CacheHitSource.P2P: 10 * TOKENS}
    a.kill()
    for rank, caches in enumerate(sources):
        target = tensors(layout, 99)
        reader = worker(b, layout, target, rank)
        pieces = [
            Piece(group.index, names(10)[at:], list(range(20 + at, 30)))
            for group in layout.groups
            for at in [group.first_needed(10 * TOKENS)]
        ]
        step(reader, Step(loads=[work(pieces)]))
        assert not reader.take_bad_blocks()
        for group in layout.groups:
            at = group.first_needed(10 * TOKENS)
            for layer in group.layers:
                assert torch.equal(target[layer][20 + at : 30], caches[layer][1 + at : 11]), layer
        reader.close()


def test_what_a_node_has_itself_is_not_fetched(nodes: Nodes, layout_of: Any):
    a, b = nodes
    layout = layout_of(cache(FULL))
    caches = tensors(layout, 1)
    store(worker(a, layout, caches), [Piece(0, names(8), list(range(1, 9)))])
    store(worker(b, layout, caches), [Piece(0, names(3), [1, 2, 3])])
    one = scheduler(b, layout)
    # vLLM has four itself: one more of them is with the other node, and need not come.
    assert matched(one, request(names(8)), computed=4 * TOKENS) == 4 * TOKENS
    assert one.stats.take().data["peer_blocks"] == 4
    assert matched(one, request(names(8), request_id="all")) == 8 * TOKENS
    assert one.stats.take().data["peer_blocks"] == 1
    assert matched(one, request(names(8), request_id="again")) == 8 * TOKENS
    assert "peer_blocks" not in one.stats.take().data, "nobody was asked"


def test_a_long_prompt_of_another_node_comes_whole(nodes: Nodes, layout_of: Any):
    a, b = nodes
    layout = layout_of(cache(FULL))
    store(worker(a, layout, tensors(layout, 1)), [Piece(0, names(150), [1 + at % 60 for at in range(150)])])
    assert matched(scheduler(b, layout), request(names(160))) == 150 * TOKENS


def test_blocks_that_another_node_expects_are_waited_for(nodes: Nodes, layout_of: Any):
    a, b = nodes
    layout = layout_of(cache(FULL))
    one = worker(a, layout, tensors(layout, 1))
    one.begin(Step(stores=[work([Piece(0, names(4), [1, 2, 3, 4])])]))
    asks, asked = scheduler(b, layout, wait=20.0), request(names(4))
    assert asks.matched(asked, 0) is None
    soon(lambda: asks._tracks["r"].looking.done())
    assert asks.matched(asked, 0) is None, "they are on their way"
    one.end()
    assert matched(asks, asked) == 4 * TOKENS


def test_a_request_may_wait_for_blocks_that_another_node_has_not_announced(nodes: Nodes, layout_of: Any):
    a, b = nodes
    layout = layout_of(cache(FULL))
    asks, asked = scheduler(b, layout), request(names(4), kv_transfer_params={"kvd": {"wait": 20, "from": "a"}})
    assert asks.matched(asked, 0) is None
    soon(lambda: asks._tracks["r"].looking.done())
    store(worker(a, layout, tensors(layout, 1)), [Piece(0, names(4), [1, 2, 3, 4])])
    assert matched(asks, asked) == 4 * TOKENS


@pytest.mark.parametrize("nodes", [("peers.probe_peers_max=0",)], indirect=True)
def test_a_request_may_name_the_node_that_has_its_blocks(
    nodes: Nodes, layout_of: Any, monkeypatch: pytest.MonkeyPatch
):
    a, b = nodes
    layout = layout_of(cache(FULL))
    said: list[str] = []
    monkeypatch.setattr(_scheduler.logger, "warning", lambda form, *values: said.append(form % values))
    store(worker(a, layout, tensors(layout, 1)), [Piece(0, names(4), [1, 2, 3, 4])])
    asks = scheduler(b, layout)
    for node in (None, "b"):
        asked = request(names(4), request_id=f"{node}", kv_transfer_params={"kvd": {"from": node} if node else {}})
        assert matched(asks, asked) == 0, "nobody is asked that nobody names"
    assert not said
    stray = request(names(4), request_id="stray", kv_transfer_params={"kvd": {"from": "elsewhere"}})
    assert matched(asks, stray) == 0
    assert len(said) == 1 and "'elsewhere'" in said[0] and "peers.members" in said[0], said
    assert matched(asks, request(names(4), request_id="a", kv_transfer_params={"kvd": {"from": "a"}})) == 4 * TOKENS
    assert len(said) == 1
    for wrong in ({"from": 7}, {"from": None}, {"from": ["a"]}):
        asks._track(request(names(4), request_id=str(wrong), kv_transfer_params={"kvd": wrong}))
    assert len(said) == 4


def test_a_node_that_stands_still_or_is_gone_costs_its_blocks_and_no_more(nodes: Nodes, layout_of: Any):
    a, b = nodes
    layout = layout_of(cache(FULL))
    caches = tensors(layout, 1)
    store(worker(a, layout, caches), [Piece(0, names(8), list(range(1, 9)))])
    store(worker(b, layout, caches), [Piece(0, names(3), [1, 2, 3])])
    one = scheduler(b, layout, peer_seconds=1.0)
    # They speak with each other.
    assert matched(one, request(names(4), request_id="first")) == 4 * TOKENS
    with a.standing_still():
        assert matched(one, request(names(8), request_id="still")) == 4 * TOKENS
        assert one.link.is_up, "the daemon of this node is well"
    a.kill()
    assert matched(one, request(names(8), request_id="gone")) == 4 * TOKENS
    assert one.link.is_up
    a.start()
    tries = itertools.count()
    soon(lambda: matched(one, request(names(8), request_id=f"back {next(tries)}")) == 8 * TOKENS)


def test_what_a_node_has_and_does_not_send_in_time_is_not_promised(
    nodes: Nodes, layout_of: Any, monkeypatch: pytest.MonkeyPatch
):
    a, b = nodes
    layout = layout_of(cache(FULL))
    caches = tensors(layout, 1)
    store(worker(a, layout, caches), [Piece(0, names(8), list(range(1, 9)))])
    store(worker(b, layout, caches), [Piece(0, names(3), [1, 2, 3])])
    one = scheduler(b, layout, peer_seconds=1.0)
    bring = one._bring
    with contextlib.ExitStack() as stack:
        # It says that it has them, and then stands still.
        monkeypatch.setattr(one, "_bring", lambda *all: (stack.enter_context(a.standing_still()), bring(*all)))
        assert matched(one, request(names(8))) == 3 * TOKENS
        assert one._tracks["r"].abroad, "it did not say so"
        assert one.link.is_up


def test_nobody_is_asked_where_that_is_not_wanted_or_there_is_nobody(daemon: Daemon, nodes: Nodes, layout_of: Any):
    a, b = nodes
    layout = layout_of(cache(FULL))
    store(worker(a, layout, tensors(layout, 1)), [Piece(0, names(4), [1, 2, 3, 4])])
    for one in (scheduler(b, layout, peer_seconds=0.0), scheduler(daemon, layout)):
        assert matched(one, request(names(4))) == 0
        assert one._abroad(one._tracks["r"]) is None
    assert matched(scheduler(b, layout), request(names(4))) == 4 * TOKENS


# Two nodes that share an object store, and are no peers: what "a" has sent up "b" is asked for.


def in_the_store(daemon: Daemon, layout: Any, count: int, owner: Owner = OWNER) -> None:
    """Waits until this node knows so many blocks of each group and rank to be in the object store."""
    one = link(daemon)

    def there(session: kvd.Session) -> bool:
        for group in layout.groups:
            for slice_ in range(layout.slices):
                scope = layout.scope(group, "default", owner.weights, owner.lora, owner.salt)
                binding = one.binding(session, scope, group.block_bytes, layout.part(group, slice_))
                if not all(sighting.tier for sighting in session.locate(binding, names(count))):
                    return False
        return True

    soon(lambda: one.ask(there))


@pytest.mark.parametrize("specs", [(FULL,), (FULL, WINDOW)], ids=["one group", "two groups"])
def test_blocks_of_the_object_store_are_here_and_checked_before_they_are_promised(
    sharing: Nodes, layout_of: Any, specs: Any
):
    a, b = sharing
    layout = layout_of(cache(*specs), tensor_parallel_size=2)
    sources = [tensors(layout, rank) for rank in range(2)]
    for rank, caches in enumerate(sources):
        pieces = [Piece(group.index, names(10), list(range(1, 11))) for group in layout.groups]
        store(worker(a, layout, caches, rank), pieces)
    in_the_store(b, layout, 10)
    # Who stored them is gone for good.
    a.kill()
    one, asked = scheduler(b, layout), request(names(12))
    assert matched(one, asked) == 10 * TOKENS
    # Of a window of 40 tokens, three blocks are needed.
    wanted = 2 * sum(10 if group.window is None else 3 for group in layout.groups)
    counted = one.stats.take().data
    assert counted["object_blocks"] == wanted and "peer_blocks" not in counted
    assert one.sources(asked, 10 * TOKENS) == {CacheHitSource.EXTERNAL_UNSPECIFIED: 10 * TOKENS}
    for rank, caches in enumerate(sources):
        target = tensors(layout, 99)
        reader = worker(b, layout, target, rank)
        pieces = [
            Piece(group.index, names(10)[at:], list(range(20 + at, 30)))
            for group in layout.groups
            for at in [group.first_needed(10 * TOKENS)]
        ]
        step(reader, Step(loads=[work(pieces)]))
        assert not reader.take_bad_blocks()
        for group in layout.groups:
            at = group.first_needed(10 * TOKENS)
            for layer in group.layers:
                assert torch.equal(target[layer][20 + at : 30], caches[layer][1 + at : 11]), layer
        reader.close()


def test_what_a_node_has_itself_does_not_come_from_the_object_store(sharing: Nodes, layout_of: Any):
    a, b = sharing
    layout = layout_of(cache(FULL))
    caches = tensors(layout, 1)
    store(worker(a, layout, caches), [Piece(0, names(8), list(range(1, 9)))])
    store(worker(b, layout, caches), [Piece(0, names(3), [1, 2, 3])])
    in_the_store(b, layout, 8)
    one, asked = scheduler(b, layout), request(names(8))
    assert matched(one, asked) == 8 * TOKENS
    assert one.stats.take().data["object_blocks"] == 5
    at_hand = {CacheHitSource.HOST: 3 * TOKENS, CacheHitSource.EXTERNAL_UNSPECIFIED: 5 * TOKENS}
    assert one.sources(asked, 8 * TOKENS) == at_hand
    assert matched(one, request(names(8), request_id="again")) == 8 * TOKENS
    assert "object_blocks" not in one.stats.take().data, "they are here now"
    unasked = scheduler(b, layout, peer_seconds=0.0)
    assert matched(unasked, request(names(8))) == 8 * TOKENS
    assert unasked._abroad(unasked._tracks["r"]) is None


def test_a_request_may_wait_for_blocks_that_come_by_the_object_store(sharing: Nodes, layout_of: Any):
    a, b = sharing
    layout = layout_of(cache(FULL))
    asks, asked = scheduler(b, layout), request(names(4), kv_transfer_params={"kvd": {"wait": 20}})
    assert asks.matched(asked, 0) is None
    soon(lambda: asks._tracks["r"].looking.done())
    store(worker(a, layout, tensors(layout, 1)), [Piece(0, names(4), [1, 2, 3, 4])])
    assert matched(asks, asked) == 4 * TOKENS


def test_a_pack_that_is_gone_costs_its_blocks_and_no_more(
    sharing: Nodes, layout_of: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    a, b = sharing
    layout = layout_of(cache(FULL))
    caches = tensors(layout, 1)
    store(worker(a, layout, caches), [Piece(0, names(8), list(range(1, 9)))])
    store(worker(b, layout, caches), [Piece(0, names(3), [1, 2, 3])])
    in_the_store(b, layout, 8)
    one = scheduler(b, layout)
    bring = one._bring

    def too_late(*all: Any) -> None:
        for pack in (tmp_path / "objects" / "packs").iterdir():
            pack.unlink()
        bring(*all)

    # The store has them when it is asked, and not when they are fetched.
    monkeypatch.setattr(one, "_bring", too_late)
    assert matched(one, request(names(8))) == 3 * TOKENS
    assert one.link.is_up and one._tracks["r"].abroad, "it did not say so"


ONLINE = {"quantization": "online", "dtype": "bfloat16"}
COMPUTED = [
    {},
    {"hf_overrides": {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}}},
    {"seed": 1},
    # The same numbers are kept, and others computed.
    {"dtype": "float32"},
    {"dtype": "float32", "kv_cache_dtype": "fp8_e4m3"},
    {"dtype": "bfloat16", "kv_cache_dtype": "fp8_e4m3"},
    {"dtype": "bfloat16", "kv_cache_dtype": "fp8_e5m2"},
    {"dtype": "bfloat16", "kv_cache_dtype": "fp8_e5m2", "kv_cache_dtype_skip_layers": ["0"]},
    {**ONLINE, "quantization_config": {"linear": {"weight": "fp8_per_tensor_static"}}},
    {**ONLINE, "quantization_config": {"linear": {"weight": "fp8_per_block_static"}}},
    {**ONLINE, "quantization_config": {"linear": {"weight": "fp8_per_block_static"}, "ignore": ["re:.*q_proj"]}},
    {"quantization": "fp8_per_tensor", "dtype": "bfloat16"},
    # vLLM chooses among a model's factors by the length of the run.
    {"rope": LONGROPE, "max_model_len": 1024},
    {"rope": LONGROPE, "max_model_len": 2048},
    {"rope": LONGROPE, "max_model_len": -1},
    {"rope": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}, "max_model_len": 1024},
    {"rope": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}, "max_model_len": 2048},
    {"model_impl": "transformers"},
    {"code_revision": "r2"},
    {"load_format": "tensorizer"},
    {"enable_lora": True, "lora_target_modules": ["q_proj"]},
    {"attention_config": {"indexer_kv_dtype": "mxfp4"}},
    {"additional_config": {"anything": 1}},
]


def test_engines_that_compute_differently_have_names_of_their_own(config: Any):
    named = {json.dumps(given): computed_as(config(**given)) for given in COMPUTED}
    assert len(set(named.values())) == len(COMPUTED), named


@pytest.mark.parametrize(
    "given",
    [
        {"max_model_len": 1024},
        {"max_model_len": -1},
        {"dtype": "bfloat16", "kv_cache_dtype": "bfloat16"},
        {"served_model_name": "other", "max_logprobs": 3, "gpu_memory_utilization": 0.5, "max_num_seqs": 3},
        {"enable_lora": True, "max_loras": 2, "max_lora_rank": 8},
        {"attention_backend": "CPU_ATTN"},
        {"generation_config": "vllm", "override_generation_config": {"temperature": 0.5}},
    ],
    ids=str,
)
def test_what_does_not_change_keys_and_values_is_not_in_the_name(config: Any, given: Any):
    assert computed_as(config(**given)) == computed_as(config())


def test_a_name_is_the_same_in_every_process_and_place(config: Any, model: Path, tmp_path: Path):
    program = "import json, sys; from vllm.engine.arg_utils import EngineArgs; from kvd.vllm._identity import weights_named;"
    program += "print('NAME', weights_named(EngineArgs(**json.loads(sys.argv[1])).create_engine_config()))"
    elsewhere = shutil.copytree(model, tmp_path / "copy")
    given = {**ONLINE, "quantization_config": {"linear": {"weight": "mxfp8"}}, "max_model_len": 512, "enforce_eager": True}
    argument = json.dumps({**given, "model": str(elsewhere), "skip_tokenizer_init": True, "load_format": "dummy"})
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    said = subprocess.run([sys.executable, "-c", program, argument], env=environment, capture_output=True, text=True, timeout=120)
    assert f"NAME {weights_named(config(**given))}\n" in said.stdout, said.stdout + said.stderr


def test_a_model_adapted_while_it_is_loaded_keeps_its_name(config: Any):
    made = config()
    before = computed_as(made)
    # MiniMax M2 does this, in the process of its rank.
    made.model_config.hf_config.max_model_len = 77
    assert computed_as(made) == before


def test_draft_models_are_in_the_name(config: Any, model: Path, tmp_path: Path):
    def named(weights: float) -> str:
        save_file({"a": torch.full((4,), weights)}, draft / "model.safetensors")
        made, drafting = config(), config(model=str(draft)).model_config
        made.speculative_config = SimpleNamespace(method="draft_model", draft_model_config=drafting)
        return computed_as(made)

    draft = shutil.copytree(model, tmp_path / "draft")
    assert len({computed_as(config()), named(0.0), named(1.0)}) == 3


def test_weights_go_by_what_cannot_change_under_their_name(config: Any, tmp_path: Path):
    made = config(load_format="auto")
    with pytest.raises(ValueError, match='weights that are not in its directory: say which weights: "weights" in the extra'):
        weights_named(made)
    assert weights_named(made, "mine").startswith("mine:")
    hub = made.model_config
    hub.model = "some/model"
    with pytest.raises(ValueError, match="model some/model of unknown revision"):
        weights_named(made)
    hub.revision = "main"
    assert weights_named(made).startswith("main:")
    # A branch moves.
    hub.hf_config._commit_hash = "c1"
    assert weights_named(made).startswith("c1:")

    tensors = {"a": torch.zeros(1 << 20), "b": torch.zeros(3), "c": torch.zeros(1 << 16)}
    files = ("model.py", "hf_quant_config.json", "preprocessor_config.json", "tokenizer.json")
    digests = {}
    for changed in ("", *tensors, *files):
        folder = tmp_path / changed.replace(".", "-")
        folder.mkdir(exist_ok=True)
        save_file({name: one + (name == changed) for name, one in tensors.items()}, folder / "model.safetensors")
        for file in files:
            (folder / file).write_text(f"{file == changed}")
        digests[changed] = weights_of(str(folder))
    assert digests.pop("tokenizer.json") == digests[""]
    assert len(set(digests.values())) == len(digests)


def test_numbers_that_torch_calls_bytes_are_called_by_what_they_are(layout_of: Any):
    bare = dataclasses.replace(FULL, dtype=torch.uint8, kv_quant_mode=KVQuantMode.FP8_PER_TENSOR)
    for kept in ("fp8_e4m3", "fp8_e5m2", "fp8_per_token_head"):
        assert layout_of(cache(bare), kv_cache_dtype=kept).groups[0].dtype == kept
    unsaid = dataclasses.replace(FULL, dtype=torch.uint8)
    assert layout_of(cache(unsaid), kv_cache_dtype="fp8_e4m3").groups[0].dtype == "uint8:fp8_e4m3"
    # A layer that was left out of it.
    assert layout_of(cache(FULL), kv_cache_dtype="fp8_e4m3").groups[0].dtype == "bfloat16"


def test_blocks_of_other_machines_and_versions_have_names_of_their_own(layout_of: Any, monkeypatch: pytest.MonkeyPatch):
    usual = layout_of(cache(FULL)).groups[0].layout
    assert usual.startswith("vllm-0.32,cpu-")
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: "amx" not in usual)
    assert layout_of(cache(FULL)).groups[0].layout != usual
    monkeypatch.setattr(vllm, "__version__", "0.33.1")
    assert layout_of(cache(FULL)).groups[0].layout.startswith("vllm-0.33,")


def test_events_say_where_blocks_of_this_engine_went(daemon: Daemon, layout_of: Any):
    layout = layout_of(cache(FULL))
    events = Events(link(daemon), layout, "default")
    one, hashes = worker(daemon, layout, tensors(layout, 1)), names(3)
    asked = request(hashes, all_token_ids=list(range(3 * TOKENS + 5)))
    events.remember(asked, layout.groups[0], 1, hashes[1:], OWNER)
    store(one, [Piece(0, hashes, [1, 2, 3])])
    seen: list[Any] = []

    def seen_all(count: int) -> bool:
        seen.extend(events.take())
        return len(seen) >= count

    soon(lambda: seen_all(2))
    assert all(isinstance(event, BlockStored) and event.medium == "CPU" for event in seen), seen
    first = seen[0]
    assert (first.block_hashes, first.parent_block_hash) == ([number(hashes[1])], number(hashes[0]))
    assert (first.token_ids, first.block_size) == (list(range(TOKENS, 2 * TOKENS)), TOKENS)
    session = daemon.client().session("other")
    assert session.evict(one._binding(session, OWNER, layout.groups[0]), hashes[2:]).evicted == 1
    soon(lambda: seen_all(3))
    # A life of the daemon that lacks blocks says so by its inventory.
    daemon.kill()
    shutil.rmtree(daemon.memory / "m")
    daemon.start()
    soon(lambda: seen_all(4))
    assert [type(event) for event in seen[2:]] == [BlockRemoved] * 2
    assert [event.block_hashes for event in seen[2:]] == [[number(hashes[2])], [number(hashes[1])]]
    events.close()


def number(hash_: bytes) -> int:
    """How vLLM's events name it."""
    return int.from_bytes(hash_[-8:], "big")


def test_without_a_daemon_nothing_is_promised_and_nothing_fails(daemon: Daemon, layout_of: Any):
    layout = layout_of(cache(FULL))
    caches = tensors(layout, 1)
    one, asks = worker(daemon, layout, caches), scheduler(daemon, layout)
    store(one, [Piece(0, names(4), [1, 2, 3, 4])])
    assert matched(asks, request(names(4), request_id="a")) == 4 * TOKENS
    daemon.kill()
    soon(lambda: matched(asks, request(names(4), request_id="b")) == 0)
    step(one, Step(loads=[work([Piece(0, names(4), [11, 12, 13, 14])])]))
    # What lies in shared memory can be read without the daemon; then it is right.
    if one.take_bad_blocks() != {11, 12, 13, 14}:
        assert all(torch.equal(tensor[11:15], tensor[1:5]) for tensor in caches.values())
    step(one, Step(stores=[work([Piece(0, names(3, 1), [5, 6, 7])])], failures_seen=1))
    assert one.take_stats().data["unstored_blocks"] == 3
    daemon.start()
    found = [0]

    def again() -> bool:
        found[0] += 1
        return matched(asks, request(names(4), request_id=f"again {found[0]}")) == 4 * TOKENS

    soon(again)

    def loads() -> bool:
        step(one, Step(loads=[work([Piece(0, names(4), [11, 12, 13, 14])])]))
        return not one.take_bad_blocks()

    soon(loads)
    assert all(torch.equal(tensor[11:15], tensor[1:5]) for tensor in caches.values())


@pytest.mark.parametrize(
    ("given", "spec", "named"),
    [
        ({"pipeline_parallel_size": 2}, FULL, "pipeline_parallel_size = 2"),
        ({"decode_context_parallel_size": 2}, FULL, "decode_context_parallel_size"),
        ({}, dataclasses.replace(FULL, tokens_per_state=4), "tokens_per_state = 4"),
        ({}, MambaSpec(block_size=TOKENS, shapes=((2, 2),), dtypes=(torch.float32,)), "MambaSpec"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(layout_of: Any, given: Any, spec: Any, named: str):
    with pytest.raises(ValueError, match=named):
        layout_of(cache(spec), **given)


def test_scales_of_one_process_are_refused_by_name(config: Any):
    made = config(kv_cache_dtype="fp8_e4m3")
    made.cache_config.calculate_kv_scales = True
    with pytest.raises(ValueError, match="calculate_kv_scales"):
        kvd_layout(made, cache(FULL))


def test_attention_backends_of_another_order_are_refused_by_name(
    config: Any, layout_of: Any, monkeypatch: pytest.MonkeyPatch
):
    layout = layout_of(cache(FULL))
    for name, known in (("CPUAttentionBackend", True), ("RocmAttentionBackend", False), ("AiterFlashAttentionBackend", False)):
        monkeypatch.setattr(_layout, "get_current_attn_backends", lambda config, layers: [type(name, (), {})])
        if known:
            check_backends(config(), layout)
            continue
        with pytest.raises(ValueError, match=f"the attention backend {name}"):
            check_backends(config(), layout)


@pytest.mark.parametrize(
    "shape", [(BLOCKS, TOKENS, 2, 64), (2, BLOCKS, 2, TOKENS, 32), (BLOCKS, 2, TOKENS, 32)], ids=str
)
def test_tensors_of_another_layout_are_refused_by_name(layout_of: Any, shape: tuple[int, ...]):
    layout = layout_of(cache(FULL, layers=1))
    with pytest.raises(ValueError, match=r"layer group0\.layer0: tensor"):
        pages_of(layout.groups[0], {"group0.layer0": torch.zeros(shape, dtype=torch.bfloat16)})


def test_settings_are_checked():
    assert settings(Settings, {"socket": "/x", "wait": 3, "deadline": 600}, "extra").wait == 3
    with pytest.raises(ValueError, match="unknown key 'sockt'; did you mean 'socket'"):
        settings(Settings, {"sockt": "/x"}, "extra")
    with pytest.raises(ValueError, match="'wait' is 'long'; expected float"):
        settings(Settings, {"wait": "long"}, "extra")
    with pytest.raises(ValueError, match="'layerwise' is 1; expected bool"):
        settings(Settings, {"layerwise": 1}, "extra")


@pytest.mark.parametrize("kind", [Settings, TierSettings])
def test_settings_that_cannot_work_are_refused_by_name(kind: Any):
    wrong: list[tuple[str, Any]] = [("tenant", one) for one in ("Team-A", "", "a" * 64, "a b", "a\n")]
    wrong += [("deadline", one) for one in (0, 0.0, -1.0, float("nan"), float("inf"), 1e9, 10**400)]
    wrong += [("staging_bytes", one) for one in (0, -1, 1 << 60)]
    wrong += [("model", "x" * 1025), ("weights", "x" * 1025), ("socket", "/" * 5000)]
    seconds = ("load_seconds", "match_seconds", "job_seconds")
    wrong += [(name, one) for name in seconds if hasattr(kind, name) for one in (0, -1.0, float("nan"), 601)]
    wrong += [(name, one) for name in ("wait", "request_wait_max") if hasattr(kind, name) for one in (-5, float("nan"), 1e9)]
    wrong += [("threads", one) for one in (0, -1, 1000) if hasattr(kind, "threads")]
    for name, value in wrong:
        with pytest.raises(ValueError, match=f"^extra: '{name}' "):
            settings(kind, {name: value}, "extra")


def connector(config: Any, role: KVConnectorRole, spec: Any = FULL, kv_role: str = "kv_both", **extra: Any) -> KvdConnector:
    made = config()
    made.kv_transfer_config = KVTransferConfig(
        kv_connector="KvdConnector", kv_connector_module_path="kvd.vllm", kv_role=kv_role, kv_connector_extra_config=extra
    )
    return KvdConnector(made, role, cache(spec))


def test_what_cannot_be_a_name_is_refused_when_the_engine_starts(config: Any, tmp_path: Path):
    scheduler = KVConnectorRole.SCHEDULER
    with pytest.raises(ValueError, match="'tenant' is 'Team-A'; expected the form"):
        connector(config, scheduler, tenant="Team-A")
    made = config()
    made.model_config.model = "x" * 1025
    with pytest.raises(ValueError, match="`model` has 1025 bytes"):
        connector(lambda: made, scheduler)


def test_staging_that_holds_no_block_is_refused_with_both_numbers(config: Any):
    block_bytes = 3 * 2 * TOKENS * 64 * 2
    role = KVConnectorRole.SCHEDULER
    with pytest.raises(ValueError, match=f"'staging_bytes' is 10,000, and a block of group 0 has {block_bytes:,}"):
        connector(config, role, staging_bytes=10_000)
    connector(config, role, staging_bytes=block_bytes).shutdown()
    # It announces nothing.
    connector(config, role, kv_role="kv_consumer", staging_bytes=10_000).shutdown()


def test_whatever_a_call_raises_the_engine_goes_on(daemon: Daemon, layout_of: Any, caplog: pytest.LogCaptureFixture):
    layout, one = layout_of(cache(FULL)), link(daemon)
    for wrong in (ValueError, OverflowError, TypeError, RuntimeError, kvd.errors.Invalid):

        def fail(session: kvd.Session, wrong: Any = wrong) -> None:
            raise wrong("that")

        assert one.ask(fail) is None
    # A salt that no scope can hold, with events on.
    asked = request(names(3), cache_salt="s" * 2000, all_token_ids=list(range(3 * TOKENS + 5)))
    events = Events(link(daemon), layout, "default")
    asks = scheduler(daemon, layout, events=events)
    assert matched(asks, asked) == 0
    assert asks.step(planned(3)).stores, "it is offered, and comes to nothing"
    events.remember(SimpleNamespace(), layout.groups[0], 0, names(3), OWNER)
    store(worker(daemon, layout, tensors(layout, 1)), [Piece(0, names(3), [1, 2, 3])], Owner("w", salt="s" * 2000))
    asks.close()


def test_what_a_client_says_wrongly_is_cut_short_in_the_log(daemon: Daemon, layout_of: Any, monkeypatch: pytest.MonkeyPatch):
    said: list[str] = []
    monkeypatch.setattr(_scheduler.logger, "warning", lambda form, *values: said.append(form % values))
    wrong = request(names(4), kv_transfer_params={"kvd": {"wait": "x" * 10_000}})
    assert scheduler(daemon, layout_of(cache(FULL)))._track(wrong).wait == 0
    assert len(said) == 1 and len(said[0]) < 400


def test_the_name_of_a_session_may_be_of_any_length(daemon: Daemon):
    assert link(daemon, "ü" * 500).ask(lambda session: session.is_connected) is not None
