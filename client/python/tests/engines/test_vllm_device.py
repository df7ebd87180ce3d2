"""The vLLM connector where the daemon copies to and from device memory. There is no GPU: the driver is one over host memory
(``tiers/gpu/fake``), in this process and in the daemon, and torch's part of CUDA is played by stand-ins on it.

Each KV cache is there twice, with the same bytes: in device memory, as stand-ins of CUDA tensors, and as tensors that the
connector copies by itself. What one way has stored the other must load.
"""

import contextlib
import ctypes
import dataclasses
import itertools
import os
import subprocess
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed here; engines/install-vllm makes an environment that has it")

import torch
from conftest import Daemon, binary, running, soon
from test_devices import LIBRARY, Gpu, fake
from test_vllm import BLOCKS, FULL, OWNER, TOKENS, WINDOW, cache, matched, names, request, scheduler, step, work
from test_vllm import config as config
from test_vllm import layout_of as layout_of
from test_vllm import model as model
from vllm.v1.kv_cache_interface import MLAAttentionSpec, UniformTypeKVCacheSpecs

import kvd
from kvd._engine import Link, settings
from kvd.vllm import Settings, _device_copies, logger
from kvd.vllm._copies import HostCopies
from kvd.vllm._device import DeviceCopies, _DeviceRoom
from kvd.vllm._layout import AXES, cache_layout, pages_of
from kvd.vllm._plan import Owner, Piece, Step, Work
from kvd.vllm._worker import Worker

UNEQUAL = dataclasses.replace(FULL, head_size=64, head_size_v=32)
MLA = MLAAttentionSpec(block_size=TOKENS, num_kv_heads=1, head_size=72, dtype=torch.bfloat16)


class Stream:
    """As ``torch.cuda.Stream``, one beside the engine's."""

    gpu: Gpu

    def __init__(self) -> None:
        self.stream = ctypes.c_void_p()
        self.gpu.call("cuStreamCreateWithPriority", ctypes.byref(self.stream), ctypes.c_uint(1), ctypes.c_int(0))


class Event:
    """As ``torch.cuda.Event``."""

    gpu: Gpu

    def __init__(self, interprocess: bool = False):
        self.event = ctypes.c_void_p()
        # Without timing; with it the driver shares none.
        self.gpu.call("cuEventCreate", ctypes.byref(self.event), ctypes.c_uint(6 if interprocess else 2))

    def record(self, stream: Stream | None = None) -> None:
        self.gpu.call("cuEventRecord", self.event, self.gpu.stream if stream is None else stream.stream)

    def wait(self) -> None:
        self.gpu.call("cuStreamWaitEvent", self.gpu.stream, self.event, 0)

    def synchronize(self) -> None:
        self.gpu.call("cuEventSynchronize", self.event)

    def ipc_handle(self) -> bytes:
        handle = ctypes.create_string_buffer(64)
        self.gpu.call("cuIpcGetEventHandle", handle, self.event)
        return handle.raw


class OnDevice:
    """As a CUDA tensor: what the connector asks of one."""

    def __init__(self, gpu: Gpu, address: int, shape: torch.Tensor):
        self.gpu, self.address, self.form = gpu, address, shape
        self.shape, self.dtype, self.device = shape.shape, shape.dtype, SimpleNamespace(type="cuda")

    def dim(self) -> int:
        return self.form.dim()

    def stride(self, *axis: int) -> Any:
        return self.form.stride(*axis)

    def numel(self) -> int:
        return self.form.numel()

    def view(self, dtype: torch.dtype) -> "OnDevice":
        return OnDevice(self.gpu, self.address, self.form.view(dtype))

    def unsqueeze(self, axis: int) -> "OnDevice":
        return OnDevice(self.gpu, self.address, self.form.unsqueeze(axis))

    def __getitem__(self, at: int) -> "OnDevice":
        return OnDevice(self.gpu, self.address, self.form[at])

    @property
    def start(self) -> int:
        return self.address + self.form.storage_offset() * self.form.element_size()

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        assert self.dtype == torch.uint8
        strides = None if self.form.is_contiguous() else self.form.stride()
        return {"typestr": "|u1", "shape": tuple(self.shape), "strides": strides, "data": (self.start, False), "version": 2}

    def rows(self) -> Iterator[tuple[tuple[int, ...], int]]:
        """Runs of bytes: where in the tensor, and where in memory."""
        for at in itertools.product(*(range(length) for length in self.shape[:-1])):
            yield at, self.start + sum(n * stride for n, stride in zip(at, self.form.stride(), strict=False))

    def copy_(self, source: torch.Tensor) -> None:
        for at, address in self.rows():
            self.gpu.write(address, bytes(source[at].tolist()))

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, arguments: Any, named: Any = None) -> None:
        assert function is torch.Tensor.copy_, function
        target, source = arguments
        for at, address in source.rows():
            target[at] = torch.frombuffer(bytearray(source.gpu.read(address, source.shape[-1])), dtype=torch.uint8)


class Memory:
    """A KV cache of one rank, in device memory and as plain tensors with the same bytes.

    ``order``: a letter for each of layer, block, head, token and channel, outermost first; the tensors are views of one
    buffer, or with layers outermost one after the other. ``gap``: elements between blocks.
    """

    def __init__(self, gpu: Gpu, layout: Any, seed: int, order: str = "LBHNC", gap: int = 0, start: int | None = None):
        self.gpu, self.bytes = gpu, 0
        self.device: dict[str, OnDevice] = {}
        self.plain: dict[str, torch.Tensor] = {}
        forms: dict[str, torch.Tensor] = {}
        for group in layout.groups:
            # Groups share the buffer, as vLLM's do.
            channel = group.page_bytes[0] // group.heads // TOKENS // 2
            lengths = {"L": len(group.layers), "B": BLOCKS, "H": group.heads, "N": TOKENS, "C": channel}
            strides, inner = {}, 1
            for axis in reversed(order):
                inner += gap if axis == "B" else 0
                strides[axis] = inner
                inner *= lengths[axis]
            self.bytes = max(self.bytes, 2 * inner)
            axes = "BNC" if group.attention == "mla" else "BHNC"
            for at, layer in enumerate(group.layers):
                whole = torch.empty(0, dtype=torch.bfloat16, device="meta")
                lie = [lengths[axis] for axis in axes], [strides[axis] for axis in axes]
                forms[layer] = whole.as_strided(*lie, at * strides["L"])
        torch.manual_seed(seed)
        self.buffer = torch.randint(0, 256, (self.bytes,), dtype=torch.uint8)
        self.start = gpu.allocate(self.bytes) if start is None else start
        gpu.write(self.start, bytes(self.buffer.numpy()))
        for layer, form in forms.items():
            self.device[layer] = OnDevice(gpu, self.start, form)
            place = form.size(), form.stride(), form.storage_offset()
            self.plain[layer] = self.buffer.view(torch.bfloat16).as_strided(*place)

    def same(self) -> bool:
        """Whether device memory and the plain tensors hold the same, down to the bytes that nobody was to touch."""
        return self.gpu.read(self.start, self.bytes) == bytes(self.buffer.numpy())

    def clear(self) -> None:
        """Both."""
        self.buffer.zero_()
        self.gpu.write(self.start, bytes(self.bytes))

    def blocks(self, *numbers: int) -> list[bytes]:
        """What blocks of these pages are, by the plain tensors."""
        pages = [[one[number].contiguous().view(torch.uint8) for one in self.plain.values()] for number in numbers]
        return [b"".join(bytes(page.flatten().tolist()) for page in layers) for layers in pages]

    def blocks_there(self, *numbers: int) -> list[bytes]:
        """The same when the plain tensors have become what device memory is, once the engine's stream has run empty."""
        self.gpu.call("cuStreamSynchronize", self.gpu.stream)
        self.buffer.copy_(torch.frombuffer(bytearray(self.gpu.read(self.start, self.bytes)), dtype=torch.uint8))
        return self.blocks(*numbers)

    def compute(self, layer: str, source: int, target: int) -> None:
        """Work on the engine's stream, as a kernel is: copies one page of a layer over another."""
        begin, end = (self.device[layer][number].view(torch.uint8) for number in (source, target))
        for (_, read), (_, written) in zip(begin.rows(), end.rows(), strict=True):
            count = ctypes.c_size_t(begin.shape[-1])
            to, from_ = ctypes.c_uint64(written), ctypes.c_uint64(read)
            self.gpu.call("cuMemcpyDtoDAsync_v2", to, from_, count, self.gpu.stream)


@pytest.fixture(scope="module")
def gpu() -> Gpu:
    path = fake()
    os.environ[LIBRARY] = str(path)
    made = Gpu(path)
    made.cuda.fake_cuda_set(b"memory=1073741824")
    return made


@pytest.fixture(autouse=True)
def torch_with_cuda(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for kind in (Event, Stream):
        monkeypatch.setattr(kind, "gpu", gpu, raising=False)
        monkeypatch.setattr(torch.cuda, kind.__name__, kind)
    yield
    play(gpu, "hold=0")


@contextlib.contextmanager
def serving(*more: str) -> Iterator[Daemon]:
    library = f"gpu.driver={fake()}"
    checked = subprocess.run([binary(), "--check", "--set", library], capture_output=True, text=True)
    if "gpu" in checked.stderr and checked.returncode != 0:
        pytest.skip(f"this kvd does not serve device memory: {checked.stderr.strip().splitlines()[0]}")
    with running(library, *more) as daemon:
        yield daemon


@pytest.fixture(scope="module")
def with_gpu() -> Iterator[Daemon]:
    """For tests with an ``owner`` of their own."""
    with serving() as daemon:
        yield daemon


@pytest.fixture
def owner(request: pytest.FixtureRequest) -> Owner:
    return Owner(f"weights of {request.node.name}")


@pytest.fixture
def by_axes(layout_of: Any) -> Any:
    """As ``layout_of``, of an engine that wants the daemon to copy."""

    def make(cached: Any, **given: Any) -> Any:
        layout = layout_of(cached, **given)
        return dataclasses.replace(layout, groups=tuple(dataclasses.replace(one, by_axes=True) for one in layout.groups))

    return make


def play(gpu: Gpu, setting: str) -> None:
    """Has the driver in this process do something."""
    assert gpu.cuda.fake_cuda_set(setting.encode()) == 0


def worker(daemon: Daemon, layout: Any, caches: Any, rank: int = 0, who: str = "either", **more: Any) -> Worker:
    """``who`` copies: ``daemon`` or ``rank``, alone, or ``either``, which is what an engine has."""
    connection = Link("test", endpoint=str(daemon.run), deadline=more.pop("deadline", 10), log=logger)
    chosen = {"layerwise": True, "load_seconds": 10, "staging_bytes": 1 << 20, "store_seconds": 20, **more}
    one = Worker(connection, layout, "default", rank, **{**chosen, **({"store_seconds": None} if who == "rank" else {})})
    one.register(caches)
    if who == "daemon":
        assert isinstance(one.copies, DeviceCopies)
        one._host.load = one._host.announce = None  # type: ignore[method-assign, assignment, union-attr]
    return one


def settled(one: Worker) -> None:
    """All that was stored is stored: what the next step begins with."""
    one.begin(Step(failures_seen=one._failures))
    soon(lambda: (one._settle(wait=False), not one._commits)[1])


def store(one: Worker, pieces: list[Piece], owner: Owner = OWNER, hooks: bool = True) -> None:
    step(one, Step(stores=[work(pieces, owner)]), hooks)
    settled(one)


def stored(one: Worker, names: list[bytes], owner: Owner = OWNER, group: int = 0) -> list[bytes | None]:
    """What the daemon has under these names."""

    def get(session: kvd.Session) -> list[bytes | None]:
        binding = one._binding(session, owner, one.groups[group])
        return [session.get(binding, name) for name in names]

    answer = one.link.ask(get)
    assert answer is not None
    return answer


def fetch(one: Worker, *works: Work) -> set[str]:
    """Steps until all of these waiting requests are told of; those that were not loaded."""
    received, failed = set(), set()
    step(one, Step(later=list(works)))

    def all_are() -> bool:
        for told, more in zip((received, failed), one.take_received(), strict=True):
            told |= more
        step(one, Step())
        return received == {work.request for work in works}

    soon(all_are)
    return failed


def elsewhere(pieces: list[Piece], *bases: int) -> list[Piece]:
    """The same blocks in other pages, for each piece from one on."""
    return [
        dataclasses.replace(one, numbers=list(range(base, base + len(one.names))))
        for one, base in zip(pieces, bases, strict=False)
    ]


CACHES = {
    "a tensor for each layer": ((FULL,), {}),
    "tokens outside of heads": ((FULL,), {"order": "LBNHC"}),
    "heads outside of blocks": ((FULL,), {"order": "LHBNC"}),
    "views of one tensor": ((FULL,), {"order": "BLNHC"}),
    "blocks apart": ((FULL,), {"gap": 64}),
    "two groups": ((FULL, WINDOW), {}),
    "keys longer than values": ((UNEQUAL,), {}),
    "latents": ((MLA,), {}),
}


@pytest.mark.parametrize("hooks", [True, False], ids=["layer by layer", "vLLM skips its hooks"])
@pytest.mark.parametrize(("specs", "form"), CACHES.values(), ids=CACHES)
def test_blocks_are_the_same_whoever_copied_them(
    gpu: Gpu, with_gpu: Daemon, by_axes: Any, owner: Owner, specs: Any, form: Any, hooks: bool
):
    layout = by_axes(cache(*specs), tensor_parallel_size=2)
    pieces = [Piece(group.index, names(10, group.index), []) for group in layout.groups]
    other = dataclasses.replace(owner, salt="by the rank")
    for rank in range(2):
        memory = Memory(gpu, layout, rank, **form)
        by_daemon = worker(with_gpu, layout, memory.device, rank, who="daemon")
        by_rank = worker(with_gpu, layout, memory.plain, rank, who="rank")
        # Groups have pages of their own in the tensors that they share.
        for one, named in ((by_daemon, owner), (by_rank, other)):
            store(one, elsewhere(pieces, 1, 11), named, hooks)
            assert one.take_stats().data["stored_blocks"] == 10 * len(pieces)
        for piece in pieces:
            found = stored(by_daemon, piece.names, owner, piece.group)
            assert None not in found and found == stored(by_rank, piece.names, other, piece.group)
        # Each loads what the other stored. Twice: layer by layer only after vLLM was seen to ask for each.
        for bases in ((21, 31), (41, 51)):
            step(by_daemon, Step(loads=[work(elsewhere(pieces, *bases), other)]), hooks)
            step(by_rank, Step(loads=[work(elsewhere(pieces, *bases), owner)]), hooks)
            assert not by_daemon.take_bad_blocks() and not by_rank.take_bad_blocks()
            assert memory.same()
        assert by_daemon._hooks_work == hooks
        memory.clear()
        assert not fetch(by_daemon, work(elsewhere(pieces, 1, 11), other))
        assert not fetch(by_rank, work(elsewhere(pieces, 1, 11), owner))
        assert memory.same() and memory.buffer.any()
        loaded = by_daemon.take_stats().data
        assert loaded["loaded_blocks"] == 30 * len(pieces)
        assert loaded["loaded_bytes"] == 30 * sum(group.block_bytes for group in layout.groups)
        by_daemon.close()
        by_rank.close()


def test_blocks_for_the_daemons_copies_have_names_of_their_own(
    gpu: Gpu, with_gpu: Daemon, layout_of: Any, by_axes: Any
):
    usual, layout = layout_of(cache(FULL)), by_axes(cache(FULL))
    theirs, ours = (one.scope(one.groups[0], "default", "w") for one in (usual, layout))
    assert (theirs["weights"], ours["layout"]) == ("w", AXES)
    # What was in the layout is in the name all the same.
    assert all(part in ours["weights"] for part in ("w;", "vllm-0.32,cpu-", theirs["layout"].rpartition(";")[2]))
    one = worker(with_gpu, layout, Memory(gpu, layout, 1).device, who="daemon")
    store(one, [Piece(0, names(4), [1, 2, 3, 4])])
    assert matched(scheduler(with_gpu, usual), request(names(4))) == 0
    assert matched(scheduler(with_gpu, layout), request(names(4))) == 4 * TOKENS
    one.close()


def test_settings_say_whether_the_daemon_copies(config: Any):
    assert not settings(Settings, {}, "extra").device_copies
    chosen, made = settings(Settings, {"device_copies": True, "store_seconds": 3}, "extra"), config()
    assert _device_copies(chosen, made)
    made.model_config.enable_sleep_mode = True
    assert not _device_copies(chosen, made), "other memory is at the same addresses after it woke up"


# When


def test_announced_blocks_are_waited_for(gpu: Gpu, with_gpu: Daemon, by_axes: Any, owner: Owner):
    layout = by_axes(cache(FULL))
    one = worker(with_gpu, layout, Memory(gpu, layout, 1).device, who="daemon")
    one.begin(Step(stores=[work([Piece(0, names(4), [1, 2, 3, 4])], owner)]))
    asks, asked = scheduler(with_gpu, layout, wait=20.0), request(names(4))
    asks._weights = owner.weights
    soon(lambda: asks._held(names(4), owner, 4 * TOKENS)[2])
    assert asks.matched(asked, 0) is None, "they are on their way"
    one.end()
    assert matched(asks, asked) == 4 * TOKENS
    one.close()


def test_a_save_takes_what_the_engine_still_computes(gpu: Gpu, with_gpu: Daemon, by_axes: Any, owner: Owner):
    layout = by_axes(cache(FULL))
    memory = Memory(gpu, layout, 1)
    one = worker(with_gpu, layout, memory.device, who="daemon")
    wanted = memory.blocks(9)
    assert wanted != memory.blocks(3)
    one.begin(Step(stores=[work([Piece(0, names(1), [3])], owner)]))
    one.load(Step())
    play(gpu, "hold=1")
    for layer in one.place:
        one.before_layer(layer)
        # The layer's kernel, which is not done when the connector hears of it: page 3 becomes what page 9 is.
        memory.compute(layer, 9, 3)
        one.after_layer(layer)
    one.end()
    assert one.link.ask(lambda session: session.lookup(one._binding(session, owner, layout.groups[0]), names(1)).prefix) == 0
    play(gpu, "hold=0")
    settled(one)
    assert stored(one, names(1), owner) == wanted
    one.close()


def test_pages_of_a_save_hold_still_until_the_next_step(gpu: Gpu, by_axes: Any, monkeypatch: pytest.MonkeyPatch):
    layout = by_axes(cache(FULL))
    memory = Memory(gpu, layout, 1)
    wanted = memory.blocks(*range(1, 9))
    monkeypatch.setenv("FAKE_CUDA", "delay_us=20000")
    with serving("gpu.method=loop") as slow:
        one = worker(slow, layout, memory.device, who="daemon")
        step(one, Step(stores=[work([Piece(0, names(8), list(range(1, 9)))])]))
        one.begin(Step())
        memory.clear()
        assert stored(one, names(8)) == wanted
        assert one.take_stats().data["stored_blocks"] == 8
        one.close()


def test_a_layer_is_computed_with_when_it_has_come(gpu: Gpu, by_axes: Any, monkeypatch: pytest.MonkeyPatch):
    layout = by_axes(cache(FULL))
    memory = Memory(gpu, layout, 1)
    monkeypatch.setenv("FAKE_CUDA", "delay_us=20000")
    with serving("gpu.method=loop") as slow:
        one = worker(slow, layout, memory.device, who="daemon")
        salted = Owner("w", salt="s")
        store(one, [Piece(0, names(2), [1, 2])])
        store(one, [Piece(0, names(1), [3])], salted)
        wanted = memory.blocks(1, 2, 3)
        # The daemon has a call for each owner; the second is over sooner.
        loads = [work([Piece(0, names(2), [11, 12])]), work([Piece(0, names(1), [13])], salted)]
        for hooks_work in (False, True):
            one._hooks_work = hooks_work
            memory.clear()
            what = Step(loads=loads)
            one.begin(what)
            one.load(what)
            assert one._loading[0].asks == (frozenset(one.place) if hooks_work else frozenset())
            for layer in one.place:
                one.before_layer(layer)
                for page in (11, 12, 13):
                    memory.compute(layer, page, page + 10)
                one.after_layer(layer)
            one.end()
            assert memory.blocks_there(11, 12, 13, 21, 22, 23) == wanted * 2
        one.close()


@pytest.mark.parametrize("later", [False, True], ids=["computed with in the step", "for a request that waits"])
def test_a_load_waits_for_what_the_engine_has_yet_to_write_there(
    gpu: Gpu, with_gpu: Daemon, by_axes: Any, owner: Owner, later: bool
):
    layout = by_axes(cache(FULL))
    memory = Memory(gpu, layout, 1)
    one = worker(with_gpu, layout, memory.device, who="daemon")
    store(one, [Piece(0, names(1), [1])], owner)
    wanted = memory.blocks(1)
    # A request that has ended had this page, and a kernel in the stream still writes to it.
    play(gpu, "hold=1")
    for layer in one.place:
        memory.compute(layer, 5, 11)
    load = work([Piece(0, names(1), [11])], owner)
    what = Step(later=[load]) if later else Step(loads=[load])
    # Time enough to copy, for one that would not wait.
    going_on = threading.Timer(0.3, play, [gpu, "hold=0"])
    going_on.start()
    one.begin(what)
    one.load(what)
    for layer in one.place:
        one.before_layer(layer)
    one.end()
    going_on.join()
    assert not one.take_bad_blocks()
    if later:
        soon(lambda: one.take_received() == ({"r"}, set()))
    assert memory.blocks_there(11) == wanted
    one.close()


def test_requests_of_one_step_may_share_blocks_and_have_owners_of_their_own(
    gpu: Gpu, with_gpu: Daemon, by_axes: Any, owner: Owner
):
    layout = by_axes(cache(FULL))
    memory = Memory(gpu, layout, 1)
    one = worker(with_gpu, layout, memory.device, who="daemon")
    salted = dataclasses.replace(owner, salt="s")
    wanted = memory.blocks(1, 2, 3, 4, 1, 2, 3, 5, 6)
    first = work([Piece(0, names(4), [1, 2, 3, 4])], owner)
    # A request with the same beginning, and one that shares with nobody.
    again, apart = work([Piece(0, names(3), [1, 2, 3])], owner), work([Piece(0, names(2), [5, 6])], salted)
    step(one, Step(stores=[first, again, apart]))
    settled(one)
    assert one.take_stats().data["stored_blocks"] == 6
    loads = [
        work([Piece(0, names(4), [11, 12, 13, 14])], owner),
        work([Piece(0, names(3), [21, 22, 23])], owner),
        work([Piece(0, names(2), [31, 32])], salted),
    ]
    for hooks_work in (True, False):
        one._hooks_work = hooks_work
        memory.clear()
        step(one, Step(loads=loads))
        assert not one.take_bad_blocks()
        assert memory.blocks_there(11, 12, 13, 14, 21, 22, 23, 31, 32) == wanted
    # Stored again, they are there already, and that is no failure.
    step(one, Step(stores=[first]))
    settled(one)
    assert "unstored_blocks" not in one.take_stats().data
    one.close()


def test_more_blocks_than_may_wait_for_their_layers_are_stored_all(gpu: Gpu, by_axes: Any):
    layout = by_axes(cache(FULL))
    memory = Memory(gpu, layout, 1)
    count = (20 << 20) // layout.groups[0].block_bytes
    with serving() as daemon:
        one = worker(daemon, layout, memory.device, who="daemon")
        # A quarter of the daemon's 64 MiB may.
        store(one, [Piece(0, names(count), [1 + at % 60 for at in range(count)])])
        assert one.take_stats().data["stored_blocks"] == count
        for at in (0, 63, count - 1):
            assert stored(one, [names(count)[at]]) == memory.blocks(1 + at % 60)
        one.close()


def test_replicas_load_and_do_not_store(gpu: Gpu, with_gpu: Daemon, by_axes: Any, owner: Owner):
    layout = by_axes(cache(MLA, kv_tp_replicas=2), tensor_parallel_size=2)
    memories = [Memory(gpu, layout, rank) for rank in range(2)]
    ranks = [worker(with_gpu, layout, memory.device, rank, who="daemon") for rank, memory in enumerate(memories)]
    wanted = memories[0].blocks(1, 2)
    for rank in ranks:
        store(rank, [Piece(0, names(2), [1, 2])], owner)
    assert ranks[1].take_stats() is None
    for rank, memory in zip(ranks, memories, strict=True):
        step(rank, Step(loads=[work([Piece(0, names(2), [11, 12])], owner)]))
        assert not rank.take_bad_blocks()
        assert memory.blocks_there(11, 12) == wanted
        rank.close()


# What goes wrong


def test_a_layer_that_did_not_ask_makes_its_step_computed_again(
    gpu: Gpu, with_gpu: Daemon, by_axes: Any, owner: Owner
):
    layout = by_axes(cache(FULL))
    one = worker(with_gpu, layout, Memory(gpu, layout, 1).device, who="daemon")
    store(one, [Piece(0, names(4), [1, 2, 3, 4])], owner)
    assert one._hooks_work
    load = Step(loads=[work([Piece(0, names(4), [11, 12, 13, 14])], owner)])
    step(one, load, hooks=False)
    assert one.take_bad_blocks() == {11, 12, 13, 14}
    step(one, load, hooks=False)
    assert not one.take_bad_blocks(), "from then on all is loaded before the first layer"
    one.close()


def test_what_is_evicted_between_promise_and_load_is_reported(
    gpu: Gpu, with_gpu: Daemon, by_axes: Any, owner: Owner
):
    layout = by_axes(cache(FULL))
    one = worker(with_gpu, layout, Memory(gpu, layout, 1).device, who="daemon", load_seconds=0.5)
    store(one, [Piece(0, names(8), list(range(1, 9)))], owner)
    session = with_gpu.client().session("other")
    binding = one._binding(session, owner, layout.groups[0])
    assert session.evict(binding, names(8)[2:3]).evicted == 1
    lost = dataclasses.replace(work([Piece(0, names(4), [11, 12, 13, 14])], owner), request="lost")
    good = dataclasses.replace(work([Piece(0, names(8)[4:], [21, 22, 23, 24])], owner), request="good")
    step(one, Step(loads=[lost, good]))
    assert one.take_bad_blocks() == {11, 12, 13, 14}, "the other request has all of its blocks"
    assert fetch(one, lost, good) == {"lost"}
    counted = one.take_stats().data
    assert (counted["failed_blocks"], counted["loaded_blocks"]) == (8, 8)
    one.close()


def test_what_was_computed_with_a_failed_load_is_never_stored(
    gpu: Gpu, with_gpu: Daemon, by_axes: Any, owner: Owner
):
    layout = by_axes(cache(FULL))
    one = worker(with_gpu, layout, Memory(gpu, layout, 1).device, who="daemon", load_seconds=0.5)
    here = scheduler(with_gpu, layout)
    absent, garbage = work([Piece(0, names(2, 9), [11, 12])], owner), names(6)

    def stores(first: int, numbers: list[int]) -> list[Work]:
        return [work([Piece(0, garbage[first : first + 2], numbers)], owner)]

    for hooks in (True, False):
        step(one, Step(loads=[absent], stores=stores(0, [13, 14]), failures_seen=one._failures), hooks)
        assert one.take_bad_blocks() == {11, 12}
        # Planned before the scheduler knew.
        step(one, Step(stores=stores(2, [15, 16]), failures_seen=one._failures - 1), hooks)
        settled(one)
        assert here._held(garbage, owner, 6 * TOKENS)[0] == 0
        soon(lambda: not here._held(garbage, owner, 6 * TOKENS)[2])
    step(one, Step(stores=stores(0, [17, 18]), failures_seen=one._failures))
    settled(one)
    assert here._held(garbage, owner, 6 * TOKENS)[0] == 2 * TOKENS
    one.close()


def test_a_save_that_takes_too_long_is_let_go_and_the_next_is_stored(
    gpu: Gpu, with_gpu: Daemon, by_axes: Any, owner: Owner
):
    layout = by_axes(cache(FULL))
    memory = Memory(gpu, layout, 1)
    one = worker(with_gpu, layout, memory.device, who="daemon", store_seconds=0.3)
    one.begin(Step(stores=[work([Piece(0, names(2), [1, 2])], owner)]))
    one.load(Step())
    (room,) = one._rooms
    assert isinstance(room, _DeviceRoom)
    # No layer is ready in time.
    soon(lambda: is_over(room._save))
    one.end()
    settled(one)
    assert one.take_stats().data["unstored_blocks"] == 2
    assert one.link.is_up and isinstance(one.copies, DeviceCopies), "the daemon is well"
    one._device.store_seconds = 20.0  # type: ignore[union-attr]
    store(one, [Piece(0, names(2), [1, 2])], owner)
    assert stored(one, names(2), owner) == memory.blocks(1, 2)
    one.close()


def is_over(save: kvd.LayerSave) -> bool:
    """Asks by what is refused in any case."""
    try:
        save.ready(1000)
    except kvd.Invalid:
        return False
    except kvd.KvdError:
        return True
    raise AssertionError("a thousand layers cannot be ready")


def test_what_one_request_says_wrongly_is_its_own_affair(gpu: Gpu, with_gpu: Daemon, by_axes: Any, owner: Owner):
    layout = by_axes(cache(FULL))
    one = worker(with_gpu, layout, Memory(gpu, layout, 1).device, who="daemon")
    # A salt that no scope can hold.
    salted = dataclasses.replace(owner, salt="s" * 2000)
    step(one, Step(stores=[work([Piece(0, names(2), [1, 2])], named) for named in (salted, owner)]))
    settled(one)
    counted = one.take_stats().data
    assert (counted["stored_blocks"], counted["unstored_blocks"]) == (2, 2)
    assert isinstance(one.copies, DeviceCopies)
    one.close()


def test_pages_of_a_failed_load_are_free_when_nothing_is_copied_any_more(
    gpu: Gpu, by_axes: Any, monkeypatch: pytest.MonkeyPatch
):
    layout = by_axes(cache(FULL))
    memory = Memory(gpu, layout, 1)
    monkeypatch.setenv("FAKE_CUDA", "delay_us=100000")
    with serving("gpu.method=loop") as slow:
        one = worker(slow, layout, memory.device, who="daemon", load_seconds=0.1)
        store(one, [Piece(0, names(2), [1, 2])])
        what = Step(loads=[work([Piece(0, names(2), [11, 12])])])
        one.begin(what)
        # Six copies of a tenth of a second each do not end in time.
        one.link.deadline = 0.1
        one.load(what)
        one.link.deadline = 30
        one.end()
        assert one.take_bad_blocks() == {11, 12}
        memory.clear()
        assert one._device is not None
        one._device.quiesce()
        assert memory.same(), "nobody writes to them any more"
        one.close()


def test_the_engines_stream_goes_on_when_the_daemon_goes_in_the_middle_of_a_load(
    gpu: Gpu, by_axes: Any, monkeypatch: pytest.MonkeyPatch
):
    layout = by_axes(cache(FULL))
    memory = Memory(gpu, layout, 1)
    monkeypatch.setenv("FAKE_CUDA", "delay_us=200000")
    with serving("gpu.method=loop") as slow:
        one = worker(slow, layout, memory.device, who="daemon", deadline=1)
        store(one, [Piece(0, names(2), [1, 2])])
        what = Step(loads=[work([Piece(0, names(2), [11, 12])])])
        for hooks_work in (True, False):
            one._hooks_work = hooks_work
            one.begin(what)
            one.load(what)
            assert len(one._loading[0].asks) == (len(one.place) if hooks_work else 0), "it is under way"
            for layer in one.place:
                one.before_layer(layer)
                memory.compute(layer, 11, 21)
            assert gpu.cuda.cuStreamQuery(gpu.stream) == 600, "it is not ready"
            slow.kill()
            soon(lambda: gpu.cuda.cuStreamQuery(gpu.stream) == 0)
            one.end()
            assert one.take_bad_blocks() == {11, 12}
            slow.start()

            def loads() -> bool:
                step(one, what)
                return not one.take_bad_blocks()

            soon(loads)
            assert memory.blocks_there(11, 12) == memory.blocks_there(1, 2)
        one.close()


def test_a_daemon_that_stands_still_costs_its_blocks_and_no_more(gpu: Gpu, by_axes: Any):
    layout = by_axes(cache(FULL))
    memory = Memory(gpu, layout, 1)
    with serving() as daemon:
        one = worker(daemon, layout, memory.device, deadline=0.5, load_seconds=0.2, store_seconds=0.5)
        assert isinstance(one.copies, DeviceCopies)
        store(one, [Piece(0, names(2), [1, 2])])
        one.begin(Step(stores=[work([Piece(0, names(2, 1), [5, 6])])]))
        with daemon.standing_still():
            one.load(Step())
            one.end()
            step(one, Step(loads=[work([Piece(0, names(2), [11, 12])])]))
            assert one.take_bad_blocks() == {11, 12}
            # How many launches a save takes depends on what comes together.
        assert one.take_stats().data["unstored_blocks"] >= 2

        def again() -> bool:
            step(one, Step(loads=[work([Piece(0, names(2), [11, 12])])]))
            return not one.take_bad_blocks()

        soon(again)
        assert isinstance(one.copies, DeviceCopies)
        assert memory.blocks_there(11, 12) == memory.blocks_there(1, 2)
        one.close()


def test_without_a_daemon_nothing_fails_and_the_next_has_the_pages_again(gpu: Gpu, by_axes: Any):
    layout = by_axes(cache(FULL))
    memory = Memory(gpu, layout, 1)
    load = work([Piece(0, names(4), [11, 12, 13, 14])])
    with serving() as daemon:
        one = worker(daemon, layout, memory.device, deadline=1)
        assert isinstance(one.copies, DeviceCopies)
        store(one, [Piece(0, names(4), [1, 2, 3, 4])])
        # It goes in the middle of a step.
        one.begin(Step(stores=[work([Piece(0, names(2, 1), [5, 6])])]))
        daemon.kill()
        one.load(Step())
        for layer in one.place:
            one.after_layer(layer)
        one.end()
        step(one, Step(loads=[load]))
        assert one.take_bad_blocks() == {11, 12, 13, 14}
        assert fetch(one, load) == {"r"}
        step(one, Step(stores=[work([Piece(0, names(3, 1), [5, 6, 7])])], failures_seen=one._failures))
        assert one.take_stats().data["unstored_blocks"] == 5
        daemon.start()

        def again() -> bool:
            step(one, Step(loads=[load]))
            return not one.take_bad_blocks()

        soon(again)
        assert isinstance(one.copies, DeviceCopies)
        assert memory.blocks_there(11, 12, 13, 14) == memory.blocks_there(1, 2, 3, 4)
        one.close()


# Where the daemon cannot copy, the rank does


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the log has of warnings."""
    lines: list[str] = []
    monkeypatch.setattr(logger, "warning", lambda form, *values: lines.append(form % values))
    return lines


def by_itself(one: Worker, memory: Memory, owner: Owner = OWNER) -> None:
    """The rank copies, and blocks come back."""
    assert isinstance(one.copies, HostCopies) and one.link.is_up
    store(one, [Piece(0, names(2), [1, 2])], owner)
    assert stored(one, names(2), owner) == memory.blocks(1, 2)
    step(one, Step(loads=[work([Piece(0, names(2), [11, 12])], owner)]))
    assert not one.take_bad_blocks()
    assert memory.blocks_there(11, 12) == memory.blocks_there(1, 2)


def test_a_daemon_without_gpus_is_asked_again_in_its_next_life(gpu: Gpu, by_axes: Any, said: list[str]):
    layout = by_axes(cache(FULL))
    memory = Memory(gpu, layout, 1)
    with serving("gpu.enabled=off") as daemon:
        one = worker(daemon, layout, memory.device, deadline=2)
        handed_over = gpu.count("calls:cuIpcGetMemHandle")
        by_itself(one, memory)
        assert len(said) == 1 and "gpu.enabled is off" in said[0], said
        assert gpu.count("calls:cuIpcGetMemHandle") == handed_over, "it is not asked again"
        daemon.kill()
        daemon.settings = daemon.settings[:1]
        daemon.start()
        soon(lambda: isinstance(one.copies, DeviceCopies))

        def loads() -> bool:
            step(one, Step(loads=[work([Piece(0, names(2), [21, 22])])]))
            return not one.take_bad_blocks()

        soon(loads)
        assert memory.blocks_there(21, 22) == memory.blocks_there(1, 2)
        one.close()


def test_a_gpu_that_the_daemon_loses_is_no_more_than_that(
    gpu: Gpu, by_axes: Any, said: list[str], monkeypatch: pytest.MonkeyPatch
):
    layout = by_axes(cache(FULL))
    memory = Memory(gpu, layout, 1)
    # Some are needed to try the kernels.
    monkeypatch.setenv("FAKE_CUDA", "fail_launch=12:700")
    with serving("gpu.method=kernel") as daemon:
        one = worker(daemon, layout, memory.device, deadline=2)
        tries = itertools.count(1)

        def lost() -> bool:
            assert isinstance(one.copies, DeviceCopies)
            store(one, [Piece(0, names(2, next(tries)), [1, 2])])
            return isinstance(one.copies, HostCopies)

        soon(lost)
        assert one.take_stats().data["unstored_blocks"] == 2
        assert any("which copies by itself: " in line for line in said), said
        by_itself(one, memory)
        one.close()


def test_memory_that_cannot_be_shared_is_copied_by_the_rank(
    gpu: Gpu, with_gpu: Daemon, by_axes: Any, owner: Owner, said: list[str]
):
    layout = by_axes(cache(FULL))
    memory = Memory(gpu, layout, 1, start=gpu.segment(1, kinds=0))
    one = worker(with_gpu, layout, memory.device)
    by_itself(one, memory, owner)
    assert len(said) == 1 and "not made to be shared" in said[0], said
    one.close()


def test_memory_in_pieces_goes_over_the_worker_socket(gpu: Gpu, with_gpu: Daemon, by_axes: Any, owner: Owner):
    layout = by_axes(cache(FULL))
    memory = Memory(gpu, layout, 1, start=gpu.segment(1))
    one = worker(with_gpu, layout, memory.device, who="daemon")
    store(one, [Piece(0, names(2), [1, 2])], owner)
    assert stored(one, names(2), owner) == memory.blocks(1, 2)
    one.close()


def test_pages_that_cannot_be_described_are_refused_by_name(
    gpu: Gpu, with_gpu: Daemon, layout_of: Any, by_axes: Any, owner: Owner, said: list[str]
):
    layout = by_axes(cache(FULL))
    memory, apart = Memory(gpu, layout, 1), Memory(gpu, layout, 2, gap=64)
    mixed = {**memory.device, "group0.layer2": apart.device["group0.layer2"]}
    one = worker(with_gpu, layout, mixed)
    assert len(said) == 1 and "layer group0.layer2 is (64, 2, 16, 128) with strides (4224, " in said[0], said
    assert isinstance(one.copies, HostCopies)
    one.close()
    one = worker(with_gpu, layout, memory.plain)
    assert len(said) == 2 and "layer group0.layer0 is in cpu memory" in said[1], said
    assert isinstance(one.copies, HostCopies)
    one.close()
    # Heads of two lengths in one group.
    two = {"group0.layer0": FULL, "group0.layer1": UNEQUAL}
    spec = UniformTypeKVCacheSpecs(block_size=TOKENS, kv_cache_specs=two)
    group = layout_of(cache(spec, layers=2)).groups[0]
    tensors: Any = {
        layer: OnDevice(gpu, memory.start, torch.empty(BLOCKS, 2, TOKENS, channel, dtype=FULL.dtype, device="meta"))
        for layer, channel in zip(two, (64, 96), strict=True)
    }
    with pytest.raises(ValueError, match=r"layer group0\.layer1 is \(64, 2, 16, 192\)"):
        cache_layout(group, pages_of(group, tensors), kvd.Slice(2, 2))
