"""The daemon copies between vLLM's pages and its tiers by itself: :class:`DeviceCopies` names pages, and nothing of a block
passes through this process.

::

    load           an event on the engine's stream | behind it the daemon copies layer by layer, an event behind each
    before layer   the engine's stream waits for the layer's event
    fetch          the same on a thread, all layers at once
    announce       the daemon gets slots, and waits for layers
    after layer    an event on the engine's stream: the copies of the layer wait for it
    commit         the last layer is ready, now that nothing failed: without it nothing is stored
    next begin     waits until the save is over

What must hold: pages of a load are nobody else's. vLLM gives a block away when the scheduler is done with it, while what the
engine's stream still has to do may write to it; so that is waited for before the daemon writes. And pages of a save hold
still. They do until the next step begins, which is why that waits. A call that failed may leave copies under way; the
daemon is asked when they are over, and what it does not answer in time it has not begun, for its calls have deadlines. And
the engine's stream must not wait for an event that a daemon which failed will never record: then we do.

Whatever the daemon refuses for good, from memory that cannot be shared to a GPU that it does not have, is in the log, and
``HostCopies`` go on: the blocks are the same. A new life of the daemon is asked again.
"""

import contextlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, TypeVar

import torch
from vllm.logger import init_logger

import kvd
from kvd._engine import Link
from kvd.vllm._copies import Bind, Coming, Room, missing, not_loaded
from kvd.vllm._layout import Group, cache_layout
from kvd.vllm._plan import Owner, Piece, Work

logger = init_logger("vllm.kvd")

T = TypeVar("T")

FETCHES = 4
"""Requests whose blocks are fetched at once."""
QUIESCE_PAUSE, QUIESCE_LEAST = 0.02, 0.1
"""Seconds between two questions whether copies are over; and the least that such a question may take."""
REFUSALS = (kvd.Invalid, kvd.NotFound, kvd.Busy, kvd.Full, kvd.Unsupported, kvd.Denied)
"""What leaves nothing under way."""
FOR_THE_MOMENT = (kvd.Unavailable, kvd.DeadlineExceeded, kvd.Fenced, kvd.NotFound, kvd.Busy, kvd.Full, kvd.Internal)
"""What may go well another time."""
NO_GPU = "KVD-3008"
NO_DEVICE = frozenset({NO_GPU, "KVD-3007", "KVD-3009"})
"""The daemon is well, and has no GPU, has lost it, or it failed."""
ANNOUNCED_BY_ANOTHER, QUEUE_FULL = "KVD-1009", "KVD-4005"

_Block: TypeAlias = tuple[bytes, list[int]]
"""Its name, and its page."""


class _Event(Protocol):
    """Of ``torch.cuda.Event``; on the current stream where none is named."""

    def record(self, stream: Any = None) -> None: ...
    def wait(self) -> None: ...
    def synchronize(self) -> None: ...
    def ipc_handle(self) -> bytes: ...


def _event(*, interprocess: bool) -> _Event:
    make: Any = torch.cuda.Event
    event: _Event = make(interprocess=interprocess)
    return event


class _Events:
    """Those of a group's pages, each known to the daemon by its number."""

    def __init__(self, layers: int):
        self.all = [_event(interprocess=True) for _ in range(2 * layers + 2)]
        self.arrived = list(range(layers))
        """The daemon records them behind the layers of a load."""
        self.filled = list(range(layers, 2 * layers))
        """We record them behind the layers of a step."""
        self.whole = 2 * layers
        """The daemon records it behind a load that is not layer by layer."""
        self.before = 2 * layers + 1
        """We record it behind what may still use the pages of a load."""
        make: Any = torch.cuda.Stream
        self._aside = make()

    def pass_(self, numbers: Sequence[int]) -> None:
        """Who waits for these goes on."""
        for number in numbers:
            self.all[number].record(self._aside)


@dataclass(frozen=True)
class _Registered:
    """The pages of a group, as the daemon knows them."""

    group: Group
    cache: kvd.DeviceCache
    events: _Events


class _DeviceComing:
    def __init__(self, work: Work):
        self.work = work
        self.arriving: dict[str, _Event] = {}
        self.ends: list[Future[float | None]] = []
        self.is_whole = True
        """As far as is known."""

    @property
    def asks(self) -> frozenset[str]:
        return frozenset(self.arriving)

    def before_layer(self, layer: str) -> None:
        if (event := self.arriving.get(layer)) is not None:
            event.wait()

    def is_over(self) -> bool:
        return all(end.done() for end in self.ends)

    def finish(self) -> float | None:
        seconds = [end.result() for end in self.ends]
        lost = not self.is_whole or None in seconds
        return None if lost else max((took for took in seconds if took is not None), default=0.0)


class _DeviceRoom:
    holds_pages = True

    def __init__(self, copies: "DeviceCopies", registered: _Registered, binding: kvd.Binding, blocks: list[_Block]):
        self.group = registered.group
        self._copies, self._registered, self._binding, self._blocks = copies, registered, binding, blocks
        self._cache = registered.cache.with_deadline(copies.store_seconds)
        self._save = self._cache.save_by_layer(binding, blocks)
        self._filled: set[int] = set()
        self._ready = 0
        self._end: Future[tuple[int, int]] | None = None

    def after_layer(self, at: int) -> None:
        self._filled.add(at)
        ready = next(layer for layer in range(len(self.group.layers) + 1) if layer not in self._filled)
        # The last is said to be ready by `commit`: until then nothing is stored.
        self._say(min(ready, len(self.group.layers) - 1))

    def commit(self) -> None:
        self._say(len(self.group.layers))
        self._end = self._copies.committer.submit(self._finish)

    def drop(self) -> None:
        self._save.abort()
        self._copies.wait_for_copies(self._registered)

    def is_over(self) -> bool:
        return self._end is None or self._end.done()

    def settle(self) -> tuple[int, int]:
        return (0, 0) if self._end is None else self._end.result()

    def _say(self, layers: int) -> None:
        if layers <= self._ready:
            return
        self._ready = layers
        events = self._registered.events
        number = events.filled[layers - 1]
        events.all[number].record()
        try:
            self._save.ready(layers, number)
        except kvd.KvdError as error:
            # It has failed, and says so at its end, too.
            logger.debug("kvd: a save is over before its time: %s", error)

    def _finish(self) -> tuple[int, int]:
        answers = self._copies.end(self._registered, self._save.finish)
        if answers is None:
            return 0, len(self._blocks)
        stored = sum(answer is True for answer in answers)
        busy = [block for block, answer in zip(self._blocks, answers, strict=True) if _code(answer) == QUEUE_FULL]
        if busy:
            # Too much would have waited for its layers. It waits for nothing any more.
            whole = self._registered.events.filled[-1]
            again = self._copies.end(self._registered, lambda: self._cache.save(self._binding, busy, event=whole))
            if again is None:
                return stored, len(busy)
            stored += sum(answer is True for answer in again)
            answers = [answer for answer in answers if _code(answer) != QUEUE_FULL] + again
        failed = [one for one in answers if isinstance(one, Exception) and _code(one) != ANNOUNCED_BY_ANOTHER]
        if failed:
            logger.warning("kvd: %d blocks of %d are not stored: %s", len(failed), len(self._blocks), failed[0])
            for error in {_code(one): one for one in failed}.values():
                self._copies.after_failure(self._registered, error)
        return stored, len(failed)


class DeviceCopies:
    """See the top of the file. ``pages``: by group, a tensor for each layer; ``slices``: what of all layers and heads they
    are. ``store_seconds``: in which the blocks of a step must have been computed and stored.

    Raises ``ValueError`` that says why the pages cannot be described to the daemon.
    """

    def __init__(
        self,
        link: Link,
        groups: Mapping[int, Group],
        pages: Mapping[int, list[torch.Tensor]],
        slices: Mapping[int, kvd.Slice],
        bind: Bind,
        store_seconds: float,
    ):
        self._link, self._groups, self._pages, self._bind = link, groups, pages, bind
        self.store_seconds = store_seconds
        self._layouts = {index: cache_layout(group, pages[index], slices[index]) for index, group in groups.items()}
        self._events: dict[int, _Events] = {}
        self._registered: dict[int, _Registered] = {}
        self._epoch = 0
        """Life of the daemon in which they were registered."""
        self._refused_in: int | None = None
        """Life of the daemon in which it said that it does not copy."""
        self._unanswered_from: float | None = None
        """Since when it does not say whether copies are over."""
        self._fetcher = ThreadPoolExecutor(FETCHES, "kvd-fetch")
        self.committer = ThreadPoolExecutor(1, "kvd-commit")

    def is_ready(self) -> bool:
        """Whether the daemon copies, as far as is known. It is asked if nothing is."""
        return bool(self._registered) or bool(self._link.ask(self._register))

    def load(self, works: Sequence[Work], until: float, layerwise: bool) -> Sequence[Coming]:
        coming = [_DeviceComing(work) for work in works]
        # One call for what is of one owner and group; as a rule that is all.
        calls: dict[tuple[Owner, int], list[tuple[_DeviceComing, Piece]]] = {}
        for one in coming:
            for piece in one.work.pieces:
                calls.setdefault((one.work.owner, piece.group), []).append((one, piece))
        used: set[int] = set()
        for (owner, index), parts in calls.items():
            # Events of layers are for one call of a step.
            self._load(owner, index, parts, until, by_layer=layerwise and index not in used)
            used.add(index)
        return coming

    def fetch(self, work: Work, until: float) -> Coming:
        coming, quiet = _DeviceComing(work), _event(interprocess=False)
        quiet.record()
        coming.ends.append(self._fetcher.submit(self._fetch, work, quiet, until))
        return coming

    def announce(self, works: Sequence[Work]) -> tuple[Sequence[Room], list[Work]]:
        # One call for what is of one owner and group. Two requests may have filled the same block.
        calls: dict[tuple[Owner, int], dict[bytes, int]] = {}
        for work in works:
            for piece in work.pieces:
                blocks = calls.setdefault((work.owner, piece.group), {})
                for name, number in zip(piece.names, piece.numbers, strict=True):
                    blocks.setdefault(name, number)
        rooms: list[_DeviceRoom] = []
        left: list[Work] = []
        for (owner, index), blocks in calls.items():
            if (room := self._announce(owner, index, blocks)) is not None:
                rooms.append(room)
            else:
                left.append(Work("", owner, [Piece(index, list(blocks), list(blocks.values()))]))
        return rooms, left

    def quiesce(self) -> None:
        for registered in self._registered.values():
            self.wait_for_copies(registered)

    def close(self) -> None:
        self._fetcher.shutdown(wait=True, cancel_futures=True)
        self.committer.shutdown(wait=True)
        registered, self._registered = self._registered, {}
        for known in registered.values():
            # Memory must not be freed before the daemon has closed it.
            with contextlib.suppress(Exception):
                known.cache.with_deadline(self._link.deadline).forget()

    # What the daemon knows

    def _register(self, session: kvd.Session) -> bool:
        if self._refused_in == session.epoch:
            return False
        registered = {}
        try:
            for index, group in self._groups.items():
                if index not in self._events:
                    self._events[index] = _Events(len(group.layers))
                events = self._events[index]
                handles = [event.ipc_handle() for event in events.all]
                cache = session.register_kv_cache(self._pages[index], self._layouts[index], events=handles)
                registered[index] = _Registered(group, cache, events)
        except Exception as error:
            if not _is_for_good(error):
                raise
            self._refuse(error, session.epoch)
            return False
        self._registered, self._epoch = registered, session.epoch
        logger.info("kvd: the daemon copies to and from the pages of this rank by itself")
        return True

    def _refuse(self, why: Exception, epoch: int) -> None:
        self._registered = {}
        if self._refused_in == epoch:
            return
        self._refused_in = epoch
        cannot(why)

    def _call(self, index: int, what: Callable[[_Registered], T]) -> T | None:
        """What ``what`` answers; ``None`` when that failed."""
        registered = self._registered.get(index)
        failed: list[Exception] = []

        def ask(_: kvd.Session) -> T | None:
            assert registered is not None
            try:
                return what(registered)
            except Exception as error:
                failed.append(error)
                if _code(error) in NO_DEVICE:
                    return None
                raise

        if registered is None:
            return None
        answer = self._link.ask(ask)
        for error in failed:
            self.after_failure(registered, error)
        return answer

    def end(self, registered: _Registered, what: Callable[[], T]) -> T | None:
        """The same for the end of what is under way. It is waited for in any case; it has a deadline."""
        try:
            return what()
        except Exception as error:
            logger.warning("kvd: copies of the daemon failed: %s", error)
            self.after_failure(registered, error)
            return None

    def after_failure(self, registered: _Registered, error: Exception) -> None:
        """Waits for what a call may have left under way, and asks for no more what cannot be had."""
        if not isinstance(error, REFUSALS):
            self.wait_for_copies(registered)
        if _is_for_good(error):
            self._refuse(error, self._link.ask(lambda session: session.epoch) or self._epoch)

    def wait_for_copies(self, registered: _Registered) -> None:
        """Returns when no copy of these pages is under way any more that had begun before. A daemon that is gone has ended
        them with it, and one that does not answer has been given a moment for those that the device has already."""
        for number in registered.events.filled:
            # Copies wait for these; from then on they end by themselves.
            registered.events.all[number].synchronize()
        begun = self._unanswered_from or time.monotonic()
        until = begun + self._link.deadline
        while True:
            try:
                registered.cache.with_deadline(max(until - time.monotonic(), QUIESCE_LEAST)).quiesce()
            except Exception as error:
                code = _code(error)
                if code != NO_GPU and not isinstance(error, REFUSALS):
                    self._unanswered_from = begun
                    if time.monotonic() < until:
                        time.sleep(QUIESCE_PAUSE)
                        continue
                    logger.error("kvd: the daemon does not say that its copies are over; the engine goes on: %s", error)
                    if code not in NO_DEVICE:
                        self._link.ask(_raising(error))
                    return
                # It has no GPU, or does not know these pages.
            self._unanswered_from = None
            return

    # Loads

    def _begin(
        self,
        owner: Owner,
        index: int,
        blocks: list[tuple[bytes, int]],
        until: float,
        *,
        after: int | None = None,
        events: Sequence[int] = (),
    ) -> kvd.Load | None:
        """``after``: the event that the copies wait for. ``events``: one for each layer, one for all, or none."""
        group, seconds = self._groups[index], until - time.monotonic()
        binding = self._link.ask(lambda session: self._bind(session, owner, group))
        if binding is None or seconds <= 0:
            return None
        paged = [(name, [number]) for name, number in blocks]
        return self._call(
            index,
            lambda known: known.cache.with_deadline(seconds + self._link.deadline).load(
                binding, paged, wait=seconds, by_layer=len(events) > 1, event=after, events=events
            ),
        )

    def _load(
        self,
        owner: Owner,
        index: int,
        parts: list[tuple[_DeviceComing, Piece]],
        until: float,
        *,
        by_layer: bool,
    ) -> None:
        if (registered := self._registered.get(index)) is None:
            return _lost((one for one, _ in parts), "no answer")
        events, layers = registered.events, registered.group.layers
        behind = events.arrived if by_layer else [events.whole]
        blocks = [block for _, piece in parts for block in zip(piece.names, piece.numbers, strict=True)]
        begun = time.perf_counter()
        events.all[events.before].record()
        load = self._begin(owner, index, blocks, until, after=events.before, events=behind)
        if load is None:
            events.pass_(behind)
            return _lost((one for one, _ in parts), "no answer")
        at = 0
        for one, piece in parts:
            found = load.found[at : at + len(piece.names)]
            at += len(piece.names)
            if (why := missing(found)) is not None:
                _lost([one], why)
        end = self._fetcher.submit(self._finish, registered, load, begun, behind)
        for one, _ in parts:
            one.ends.append(end)
            if by_layer:
                one.arriving.update(zip(layers, (events.all[number] for number in behind), strict=True))
        if not by_layer:
            events.all[events.whole].wait()

    def _finish(self, registered: _Registered, load: kvd.Load, begun: float, behind: Sequence[int] = ()) -> float | None:
        def finish() -> float:
            try:
                load.finish()
            except Exception:
                # At once: the engine may be waiting for its stream.
                registered.events.pass_(behind)
                raise
            return time.perf_counter() - begun

        return self.end(registered, finish)

    def _fetch(self, work: Work, quiet: _Event, until: float) -> float | None:
        # Not the event that loads of steps wait for: each step might record it anew.
        quiet.synchronize()
        begun, is_whole, loads = time.perf_counter(), True, []
        for piece in work.pieces:
            registered = self._registered.get(piece.group)
            blocks = list(zip(piece.names, piece.numbers, strict=True))
            load = self._begin(work.owner, piece.group, blocks, until)
            if load is not None and registered is not None:
                loads.append((registered, load))
            why = "no answer" if load is None else missing(load.found)
            if why is not None:
                not_loaded(why)
                is_whole = False
                break
        ends = [self._finish(registered, load, begun) for registered, load in loads]
        return None if None in ends or not is_whole else time.perf_counter() - begun

    # Stores

    def _announce(self, owner: Owner, index: int, blocks: dict[bytes, int]) -> _DeviceRoom | None:
        group = self._groups[index]
        binding = self._link.ask(lambda session: self._bind(session, owner, group))
        if binding is None:
            return None
        paged: list[_Block] = [(name, [number]) for name, number in blocks.items()]
        return self._call(index, lambda known: _DeviceRoom(self, known, binding, paged))


def cannot(why: Exception) -> None:
    logger.warning("kvd: the daemon cannot copy to and from the pages of this rank, which copies by itself: %s", why)


def _lost(coming: Iterable[_DeviceComing], why: str) -> None:
    not_loaded(why)
    for one in coming:
        one.is_whole = False


def _code(answer: object) -> str | None:
    """Of a fault."""
    return answer.code if isinstance(answer, kvd.KvdError) else None


def _is_for_good(error: Exception) -> bool:
    return _code(error) in NO_DEVICE or not isinstance(error, FOR_THE_MOMENT)


def _raising(error: Exception) -> Callable[[kvd.Session], None]:
    def fail(_: kvd.Session) -> None:
        raise error

    return fail
