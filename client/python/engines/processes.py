"""Real processes for the stories: kvd, ``vllm serve``, and what they say of themselves."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
ENGINE_START_SECONDS = 420
"""An idle machine needs 30 to 60."""


def soon(what: Callable[[], Any], why: str, seconds: float = 30) -> Any:
    """Waits until ``what()`` holds, and gives it."""
    until = time.monotonic() + seconds
    while True:
        if answer := what():
            return answer
        assert time.monotonic() < until, f"{why}: not within {seconds} s"
        time.sleep(0.02)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


def maps(session: int | None = None) -> str:
    """What all processes, or those of a session, have mapped. Of whom we may not look at, nothing: they are not ours."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if session in (None, int((process / "stat").read_text().rpartition(")")[2].split()[3])):
                found.append((process / "maps").read_text())
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
    return "".join(found)


class Process:
    """A process in a group of its own, which ends with us."""

    def __init__(self, name: str, arguments: list[str], log: Path, environment: dict[str, str] | None = None):
        self.name, self.log = name, log
        with log.open("ab") as out:
            self.popen = subprocess.Popen(
                arguments, stdout=out, stderr=out, env={**os.environ, **(environment or {})}, start_new_session=True
            )

    @property
    def is_running(self) -> bool:
        return self.popen.poll() is None

    def send(self, how: signal.Signals) -> None:
        """To the whole group."""
        if self.is_running:
            os.killpg(self.popen.pid, how)

    def end(self, how: signal.Signals = signal.SIGTERM, seconds: float = 30) -> None:
        self.send(how)
        try:
            self.popen.wait(seconds)
        except subprocess.TimeoutExpired:
            pass
        # Its children may outlive it.
        try:
            os.killpg(self.popen.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.popen.wait(10)

    def tail(self, lines: int = 30) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])


class Kvd:
    """A daemon on directories of its own. ``settings``: ``KEY=VALUE``, as for ``kvd --set``."""

    def __init__(self, folder: Path, *settings: str):
        self.folder = folder
        folder.mkdir()
        shm = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
        self.memory = Path(tempfile.mkdtemp(prefix="kvd-engines-", dir=shm))
        self.settings, self.host = settings, "256MiB"
        self.process: Process | None = None

    @property
    def run(self) -> Path:
        return self.folder / "run"

    @property
    def data(self) -> Path:
        return self.folder / "data"

    def start(self) -> None:
        arguments = [str(ROOT / "target/release/kvd"), "--run-dir", str(self.run), "--data-dir", str(self.data)]
        arguments += ["--memory-dir", str(self.memory / "m"), "--host-bytes", self.host, "--disk-bytes", "1GiB"]
        arguments += ["--http", "off", "--set", "disk.admission=all", "--set", "disk.slow_limit=30s"]
        for setting in self.settings:
            arguments += ["--set", setting]
        process = Process("kvd", arguments, self.folder / "kvd.log")
        self.process = process
        soon(lambda: self.ctl("version", check=False) is not None or not process.is_running, "kvd comes up")
        assert process.is_running, process.tail()

    def kill(self, how: signal.Signals = signal.SIGKILL) -> None:
        if self.process is not None:
            self.process.end(how)
            self.process = None

    def forget_memory(self) -> None:
        """As after a restart of the machine."""
        shutil.rmtree(self.memory / "m")

    def forget(self) -> None:
        self.forget_memory()
        shutil.rmtree(self.data)

    def ctl(self, *words: str, check: bool = True) -> str | None:
        """What ``kvctl`` prints; ``None`` when it fails and need not be checked."""
        done = subprocess.run(
            [str(ROOT / "target/release/kvctl"), *words],
            env={**os.environ, "KVCTL_ENDPOINT": str(self.run)},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0 or not check, f"kvctl {words}: {done.stdout}{done.stderr}"
        return done.stdout if done.returncode == 0 else None

    def ask(self, *words: str) -> Any:
        """What ``kvctl`` says as JSON."""
        return json.loads(self.ctl(*words, "-o", "json") or "")

    def status(self) -> Any:
        return self.ask("status")

    def begin_anew(self, host: str) -> None:
        """Without what it had, with that much host memory."""
        self.kill(signal.SIGTERM)
        self.forget()
        self.host = host
        self.start()

    def close(self) -> None:
        self.kill()
        shutil.rmtree(self.memory, ignore_errors=True)


@dataclass
class Answer:
    """One completion. Times are seconds, counts are prompt tokens."""

    text: str
    ttft: float
    tokens: int
    computed: int = 0
    cached: int = 0
    external: int = 0
    ids: list[int] = field(default_factory=list)
    """Tokens of the prompt and of the answer."""


class Vllm:
    """``vllm serve`` on one core. ``connector``: the value of ``--kv-transfer-config``, or ``None``."""

    def __init__(
        self,
        folder: Path,
        name: str,
        model: Path,
        connector: dict[str, Any] | None,
        *arguments: str,
        core: int = 0,
        environment: dict[str, str] | None = None,
    ):
        self.name, self.port = name, free_port()
        self._segments: set[str] = set()
        programs = Path(sys.executable).parent
        command = [str(programs / "vllm"), "serve", str(model), "--served-model-name", "tiny", "--host", "127.0.0.1"]
        command += ["--port", str(self.port), "--dtype", "float32", "--max-model-len", "4096", "--max-num-seqs", "8"]
        command += ["--max-num-batched-tokens", "2048", "--block-size", "32", "--enforce-eager", "--seed", "0"]
        command += ["--enable-prefix-caching", *arguments]
        if connector is not None:
            command += ["--kv-transfer-config", json.dumps(connector)]
        settings = {
            "PATH": f"{programs}:{os.environ['PATH']}",
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "DO_NOT_TRACK": "1",
            "VLLM_HOST_IP": "127.0.0.1",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            # For POST /reset_prefix_cache.
            "VLLM_SERVER_DEV_MODE": "1",
            # More threads than cores spin at barriers, and two servers on two cores hardly move.
            "VLLM_CPU_OMP_THREADS_BIND": str(core % (os.cpu_count() or 1)),
            "OMP_WAIT_POLICY": "PASSIVE",
            "PYTHONPATH": str(Path(__file__).parent),
        }
        self.process = Process(name, command, folder / f"{name}.log", {**settings, **(environment or {})})

    def wait_until_ready(self) -> None:
        def ready() -> bool:
            assert self.process.is_running, f"{self.name} ended:\n{self.process.tail()}"
            try:
                self._get("/health")
                return True
            except (urllib.error.URLError, ConnectionError):
                return False

        soon(ready, f"{self.name} comes up", ENGINE_START_SECONDS)
        # Now, for it may be killed.
        self._note_segments()

    def ask(
        self, prompt: str | list[int], *, tokens: int = 16, model: str = "tiny", timeout: float = 120, **more: Any
    ) -> Answer:
        """A greedy completion, and where the KV of its prompt came from. Nothing else may be asked meanwhile."""
        before = self.sources()
        answer = self.send(prompt, tokens=tokens, model=model, timeout=timeout, **more)
        # Counters are taken in a moment after the last word.
        soon(lambda: sum(self.sources().values()) >= sum(before.values()) + answer.tokens, "vLLM counts the prompt")
        now = self.sources()
        answer.computed = int(now["local_compute"] - before["local_compute"])
        answer.cached = int(now["local_cache_hit"] - before["local_cache_hit"])
        answer.external = int(now["external_kv_transfer"] - before["external_kv_transfer"])
        return answer

    def send(
        self, prompt: str | list[int], *, tokens: int = 16, model: str = "tiny", timeout: float = 120, **more: Any
    ) -> Answer:
        """A greedy completion alone."""
        body = {"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, **more}
        body |= {"return_token_ids": True, "stream": True, "stream_options": {"include_usage": True}}
        begun, first, text, prompt_tokens = time.monotonic(), 0.0, "", 0
        ids: list[int] = []
        with self._open("/v1/completions", body, timeout) as lines:
            for line in lines:
                if not line.startswith(b"data: ") or line.strip() == b"data: [DONE]":
                    continue
                piece = json.loads(line[6:])
                assert "error" not in piece, piece
                if piece["choices"]:
                    first = first or time.monotonic()
                    choice = piece["choices"][0]
                    text += choice["text"]
                    ids += (choice.get("prompt_token_ids") or []) + (choice.get("token_ids") or [])
                if piece.get("usage"):
                    prompt_tokens = piece["usage"]["prompt_tokens"]
        return Answer(text, first - begun, prompt_tokens, ids=ids)

    def reset(self) -> None:
        """Empties vLLM's own prefix cache."""

        def done() -> bool:
            with self._open("/reset_prefix_cache", {}, 30) as answer:
                return bool(json.loads(answer.read())["success"])

        soon(done, "vLLM gives up its prefix cache")

    def sources(self) -> dict[str, float]:
        """Prompt tokens so far, by where their KV came from."""
        pattern = re.compile(r'^vllm:prompt_tokens_by_source_total\{.*source="(\w+)".*\} (\S+)$', re.M)
        return {source: float(count) for source, count in pattern.findall(self._get("/metrics"))}

    def end(self, how: signal.Signals = signal.SIGTERM) -> None:
        self._note_segments()
        self.process.end(how)
        # What an engine that was killed leaves in shared memory, Python does not collect.
        mapped = maps()
        for segment in self._segments:
            if segment not in mapped:
                Path(segment).unlink(missing_ok=True)

    def _note_segments(self) -> None:
        """Remembers the segments of shared memory that its processes have made."""
        self._segments.update(re.findall(r"/dev/shm/psm_\w+", maps(self.process.popen.pid)))

    def _get(self, path: str) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=30) as answer:
            text: str = answer.read().decode()
            return text

    @contextmanager
    def _open(self, path: str, body: dict[str, Any], timeout: float) -> Iterator[Any]:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            yield answer
