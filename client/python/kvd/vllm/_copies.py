"""Who copies between vLLM's pages and kvd.

A rank asks for three things, by its engine's thread::

    load       blocks that the step computes with go into their pages, where wanted each layer before it is computed
    fetch      blocks of a request that waits for them go into its pages
    announce   there is room for blocks that the step fills; layers are taken as they are filled, then it is committed

:class:`HostCopies` is the way that works everywhere: blocks are opened in host memory and copied out of, room is
announced there and copied into, by torch. Nothing here raises for what becomes of the daemon: it is in the log, and in
what the objects say at their end.
"""

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol, TypeAlias

import torch
from vllm.logger import init_logger

import kvd
from kvd._engine import Link
from kvd.vllm._layout import Group
from kvd.vllm._plan import BATCH, Owner, Piece, Work

logger = init_logger("vllm.kvd")

# Blocks are read-only memory. torch knows no read-only tensors, and would say so; we copy out of them, and no more.
warnings.filterwarnings("ignore", message="The given buffer is not writable", category=UserWarning)

Bind: TypeAlias = Callable[[kvd.Session, Owner, Group], kvd.Binding]
"""What this rank's blocks of an owner and a group are registered as."""


class Coming(Protocol):
    """The blocks of a request on their way into its pages."""

    @property
    def work(self) -> Work: ...

    @property
    def asks(self) -> frozenset[str]:
        """Layers that are in their pages only once :meth:`before_layer` was called for them; of the others all are."""

    def before_layer(self, layer: str) -> None:
        """What is computed from here on finds the layer in its pages, unless :meth:`finish` says that it failed."""

    def is_over(self) -> bool:
        """Whether :meth:`finish` would not wait."""

    def finish(self) -> float | None:
        """Waits until nothing of it is under way. The seconds that it took; ``None`` when not all of it came."""


class Room(Protocol):
    """Announced blocks of one group, to be filled from pages."""

    @property
    def group(self) -> Group: ...

    @property
    def holds_pages(self) -> bool:
        """Whether the pages must stay what they are until it is over, and not just until it is committed."""

    def after_layer(self, at: int) -> None:
        """The layer of this place in the group is filled."""

    def commit(self) -> None:
        """All layers are filled: the blocks are stored, behind the engine's back."""

    def drop(self) -> None:
        """Nobody may read them: who waits for them waits no more."""

    def is_over(self) -> bool:
        """Whether :meth:`settle` would not wait."""

    def settle(self) -> tuple[int, int]:
        """Waits for what :meth:`commit` began: how many blocks are stored, by this rank or by another that was faster,
        and how many are not."""


class Copies(Protocol):
    """One way to copy."""

    def load(self, works: Sequence[Work], until: float, layerwise: bool) -> Sequence[Coming]:
        """Starts the loads of a step, one for each work. What is not known to be there by ``until`` has failed."""

    def fetch(self, work: Work, until: float) -> Coming:
        """Starts the load of a request that waits for it."""

    def announce(self, works: Sequence[Work]) -> tuple[Sequence[Room], list[Work]]:
        """Room for as many blocks as there is, and what is left."""

    def quiesce(self) -> None:
        """Waits until no load is under way any more."""

    def close(self) -> None:
        """Ends when what was committed is stored."""


def missing(found: Sequence[object]) -> str | None:
    """Why not all of these blocks can be loaded; ``None`` when they can."""
    return next((one.reason for one in found if isinstance(one, kvd.Miss)), None)


def not_loaded(why: str) -> None:
    logger.warning("kvd: a promised block cannot be loaded (%s); computing it", why)


class _Opened:
    """Blocks of one group, open for reading, and the pages they go into."""

    def __init__(self, group: Group, blocks: list[kvd.Block], pages: list[torch.Tensor], numbers: list[int]):
        self.group, self.blocks, self.pages, self.numbers = group, blocks, pages, numbers

    def copy(self, at: int) -> None:
        page, length = self.pages[at], self.group.page_bytes[at]
        offset, shape = sum(self.group.page_bytes[:at]), page.shape[1:]
        for block, number in zip(self.blocks, self.numbers, strict=True):
            bytes_ = torch.frombuffer(memoryview(block), dtype=torch.uint8, count=length, offset=offset)
            page[number].copy_(bytes_.view(shape))


class _HostComing:
    def __init__(self, work: Work, opened: list[_Opened] | None):
        self.work, self.opened = work, opened
        self.layers: dict[str, Future[None]] = {}
        self._begun, self._seconds = time.perf_counter(), 0.0

    @property
    def asks(self) -> frozenset[str]:
        return frozenset(self.layers)

    def copy(self, opened: _Opened, at: int) -> None:
        opened.copy(at)
        self._seconds = time.perf_counter() - self._begun

    def before_layer(self, layer: str) -> None:
        if (future := self.layers.get(layer)) is not None:
            _done(future)

    def is_over(self) -> bool:
        return all(future.done() for future in self.layers.values())

    def finish(self) -> float | None:
        done = all([_done(future) for future in self.layers.values()])
        opened, self.opened = self.opened, []
        return self._seconds if done and opened is not None else None


class _HostRoom:
    holds_pages = False

    def __init__(self, copies: "HostCopies", group: Group, pages: list[torch.Tensor]):
        self.group = group
        self.reservations: list[kvd.Reservation] = []
        self.numbers: list[int] = []
        self._copies, self._pages = copies, pages
        self._copied: dict[int, Future[None]] = {}
        """By the layer's place."""
        self._commit: Future[int] | None = None
        self._blocks = 0

    def after_layer(self, at: int) -> None:
        if at not in self._copied:
            self._copied[at] = self._copies.job(self._copy, at)

    def commit(self) -> None:
        for at in range(len(self.group.layers)):
            self.after_layer(at)
        if not self._is_copied():
            # Nobody may read them: announced blocks that are let go are taken back.
            self.reservations.clear()
        self._commit = self._copies.committer.submit(self._store)

    def drop(self) -> None:
        self._is_copied()
        self.reservations.clear()
        self._copies.staging_left += self._blocks * self.group.block_bytes

    def is_over(self) -> bool:
        return self._commit is None or self._commit.done()

    def settle(self) -> tuple[int, int]:
        stored = 0 if self._commit is None else self._commit.result()
        self._copies.staging_left += self._blocks * self.group.block_bytes
        return stored, self._blocks - stored

    def reserved(self, reservation: kvd.Reservation, number: int) -> None:
        self.reservations.append(reservation)
        self.numbers.append(number)
        self._blocks += 1
        self._copies.staging_left -= self.group.block_bytes

    def _is_copied(self) -> bool:
        return all([_done(future) for future in self._copied.values()])

    def _copy(self, at: int) -> None:
        page, length = self._pages[at], self.group.page_bytes[at]
        offset, shape = sum(self.group.page_bytes[:at]), page.shape[1:]
        for reservation, number in zip(self.reservations, self.numbers, strict=True):
            view = torch.frombuffer(memoryview(reservation), dtype=torch.uint8, count=length, offset=offset)
            view.view(shape).copy_(page[number])
            del view

    def _store(self) -> int:
        """How many were stored, by this rank or by another that was faster. Gives back the others' room."""
        stored = 0
        for one in self.reservations:
            stored += self._copies.link.ask(lambda _: one.commit()) is not None
        self.reservations.clear()
        return stored


class HostCopies:
    """See the top of the file. ``pages``: by group, a tensor for each layer, see :func:`kvd.vllm._layout.pages_of`.
    ``staging_bytes``: what may be announced and not yet stored."""

    def __init__(
        self,
        link: Link,
        groups: Mapping[int, Group],
        pages: Mapping[int, list[torch.Tensor]],
        bind: Bind,
        staging_bytes: int,
    ):
        self.link, self.staging_left = link, staging_bytes
        self.committer = ThreadPoolExecutor(1, "kvd-commit")
        self._groups, self._pages, self._bind = groups, pages, bind
        self._copier = ThreadPoolExecutor(1, "kvd-copy")
        self._on_cpu = all(page.device.type == "cpu" for tensors in pages.values() for page in tensors)

    def load(self, works: Sequence[Work], until: float, layerwise: bool) -> Sequence[Coming]:
        coming = [_HostComing(work, self._open(work, until)) for work in works]
        jobs = [
            (at, one, opened) for one in coming for opened in one.opened or () for at in range(len(opened.group.layers))
        ]
        if layerwise and self._on_cpu:
            # One thread, in order: the last job of a layer is the one to wait for.
            for at, one, opened in sorted(jobs, key=lambda job: job[0]):
                one.layers[opened.group.layers[at]] = self._copier.submit(one.copy, opened, at)
        else:
            for at, one, opened in jobs:
                one.copy(opened, at)
        return coming

    def fetch(self, work: Work, until: float) -> Coming:
        return self.load([work], until, layerwise=False)[0]

    def announce(self, works: Sequence[Work]) -> tuple[Sequence[Room], list[Work]]:
        rooms: list[_HostRoom] = []
        left: list[Work] = []
        for work in works:
            for at, piece in enumerate(work.pieces):
                room, settled = self._reserve(work.owner, piece)
                if room.reservations:
                    rooms.append(room)
                if settled < len(piece.names):
                    rest = Piece(piece.group, piece.names[settled:], piece.numbers[settled:])
                    left.append(Work(work.request, work.owner, [rest, *work.pieces[at + 1 :]]))
                    break
        return rooms, left

    def quiesce(self) -> None:
        """Copies on the engine's own stream are in nobody's way; what a thread copies is waited for."""
        self._copier.submit(lambda: None).result()

    def close(self) -> None:
        self._copier.shutdown(wait=True, cancel_futures=True)
        self.committer.shutdown(wait=True)

    def job(self, what: Callable[[int], None], at: int) -> Future[None]:
        """Copies of a layer: beside what the engine computes, or in its stream."""
        if self._on_cpu:
            return self._copier.submit(what, at)
        done: Future[None] = Future()
        try:
            what(at)
            done.set_result(None)
        except Exception as error:
            done.set_exception(error)
        return done

    def _open(self, work: Work, until: float) -> list[_Opened] | None:
        """All blocks of a request, checked; or ``None``, and why is in the log."""
        opened = []
        for piece in work.pieces:
            group = self._groups[piece.group]
            found: list[kvd.Block] = []
            for first in range(0, len(piece.names), BATCH):
                names = piece.names[first : first + BATCH]
                left = until - time.monotonic()
                answers = None
                if left > 0:
                    bind = self._bind
                    answers = self.link.ask(lambda s: s.acquire(bind(s, work.owner, group), names, wait=left))
                answers = answers or []
                good = [one for one in answers if isinstance(one, kvd.Block) and one.verify()]
                if len(good) < len(names):
                    not_loaded(missing(answers) or "no answer, or damaged")
                    return None
                found += good
            opened.append(_Opened(group, found, self._pages[piece.group], piece.numbers))
        return opened

    def _reserve(self, owner: Owner, piece: Piece) -> tuple[_HostRoom, int]:
        """Room for the first blocks of a piece, and how many of it are settled: announced, or there already."""
        group = self._groups[piece.group]
        room, settled = _HostRoom(self, group, self._pages[piece.group]), 0

        def reserve(session: kvd.Session) -> None:
            nonlocal settled
            binding = self._bind(session, owner, group)
            for name, number in zip(piece.names, piece.numbers, strict=True):
                # More would wait for room that this step has yet to give back.
                if self.staging_left < group.block_bytes:
                    return
                if (reservation := session.reserve(binding, name)) is not None:
                    room.reserved(reservation, number)
                settled += 1

        self.link.ask(reserve)
        return room, settled


def _done(future: Future[None]) -> bool:
    """Whether the copy was made. It copies memory, and nothing else: it ends."""
    try:
        future.result()
    except Exception:
        logger.exception("kvd: a copy failed")
        return False
    return True
