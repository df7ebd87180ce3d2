"""Real vLLM on real kvd: what an operator would try, each a story with an end that can be seen.

    stories.py [--door connector|lmcache|both] [--all] [--only NAME ...]

A tiny random model on one CPU core; same text means the greedy answer is the same, word for word, as when nothing was
loaded. ``--door connector`` is :mod:`kvd.vllm`; ``--door lmcache`` is vLLM's own LMCache connector, unchanged, pointed
at kvd. ``--all`` adds what takes long: several KV cache groups, LoRA, tensor parallelism. A folder of logs is kept when
a story fails.
"""

import argparse
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from processes import Answer, Kvd, Vllm, free_port, soon
from tiny_model import words, write_adapter, write_model

PAGE = 4096


@dataclass
class Door:
    """A way into kvd."""

    name: str
    step: int
    """Prompt tokens that are found or not together."""
    notices: float
    """Seconds in which an engine must not store after kvd went away, or it ends."""
    settings: list[str]
    """Of kvd."""

    def config(self, kvd: Kvd, **extra: Any) -> dict[str, Any]:
        """``--kv-transfer-config``."""
        raise NotImplementedError


@dataclass
class Connector(Door):
    name: str = "connector"
    step: int = 32
    notices: float = 0
    settings: list[str] = field(default_factory=list)
    module: str = "kvd.vllm"
    connector: str = "KvdConnector"

    def config(self, kvd: Kvd, role: str = "kv_both", **extra: Any) -> dict[str, Any]:
        return {
            "kv_connector": self.connector,
            "kv_connector_module_path": self.module,
            "kv_role": role,
            "kv_connector_extra_config": {"socket": str(kvd.run), **extra},
        }


@dataclass
class Lmcache(Door):
    name: str = "lmcache"
    step: int = 64
    # Until two heartbeats have failed, LMCache's connector goes on, and lets a broken call end the engine.
    notices: float = 3
    settings: list[str] = field(default_factory=list)
    port: int = field(default_factory=free_port)

    def __post_init__(self) -> None:
        self.settings = [f"lmcache.listen=127.0.0.1:{self.port}", f"lmcache.chunk_tokens={self.step}"]

    def config(self, kvd: Kvd, role: str = "kv_both", **extra: Any) -> dict[str, Any]:
        return {
            "kv_connector": "LMCacheMPConnector",
            "kv_role": role,
            "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": {
                "lmcache.mp.host": "grpc://127.0.0.1",
                "lmcache.mp.port": self.port,
                "lmcache.mp.mq_timeout": 5.0,
                "lmcache.mp.heartbeat_interval": 1.0,
                "lmcache.mp.save_decode_cache": True,
                **extra,
            },
        }


class World:
    """A folder, a daemon, models, and whatever engines are up."""

    def __init__(self, door: Door, folder: Path, models: Path, thorough: bool):
        """``thorough``: take the time."""
        self.door, self.folder, self.models, self.thorough = door, folder, models, thorough
        self.kvd = Kvd(folder / "kvd", *door.settings)
        self.kvds: dict[str, Kvd] = {}
        """Of other nodes."""
        self.engines: dict[str, Vllm] = {}
        self._prompts = 100

    def prompt(self, count: int = 250) -> str:
        """Words that nobody has asked before: some 3 tokens each."""
        self._prompts += 1
        return words(self._prompts, count)

    def model(self, arch: str = "qwen3", seed: int = 7) -> Path:
        folder = self.models / f"{arch}-{seed}" / "tiny"
        if not folder.exists():
            write_model(folder, arch, seed)
        return folder

    def engine(self, name: str, *arguments: str, **more: Any) -> Vllm:
        """Starts an engine and does not wait for it."""
        more.setdefault("connector", self.door.config(self.kvd))
        more.setdefault("model", self.model())
        core = len(self.engines)
        self.engines[name] = Vllm(self.folder, name, more.pop("model"), more.pop("connector"), *arguments, core=core, **more)
        return self.engines[name]

    @property
    def spoil(self) -> Path:
        """While this file exists, the second engine stores zeroes."""
        return self.folder / "spoil"

    def second_engine(self) -> Vllm:
        """An engine beside the first. At our own door it can be made to spoil what it stores."""
        config = self.door.config(self.kvd)
        if self.door.name == "connector":
            config = Connector(module="spoiler", connector="SpoilingConnector").config(self.kvd)
        return self.engine("B", connector=config, environment={"KVD_SPOIL": str(self.spoil)})

    def stop(self, name: str, how: signal.Signals = signal.SIGTERM) -> None:
        self.engines.pop(name).end(how)

    def whole(self, answer: Answer) -> int:
        """Prompt tokens that can be loaded: the last one is computed always."""
        return (answer.tokens - 1) // self.door.step * self.door.step

    def stop_kvd(self, how: signal.Signals) -> None:
        self.kvd.kill(how)
        time.sleep(self.door.notices)

    def tell(self, words: str) -> None:
        print(f"    {words}", flush=True)

    def told(self, what: str, answer: Answer) -> None:
        self.tell(
            f"{what}: {answer.computed} computed, {answer.cached} cached, {answer.external} from kvd,"
            f" TTFT {answer.ttft * 1e3:.0f} ms"
        )

    def cold(self, engine: Vllm, prompt: str, **more: Any) -> Answer:
        """Asks for the first time, when nothing can be loaded, and waits until it is stored."""
        before = self.kvd.status()["put_blocks"] if self.kvd.process else 0
        answer = engine.ask(prompt, **more)
        assert answer.external == 0, f"{answer.external} tokens were loaded of what nobody had stored"
        if self.kvd.process:
            wanted = answer.tokens // self.door.step
            soon(lambda: self.kvd.status()["put_blocks"] >= before + wanted, "the prompt is stored")
            # What came in may have been an earlier prompt's.
            soon(lambda: not self.held("pending"), "what is announced is stored")
        return answer

    def again(self, engine: Vllm, prompt: str, cold: Answer, what: str, **more: Any) -> Answer:
        """Asks again with vLLM's own cache empty: all from kvd, same text."""
        engine.reset()
        answer = engine.ask(prompt, **more)
        self.told(what, answer)
        same(answer, cold)
        # LMCache's connector loads a prompt of whole chunks to its last token but one.
        assert answer.external >= self.whole(answer), f"{answer.external} loaded of {self.whole(answer)}"
        return answer

    def disk_places(self) -> dict[str, str]:
        """Where on disk each block is; empty while it is not there."""
        blocks = self.kvd.ask("get", "blocks", "--limit", "10000")["blocks"]
        return {block["key"]: block["disk_location"] for block in blocks}

    def held(self, what: str) -> int:
        """Blocks that kvd holds for engines: ``"open"`` for reading, or ``"pending"``, announced and not stored."""
        status = self.kvd.status()
        count: int = status["leases"] + status["reading"] if what == "open" else status["pending"]
        return count

    def nothing_held(self, seconds: float = 30) -> None:
        soon(lambda: not self.held("open") and not self.held("pending"), "all is given back", seconds)

    def close(self) -> None:
        for engine in self.engines.values():
            engine.end(signal.SIGKILL)
        for kvd in (self.kvd, *self.kvds.values()):
            kvd.close()


def same(answer: Answer, cold: Answer) -> None:
    assert answer.text == cold.text, f"the text changed: {cold.text!r} became {answer.text!r}"


# The stories, in order. Each gets the world as those before it left it; "A" is an engine that is up.


def the_same_prompt_again_after_the_prefix_cache_was_reset(world: World) -> None:
    engine, prompt = world.engines["A"], world.prompt()
    cold = world.cold(engine, prompt, tokens=100)
    world.told("first", cold)
    world.again(engine, prompt, cold, "again", tokens=100)
    # What was decoded is stored as well: a conversation goes on where it ended.
    engine.reset()
    longer = engine.ask([*cold.ids, 300, 301])
    world.told("the conversation goes on", longer)
    assert longer.external >= world.whole(cold) + 64, "decoded blocks were not found"


def many_at_once_with_a_common_prefix(world: World) -> None:
    """They are looked up while each fills vLLM's own cache under the others."""
    engine, common = world.engines["A"], world.prompt(350)
    prompts = [f"{common} {world.prompt(60)}" for _ in range(6)]
    cold = [world.cold(engine, prompts[0])] + [engine.ask(prompt) for prompt in prompts[1:]]
    world.nothing_held()
    for _ in range(3):
        engine.reset()
        before = engine.sources()
        answers: dict[int, Answer] = {}

        def ask(at: int, into: dict[int, Answer] = answers) -> None:
            into[at] = engine.send(prompts[at])

        busy = threading.Thread(target=engine.send, args=(world.prompt(600),), kwargs={"tokens": 1})
        asking = [threading.Thread(target=ask, args=(at,)) for at in range(len(prompts))]
        for thread in [busy, *asking]:
            thread.start()
        for thread in [busy, *asking]:
            thread.join()
        for at, answer in sorted(answers.items()):
            same(answer, cold[at])
        assert len(answers) == len(prompts)
        loaded = engine.sources()["external_kv_transfer"] - before["external_kv_transfer"]
        assert loaded, "none of it came from kvd"
    world.tell(f"{len(prompts)} at once, three times: the same text each time; {loaded:.0f} tokens from kvd the last time")


def kvd_killed_between_the_two(world: World) -> None:
    engine, prompt = world.engines["A"], world.prompt()
    cold = world.cold(engine, prompt)
    world.stop_kvd(signal.SIGKILL)
    world.kvd.start()
    comes_back(world, engine)
    world.again(engine, prompt, cold, "after kill -9 of kvd")


def kvd_down_while_the_engine_runs(world: World) -> None:
    engine, prompt, other = world.engines["A"], world.prompt(), world.prompt()
    cold = world.cold(engine, prompt)
    world.stop_kvd(signal.SIGKILL)
    engine.reset()
    without = engine.ask(prompt)
    world.told("kvd is down", without)
    same(without, cold)
    assert without.external == 0
    unseen = world.cold(engine, other)
    world.kvd.start()
    comes_back(world, engine)
    world.again(engine, prompt, cold, "kvd is back")
    engine.reset()
    same(world.cold(engine, other), unseen)
    world.again(engine, other, unseen, "what was asked while it was down")


def comes_back(world: World, engine: Vllm) -> None:
    """Waits until the engine uses kvd again, by asking what is not looked at."""
    for _ in range(60):
        prompt = world.prompt(40)
        engine.ask(prompt, tokens=1)
        engine.reset()
        if engine.ask(prompt, tokens=1).external:
            return
        time.sleep(0.5)
    raise AssertionError("the engine does not find kvd again")


def one_stored_block_damaged_on_disk(world: World) -> None:
    engine, prompt = world.engines["A"], world.prompt()
    # So little host memory that blocks have to go to disk.
    world.stop_kvd(signal.SIGTERM)
    world.kvd.begin_anew(host="16MiB")
    comes_back(world, engine)
    before = set(world.disk_places())
    cold = world.cold(engine, prompt)
    mine = sorted(set(world.disk_places()) - before)
    while not all(world.disk_places()[key] for key in mine):
        world.cold(engine, world.prompt(400), tokens=1)
    world.stop_kvd(signal.SIGTERM)
    world.kvd.forget_memory()
    world.kvd.start()
    comes_back(world, engine)
    world.again(engine, prompt, cold, "after a restart that lost host memory")
    places = world.disk_places()
    world.stop_kvd(signal.SIGTERM)
    world.kvd.forget_memory()
    damage(world.kvd.data, places[mine[len(mine) // 2]])
    world.kvd.start()
    comes_back(world, engine)
    engine.reset()
    answer = engine.ask(prompt)
    world.told("one block damaged", answer)
    same(answer, cold)
    assert answer.external < world.whole(answer), "the damage was not met"
    assert world.kvd.status()["checksum_failures"] >= 1
    # It was computed again, and stored again.
    world.nothing_held()
    world.again(engine, prompt, cold, "after it was computed again")
    world.stop_kvd(signal.SIGTERM)
    world.kvd.begin_anew(host="256MiB")
    comes_back(world, engine)


def place_of(location: str) -> tuple[int, ...]:
    """Segment and page."""
    numbers = "".join(one if one.isdigit() else " " for one in location).split()
    return tuple(map(int, numbers))


def damage(data: Path, location: str) -> None:
    """Changes a byte of the block there."""
    segment, page = place_of(location)
    (path,) = data.glob(f"shard-0/segment-{segment:08}.kv")
    with path.open("r+b") as file:
        file.seek(page * PAGE + 100)
        byte = file.read(1)
        file.seek(page * PAGE + 100)
        file.write(bytes([byte[0] ^ 0x40]))


def two_tenants_with_different_salts(world: World) -> None:
    engine, prompt = world.engines["A"], world.prompt()
    cold = world.cold(engine, prompt, cache_salt="one")
    engine.reset()
    other = world.cold(engine, prompt, cache_salt="two")
    same(other, cold)
    engine.reset()
    same(world.cold(engine, prompt), cold)
    world.again(engine, prompt, cold, "each finds its own", cache_salt="one")


def an_engine_killed_in_mid_store_and_a_new_process(world: World) -> None:
    prompt = world.prompt()
    cold = world.cold(world.engines["A"], prompt)
    half = killed_while(world, "A", "pending")
    # Both at once: it takes them long enough.
    world.engine("A")
    world.second_engine()
    for name in ("A", "B"):
        world.engines[name].wait_until_ready()
    # No half block: what is found is right, and what is not is computed.
    engine = world.engines["A"]
    found = engine.ask(half)
    world.told("what was being stored, in a new process", found)
    world.again(engine, half, found, "again")
    world.again(engine, prompt, cold, "what was stored before, in a new process")


def an_engine_killed_in_mid_load(world: World) -> None:
    if "B" not in world.engines:
        world.second_engine().wait_until_ready()
    half = killed_while(world, "B", "open")
    engine = world.engines["A"]
    engine.reset()
    answer = engine.ask(half)
    world.told("another engine", answer)
    assert answer.external >= world.whole(answer)


def killed_while(world: World, name: str, what: str) -> str:
    """Kills the engine with -9 at a moment when kvd holds something for it. The prompt that it worked on."""
    engine, prompt = world.engines[name], world.prompt(1000)
    if what == "open":
        world.cold(engine, prompt, tokens=1)
    for _ in range(30):
        engine.reset()
        asked = threading.Thread(target=quietly, args=(lambda: engine.send(prompt, tokens=1),))
        asked.start()
        while asked.is_alive():
            # It runs for a moment, and stands still while we look.
            time.sleep(0.002)
            engine.process.send(signal.SIGSTOP)
            if held := world.held(what):
                killed = time.monotonic()
                engine.process.send(signal.SIGKILL)
                world.nothing_held(1)
                took = (time.monotonic() - killed) * 1e3
                world.tell(f"killed with {held} blocks {what}; all back after {took:.0f} ms")
                asked.join(30)
                world.stop(name, signal.SIGKILL)
                world.kvd.ctl("verify")
                assert world.kvd.status()["checksum_failures"] == 0
                return prompt
            engine.process.send(signal.SIGCONT)
        if what == "pending":
            prompt = world.prompt(1000)
    raise AssertionError(f"it was never caught with blocks {what}")


def quietly(call: Callable[[], Any]) -> None:
    try:
        call()
    except OSError:
        pass


def damage_that_keeps_checksums_right_changes_the_text(world: World) -> None:
    """The control: were wrong bytes ever loaded, these stories would see it."""
    if world.door.name != "connector":
        world.tell("the bytes are spoilt in our own connector; told at that door alone")
        return
    if "B" not in world.engines:
        world.second_engine().wait_until_ready()
    engine, prompt = world.engines["B"], world.prompt()
    world.spoil.touch()
    cold = world.cold(engine, prompt)
    world.spoil.unlink()
    engine.reset()
    answer = engine.ask(prompt)
    world.told("zeroes with right checksums", answer)
    assert answer.external >= world.whole(answer)
    assert answer.text != cold.text, "zeroes gave the same text: these stories cannot fail"


def two_models_with_equal_token_ids(world: World) -> None:
    engine, prompt = world.engines["A"], world.prompt()
    cold = world.cold(engine, prompt)
    # Of the same name and the same shapes, in another folder.
    other = world.engine("other", model=world.model(seed=8))
    other.wait_until_ready()
    answer = world.cold(other, prompt)
    world.told("another model", answer)
    assert answer.text != cold.text, "these models cannot be told apart"
    world.again(other, prompt, answer, "another model again")
    world.again(engine, prompt, cold, "the first model again")
    world.stop("other")


def prefill_engine_and_decode_engine(world: World) -> None:
    if "B" not in world.engines:
        world.second_engine().wait_until_ready()
    prefill, decode, prompt = world.engines["A"], world.engines["B"], world.prompt(1000)
    alone = world.cold(prefill, prompt, tokens=32, cache_salt="alone")
    world.told("one engine alone", alone)
    prefill.reset()
    before = world.kvd.status()["put_blocks"]
    asked = threading.Thread(target=lambda: prefill.send(prompt, tokens=1))
    if world.door.name == "connector":
        # Asked first: it waits for what nobody has begun to compute.
        threading.Timer(0.3, asked.start).start()
        answer = decode.ask(prompt, tokens=32, kv_transfer_params={"kvd": {"wait": 60}})
    else:
        asked.start()

        def arriving() -> bool:
            status = world.kvd.status()
            return bool(status["pending"]) or status["put_blocks"] > before

        soon(arriving, "the prefill engine stores")
        answer = decode.ask(prompt, tokens=32)
    asked.join()
    world.told("the decode engine", answer)
    same(answer, alone)
    assert answer.external, "the decode engine computed it all"
    if world.door.name == "connector":
        assert answer.external >= world.whole(answer)


def prefill_on_one_node_and_decode_on_another(world: World) -> None:
    """Node a has the first engine's kvd, node b one of its own with an engine of its own."""
    if world.door.name != "connector" and not world.thorough:
        world.tell("told at this door with --all, or by name")
        return
    if "B" in world.engines:
        # Two engines on one core: one that waits spins, and the other hardly moves.
        world.stop("B")
    prefill, alone, door = world.engines["A"], world.kvd.settings, type(world.door)()
    ports = {"a": free_port(), "b": free_port()}
    members = "peers.members=" + ",".join(f"{name}=127.0.0.1:{port}" for name, port in ports.items())
    settings = {name: (f"node.name={name}", f"peers.listen=127.0.0.1:{port}", members) for name, port in ports.items()}
    world.stop_kvd(signal.SIGTERM)
    world.kvd.settings = (*alone, *settings["a"])
    world.kvd.start()
    other = world.kvds["b"] = Kvd(world.folder / "kvd-b", *door.settings, *settings["b"])
    other.start()
    decode = world.engine("far", connector=door.config(other))
    decode.wait_until_ready()
    comes_back(world, prefill)

    def came() -> int:
        """Blocks that node b has from node a."""
        (peer,) = other.ask("get", "peers")["peers"]
        assert peer["node"] == "a", peer
        return int(peer["blocks_in"])

    prompt, lost, unseen = world.prompt(), world.prompt(), world.prompt()
    cold = world.cold(prefill, prompt, tokens=32)
    answer = decode.ask(prompt, tokens=32)
    world.told("what the other node has", answer)
    same(answer, cold)
    assert answer.external >= world.whole(answer), f"{answer.external} loaded of {world.whole(answer)}"
    assert came() == world.whole(answer) // world.door.step

    if world.door.name == "connector":
        # Asked first: it waits for what nobody has begun to compute.
        before, long = came(), world.prompt(1000)
        asked = threading.Timer(0.3, prefill.send, args=(long,), kwargs={"tokens": 32})
        asked.start()
        answer = decode.ask(long, tokens=32, kv_transfer_params={"kvd": {"wait": 60, "from": "a"}})
        asked.join()
        world.told("what the other node is about to compute", answer)
        assert answer.external >= world.whole(answer)
        assert came() == before + world.whole(answer) // world.door.step
        prefill.reset()
        same(prefill.ask(long, tokens=32, cache_salt="alone"), answer)

    cold_lost = world.cold(prefill, lost)
    world.stop_kvd(signal.SIGKILL)
    begun = time.monotonic()
    without = decode.ask(lost, timeout=60)
    world.told(f"the other node is gone ({time.monotonic() - begun:.1f} s)", without)
    same(without, cold_lost)
    assert without.external == 0
    same(decode.ask(unseen), prefill.ask(unseen))
    decode.reset()
    again = decode.ask(prompt, tokens=32)
    world.told("what had come before", again)
    same(again, cold)
    assert again.external >= world.whole(again)

    world.stop("far")
    world.kvds.pop("b").close()
    world.kvd.settings = alone
    world.kvd.start()
    comes_back(world, prefill)


def two_nodes_that_share_an_object_store_and_nothing_else(world: World) -> None:
    """Node a has the first engine's kvd, and is gone for good when an engine of node b asks for what it had."""
    if world.door.name != "connector" and not world.thorough:
        world.tell("told at this door with --all, or by name")
        return
    if "B" in world.engines:
        # Two engines on one core: one that waits spins, and the other hardly moves.
        world.stop("B")
    prefill, alone, door = world.engines["A"], world.kvd.settings, type(world.door)()
    # What comes in goes up at once.
    store = (f"object.store={world.folder / 'objects'}", "object.reads_min=0", "object.age_min=0s")
    store = (*store, "object.pack_wait=200ms", "object.refresh=200ms")
    world.stop_kvd(signal.SIGTERM)
    world.kvd.settings = (*alone, "node.name=a", *store)
    world.kvd.start()
    other = world.kvds["b"] = Kvd(world.folder / "kvd-shares", *door.settings, "node.name=b", *store)
    other.start()
    decode = world.engine("far", connector=door.config(other))
    decode.wait_until_ready()
    comes_back(world, prefill)

    def shared(what: str) -> int:
        """What node b says of the store."""
        (tier,) = (one for one in other.status()["tiers"] if one["tier"] == "object")
        return int(tier[what])

    prompt, before = world.prompt(), set(world.disk_places())
    cold = world.cold(prefill, prompt, tokens=32)
    # By name: what earlier stories stored goes up as well, as it leaves host memory.
    stored = set(world.disk_places()) - before
    assert len(stored) >= world.whole(cold) // world.door.step, f"{len(stored)} blocks of the prompt are listed"
    soon(lambda: all(other.ask("why", key).get("pack") for key in stored), "the other node knows of it all")
    world.stop_kvd(signal.SIGKILL)
    answer = decode.ask(prompt, tokens=32)
    world.told("what a node that is gone had sent up", answer)
    same(answer, cold)
    assert answer.external >= world.whole(answer), f"{answer.external} loaded of {world.whole(answer)}"
    assert shared("bytes_read"), "they did not come from the store"

    world.stop("far")
    world.kvds.pop("b").close()
    world.kvd.settings = alone
    world.kvd.start()
    comes_back(world, prefill)


def several_groups_of_kv_cache(world: World) -> None:
    """Layers that see everything, and layers that see a window of 128 tokens."""
    if world.door.name != "connector":
        world.tell("LMCache's connector decides that itself; told at our own door alone")
        return
    engine = world.engine("groups", model=world.model("gemma3"))
    engine.wait_until_ready()
    prompt = world.prompt()
    cold = engine.ask(prompt)
    assert cold.external == 0
    world.nothing_held()
    world.again(engine, prompt, cold, "two groups")
    world.kvd.kill(signal.SIGKILL)
    engine.reset()
    same(engine.ask(prompt), cold)
    world.kvd.start()
    comes_back(world, engine)
    world.again(engine, prompt, cold, "two groups, after kill -9 of kvd")
    world.stop("groups")


def adapters_do_not_share(world: World) -> None:
    """Two LoRA adapters and the model without one."""
    if world.door.name != "connector":
        world.tell("LMCache's connector leaves adapters to vLLM's hashes; told at our own door alone")
        return
    adapters = [write_adapter(world.models / "adapters" / name, seed) for name, seed in (("one", 1), ("two", 2))]
    arguments = ["--enable-lora", "--max-lora-rank", "8", "--max-loras", "2", "--lora-modules"]
    engine = world.engine("lora", *arguments, *(f"{path.name}={path}" for path in adapters))
    engine.wait_until_ready()
    prompt = world.prompt()
    cold = {}
    for model in ("tiny", "one", "two"):
        engine.reset()
        cold[model] = world.cold(engine, prompt, model=model)
    assert len({answer.text for answer in cold.values()}) == 3, "these adapters do nothing"
    for model, answer in cold.items():
        world.again(engine, prompt, answer, f"model {model}", model=model)
    world.stop("lora")


def two_tensor_parallel_ranks(world: World) -> None:
    if world.door.name != "connector":
        world.tell("told at our own door alone")
        return
    cores = "|".join(str(rank % (os.cpu_count() or 1)) for rank in range(2))
    settings = {"VLLM_CPU_OMP_THREADS_BIND": cores}
    engine = world.engine("ranks", "--tensor-parallel-size", "2", environment=settings)
    engine.wait_until_ready()
    prompt = world.prompt()
    cold = engine.ask(prompt)
    assert cold.external == 0
    world.nothing_held()
    world.again(engine, prompt, cold, "two ranks")
    world.stop("ranks")


STORIES: list[Callable[[World], None]] = [
    the_same_prompt_again_after_the_prefix_cache_was_reset,
    many_at_once_with_a_common_prefix,
    kvd_killed_between_the_two,
    kvd_down_while_the_engine_runs,
    one_stored_block_damaged_on_disk,
    two_tenants_with_different_salts,
    an_engine_killed_in_mid_store_and_a_new_process,
    damage_that_keeps_checksums_right_changes_the_text,
    prefill_engine_and_decode_engine,
    an_engine_killed_in_mid_load,
    prefill_on_one_node_and_decode_on_another,
    two_nodes_that_share_an_object_store_and_nothing_else,
    two_models_with_equal_token_ids,
]
LONG: list[Callable[[World], None]] = [
    several_groups_of_kv_cache,
    adapters_do_not_share,
    two_tensor_parallel_ranks,
]


def run(door: Door, chosen: list[Callable[[World], None]], folder: Path, models: Path, thorough: bool) -> bool:
    print(f"\n== {door.name} ==", flush=True)
    world = World(door, folder, models, thorough)
    passed = False
    try:
        world.kvd.start()
        begun = time.monotonic()
        world.engine("A").wait_until_ready()
        print(f"vLLM is up after {time.monotonic() - begun:.0f} s", flush=True)
        for story in chosen:
            begun = time.monotonic()
            print(f"  {story.__name__.replace('_', ' ')}", flush=True)
            story(world)
            print(f"    ok, {time.monotonic() - begun:.1f} s", flush=True)
        passed = True
    except Exception:
        traceback.print_exc()
        for engine in world.engines.values():
            print(f"--- {engine.name}\n{engine.process.tail()}", file=sys.stderr)
    finally:
        world.close()
    return passed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--door", choices=("connector", "lmcache", "both"), default="both")
    parser.add_argument("--only", nargs="*", default=[], help="words of the stories to tell")
    parser.add_argument("--all", action="store_true", help="also what takes long")
    given = parser.parse_args()
    chosen = STORIES + (LONG if given.all else [])
    if given.only:
        chosen = [story for story in STORIES + LONG if any(word in story.__name__ for word in given.only)]
    doors = {"connector": Connector, "lmcache": Lmcache}
    folder = Path(tempfile.mkdtemp(prefix="kvd-engines-"))
    passed = []
    for name, door in doors.items():
        if given.door in (name, "both"):
            (folder / name).mkdir()
            thorough = bool(given.all or given.only)
            passed.append(run(door(), chosen, folder / name, folder / "models", thorough))
    if all(passed):
        shutil.rmtree(folder)
    else:
        print(f"logs: {folder}", file=sys.stderr)
    sys.exit(0 if all(passed) else 1)


if __name__ == "__main__":
    main()
