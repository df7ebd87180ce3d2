import threading
import time

import numpy as np
import pytest

import kvd
from conftest import BLOCK_BYTES, body, hashes, scope, soon


def test_what_was_stored_is_found_and_read(session, binding):
    names = hashes(range(5))
    assert session.put(binding, names[0], body(0))
    assert not session.put(binding, names[0], body(0)), "it was there"
    assert session.put_many(binding, [(names[n], body(n)) for n in (1, 2, 3)]) == [True, True, True]
    found = session.lookup(binding, names)
    assert (found.prefix, found.tiers) == (4, ["host"] * 4)
    assert found.miss.reason == "never_stored"
    *blocks, miss = session.acquire(binding, names)
    for number, block in enumerate(blocks):
        assert block and len(block) == BLOCK_BYTES and block.verify() and block.is_valid
        assert block.is_zero_copy == session.uses_shared_memory
        assert block.key == binding.key(names[number])
        assert block.tobytes() == body(number) == session.get(binding, names[number])
    assert not miss and (miss.reason, str(miss)) == ("never_stored", "never_stored")
    assert session.get(binding, names[4]) is None


def test_a_block_is_a_read_only_buffer_that_keeps_itself_alive(session, binding):
    [name] = hashes([7])
    session.put(binding, name, np.frombuffer(body(7), np.float32))
    [block] = session.acquire(binding, [name])
    view = memoryview(block)
    assert view.readonly and view.contiguous and view.nbytes == BLOCK_BYTES
    with pytest.raises(TypeError):
        view[0] = 1
    array = np.frombuffer(block, np.uint64)
    with pytest.raises(BufferError, match="2 views"):
        block.release()
    del block
    assert array.tobytes() == view.tobytes() == body(7)
    # The views still hold its memory: it is not there for others any more, and nobody writes over it.
    assert session.evict(binding, [name]).evicted == 1
    session.put_many(binding, [(other, body(8)) for other in hashes(range(100, 1500))])
    assert session.lookup(binding, [name]).miss is not None
    assert array.tobytes() == view.tobytes() == body(7)


def test_a_released_block_is_over(session, binding):
    [name] = hashes([1])
    session.put(binding, name, body(1))
    with session.acquire(binding, [name])[0] as block:
        target = np.zeros(BLOCK_BYTES, np.uint8)
        block.copy_into(target)
        assert target.tobytes() == body(1)
        with pytest.raises(BufferError, match="do not go into"):
            block.copy_into(bytearray(8))
        with pytest.raises(BufferError, match="read-only"):
            block.copy_into(bytes(BLOCK_BYTES))
    for use in (block.tobytes, block.verify, lambda: len(block), lambda: memoryview(block)):
        with pytest.raises((ValueError, BufferError), match="released"):
            use()
    block.release()


def test_room_is_filled_through_a_view_or_in_one_go(session, binding):
    through, at_once = hashes([1, 2])
    with session.reserve(binding, through) as room:
        view = np.frombuffer(room, np.uint64)
        view[:] = np.frombuffer(body(1), np.uint64)
        with pytest.raises(BufferError, match="1 views"):
            room.commit()
        del view
        assert room.commit()
        with pytest.raises(ValueError, match="over"):
            room.commit()
    room = session.reserve(binding, at_once)
    with pytest.raises(ValueError, match=f"3 bytes for a block of {BLOCK_BYTES}"):
        room.write(b"abc")
    room.write(memoryview(body(2)))
    assert room.commit()
    assert [session.get(binding, name) for name in (through, at_once)] == [body(1), body(2)]
    assert session.reserve(binding, through) is None, "it is there"


def test_what_is_not_committed_was_never_there(session, binding):
    [name] = hashes([1])
    with session.reserve(binding, name):
        assert session.reserve(binding, name) is None, "it is announced"
        assert session.lookup(binding, [name]).miss.reason == "not_complete"
    soon(lambda: session.lookup(binding, [name]).miss.reason == "never_stored")
    room = session.reserve(binding, name)
    room.abort()
    room.abort()
    soon(lambda: session.lookup(binding, [name]).miss.reason == "never_stored")
    assert session.acquire(binding, [name])[0].reason == "never_stored"


def test_a_reader_waits_for_an_announced_block_and_other_threads_run(session, binding):
    names = hashes([1, 2])
    session.put(binding, names[1], body(2))
    room = session.reserve(binding, names[0])
    assert session.wait(binding, names, 0.01) == 0

    def arrive():
        # Runs only while the reader lets go of the interpreter.
        time.sleep(0.05)
        room.write(body(1))
        room.commit()

    thread = threading.Thread(target=arrive)
    thread.start()
    first, second = session.acquire(binding, names, wait=20)
    thread.join()
    assert (first.tobytes(), second.tobytes()) == (body(1), body(2))
    assert session.wait(binding, names, 20) == 2


def test_hashes_are_bytes_hex_or_integers_of_either_sign(session, binding):
    number = (1 << 64) - 5
    session.put(binding, number, body(1))
    same = [number, -5, number.to_bytes(8, "little"), number.to_bytes(8, "little").hex()]
    assert session.lookup(binding, same).prefix == 4
    assert len({binding.key(name) for name in same}) == 1
    for wrong, error in [
        (b"short", ValueError),
        (bytes(65), ValueError),
        ("xyz", ValueError),
        (1 << 64, TypeError),
        (1.5, TypeError),
        (None, TypeError),
    ]:
        with pytest.raises(error, match="hash"):
            session.lookup(binding, [wrong])


def test_a_block_of_another_scope_is_never_a_hit_and_the_field_is_named(session, binding):
    [name] = hashes([1])
    session.put(binding, name, body(1))
    for fields in ({"dtype": "fp8_e4m3"}, {"lora": "a"}, {"salt": "s"}, {"layout": "other"}):
        other = session.register(scope(**fields), BLOCK_BYTES)
        assert session.lookup(other, [name]).prefix == 0
        miss = session.explain(other, name)
        assert (miss.reason, miss.fields) == ("scope_differs", list(fields))
    assert session.explain(binding, name) is None


def test_slices_of_a_tensor_are_different_blocks(session):
    [name] = hashes([1])
    first = session.register(scope(), BLOCK_BYTES, slice=kvd.Slice(32, 8, head_range=(0, 4)))
    second = session.register(scope(), BLOCK_BYTES, slice=kvd.Slice(32, 8, head_range=(4, 8)))
    session.put(first, name, body(1))
    assert session.lookup(second, [name]).prefix == 0
    with pytest.raises(ValueError, match="head range"):
        kvd.Slice(32, 8, head_range=(4, 9))


def test_pins_hold_and_what_is_evicted_says_so(session, binding):
    names = hashes(range(3))
    session.put_many(binding, [(name, body(1)) for name in names[:2]])
    pinned = session.pin(binding, names, 60)
    assert (pinned.pinned, pinned.absent) == (2, 1)
    assert session.evict(binding, names).in_use == 2
    assert session.unpin(binding, names) == 2
    did = session.evict(binding, names)
    assert (did.evicted, did.in_use, did.absent) == (2, 0, 1)
    assert session.lookup(binding, names).miss.reason == "evicted_request"


@pytest.mark.parametrize("daemon", [("disk.admission=all",)], indirect=True)
def test_blocks_come_up_from_disk(session, binding):
    names = hashes(range(4))
    for number, name in enumerate(names):
        session.put(binding, name, body(number), durable=True)
    assert session.evict(binding, names, tier="host").evicted == 4
    assert session.lookup(binding, names).tiers == ["disk"] * 4
    assert session.prefetch(binding, names).started == 4
    assert [block.tobytes() for block in session.acquire(binding, names, wait=20)] == [body(n) for n in range(4)]
    assert session.lookup(binding, names).tiers == ["host"] * 4


def test_a_block_is_located_at_a_peer_and_fetched(nodes):
    a, b = nodes
    there, here = a.client().session("there"), b.client().session("here")
    far, near = there.register(scope(), BLOCK_BYTES), here.register(scope(), BLOCK_BYTES)
    stored, announced, own, absent = hashes(range(4))
    there.put(far, stored, body(0))
    room = there.reserve(far, announced)
    here.put(near, own, body(2))
    first, second, third, fourth = here.locate(near, [stored, announced, own, absent])
    assert (first.node, first.tier, first.miss) == ("a", "host", None)
    assert (second.node, second.tier, second.miss) == ("a", None, None)
    assert (third.node, third.tier, third.miss) == (None, "host", None)
    assert (fourth.node, fourth.tier, fourth.miss.reason) == (None, None, "never_stored")
    assert "host" in repr(first)
    assert here.lookup(near, [stored]).prefix == 0, "nothing has moved"
    assert here.prefetch(near, [stored], node="a").started == 1
    soon(lambda: here.lookup(near, [stored]).prefix == 1)
    room.write(body(1))
    room.commit()
    (block,) = here.acquire(near, [announced], wait=20)
    assert block.tobytes() == body(1)
    with pytest.raises(kvd.Invalid, match="peers.members"):
        here.locate(near, [absent], node="elsewhere")
    told = b.client().describe()
    assert (told.peers, told.object) == (["a"], False)


def test_a_block_is_located_in_the_object_store_and_fetched(sharing):
    a, b = sharing
    there, here = a.client().session("there"), b.client().session("here")
    far, near = there.register(scope(), BLOCK_BYTES), here.register(scope(), BLOCK_BYTES)
    stored, also, absent = hashes(range(3))
    there.put_many(far, [(stored, body(0)), (also, body(1))])
    soon(lambda: all(one.tier for one in here.locate(near, [stored, also])))
    a.kill()
    first, _, third = here.locate(near, [stored, also, absent])
    assert (first.node, first.tier, first.miss) == (None, "object", None)
    assert (third.node, third.tier, third.miss.reason) == (None, None, "never_stored")
    assert here.lookup(near, [stored]).prefix == 0, "nothing has moved"
    assert here.prefetch(near, [stored]).started == 1
    soon(lambda: here.lookup(near, [stored]).tiers == ["host"])
    (block,) = here.acquire(near, [also], wait=20)
    assert block.tobytes() == body(1)
    told = b.client().describe()
    assert (told.peers, told.object) == ([], True)


def test_many_blocks_are_waited_for_together(session, binding):
    names = hashes(range(20))
    rooms = [session.reserve(binding, name) for name in names]
    assert all(rooms)
    begun = time.monotonic()
    assert not any(session.acquire(binding, names, wait=1.0))
    assert time.monotonic() - begun < 10, "the waits added up"


def test_a_short_life_ends(session, binding):
    [name] = hashes([1])
    session.put(binding, name, body(1), ttl=1, priority="low")
    assert session.lookup(binding, [name]).prefix == 1
    soon(lambda: session.lookup(binding, [name]).prefix == 0)
    assert session.lookup(binding, [name]).miss.reason == "expired"
