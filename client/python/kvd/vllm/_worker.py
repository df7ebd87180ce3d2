"""The half that runs in every rank: it has blocks copied between vLLM's tensors and kvd, one step at a time.

Within a step::

    begin          room is announced for the blocks that this step fills, so that others can wait for them
    load           what the step computes with is loaded, layer by layer
    before layer   its loads are waited for
    after layer    its part of the filled blocks is copied out
    end            what the hooks did not reach is copied; the blocks are committed behind the engine's back

What vLLM does not call (its hooks are skipped in captured graphs) is made up for: nothing is loaded layer by layer
before a whole step was seen in which every layer asked. Who copies, and how, is said in ``_copies.py``.
"""

import time
from collections import deque
from collections.abc import Iterable

import torch
from vllm.logger import init_logger

import kvd
from kvd._engine import Link
from kvd.vllm._copies import Coming, Copies, HostCopies, Room
from kvd.vllm._device import DeviceCopies, cannot
from kvd.vllm._layout import Group, Layout, pages_of
from kvd.vllm._plan import Owner, Step, Work
from kvd.vllm._stats import Stats

logger = init_logger("vllm.kvd")


class Worker:
    """See the top of the file. ``rank``: among the tensor-parallel ranks. ``store_seconds``: the daemon copies where it can,
    and has so long for the blocks of a step; ``None``: we do."""

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
        store_seconds: float | None = None,
    ):
        self.link, self.layout, self.tenant = link, layout, tenant
        self.slice, replica = divmod(rank, layout.replicas)
        self.stores_blocks = replica == 0
        self.layerwise, self.load_seconds = layerwise, load_seconds
        self.staging_bytes, self.store_seconds = staging_bytes, store_seconds
        self.groups = {group.index: group for group in layout.groups}
        self.place = {layer: (group.index, at) for group in layout.groups for at, layer in enumerate(group.layers)}
        self.stats = Stats()
        self._host: HostCopies | None = None
        self._device: DeviceCopies | None = None
        self._commits: deque[Room] = deque()
        """Under way."""
        self._fetches: list[Coming] = []
        """Loads of requests that wait for them."""
        # Of this step:
        self._asked: set[str] = set()
        self._loading: list[Coming] = []
        self._rooms: list[Room] = []
        self._left: list[Work] = []
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
        pages = {index: pages_of(group, caches) for index, group in self.groups.items()}
        self._host = HostCopies(self.link, self.groups, pages, self._binding, self.staging_bytes)
        if self.store_seconds is not None:
            slices = {index: self._slice(group) for index, group in self.groups.items()}
            try:
                made = DeviceCopies(self.link, self.groups, pages, slices, self._binding, self.store_seconds)
            except ValueError as why:
                cannot(why)
            else:
                self._device = made
                # So that the log says at the start what becomes of it.
                made.is_ready()
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

    @property
    def copies(self) -> Copies:
        """Who copies now."""
        assert self._host is not None, "vLLM has registered its KV cache"
        return self._device if self._device is not None and self._device.is_ready() else self._host

    # A step

    def begin(self, step: Step) -> None:
        """Announces what the step will fill."""
        self._asked, self._loading = set(), []
        self._hold_still()
        self._drop()
        self._failed = False
        # After a failed load, what is computed is garbage until the scheduler has planned anew: vLLM computes it
        # again, and it must not be found by anybody meanwhile.
        if self.stores_blocks and self._failures <= step.failures_seen:
            self._left = step.stores
            self._announce()

    def load(self, step: Step) -> None:
        """Starts the loads. vLLM calls it before the first layer when the step computes with them, else after the last."""
        until = time.monotonic() + self.load_seconds
        if step.loads:
            self._loading = list(self.copies.load(step.loads, until, self.layerwise and self._hooks_work))
        for work in step.later:
            self._fetches.append(self.copies.fetch(work, until))

    def fail(self, step: Step) -> None:
        """The step's loads are given up."""
        logger.exception("kvd: a defect of the connector; what it had to load is computed. Please report it")
        for copies in (self._device, self._host):
            if copies is not None:
                copies.quiesce()
        self._give_up(step.loads)
        begun = {one.work.request for one in self._fetches}
        lost = {work.request for work in step.later} - begun
        self._received |= lost
        self._not_received |= lost

    def before_layer(self, layer: str) -> None:
        """Waits for the layer's loads."""
        self._asked.add(layer)
        for one in self._loading:
            one.before_layer(layer)

    def after_layer(self, layer: str) -> None:
        """Copies what the step has filled of this layer."""
        if not self._rooms or layer not in self.place:
            return
        group, at = self.place[layer]
        for room in self._rooms:
            if room.group.index == group:
                room.after_layer(at)

    def end(self) -> None:
        """After the step's last layer: nothing of it is under way any more but the commits."""
        asks = frozenset().union(*(one.asks for one in self._loading))
        self._finish(self._loading)
        if not self._asked.issuperset(asks):
            # Some layer computed without having asked, perhaps before its bytes were there.
            logger.error("kvd: vLLM skipped its hooks; what this step loaded is computed again")
            self._give_up(one.work for one in self._loading)
            self._hooks_work, self.layerwise = False, False
        elif self.layerwise and not self._hooks_work:
            self._hooks_work = self._asked.issuperset(self.place)
        self._loading = []
        begun = time.perf_counter()
        if self._failed:
            self._drop()
        if self._rooms or self._left:
            self._store()
            self.stats.add("store_seconds", time.perf_counter() - begun)

    def take_bad_blocks(self) -> set[int]:
        """vLLM's numbers of blocks that were not loaded."""
        taken, self._bad_blocks = self._bad_blocks, set()
        return taken

    def take_received(self) -> tuple[set[str], set[str]]:
        """Waiting requests whose loads have ended; and which of them failed."""
        for one in [one for one in self._fetches if one.is_over()]:
            self._fetches.remove(one)
            if not self._finish([one]):
                self._not_received.add(one.work.request)
            self._received.add(one.work.request)
        taken = self._received, self._not_received
        self._received, self._not_received = set(), set()
        return taken

    def take_stats(self) -> Stats | None:
        """What was done since the last call."""
        self._settle(wait=False)
        return self.stats.take()

    def close(self) -> None:
        """Stores what was handed over, and ends the threads."""
        for copies in (self._device, self._host):
            if copies is not None:
                copies.close()

    def _binding(self, session: kvd.Session, owner: Owner, group: Group) -> kvd.Binding:
        scope = self.layout.scope(group, self.tenant, owner.weights, owner.lora, owner.salt)
        return self.link.binding(session, scope, group.block_bytes, self.layout.part(group, self.slice))

    def _slice(self, group: Group) -> kvd.Slice:
        layers, heads, first, end = self.layout.part(group, self.slice)
        return kvd.Slice(layers, heads, head_range=(first, end))

    # Loads

    def _finish(self, coming: list[Coming]) -> bool:
        """Waits for loads; whether all came. Those that a step computes with are given up where they did not."""
        seconds, lost = 0.0, []
        for one in coming:
            if (took := one.finish()) is None:
                lost.append(one.work)
                self.stats.add("failed_blocks", one.work.blocks)
                continue
            seconds = max(seconds, took)
            for piece in one.work.pieces:
                self.stats.add("loaded_blocks", len(piece.names))
                self.stats.add("loaded_bytes", len(piece.names) * self.groups[piece.group].block_bytes)
        if seconds:
            self.stats.add("load_seconds", seconds)
        if lost and coming is self._loading:
            self._give_up(lost)
        return not lost

    def _give_up(self, works: Iterable[Work]) -> None:
        """These were to be computed with and are not there: whatever the step computes is not stored."""
        if not self._failed:
            self._failures += 1
        self._failed = True
        self._bad_blocks.update(number for work in works for piece in work.pieces for number in piece.numbers)

    # Stores

    def _store(self) -> None:
        """Hands the announced blocks over, and goes on with those that had no room."""
        while True:
            for room in self._rooms:
                room.commit()
                self._commits.append(room)
            self._rooms = []
            if not self._left:
                return
            self._settle(wait=True)
            self._announce()
            if not self._rooms:
                # Not even one: kvd is away, or full.
                self.stats.add("unstored_blocks", sum(work.blocks for work in self._left))
                self._left = []
                return

    def _announce(self) -> None:
        """Gets room for as many of the blocks left as there is; who looks for them can wait from now on."""
        rooms, self._left = self.copies.announce(self._left)
        self._rooms += rooms

    def _drop(self) -> None:
        """What is announced is not stored."""
        for room in self._rooms:
            room.drop()
        self._rooms, self._left = [], []

    def _hold_still(self) -> None:
        """Counts the commits that have ended, and waits for those whose pages must be what they are until then."""
        begun, waits = time.perf_counter(), any(room.holds_pages for room in self._commits)
        self._settle(wait=waits)
        if waits:
            self.stats.add("store_seconds", time.perf_counter() - begun)

    def _settle(self, *, wait: bool) -> None:
        """Counts the commits that have ended, in order."""
        while self._commits and (wait or self._commits[0].is_over()):
            room = self._commits.popleft()
            stored, unstored = room.settle()
            self.stats.add("stored_blocks", stored)
            self.stats.add("stored_bytes", stored * room.group.block_bytes)
            if unstored:
                self.stats.add("unstored_blocks", unstored)
