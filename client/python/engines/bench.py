"""Conversations under load, in one run: vLLM alone, on kvd by both ways in, and on ``lmcache server``.

    bench.py [--conversations 24] [--turns 4] [--concurrency 12]

aiperf asks; the engines run one after another on one core each, with so little KV cache of their own that a conversation
has left it when its next turn comes. Prints a row for each: time to first token, throughput, and where the KV of prompt
tokens came from. Needs what ``install-vllm`` and ``install-aiperf`` make.
"""

import argparse
import json
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from processes import ROOT, Kvd, Process, Vllm, soon
from stories import Connector, Door, Lmcache
from tiny_model import write_model

# Blocks of 32 tokens: 4,096 tokens in all.
CACHE_BLOCKS = "129"


def lmcache_server(folder: Path, port: int) -> Process:
    """LMCache's own server, with the memory that kvd gets."""
    command = [str(Path(sys.executable).parent / "lmcache"), "server", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--transport", "grpc", "--supported-transfer-mode", "engine_driven", "--shm-name", f"bench{port}"]
    command += ["--chunk-size", "64", "--l1-size-gb", "0.25", "--eviction-policy", "LRU"]
    return Process("lmcache", command, folder / "lmcache.log")


def load(vllm: Vllm, model: Path, folder: Path, given: argparse.Namespace) -> dict[str, Any]:
    """What aiperf measured."""
    command = [str(ROOT / ".cache/aiperf/bin/aiperf"), "profile", "--model", "tiny", "--tokenizer", str(model)]
    command += ["--url", f"http://127.0.0.1:{vllm.port}", "--endpoint-type", "chat", "--streaming"]
    command += ["--conversation-num", str(given.conversations), "--conversation-turn-mean", str(given.turns)]
    command += ["--conversation-turn-stddev", "0", "--concurrency", str(given.concurrency), "--random-seed", "7"]
    command += ["--synthetic-input-tokens-mean", "400", "--synthetic-input-tokens-stddev", "0"]
    command += ["--output-tokens-mean", "8", "--extra-inputs", "ignore_eos:true", "--extra-inputs", "min_tokens:8"]
    command += ["--ui-type", "none", "--artifact-dir", str(folder / "aiperf"), "--no-gpu-telemetry"]
    with (folder / "aiperf.log").open("wb") as log:
        subprocess.run(command, stdout=log, stderr=log, timeout=900, check=True)
    (found,) = (folder / "aiperf").rglob("profile_export_aiperf.json")
    measured: dict[str, Any] = json.loads(found.read_text())
    return measured


def measure(name: str, door: Door | None, folder: Path, model: Path, given: argparse.Namespace) -> None:
    folder.mkdir()
    kvd = Kvd(folder / "kvd", *(door.settings if door is not None else []))
    server = None
    try:
        connector = None
        if door is not None:
            connector = door.config(kvd)
            if name == "lmcache server":
                assert isinstance(door, Lmcache)
                server = lmcache_server(folder, door.port)
            else:
                kvd.start()
        arguments = ["--num-gpu-blocks-override", CACHE_BLOCKS, "--max-model-len", "2048"]
        vllm = Vllm(folder, "vllm", model, connector, *arguments)
        try:
            vllm.wait_until_ready()
            measured = load(vllm, model, folder, given)
            # Counters are taken in a moment after the last word.
            soon(lambda: sum(vllm.sources().values()) > 0, "vLLM counts prompts")
            sources = vllm.sources()
        finally:
            vllm.end(signal.SIGKILL)
    finally:
        if server is not None:
            server.end(signal.SIGTERM)
        kvd.close()
    ttft = measured["time_to_first_token"]
    print(
        f"| {name} | {ttft['p50']:.0f} | {ttft['p99']:.0f} | {measured['request_throughput']['avg']:.2f}"
        f" | {measured['output_token_throughput']['avg']:.0f} | {sources['local_compute']:.0f}"
        f" | {sources['local_cache_hit']:.0f} | {sources['external_kv_transfer']:.0f} |",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--conversations", type=int, default=24)
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--concurrency", type=int, default=12)
    parser.add_argument("--only", nargs="*", default=[])
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="kvd-engines-bench-"))
    model = folder / "models" / "tiny"
    write_model(model, "qwen3", 7)
    rows: dict[str, Door | None] = {
        "vLLM alone": None,
        "kvd, our connector": Connector(),
        "kvd, LMCache's connector": Lmcache(),
        "lmcache server": Lmcache(),
    }
    print("| | TTFT p50 ms | p99 | requests/s | tokens/s | computed | cached | loaded |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    for at, (name, door) in enumerate(rows.items()):
        if not given.only or name in given.only:
            measure(name, door, folder / str(at), model, given)
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
