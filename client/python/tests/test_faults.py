import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import kvd
from conftest import BLOCK_BYTES, body, hashes, scope, soon


def test_nobody_listening_says_so(tmp_path):
    with pytest.raises(kvd.Unavailable) as raised:
        kvd.connect(tmp_path)
    assert isinstance(raised.value, ConnectionError) and isinstance(raised.value, kvd.KvdError)
    assert raised.value.code.startswith("KVD-") and str(tmp_path) in str(raised.value)


def test_what_makes_no_sense_is_refused_by_name(session, binding):
    with pytest.raises(kvd.Invalid, match="KVD-1003") as raised:
        session.put(binding, hashes([1])[0], b"too short")
    assert raised.value.code == "KVD-1003" and isinstance(raised.value, ValueError)
    [answer] = session.put_many(binding, [(hashes([1])[0], b"too short")])
    assert isinstance(answer, kvd.Invalid)
    for call, named in [
        (lambda: kvd.Scope("", block_tokens=16), "model"),
        (lambda: kvd.Scope("m", block_tokens=16, tenant="No!"), "tenant"),
        (lambda: kvd.Scope("m", block_tokens=16, kind="what"), "kind"),
        (lambda: session.put(binding, hashes([1])[0], body(1), priority="urgent"), "priority"),
        (lambda: session.put(binding, hashes([1])[0], body(1), ttl=-1.0), "ttl"),
        (lambda: session.evict(binding, hashes([1]), tier="tape"), "tier"),
        (lambda: session.acquire(binding, hashes([1]), wait=float("nan")), "wait"),
        (lambda: session.with_deadline(-1), "deadline"),
    ]:
        with pytest.raises(ValueError, match=named):
            call()
    with pytest.raises(BufferError, match="contiguous"):
        session.put(binding, hashes([1])[0], memoryview(bytes(2 * BLOCK_BYTES))[::2])
    with pytest.raises(TypeError):
        session.put(binding, hashes([1])[0], "text")


def test_a_secret_is_not_shown(session):
    secret = kvd.Scope("m", block_tokens=16, salt="hush")
    assert "hush" not in repr(secret) + repr(session.register(secret, BLOCK_BYTES))


def test_killed_and_back_the_same_session_finds_its_blocks(daemon):
    session = daemon.client().session("survivor")
    binding = session.register(scope(), BLOCK_BYTES)
    names = hashes(range(8))
    session.put_many(binding, [(name, body(number)) for number, name in enumerate(names)])
    [held] = session.acquire(binding, names[:1])
    epoch = session.epoch
    daemon.kill()
    assert held.tobytes() == body(0), "what is open stays readable"
    with pytest.raises(kvd.Unavailable):
        session.put(binding, hashes([100])[0], body(100))
    del held
    daemon.start()
    assert session.wait_until_connected(30)
    assert session.epoch > epoch
    assert [session.get(binding, name) for name in names] == [body(n) for n in range(8)]
    assert session.put(binding, hashes([100])[0], body(100))


def test_a_worker_that_dies_holds_nothing(daemon):
    code = f"""
import os, sys, kvd
sys.path.insert(0, {str(Path(__file__).parent)!r})
from conftest import BLOCK_BYTES, body, hashes, scope
session = kvd.connect({str(daemon.run)!r}).session("victim")
binding = session.register(scope(), BLOCK_BYTES)
session.put(binding, hashes([1])[0], body(1))
blocks = session.acquire(binding, hashes([1]))
room = session.reserve(binding, hashes([2])[0])
print("ready", flush=True)
sys.stdin.read()
"""
    victim = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert victim.stdout.readline() == b"ready\n"
    session = daemon.client().session("heir")
    binding = session.register(scope(), BLOCK_BYTES)
    assert session.reserve(binding, hashes([2])[0]) is None, "the victim announced it"
    victim.send_signal(signal.SIGKILL)
    victim.wait(60)
    soon(lambda: session.lookup(binding, hashes([2])).miss.reason == "never_stored")
    with session.reserve(binding, hashes([2])[0]) as room:
        room.write(body(2))
        assert room.commit()
    assert session.get(binding, hashes([1])[0]) == body(1)


def test_events_tell_what_happens_to_blocks(daemon):
    client = daemon.client()
    session = client.session("writer")
    binding = session.register(scope(), BLOCK_BYTES)
    [name] = hashes([1])
    session.put(binding, name, body(1))
    events = client.watch()
    seen, cursors, until = [], {}, time.monotonic() + 20
    evicted = False
    while time.monotonic() < until and ("removed", "host") not in seen:
        batch = events.next(1)
        if batch is None:
            continue
        cursors[batch.cursor[0]] = batch.cursor
        for event in batch.events:
            if event.key == binding.key(name):
                seen.append((event.kind, event.tier))
        if ("stored", "host") in seen and not evicted:
            evicted = session.evict(binding, [name]).evicted == 1
    assert seen[0] == ("stored", "host") and seen[-1] == ("removed", "host")
    again = client.watch(cursors=list(cursors.values()))
    session.put(binding, name, body(1))
    batch = again.next(20)
    assert not batch.snapshot and [event.kind for event in batch.events] == ["stored"]
    assert again.next(0) is None


def test_threads_share_a_session(session, binding):
    wrong = []

    def work(first: int):
        for number in range(first, first + 40):
            [name] = hashes([number % 60])
            session.put(binding, name, body(number % 60))
            if session.get(binding, name) not in (None, body(number % 60)):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(n * 10,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_description_of_the_daemon(daemon):
    told = daemon.client().describe()
    assert told.version and told.epoch == 1 and told.shards >= 1 and told.keys_per_request_max > 0
    assert told.node in repr(told)
