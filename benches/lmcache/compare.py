#!/usr/bin/env python3
"""The LMCache door of kvd beside `lmcache server`, with the client of the lmcache wheel itself.

    VENV/bin/python benches/lmcache/compare.py [--kvd target/release/kvd] [--rounds 3] [--only kvd|lmcache]

Run it with a Python that has lmcache and torch (CPU is enough); nothing else of the machine should be busy. Each
server is started fresh on directories of its own and stopped again. One client process, as an engine has, stores and
loads 1 GiB in chunks of 2 MiB (one prompt of 131,072 tokens, eight requests of 128 MiB), through the wheel's own
classes: each figure includes the client's copy into and out of the pool. `server part` leaves that copy out: what
the engine waits for the server. Memory is what a fresh server takes, less its shared pools; start is until it answers.
"""

import argparse
import json
import os
import pathlib
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time

CHUNK_TOKENS, CHUNKS, REQUESTS = 256, 512, 8
LAYERS, HIDDEN = 4, 512  # float32, one plane: 2 MiB a chunk
CHUNK_BYTES = LAYERS * CHUNK_TOKENS * HIDDEN * 4
TOKENS = CHUNKS * CHUNK_TOKENS
WAIT_S = 120


def free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def client(url, rounds):
    """Runs in a process of its own; prints one line of JSON."""
    import torch
    from lmcache.v1.distributed.api import MemoryLayoutDesc
    from lmcache.v1.multiprocess.custom_types import IPCCacheServerKey, RegisterEngineDrivenContextPayload
    from lmcache.v1.multiprocess.transfer_context.base import (
        EngineDrivenContextMetadata,
        create_engine_driven_context,
    )
    from lmcache.v1.multiprocess.transport.grpc_impl.client import GrpcMultiprocessClient

    torch.set_num_threads(1)
    server = GrpcMultiprocessClient(url)
    assert server.get_chunk_size().result(timeout=WAIT_S) == CHUNK_TOKENS
    instance, model = 4711, "bench"
    payload = RegisterEngineDrivenContextPayload(
        instance_id=instance, model_name=model, world_size=1, block_size=32, num_layers=LAYERS,
        hidden_dim_size=HIDDEN, dtype_str="float32", use_mla=True, num_physical_slots=CHUNK_TOKENS,
    )
    answer = server.register_kv_cache_engine_driven_context(payload).result(timeout=WAIT_S)
    shape = torch.Size([LAYERS, CHUNK_TOKENS, HIDDEN])
    layout = MemoryLayoutDesc(shapes=[shape], dtypes=[torch.float32])
    metadata = EngineDrivenContextMetadata(layout_desc=layout, block_size=32, use_mla=True)
    context = create_engine_driven_context(
        metadata, server, WAIT_S, shm_name=answer.shm_name, pool_size=answer.pool_size
    )
    assert type(context).__name__ == "EngineDrivenContextShm", "the pool could not be mapped"
    source = [torch.full(shape, float(chunk)) for chunk in range(16)]
    target = torch.empty(shape)

    def key(tokens, request, worker, start=0, end=TOKENS):
        return IPCCacheServerKey(
            model_name=model, world_size=1, worker_id=worker, token_ids=tokens, start=start, end=end,
            request_id=request, cache_salt="", num_kv_readers=1,
        )

    def lookup(tokens, request):
        began = time.perf_counter()
        server.lookup(key(tokens, request, None), 1).result(timeout=WAIT_S)
        while True:
            found = server.query_prefetch_status(request).result(timeout=WAIT_S)
            if found is not None:
                return found, time.perf_counter() - began

    step = TOKENS // REQUESTS
    figures = {name: [] for name in ("store", "store server", "load", "load server", "lookup")}
    for number in range(rounds):
        tokens = tuple(range(number * TOKENS, (number + 1) * TOKENS))
        own = began = time.perf_counter()
        copying = 0.0
        for at in range(0, TOKENS, step):
            part = key(tokens, f"store-{number}", 0, at, at + step)
            slots, chunks = context.prepare_store(part, instance)
            assert len(chunks) == CHUNKS // REQUESTS, f"only {len(chunks)} chunks were taken"
            own = time.perf_counter()
            for slot, chunk in zip(slots, chunks):
                slot.copy_(source[chunk % 16])
            copying += time.perf_counter() - own
            assert context.commit_store(part, instance, slots)
        took = time.perf_counter() - began
        figures["store"].append(took)
        figures["store server"].append(took - copying)
        server.end_session(f"store-{number}").result(timeout=WAIT_S)

        # Others looked for it before: what one lookup of a known prompt costs, then what it takes to load it.
        for again in range(5):
            found, took = lookup(tokens, f"look-{number}-{again}")
            assert found == CHUNKS, f"{found} chunks were found"
            figures["lookup"].append(took)
            server.free_lookup_locks(key(tokens, f"look-{number}-{again}", None), 1).result(timeout=WAIT_S)
            server.end_session(f"look-{number}-{again}").result(timeout=WAIT_S)

        request = f"load-{number}"
        assert lookup(tokens, request)[0] == CHUNKS
        began = time.perf_counter()
        copying = 0.0
        for at in range(0, TOKENS, step):
            part = key(tokens, request, 0, at, at + step)
            slots = context.prepare_retrieve(part, instance)
            assert slots is not None, "a load failed"
            own = time.perf_counter()
            for index, slot in enumerate(slots):
                target.copy_(slot)
                assert target[0, 0, 0] == index % 16 and target[-1, -1, -1] == index % 16
            copying += time.perf_counter() - own
            assert context.commit_retrieve(part, instance)
        took = time.perf_counter() - began
        figures["load"].append(took)
        figures["load server"].append(took - copying)
        server.end_session(request).result(timeout=WAIT_S)
    server.unregister_kv_cache_engine_driven_context(instance).result(timeout=WAIT_S)
    print(json.dumps(figures), flush=True)
    os._exit(0)


def answers(port, process):
    """Waits until the server answers a call; with bare sockets, so that no import counts."""
    # An HTTP/2 preface and empty SETTINGS; a gRPC server answers with its own.
    hello = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
    limit = time.monotonic() + WAIT_S
    while time.monotonic() < limit:
        if process.poll() is not None:
            raise SystemExit("the server ended; see its log above")
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=1) as sock:
                sock.sendall(hello)
                if sock.recv(9):
                    return
        except OSError:
            time.sleep(0.002)
    raise SystemExit("the server does not answer")


def memory_mib(pid):
    """Own memory of a process and its children: resident, less what is shared through files in memory."""
    pids, total = [pid], 0
    while pids:
        one = pids.pop()
        try:
            children = pathlib.Path(f"/proc/{one}/task/{one}/children").read_text().split()
            lines = pathlib.Path(f"/proc/{one}/status").read_text().splitlines()
        except OSError:
            continue
        pids += map(int, children)
        sizes = {line.split(":")[0]: int(line.split()[1]) for line in lines if line.startswith(("RssAnon", "RssFile"))}
        total += sum(sizes.values())
    return total / 1024


def measure(name, command, port, rounds, log):
    began = time.monotonic()
    process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    try:
        answers(port, process)
        start_s = time.monotonic() - began
        time.sleep(5)
        idle_mib = memory_mib(process.pid)
        me = [sys.executable, __file__, "--client", f"grpc://127.0.0.1:{port}", "--rounds", str(rounds)]
        out = subprocess.run(me, stdout=subprocess.PIPE, stderr=log, check=False)
        lines = [line for line in out.stdout.splitlines() if line.startswith(b"{")]
        if out.returncode or not lines:
            log.flush()
            sys.stderr.write(pathlib.Path(log.name).read_text()[-4000:])
            raise SystemExit(f"{name}: the client failed")
        return {**json.loads(lines[-1]), "start": start_s, "idle": idle_mib}
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kvd", default="target/release/kvd")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=["kvd", "lmcache"])
    parser.add_argument("--client", help=argparse.SUPPRESS)
    said = parser.parse_args()
    if said.client:
        return client(said.client, said.rounds)

    # Room for all rounds, so that nothing is evicted.
    gib = said.rounds + 1
    scratch = pathlib.Path(tempfile.mkdtemp(prefix="kvd-lmcache-"))
    memory = pathlib.Path(f"/dev/shm/{scratch.name}")
    lmcache = shutil.which("lmcache", path=f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}")
    ports = {"kvd": free_port(), "lmcache": free_port()}
    commands = {
        "lmcache": [
            lmcache or "lmcache", "server", "--transport", "grpc", "--host", "127.0.0.1",
            "--port", str(ports["lmcache"]), "--http-port", str(free_port()),
            "--supported-transfer-mode", "engine_driven", "--shm-name", scratch.name,
            "--l1-size-gb", str(gib), "--eviction-policy", "LRU", "--chunk-size", str(CHUNK_TOKENS),
        ],
        "kvd": [
            said.kvd, "--run-dir", str(scratch / "run"), "--memory-dir", str(memory),
            "--host-bytes", f"{gib}GiB", "--http", "off", "--lmcache-listen", f"127.0.0.1:{ports['kvd']}",
            "--set", f"lmcache.chunk_tokens={CHUNK_TOKENS}", "--set", f"lmcache.shm_name={scratch.name}",
        ],
    }
    results = {}
    try:
        for name, command in commands.items():
            if said.only in (None, name):
                with open(scratch / f"{name}.log", "w+") as log:
                    results[name] = measure(name, command, ports[name], said.rounds, log)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        shutil.rmtree(memory, ignore_errors=True)

    gib_moved = CHUNKS * CHUNK_BYTES / 2**30
    rows = [
        ("store, GiB/s", lambda found: gib_moved / statistics.median(found["store"]), True),
        ("  server part, GiB/s", lambda found: gib_moved / statistics.median(found["store server"]), True),
        ("load, GiB/s", lambda found: gib_moved / statistics.median(found["load"]), True),
        ("  server part, GiB/s", lambda found: gib_moved / statistics.median(found["load server"]), True),
        (f"lookup of {TOKENS:,} tokens, ms", lambda found: 1e3 * statistics.median(found["lookup"]), False),
        ("start, s", lambda found: found["start"], False),
        ("idle memory, MiB", lambda found: found["idle"], False),
    ]
    print(f"{'median of ' + str(said.rounds) + ' rounds':36}" + "".join(f"{name:>12}" for name in results) + f"{'ratio':>10}")
    for title, value, more_is_better in rows:
        values = {name: value(found) for name, found in results.items()}
        ratio = ""
        if len(values) == 2:
            better = values["kvd"] / values["lmcache"]
            ratio = f"{better if more_is_better else 1 / better:9.1f}x"
        print(f"{title:36}" + "".join(f"{number:12.2f}" for number in values.values()) + f"{ratio:>10}")


if __name__ == "__main__":
    main()
