"""KV caches in device memory. What needs a driver has one over host memory (``tiers/gpu/fake``), in this process and in the
daemon; what needs a daemon that serves them says when it is skipped."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, Daemon, binary, running, scope

import kvd

LIBRARY = "KVD_CUDA_LIBRARY"
PAGES, PAGE_TOKENS, HEADS, DIM = 8, 4, 2, 16
WHOLE = kvd.Slice(2, HEADS)
"""Two layers, each a tensor of 4096 bytes."""
LENGTHS = {"slice": WHOLE, "page_count": PAGES, "page_tokens": PAGE_TOKENS, "head_dim": DIM, "element_bits": 16}
LAYOUT = kvd.CacheLayout("LBNHC", **LENGTHS)
CANONICAL = "layer,kv,head,token,dim"
PIECE = 2 << 20


class Tensor:
    """As PyTorch shows one."""

    def __init__(self, address: int, shape, strides=None, typestr: str = "<f2", read_only: bool = False):
        self.__cuda_array_interface__ = {
            "shape": tuple(shape),
            "typestr": typestr,
            "data": (address, read_only),
            "strides": strides,
            "version": 3,
        }


def fake() -> Path:
    # Built for itself it is here, and for the tests of kv-gpu there.
    places = [ROOT / "target" / profile for profile in ("release", "debug")]
    built = [place / folder / "libfake_cuda.so" for place in places for folder in ("", "deps")]
    named = [Path(os.environ["KVD_FAKE_CUDA"])] if "KVD_FAKE_CUDA" in os.environ else []
    for path in named or built:
        if path.is_file():
            return path
    pytest.skip("no driver to test with: `cargo build -p kv-gpu-fake`, or name one in the variable KVD_FAKE_CUDA")


class Gpu:
    """The part of an engine that has memory: the driver, called as an engine calls it."""

    def __init__(self, path: Path):
        self.cuda = ctypes.CDLL(str(path))
        self.call("cuInit", ctypes.c_uint(0))
        context = ctypes.c_void_p()
        self.call("cuDevicePrimaryCtxRetain", ctypes.byref(context), ctypes.c_int(0))
        self.call("cuCtxPushCurrent_v2", context)
        self.stream = ctypes.c_void_p()
        self.call("cuStreamCreateWithPriority", ctypes.byref(self.stream), ctypes.c_uint(1), ctypes.c_int(0))

    def call(self, name: str, *arguments) -> None:
        code = getattr(self.cuda, name)(*arguments)
        assert code == 0, f"{name} answers {code}"

    def count(self, what: str) -> int:
        self.cuda.fake_cuda_count.restype = ctypes.c_uint64
        return self.cuda.fake_cuda_count(what.encode())

    def allocate(self, count: int) -> int:
        address = ctypes.c_uint64()
        self.call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(count))
        return address.value

    def segment(self, pieces: int, kinds: int = 1) -> int:
        """Pieces at addresses in a row, as PyTorch's expandable segments have them. ``kinds``: 1 they are shared by
        descriptor, 0 not at all."""
        start = ctypes.c_uint64()
        zero, size = ctypes.c_uint64(0), ctypes.c_size_t(PIECE)
        reserved = ctypes.c_size_t(pieces * PIECE)
        self.call("cuMemAddressReserve", ctypes.byref(start), reserved, ctypes.c_size_t(0), zero, zero)
        # CUmemAllocationProp: pinned, kinds, on device 0, nothing else; CUmemAccessDesc: device 0, read and write.
        properties = (ctypes.c_uint32 * 8)(1, kinds, 1, 0, 0, 0, 0, 0)
        access = (ctypes.c_uint32 * 3)(1, 0, 3)
        for at in range(start.value, start.value + pieces * PIECE, PIECE):
            handle = ctypes.c_uint64()
            self.call("cuMemCreate", ctypes.byref(handle), size, properties, zero)
            self.call("cuMemMap", ctypes.c_uint64(at), size, ctypes.c_size_t(0), handle, zero)
            self.call("cuMemRelease", handle)
            self.call("cuMemSetAccess", ctypes.c_uint64(at), size, access, ctypes.c_size_t(1))
        return start.value

    def write(self, address: int, data: bytes) -> None:
        self.call("cuMemcpyHtoDAsync_v2", ctypes.c_uint64(address), data, ctypes.c_size_t(len(data)), self.stream)
        self.call("cuStreamSynchronize", self.stream)

    def read(self, address: int, count: int) -> bytes:
        room = ctypes.create_string_buffer(count)
        self.call("cuMemcpyDtoHAsync_v2", room, ctypes.c_uint64(address), ctypes.c_size_t(count), self.stream)
        self.call("cuStreamSynchronize", self.stream)
        return room.raw

    def event(self) -> tuple[ctypes.c_void_p, bytes]:
        """An event that others can wait for, and its handle."""
        event, handle = ctypes.c_void_p(), ctypes.create_string_buffer(64)
        self.call("cuEventCreate", ctypes.byref(event), ctypes.c_uint(6))
        self.call("cuIpcGetEventHandle", handle, event)
        return event, handle.raw


@pytest.fixture(scope="module")
def gpu() -> Gpu:
    path = fake()
    # A process has one driver: from here on it is this one.
    os.environ[LIBRARY] = str(path)
    return Gpu(path)


@pytest.fixture(scope="module")
def with_gpu(gpu: Gpu):
    """A daemon that has the same kind of GPU."""
    library = f"gpu.driver={fake()}"
    checked = subprocess.run([binary(), "--check", "--set", library], capture_output=True, text=True)
    if "gpu" in checked.stderr and checked.returncode != 0:
        pytest.skip(f"this kvd does not serve device memory: {checked.stderr.strip().splitlines()[0]}")
    with running(library) as daemon:
        yield daemon


class Cache:
    """An engine's cache on the device, what it holds, and what blocks of it are."""

    def __init__(self, gpu: Gpu, addresses: list[int]):
        self.gpu, self.addresses = gpu, addresses
        self.tensors = [Tensor(address, (PAGES, PAGE_TOKENS, HEADS, 2 * DIM)) for address in addresses]
        for layer, address in enumerate(addresses):
            numbers = np.arange(2048, dtype="<u2") + 4096 * layer
            gpu.write(address, numbers.tobytes())

    def page(self, number: int) -> list[bytes]:
        """A page of each layer."""
        count = 4096 // PAGES
        return [self.gpu.read(address + number * count, count) for address in self.addresses]

    def block(self, pages: list[int]) -> bytes:
        """A block of these pages in the canonical order."""
        layers = []
        for address in self.addresses:
            tensor = np.frombuffer(self.gpu.read(address, 4096), "<u2")
            tensor = tensor.reshape(PAGES, PAGE_TOKENS, HEADS, 2, DIM)[pages]
            tokens = tensor.reshape(len(pages) * PAGE_TOKENS, HEADS, 2, DIM)
            layers.append(tokens.transpose(2, 1, 0, 3))
        return np.stack(layers).tobytes()


def bind(session: kvd.Session) -> kvd.Binding:
    return session.register(scope(block_tokens=8, layout=CANONICAL), LAYOUT.block_bytes(2), slice=WHOLE)


def connected(daemon: Daemon, **options: bool) -> tuple[kvd.Session, kvd.Binding]:
    session = daemon.client().session("gpu", **options)
    return session, bind(session)


def test_layouts_are_read_by_the_engines_own_names():
    assert (LAYOUT.tensor_count, LAYOUT.tensor_bytes, LAYOUT.block_bytes(2)) == (2, 4096, 2048)
    assert kvd.CacheLayout("LBNH2D", **LENGTHS) == LAYOUT
    assert kvd.CacheLayout("LB2HND", **LENGTHS) != LAYOUT
    for name, tensors, count, length in [
        ("LB2HND", "one", 1, 8192),
        ("layer_first", "halves_of_layers", 4, 2048),
        ("page_first", "halves", 2, 4096),
        # Views of one cache: each reaches nearly to its end.
        ("BLNHC", "layers", 2, 8192 - 512),
    ]:
        layout = kvd.CacheLayout(name, **LENGTHS, tensors=tensors)
        assert (layout.tensor_count, layout.tensor_bytes) == (count, length), name
    latent = kvd.CacheLayout("LBN2HD", **{**LENGTHS, "slice": kvd.Slice(2, 1)}, content="latent")
    assert latent.block_bytes(1) == 2 * PAGE_TOKENS * DIM * 2
    assert "8 pages of 4 tokens, 2 tensors of 4096 bytes" in repr(LAYOUT)


def test_strides_say_the_same_as_a_name_and_more():
    strides = {"page": 512, "token": 128, "head": 64, "kv": 32, "dim": 2}
    assert kvd.CacheLayout.strided(strides, {"layer": 1}, **LENGTHS) == LAYOUT
    # Pages apart from each other, and the cache begins later.
    wide = kvd.CacheLayout.strided({**strides, "page": 1024}, {"layer": 1}, **LENGTHS, first=(0, 256))
    assert (wide.tensor_bytes, wide.block_bytes(1)) == (256 + 7 * 1024 + 512, 1024)
    one_layer = {**LENGTHS, "slice": kvd.Slice(2, HEADS, layer_range=(1, 2))}
    assert kvd.CacheLayout.strided(strides, **one_layer).tensor_count == 1
    assert strides.keys() == {"page", "token", "head", "kv", "dim"}, "what was given is left as it was"


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: kvd.CacheLayout("LBNH", **LENGTHS), "order `LBNH`: "),
        (lambda: kvd.CacheLayout("LBNHX", **LENGTHS), "`X`"),
        (lambda: kvd.CacheLayout("LBNHC", **LENGTHS, tensors="pages"), "one, layers, halves, halves_of_layers"),
        (lambda: kvd.CacheLayout("LBNHC", **LENGTHS, content="values"), "key_value, latent"),
        (lambda: kvd.CacheLayout("LBNHC", **{**LENGTHS, "element_bits": 4}), "4 bits are not whole bytes"),
        (lambda: kvd.CacheLayout("LBNHC", **{**LENGTHS, "page_count": 0}), "page_count is zero"),
        (lambda: LAYOUT.block_bytes(0), "block_tokens is zero"),
        (lambda: strided({"page": 512}), "`layer` is missing"),
        (lambda: strided({"page": 512, "layer": 0}), "`kv` is missing"),
        (lambda: strided({**STRIDES, "page": 100}, {"layer": 1}), "page has a stride of 100"),
        (lambda: strided({**STRIDES, "layer": 4096}, {"layer": 1}), "not both"),
        (lambda: strided({**STRIDES, "rows": 4}, {"layer": 1}), "unknown axis `rows`"),
        (lambda: strided({**STRIDES, "layer": 4096}, {"page": 1}), "unknown axis `page`"),
        (lambda: strided({**STRIDES, "page": "many"}, {"layer": 1}), "no number"),
    ],
)
def test_layouts_that_make_no_sense_are_refused_by_name(make, words):
    with pytest.raises(ValueError) as refused:
        make()
    assert words in str(refused.value)


STRIDES = {"page": 512, "token": 128, "head": 64, "kv": 32, "dim": 2}


def strided(strides, tensors=None):
    return kvd.CacheLayout.strided(strides, tensors if tensors is not None else {}, **LENGTHS)


@pytest.mark.parametrize(
    ("tensors", "error", "words"),
    [
        ([object(), (4096, 4096)], TypeError, "__cuda_array_interface__ or a pair"),
        ([(4096, 4096)], ValueError, "2 tensors, 1 are given"),
        ([(0, 4096), (4096, 4096)], ValueError, "no memory"),
        ([(4096, 0), (4096, 4096)], ValueError, "no memory"),
        ([(2**64 - 1, 4096), (4096, 4096)], ValueError, "no memory"),
        ([Tensor(4096, (2048,), read_only=True), (4096, 4096)], ValueError, "read-only"),
        ([Tensor(4096, (2048,), strides=(-2,)), (4096, 4096)], ValueError, "negative"),
        ([Tensor(4096, (2048,), strides=(2, 2)), (4096, 4096)], ValueError, "another number of strides"),
        ([Tensor(4096, (0, 8)), (4096, 4096)], ValueError, "no memory"),
        ([Tensor(4096, (2**40, 2**40)), (4096, 4096)], ValueError, "beyond"),
        ([Tensor(4096, (8,), typestr="O"), (4096, 4096)], ValueError, "says no length"),
    ],
)
def test_tensors_that_are_none_are_refused_before_anything_is_asked(daemon, tensors, error, words):
    session = daemon.client().session()
    with pytest.raises(error) as refused:
        session.register_kv_cache(tensors, LAYOUT)
    assert words in str(refused.value)
    with pytest.raises(ValueError, match="64 bytes, not 3"):
        session.register_kv_cache(tensors, LAYOUT, events=[b"abc"])


def test_without_a_driver_it_says_why(daemon):
    program = f"""
import kvd
session = kvd.connect({str(daemon.run)!r}).session()
layout = kvd.CacheLayout("LBNHC", slice=kvd.Slice(1, 1), page_count=1, page_tokens=1, head_dim=1, element_bits=8)
try:
    session.register_kv_cache([(4096, 4096)], layout)
except kvd.Unsupported as error:
    print(error)
"""
    environment = {**os.environ, LIBRARY: "/nowhere/libcuda.so.1"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.startswith("no CUDA driver: "), done.stdout
    assert "/nowhere/libcuda.so.1" in done.stdout


def test_memory_that_cannot_be_handed_over_is_refused_in_the_drivers_words(gpu, daemon):
    session = daemon.client().session()
    there = gpu.allocate(4096)
    with pytest.raises(kvd.Invalid, match="no device memory at 0x1000") as refused:
        session.register_kv_cache([(4096, 4096), (there, 4096)], LAYOUT)
    assert refused.value.code is None, "nobody was asked"
    with pytest.raises(kvd.Invalid):
        session.register_kv_cache([(there, 4096), (gpu.allocate(4096), 1 << 40)], LAYOUT)
    apart = gpu.segment(1, kinds=0)
    with pytest.raises(kvd.Unsupported, match="not made to be shared"):
        session.register_kv_cache([(there, 4096), (apart, 4096)], LAYOUT)


def test_a_daemon_without_gpus_refuses_and_everything_else_works(gpu, daemon):
    session, binding = connected(daemon)
    with pytest.raises((kvd.Unsupported, kvd.Unavailable)):
        session.register_kv_cache([(gpu.allocate(4096), 4096) for _ in range(2)], LAYOUT)
    assert session.put(binding, b"any block", bytes(2048))


@pytest.mark.parametrize("grpc_only", [False, True])
def test_blocks_go_from_pages_and_come_into_others(gpu, with_gpu, grpc_only):
    session, binding = connected(with_gpu, grpc_only=grpc_only)
    cache = Cache(gpu, [gpu.allocate(4096) for _ in range(2)])
    registered = session.register_kv_cache(cache.tensors, LAYOUT)
    name = [f"{grpc_only} block {n}".encode() for n in range(3)]
    pages = [[1, 5], [0, 2]]
    wanted = [cache.block(of) for of in pages]
    stored = registered.save(binding, [(name[0], pages[0]), (name[1], pages[1])])
    assert stored == [True, True]
    assert registered.save(binding, [(name[0], pages[0])]) == [False]
    assert [session.get(binding, one) for one in name[:2]] == wanted
    before = cache.page(7)
    load = registered.load(binding, [(name[0], [3, 4]), (name[2], [7, 6])])
    assert load.found[0] == "host"
    assert isinstance(load.found[1], kvd.Miss) and load.found[1].reason == "never_stored"
    load.finish()
    assert cache.block([3, 4]) == wanted[0]
    assert cache.page(7) == before, "pages of a miss are left as they are"
    with pytest.raises(ValueError, match="over"):
        load.finish()
    with pytest.raises(kvd.Invalid):
        registered.save(binding, [(name[2], [1, 99])])
    registered.quiesce()
    registered.forget()
    with pytest.raises(kvd.Invalid, match="forgotten"):
        registered.quiesce()


def test_layers_go_and_come_one_by_one_behind_events(gpu, with_gpu):
    session, binding = connected(with_gpu)
    cache = Cache(gpu, [gpu.allocate(4096) for _ in range(2)])
    events = [gpu.event() for _ in range(2)]
    registered = session.register_kv_cache(cache.tensors, LAYOUT, events=[handle for _, handle in events])
    blocks = [(b"by layer", [1, 5])]
    save = registered.save_by_layer(binding, blocks)
    for layer, (event, _) in enumerate(events):
        gpu.call("cuEventRecord", event, gpu.stream)
        save.ready(layer + 1, layer)
    assert save.finish() == [True]
    with pytest.raises(ValueError, match="over"):
        save.ready(2)
    wanted = cache.block([1, 5])
    assert session.get(binding, b"by layer") == wanted
    load = registered.load(binding, [(b"by layer", [3, 4])], by_layer=True, events=[0, 1])
    assert load.found == ["host"]
    for layer, (event, _) in enumerate(events):
        load.wait_for_layers(layer + 1)
        assert load.layers_arrived > layer
        gpu.call("cuEventSynchronize", event)
    load.finish()
    assert cache.block([3, 4]) == wanted
    given_up = registered.save_by_layer(binding, [(b"given up", [0, 1])])
    given_up.ready(1)
    given_up.abort()
    registered.quiesce()
    assert session.get(binding, b"given up") is None


def test_memory_in_pieces_goes_over_the_worker_socket(gpu, with_gpu):
    start = gpu.segment(2)
    # The second tensor lies in both pieces.
    cache = Cache(gpu, [start, start + PIECE - 512])
    session, binding = connected(with_gpu)
    registered = session.register_kv_cache(cache.tensors, LAYOUT)
    assert registered.save(binding, [(b"in pieces", [1, 5])]) == [True]
    assert session.get(binding, b"in pieces") == cache.block([1, 5])
    over_grpc, _ = connected(with_gpu, grpc_only=True)
    with pytest.raises(kvd.Unsupported, match="worker socket"):
        over_grpc.register_kv_cache(cache.tensors, LAYOUT)


def test_views_of_one_cache_are_handed_over_once(gpu, with_gpu):
    start = gpu.segment(1)
    layout = kvd.CacheLayout("BLNHC", **LENGTHS)
    shape, strides = (PAGES, PAGE_TOKENS, HEADS, 2 * DIM), (1024, 128, 64, 2)
    views = [Tensor(start + 512 * layer, shape, strides) for layer in range(2)]
    exports = gpu.count("calls:cuMemExportToShareableHandle")
    session, binding = connected(with_gpu)
    gpu.write(start, np.arange(4096, dtype="<u2").tobytes())
    registered = session.register_kv_cache(views, layout)
    assert gpu.count("calls:cuMemExportToShareableHandle") == exports + 1
    assert registered.save(binding, [(b"of views", [2, 3])]) == [True]
    whole = np.frombuffer(gpu.read(start, 8192), "<u2").reshape(PAGES, 2, PAGE_TOKENS, HEADS, 2, DIM)[[2, 3]]
    wanted = whole.transpose(1, 4, 3, 0, 2, 5).tobytes()
    assert session.get(binding, b"of views") == wanted


def test_the_next_daemon_has_the_cache_again(gpu, with_gpu):
    session, binding = connected(with_gpu)
    start = gpu.segment(1)
    cache = Cache(gpu, [start, start + 4096])
    registered = session.register_kv_cache(cache.tensors, LAYOUT)
    with_gpu.kill()
    with pytest.raises((kvd.Unavailable, kvd.Fenced)):
        for _ in range(1000):
            registered.save(binding, [(b"once more", [1, 2])])
    with_gpu.start()
    assert session.wait_until_connected(30)
    assert registered.save(binding, [(b"once more", [1, 2])])[0] in (True, False)
    assert session.get(binding, b"once more") == cache.block([1, 2])
