"""The half that runs in every rank: it copies blocks between vLLM's tensors and kvd, one step at a time.

Within a step::

    begin          room is announced for the blocks that this step fills, so that others can wait for them
    load           what the step computes with is loaded, layer by layer, on a thread of its own
    before layer   its loads are waited for
    after layer    its part of the filled blocks is copied out
    end            what the hooks did not reach is copied; the blocks are committed behind the engine's back

What vLLM does not call (its hooks are skipped in captured graphs) is made up for: nothing is loaded layer by layer
before a whole step was seen in which every layer asked.
"""

import time
import warnings
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata
from vllm.logger import init_logger

import kvd
from kvd._engine import Link
from kvd.vllm._layout import Group, Layout, pages_of
from kvd.vllm._stats import Stats

logger = init_logger("vllm.kvd")

# Blocks are read-only memory. torch knows no read-only tensors, and would say so; we copy out of them, and no more.
warnings.filterwarnings("ignore", message="The given buffer is not writable", category=UserWarning)

BATCH = 64
"""Blocks opened for reading at once."""


@dataclass(frozen=True)
class Owner:
    """Whose blocks these are: what of a scope differs between requests."""

    weights: str
    """With what is computed with them, and the life of the engine if its weights may have been exchanged."""
    lora: str = ""
    salt: str = field(default="", repr=False)


@dataclass
class Piece:
    """Blocks of one group: kvd's names beside vLLM's numbers."""

    group: int
    names: list[bytes]
    numbers: list[int]


@dataclass
class Work:
    """What to load or store for one request."""

    request: str
    owner: Owner
    pieces: list[Piece]


@dataclass
class Step(KVConnectorMetadata):
    """What the scheduler's half tells the ranks in one step."""

    loads: list[Work] = field(default_factory=list)
    later: list[Work] = field(default_factory=list)
    """Loads of requests that wait until they are done."""
    stores: list[Work] = field(default_factory=list)
    failures_seen: int = 0
    """Steps with failed loads that the scheduler knew of when it planned this one."""


@dataclass
class _Opened:
    """Blocks of one group, open for reading."""

    group: int
    blocks: list[kvd.Block]
    numbers: list[int]


@dataclass
class _Room:
    """Announced blocks of one group, to be filled."""

    group: int
    reservations: list[kvd.Reservation]
    numbers: list[int]
    copied: set[int] = field(default_factory=set)
    """Layers, by position in the group."""


class Worker:
    """See the top of the file. ``rank``: among the tensor-parallel ranks."""

    def __init__(
        self,
        link: Link,
        layout: Layout,
        tenant: str,
        rank: int,
        *,
        layerwise: bool,
        load_seconds: float,
        staging_bytes: int,
    ):
        self.link, self.layout, self.tenant = link, layout, tenant
        self.slice, replica = divmod(rank, layout.replicas)
        self.stores_blocks = replica == 0
        self.layerwise, self.load_seconds = layerwise, load_seconds
        self.groups = {group.index: group for group in layout.groups}
        self.place = {layer: (group.index, at) for group in layout.groups for at, layer in enumerate(group.layers)}
        self.pages: dict[int, list[torch.Tensor]] = {}
        self.on_cpu = True
        self.stats = Stats()
        self._copier = ThreadPoolExecutor(1, "kvd-copy")
        self._committer = ThreadPoolExecutor(1, "kvd-commit")
        self._commits: deque[tuple[Future[int], int, int]] = deque()
        """Under way: how many were stored, of how many, of how many bytes each."""
        self._staging_left = staging_bytes
        # Of this step:
        self._layers: dict[str, Future[None]] = {}
        self._asked: set[str] = set()
        self._loading: list[_Opened] = []
        self._rooms: list[_Room] = []
        self._left: list[Work] = []
        self._saves: list[Future[None]] = []
        self._failed = False
        self._failures = 0
        """Steps in which a load failed, ever."""
        # Until they are told:
        self._bad_blocks: set[int] = set()
        self._received: set[str] = set()
        self._not_received: set[str] = set()
        self._hooks_work = False

    def register(self, caches: dict[str, torch.Tensor]) -> None:
        """vLLM's tensors. Raises ``ValueError`` when they are not what the configuration said."""
        self.pages = {index: pages_of(group, caches) for index, group in self.groups.items()}
        self.on_cpu = all(page.device.type == "cpu" for pages in self.pages.values() for page in pages)
        for group in self.layout.groups:
            logger.info(
                "kvd: group %d: %d layers of %d heads, blocks of %d tokens = %d bytes, %s, %s",
                group.index,
                len(group.layers),
                group.heads,
                group.block_tokens,
                group.block_bytes,
                group.attention,
                group.dtype,
            )

    # A step

    def begin(self, step: Step) -> None:
        """Announces what the step will fill."""
        self._layers, self._asked, self._loading, self._saves = {}, set(), [], []
        self._settle(wait=False)
        self._rooms, self._left, self._failed = [], [], False
        # After a failed load, what is computed is garbage until the scheduler has planned anew: vLLM computes it
        # again, and it must not be found by anybody meanwhile.
        if self.stores_blocks and self._failures <= step.failures_seen:
            self._left = step.stores
            self._announce()

    def load(self, step: Step) -> None:
        """Starts the loads. vLLM calls it before the first layer when the step computes with them, else after the last."""
        until = time.monotonic() + self.load_seconds
        for work in step.loads:
            opened = self._open(work, until)
            if opened is None:
                self._give_up(number for piece in work.pieces for number in piece.numbers)
            else:
                self._loading += opened
        if self._loading:
            self._load()
        for work in step.later:
            begun = time.perf_counter()
            opened = self._open(work, until)
            if opened is None:
                self._not_received.add(work.request)
            else:
                for one in opened:
                    for at in range(len(self.groups[one.group].layers)):
                        self._load_layer(one, at)
                self._loaded(opened, begun)
            self._received.add(work.request)

    def fail(self, step: Step) -> None:
        """The step's loads are given up."""
        logger.exception("kvd: a defect of the connector; what it had to load is computed. Please report it")
        self._give_up(n for work in step.loads for piece in work.pieces for n in piece.numbers)
        self._received.update(work.request for work in step.later)
        self._not_received.update(work.request for work in step.later)

    def before_layer(self, layer: str) -> None:
        """Waits for the layer's loads."""
        self._asked.add(layer)
        if (future := self._layers.get(layer)) is not None:
            self._await(future)

    def after_layer(self, layer: str) -> None:
        """Copies what the step has filled of this layer."""
        if not self._rooms or layer not in self.place:
            return
        group, at = self.place[layer]
        for room in self._rooms:
            if room.group == group and at not in room.copied:
                if self.on_cpu:
                    room.copied.add(at)
                    self._saves.append(self._copier.submit(self._save_layer, room, at))
                else:
                    self._save_layer(room, at)

    def end(self) -> None:
        """After the step's last layer: nothing of it is under way any more but the commits."""
        done = all([self._await(future) for future in self._layers.values()])
        if not done or not self._asked.issuperset(self._layers):
            # Some layer computed without having asked, perhaps before its bytes were there.
            logger.error("kvd: vLLM skipped its hooks, or a copy failed; what this step loaded is computed again")
            self._give_up(number for one in self._loading for number in one.numbers)
            self._hooks_work, self.layerwise = False, False
        elif self.layerwise and not self._hooks_work:
            self._hooks_work = self._asked.issuperset(self.place)
        self._loading = []
        begun = time.perf_counter()
        if not all([self._await(future) for future in self._saves]) or self._failed:
            # Nobody may read them: announced blocks that are let go are taken back.
            self._rooms, self._left = [], []
        if self._rooms or self._left:
            self._store()
            self.stats.add("store_seconds", time.perf_counter() - begun)

    def take_bad_blocks(self) -> set[int]:
        """vLLM's numbers of blocks that were not loaded."""
        taken, self._bad_blocks = self._bad_blocks, set()
        return taken

    def take_received(self) -> tuple[set[str], set[str]]:
        """Waiting requests whose loads have ended; and which of them failed."""
        taken = self._received, self._not_received
        self._received, self._not_received = set(), set()
        return taken

    def take_stats(self) -> Stats | None:
        """What was done since the last call."""
        self._settle(wait=False)
        return self.stats.take()

    def close(self) -> None:
        """Stores what was handed over, and ends the threads."""
        self._copier.shutdown(wait=True, cancel_futures=True)
        self._committer.shutdown(wait=True)

    # Loads

    def _binding(self, session: kvd.Session, owner: Owner, group: Group) -> kvd.Binding:
        scope = self.layout.scope(group, self.tenant, owner.weights, owner.lora, owner.salt)
        return self.link.binding(session, scope, group.block_bytes, self.layout.part(group, self.slice))

    def _give_up(self, numbers: Iterable[int]) -> None:
        """These were to be computed with and are not there: whatever the step computes is not stored."""
        if not self._failed:
            self._failures += 1
        self._failed = True
        self._bad_blocks.update(numbers)

    def _open(self, work: Work, until: float) -> list[_Opened] | None:
        """All blocks of a request, checked; or ``None``, and why is in the log."""
        opened = []
        for piece in work.pieces:
            group = self.groups[piece.group]
            found: list[kvd.Block] = []
            for first in range(0, len(piece.names), BATCH):
                names = piece.names[first : first + BATCH]
                left = until - time.monotonic()
                answers = None
                if left > 0:
                    binding = self._binding
                    answers = self.link.ask(lambda s: s.acquire(binding(s, work.owner, group), names, wait=left))
                answers = answers or []
                good = [one for one in answers if isinstance(one, kvd.Block) and one.verify()]
                if len(good) < len(names):
                    why = next((one.reason for one in answers if isinstance(one, kvd.Miss)), "no answer, or damaged")
                    logger.warning("kvd: a promised block cannot be loaded (%s); computing it", why)
                    self.stats.add("failed_blocks", sum(len(piece.names) for piece in work.pieces))
                    return None
                found += good
            opened.append(_Opened(piece.group, found, piece.numbers))
        return opened

    def _load(self) -> None:
        """Copies the step's loads: each layer before it is computed, or all of them now."""
        begun = time.perf_counter()
        opened = list(self._loading)
        left = sum(len(self.groups[one.group].layers) for one in opened)

        def load(one: _Opened, at: int) -> None:
            nonlocal left
            self._load_layer(one, at)
            left -= 1
            if not left:
                self._loaded(opened, begun)

        if self.layerwise and self._hooks_work and self.on_cpu:
            order = sorted(((at, one) for one in opened for at in range(len(self.groups[one.group].layers))), key=_first)
            for at, one in order:
                # One thread, in order: the last job of a layer is the one to wait for.
                self._layers[self.groups[one.group].layers[at]] = self._copier.submit(load, one, at)
        else:
            for one in opened:
                for at in range(len(self.groups[one.group].layers)):
                    load(one, at)

    def _load_layer(self, opened: _Opened, at: int) -> None:
        group, page = self.groups[opened.group], self.pages[opened.group][at]
        offset, length = sum(group.page_bytes[:at]), group.page_bytes[at]
        shape = page.shape[1:]
        for block, number in zip(opened.blocks, opened.numbers, strict=True):
            page[number].copy_(_read_only(block, offset, length).view(shape))

    def _loaded(self, opened: Iterable[_Opened], begun: float) -> None:
        for one in opened:
            self.stats.add("loaded_blocks", len(one.blocks))
            self.stats.add("loaded_bytes", len(one.blocks) * self.groups[one.group].block_bytes)
            one.blocks = []
        self.stats.add("load_seconds", time.perf_counter() - begun)

    def _await(self, future: Future[None]) -> bool:
        """Whether the copy was made. It copies memory, and nothing else: it ends."""
        try:
            future.result()
        except Exception:
            logger.exception("kvd: a copy failed")
            return False
        return True

    # Stores

    def _store(self) -> None:
        """Copies what is left of the announced blocks, hands them over, and goes on with those that had no room."""
        while True:
            for room in self._rooms:
                group = self.groups[room.group]
                for at in range(len(group.layers)):
                    if at not in room.copied:
                        self._save_layer(room, at)
                commit = self._committer.submit(self._commit, room.reservations)
                self._commits.append((commit, len(room.reservations), group.block_bytes))
            self._rooms = []
            if not self._left:
                return
            self._settle(wait=True)
            self._announce()
            if not self._rooms:
                # Not even one: kvd is away, or full.
                self.stats.add("unstored_blocks", sum(len(one.names) for work in self._left for one in work.pieces))
                self._left = []
                return

    def _announce(self) -> None:
        """Gets room for as many of the blocks left as there is; who looks for them can wait from now on."""
        left, self._left = self._left, []
        for work in left:
            for at, piece in enumerate(work.pieces):
                room, settled = self._reserve(work.owner, piece)
                if room.reservations:
                    self._rooms.append(room)
                if settled < len(piece.names):
                    rest = Piece(piece.group, piece.names[settled:], piece.numbers[settled:])
                    self._left.append(Work(work.request, work.owner, [rest, *work.pieces[at + 1 :]]))
                    break

    def _reserve(self, owner: Owner, piece: Piece) -> tuple[_Room, int]:
        """Room for the first blocks of a piece, and how many of it are settled: announced, or there already."""
        group, room = self.groups[piece.group], _Room(piece.group, [], [])
        settled = 0

        def reserve(session: kvd.Session) -> None:
            nonlocal settled
            binding = self._binding(session, owner, group)
            for name, number in zip(piece.names, piece.numbers, strict=True):
                # More would wait for room that this step has yet to give back.
                if self._staging_left < group.block_bytes:
                    return
                if (reservation := session.reserve(binding, name)) is not None:
                    room.reservations.append(reservation)
                    room.numbers.append(number)
                    self._staging_left -= group.block_bytes
                settled += 1

        self.link.ask(reserve)
        return room, settled

    def _save_layer(self, room: _Room, at: int) -> None:
        group, page = self.groups[room.group], self.pages[room.group][at]
        offset, length = sum(group.page_bytes[:at]), group.page_bytes[at]
        shape = page.shape[1:]
        for reservation, number in zip(room.reservations, room.numbers, strict=True):
            view = torch.frombuffer(memoryview(reservation), dtype=torch.uint8, count=length, offset=offset)
            view.view(shape).copy_(page[number])
            del view
        room.copied.add(at)

    def _commit(self, reservations: list[kvd.Reservation]) -> int:
        """How many were stored, by this rank or by another that was faster. Gives back the others' room."""
        stored = 0
        for one in reservations:
            stored += self.link.ask(lambda _: one.commit()) is not None
        reservations.clear()
        return stored

    def _settle(self, *, wait: bool) -> None:
        """Counts the commits that have ended, in order."""
        while self._commits and (wait or self._commits[0][0].done()):
            commit, blocks, block_bytes = self._commits.popleft()
            stored = commit.result()
            self._staging_left += blocks * block_bytes
            self.stats.add("stored_blocks", stored)
            self.stats.add("stored_bytes", stored * block_bytes)
            if stored < blocks:
                self.stats.add("unstored_blocks", blocks - stored)


def _first(pair: tuple[int, _Opened]) -> int:
    return pair[0]


def _read_only(block: kvd.Block, offset: int, length: int) -> torch.Tensor:
    """Bytes of a block as a tensor, to read from."""
    return torch.frombuffer(memoryview(block), dtype=torch.uint8, count=length, offset=offset)
