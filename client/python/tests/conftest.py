"""A daemon of its own for each test that asks for one: real processes, real memory, directories that go away."""

import contextlib
import mmap
import os
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

import kvd

ROOT = Path(__file__).resolve().parents[3]
BLOCK_BYTES = 64 << 10


def binary() -> Path:
    named = [Path(os.environ["KVD"])] if "KVD" in os.environ else []
    built = [ROOT / "target" / profile / "kvd" for profile in ("release", "debug")]
    for path in named or built:
        if path.is_file():
            return path
    pytest.fail("there is no kvd binary; `cargo build -p kvd`, or name one in the variable KVD")


class Daemon:
    def __init__(self, root: Path, memory: Path, *settings: str):
        self.root, self.memory, self.settings = root, memory, settings
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def run(self) -> Path:
        return self.root / "run"

    def start(self) -> None:
        arguments = [str(binary()), "--run-dir", str(self.run), "--memory-dir", str(self.memory / "m")]
        arguments += ["--data-dir", str(self.root / "data"), "--host-bytes", "64MiB", "--disk-bytes", "256MiB"]
        # A disk that others keep busy is none of these tests' business.
        arguments += ["--http", "off", "--set", "disk.slow_limit=30s"]
        for setting in self.settings:
            arguments += ["--set", setting]
        with (self.root / "log").open("ab") as log:
            self.process = subprocess.Popen(arguments, stderr=log)
        until = time.monotonic() + 60
        while time.monotonic() < until:
            assert self.process.poll() is None, (self.root / "log").read_text()
            try:
                kvd.connect(self.run).describe()
                return
            except kvd.Unavailable:
                time.sleep(0.02)
        pytest.fail("the daemon did not come up")

    def kill(self, how: signal.Signals = signal.SIGKILL) -> None:
        if self.process is not None:
            self.process.send_signal(how)
            self.process.wait(60)
            self.process = None

    @contextlib.contextmanager
    def standing_still(self):
        """None of its threads runs; they go on afterwards."""
        self.process.send_signal(signal.SIGSTOP)
        tasks = Path(f"/proc/{self.process.pid}/task")
        soon(lambda: all((task / "stat").read_text().rpartition(")")[2].split()[0] == "T" for task in tasks.iterdir()))
        try:
            yield
        finally:
            self.process.send_signal(signal.SIGCONT)

    def damage(self, data: bytes) -> int:
        """Turns a byte over in the middle of every copy of ``data`` in host memory; how many there were."""
        found = 0
        for path in (self.memory / "m").rglob("*"):
            if not path.is_file() or path.stat().st_size < len(data):
                continue
            with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
                at = memory.find(data)
                while at >= 0:
                    memory[at + len(data) // 2] ^= 0xFF
                    found += 1
                    at = memory.find(data, at + 1)
        return found

    def client(self) -> kvd.Client:
        return kvd.connect(self.run, deadline=20)


@contextlib.contextmanager
def running(*settings: str):
    # Not pytest's own directory: the path of a Unix socket is short.
    shm = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory() as root, tempfile.TemporaryDirectory(dir=shm) as memory:
        daemon = Daemon(Path(root), Path(memory), *settings)
        try:
            daemon.start()
            yield daemon
        finally:
            daemon.kill()


@pytest.fixture
def daemon(request: pytest.FixtureRequest):
    with running(*getattr(request, "param", ())) as daemon:
        yield daemon


@pytest.fixture
def nodes(request: pytest.FixtureRequest):
    """Node ``a``, and node ``b`` with further settings, which fetch blocks from each other."""
    # Ports that were free a moment ago; both are taken before the first is given back.
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as two:
        places = {name: f"127.0.0.1:{free.getsockname()[1]}" for name, free in (("a", one), ("b", two))}
    members = ",".join(f"{name}={place}" for name, place in places.items())

    def node(name: str, *more: str):
        listen = f"peers.listen={places[name]}"
        return running(f"node.name={name}", listen, f"peers.members={members}", *more)

    with node("a") as a, node("b", *getattr(request, "param", ())) as b:
        yield a, b


@pytest.fixture
def sharing(tmp_path: Path, request: pytest.FixtureRequest):
    """Node ``a``, and node ``b`` with further settings, which share an object store and nothing else. What comes in goes up
    at once."""
    store = f"object.store={tmp_path / 'objects'}"
    at_once = ("object.reads_min=0", "object.age_min=0s", "object.pack_wait=200ms", "object.refresh=200ms")

    def node(name: str, *more: str):
        return running(f"node.name={name}", store, *at_once, *more)

    with node("a") as a, node("b", *getattr(request, "param", ())) as b:
        # What is offered before that is offered again only after half a minute.
        soon(lambda: all("the object store is open" in (one.root / "log").read_text() for one in (a, b)))
        yield a, b


@pytest.fixture(params=["shared memory", "gRPC"])
def session(request: pytest.FixtureRequest, daemon: Daemon) -> kvd.Session:
    session = daemon.client().session("test", grpc_only=request.param == "gRPC")
    assert session.uses_shared_memory == (request.param != "gRPC"), session.doors
    return session


@pytest.fixture
def binding(session: kvd.Session) -> kvd.Binding:
    return session.register(scope(), BLOCK_BYTES)


def soon(what) -> None:
    """Waits until ``what()`` holds, for things that happen behind the caller's back."""
    until = time.monotonic() + 30
    while not what():
        assert time.monotonic() < until, "it never came to be"
        time.sleep(0.01)


def scope(**fields: str) -> kvd.Scope:
    return kvd.Scope(**{"model": "m", "block_tokens": 16, "dtype": "bf16", **fields})


def hashes(numbers) -> list[bytes]:
    return [b"tokens" + n.to_bytes(8, "big") for n in numbers]


def body(number: int) -> bytes:
    """A block that no other block begins, goes on or ends like."""
    return b"".join((number * 10_000 + n).to_bytes(8, "big") for n in range(BLOCK_BYTES // 8))
