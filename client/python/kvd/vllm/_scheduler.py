"""The half that runs beside vLLM's scheduler: it finds out what kvd holds, and says what the ranks load and store.

A request is looked up on a thread of its own, while the engine goes on with others; vLLM asks again until the answer is
there. Where the node's own kvd has no more, it asks its peers and the object store. What is promised to vLLM has been
brought up to host memory of this node, read and compared with its checksum, and is pinned until the ranks have loaded it.
"""

import contextlib
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_events import MEDIUM_CPU, MEDIUM_STORAGE, BlockRemoved, BlockStored, KVCacheEvent
from vllm.logger import init_logger
from vllm.v1.core.kv_cache_utils import BlockHash, maybe_convert_block_hash
from vllm.v1.metrics.cache_hit_source import CacheHitSource

import kvd
from kvd._engine import Link, files_of, weights_of
from kvd.vllm._layout import NULL_BLOCK, Group, Layout
from kvd.vllm._plan import BATCH, Owner, Piece, Step, Work
from kvd.vllm._stats import Stats

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request

logger = init_logger("vllm.kvd")

PIN_SECONDS = 30.0
"""For how long a promise holds at most. It ends when the ranks have loaded the blocks."""
GLANCE_SECONDS = 0.002
"""How long vLLM's scheduler waits for a lookup before it goes on with other requests."""
POLL_SECONDS = (0.005, 0.05)
"""How soon a request that waits for another engine's blocks is looked up again at first, and later."""
PEER_POLL_SECONDS, PEER_POLLS = 0.05, 500
"""The same where peers are asked each time; and how many such questions all requests may ask in a second."""
IDLE_SECONDS = 0.0005
"""How long a step that has nothing else to do than to wait for lookups stands still."""
LOOKERS = 16
"""Requests that are looked up at once. Those that wait hold no thread."""
STORES_PER_STEP = 1024
"""Blocks of a request that one step may store."""
ADAPTERS_KEPT = 1024
"""LoRA adapters whose digest is remembered."""
SHOWN = 200
"""Letters of what a client said that are shown in the log."""
EVENTS_KEPT = 1 << 18
"""Blocks whose hash is remembered, to name them in events."""

_SOURCES = {
    "host": CacheHitSource.HOST,
    "disk": CacheHitSource.DISK,
    "peer": CacheHitSource.P2P,
    # vLLM 0.32 has no name of its own for it, and says that a remote store is this one.
    "object": getattr(CacheHitSource, "OBJECT", CacheHitSource.EXTERNAL_UNSPECIFIED),
}


@dataclass
class _Abroad:
    """What peers and the object store have of a request, as it was when it was last looked up."""

    node: str | None
    """Who is asked in any case."""
    peers: bool
    """Whether other nodes are asked."""
    until: float
    """What has not come by then is computed."""
    keys: dict[bytes, str]
    """Of blocks that were seen there, now or before: ``peer`` or ``object``."""
    places: list[tuple[int, kvd.Binding, str | None, bytes]] = field(default_factory=list)
    """The first token of a block that is there now, how it is bound, which node has it and what it is called."""
    came: set[bytes] = field(default_factory=set)
    """Of ``keys``, those that are here and right."""


@dataclass
class Found:
    """What kvd holds for a request."""

    first: int
    """Tokens that vLLM had itself."""
    tokens: int = 0
    """Tokens from the start that are there and checked."""
    tiers: list[str] = field(default_factory=list)
    """Where the blocks of the first group were found; ``peer``: on another node; ``object``: in the object store."""
    pinned: list[tuple[kvd.Binding, list[bytes]]] = field(default_factory=list)
    waiting: bool = False
    """More may come: it is to be looked up again."""
    at: float = field(default_factory=time.monotonic)

    def serves(self, computed: int) -> bool:
        """Whether it still answers the question what there is beyond ``computed`` tokens."""
        return self.first <= computed and time.monotonic() - self.at < PIN_SECONDS / 2


@dataclass
class _Track:
    """A request that vLLM works on."""

    request: "Request"
    owner: Owner
    wait: float
    """Seconds to wait for blocks that nobody has announced yet."""
    node: str = ""
    """Who has its blocks, as it says itself."""
    abroad: dict[bytes, str] = field(default_factory=dict)
    """Keys of its blocks that were seen at peers or in the object store."""
    gone: threading.Event = field(default_factory=threading.Event)
    """The request is over: nobody waits for what is being looked up."""
    looking: "Future[Found] | None" = None
    found: Found | None = None
    asked: int = 0
    """Tokens that vLLM had itself when it was last told what can be loaded: the load begins there."""
    begun: float | None = None
    """When it was first looked up."""
    asked_at: float = 0.0
    """When it was last handed over to be looked up."""
    look_at: float = 0.0
    """When it is looked up again, while it waits; and how long it waits then."""
    pause: float = POLL_SECONDS[0]
    stored: dict[int, int] = field(default_factory=dict)
    """For each group, blocks from the start that need no store."""
    loading: bool = False
    """In this step."""
    gave_up: bool = False
    """A load failed."""


class Scheduler:
    """See the top of the file.

    ``weights``: what of the model decides about keys and values, see ``_identity.py``; here alone, and the ranks are told.
    ``wait``: seconds to wait for blocks that another engine has announced. ``match_seconds``: for how long a request is
    looked up at most, on top of what it waits. ``peer_seconds``: for how long blocks of other nodes and of the object store
    are looked for and fetched, on top of what it waits; 0: not at all. ``loads`` and ``stores``: what this engine does.
    """

    def __init__(
        self,
        link: Link,
        layout: Layout,
        tenant: str,
        weights: str,
        *,
        wait: float,
        match_seconds: float,
        peer_seconds: float,
        request_wait_max: float,
        loads: bool,
        stores: bool,
        events: "Events | None",
    ):
        self.link, self.layout, self.tenant = link, layout, tenant
        self._weights = self._first_weights = weights
        self.wait, self.match_seconds, self.request_wait_max = wait, match_seconds, request_wait_max
        self.peer_seconds = peer_seconds
        self.loads, self.stores = loads, stores
        self.stats = Stats()
        self.events = events
        self._tracks: dict[str, _Track] = {}
        self._loads: list[Work] = []
        self._adapters: dict[tuple[Any, ...], str] = {}
        self._lookers = ThreadPoolExecutor(LOOKERS, "kvd-look")
        # One group: vLLM can recompute from a block that failed. Several: only a request that waits may fail.
        # Several ranks: what one of them could not load, all would compute with, and store.
        self.waits_for_loads = len(layout.groups) > 1 or layout.slices * layout.replicas > 1
        self._failures_seen = 0
        self._idle, self._may_wait = True, True

    # vLLM's questions

    def begin(self, request: "Request") -> None:
        """A request enters the queue."""
        self._track(request)

    def matched(self, request: "Request", computed: int) -> int | None:
        """Tokens beyond ``computed`` that can be loaded; ``None`` while that is not known."""
        if not self.loads or not self.link.is_up:
            return 0
        track = self._track(request)
        if track.gave_up or track.owner.weights != self._weights:
            return 0
        # The last token is computed always: vLLM needs its logits.
        limit = (request.num_tokens - 1) // self.layout.align_tokens * self.layout.align_tokens
        limit = min(limit, len(request.block_hashes) * self.layout.hash_tokens)
        if limit <= computed:
            return 0
        if track.looking is not None and track.looking.done():
            found = track.looking.result()
            if found.waiting:
                if time.monotonic() < track.look_at:
                    self._stand_still(track)
                    return None
                track.looking = None
            elif not found.serves(computed):
                self._let_go(track)
        if track.looking is None:
            if track.begun is None:
                track.begun = time.monotonic()
                self.stats.add("lookups")
            hashes, track.asked_at = list(request.block_hashes), time.monotonic()
            track.looking = self._lookers.submit(self._look, track, hashes, computed, limit)
        if not track.looking.done():
            self._stand_still(track)
        if not track.looking.done() or track.looking.result().waiting:
            return None
        track.found, track.asked = track.looking.result(), computed
        more: int = max(0, min(track.found.tokens, limit) - computed)
        return more

    def _stand_still(self, track: _Track) -> None:
        """Waits a little for a lookup, once a step: long enough for most when the engine has nothing else to do."""
        if self._may_wait and track.looking is not None:
            self._may_wait = False
            until = time.monotonic() + (GLANCE_SECONDS if not track.looking.done() else IDLE_SECONDS)
            while time.monotonic() < until and (self._idle or not track.looking.done()):
                time.sleep(0.0002)
                if track.looking.done() and not track.looking.result().waiting:
                    return

    def sources(self, request: "Request", tokens: int) -> dict[CacheHitSource, int]:
        """From which tier ``tokens`` come."""
        track = self._tracks.get(request.request_id)
        if track is None or track.found is None or not track.found.tiers:
            return {CacheHitSource.EXTERNAL_UNSPECIFIED: tokens} if tokens else {}
        block_tokens = self.layout.groups[0].block_tokens
        counts: dict[CacheHitSource, int] = {}
        for tier in track.found.tiers[track.asked // block_tokens : (track.asked + tokens) // block_tokens]:
            source = _SOURCES.get(tier, CacheHitSource.EXTERNAL_UNSPECIFIED)
            counts[source] = counts.get(source, 0) + block_tokens
        return counts if sum(counts.values()) == tokens else {CacheHitSource.EXTERNAL_UNSPECIFIED: tokens}

    def allocated(self, request: "Request", blocks: "KVCacheBlocks", tokens: int) -> None:
        """vLLM has taken ``tokens`` of what was offered, and numbered the blocks to load them into."""
        if tokens == 0:
            return
        track = self._tracks[request.request_id]
        first, end = track.asked, track.asked + tokens
        # Better no answer than one computed with what nobody loads.
        assert track.found is not None and end <= track.found.tokens, f"{end} tokens were not offered"
        numbers = blocks.get_block_ids()
        pieces = []
        for group in self.layout.groups:
            at, to = first // group.block_tokens, -(-end // group.block_tokens)
            at = max(at, group.first_needed(end))
            names = group.names(request.block_hashes, at, to)
            taken = [(name, n) for name, n in zip(names, numbers[group.index][at:to], strict=True) if n != NULL_BLOCK]
            if taken:
                pieces.append(Piece(group.index, [name for name, _ in taken], [number for _, number in taken]))
        self.stats.add("hit_tokens", tokens)
        track.loading = True
        self._loads.append(Work(request.request_id, track.owner, pieces))

    def step(self, output: "SchedulerOutput") -> Step:
        """What the ranks do in this step."""
        step = Step(later=self._loads) if self.waits_for_loads else Step(loads=self._loads)
        step.failures_seen = self._failures_seen
        self._idle, self._may_wait = not output.num_scheduled_tokens, True
        loading = {work.request for work in self._loads}
        self._loads = []
        computed = {new.req_id: new.num_computed_tokens for new in output.scheduled_new_reqs}
        cached = output.scheduled_cached_reqs
        computed.update(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        for name, tokens in output.num_scheduled_tokens.items():
            track = self._tracks.get(name)
            if track is None or name not in computed:
                continue
            if name not in loading:
                track.loading = False
            if self.stores and self.link.is_up and track.owner.weights == self._weights:
                numbers = output.kv_connector_block_state and output.kv_connector_block_state.get_block_ids(name)
                if numbers:
                    self._offer(step, track, computed[name], computed[name] + tokens, numbers)
            if name not in loading and track.looking is not None:
                # It is computed; what it was promised is loaded.
                self._let_go(track)
        return step

    def failed(self, requests: Iterable[str], blocks: bool) -> None:
        """These requests were not loaded; they are computed, and not looked up again. ``blocks``: of a step that
        computed with its loads, some failed."""
        for name in requests:
            if (track := self._tracks.get(name)) is not None:
                track.gave_up = True
        if blocks:
            # From now on what the ranks compute is sound again. What they did not store meanwhile is offered anew.
            self._failures_seen += 1
            for track in self._tracks.values():
                track.stored = dict.fromkeys(track.stored, 0)

    def end(self, request: "Request") -> None:
        """A request is over."""
        if (track := self._tracks.pop(request.request_id, None)) is not None:
            track.gone.set()
            self._let_go(track)

    def forget(self) -> None:
        """The weights may have changed: what was stored so far is not found any more by this engine."""
        # Requests that are under way keep the old one: they load and store no more.
        self._weights = f"{self._first_weights}+{time.time_ns():x}"
        for track in self._tracks.values():
            self._let_go(track)
        logger.info("kvd: a new life begins; blocks stored before it are not used by this engine")

    def close(self) -> None:
        for track in self._tracks.values():
            track.gone.set()
        self._lookers.shutdown(wait=False, cancel_futures=True)
        if self.events is not None:
            self.events.close()

    # Lookup, on threads of its own

    def _look(self, track: _Track, hashes: list[Any], computed: int, limit: int) -> Found:
        try:
            return self._find(track, hashes, computed, limit)
        except Exception:
            logger.exception("kvd: a lookup failed; the engine goes on without it")
            return Found(computed)

    def _find(self, track: _Track, hashes: list[Any], computed: int, limit: int) -> Found:
        """As much of the first ``limit`` tokens as is there, in every group and slice, and right."""
        owner, now = track.owner, time.monotonic()
        begun = now if track.begun is None else track.begun
        abroad = self._abroad(track)
        tokens, tiers, pending = self._held(hashes, owner, limit, abroad)
        if abroad is not None:
            self._bring(abroad, computed, tokens)
        # Nobody has to have announced them when the request itself says that they will come.
        until = begun + (max(track.wait, self.wait) if pending else track.wait)
        if tokens < limit and now < until and self.link.is_up:
            pause = track.pause
            if abroad is not None:
                pause = max(PEER_POLL_SECONDS if abroad.peers else pause, len(self._tracks) / PEER_POLLS)
            track.look_at = now + pause
            track.pause = min(track.pause * 1.5, POLL_SECONDS[1])
            return Found(computed, waiting=True)
        found = Found(computed, tiers=tiers)
        until = time.monotonic() + self.match_seconds
        while tokens > computed and not track.gone.is_set():
            bad = self._first_bad(hashes, owner, computed, tokens, until, found, abroad)
            if bad is None:
                found.tokens = tokens
                break
            tokens, _, _ = self._held(hashes, owner, bad)
        if abroad is not None and found.tokens:
            for key in abroad.came:
                self.stats.add("peer_blocks" if abroad.keys[key] == "peer" else "object_blocks")
        found.tiers = found.tiers[: tokens // self.layout.groups[0].block_tokens]
        return found

    def _bindings(self, session: kvd.Session, owner: Owner, group: Group) -> list[kvd.Binding]:
        scope = self.layout.scope(group, self.tenant, owner.weights, owner.lora, owner.salt)
        parts = (self.layout.part(group, slice_) for slice_ in range(self.layout.slices))
        return [self.link.binding(session, scope, group.block_bytes, part) for part in parts]

    def _abroad(self, track: _Track) -> _Abroad | None:
        """Whom to ask for what is not here; ``None`` when nobody is."""
        daemon = self.link.daemon()
        if daemon is None:
            return None
        node = track.node
        if node and node not in (daemon.node, *daemon.peers):
            peers = ", ".join(daemon.peers) or "none"
            logger.warning(
                "kvd: a request says that node %r has its blocks, which is no peer of node %r; its peers (peers.members): %s",
                node[:SHOWN],
                daemon.node,
                peers,
            )
            track.node = ""
        until = track.asked_at + self.peer_seconds
        # One that had to queue for longer than that waits no more.
        if not (daemon.peers or daemon.object) or until <= time.monotonic():
            return None
        return _Abroad(track.node or None, bool(daemon.peers), until, track.abroad)

    def _sighted(
        self, abroad: _Abroad, binding: kvd.Binding, names: list[bytes], first: int, step: int
    ) -> tuple[list[str], bool]:
        """The tiers of blocks that this node, a peer or the object store has, from the first on, and whether the next one is
        announced somewhere. The first begins at token ``first``, each has ``step`` of them."""
        tiers: list[str] = []
        # Of most prompts others have nothing, or all: a few blocks tell which.
        for part in (names[:BATCH], names[BATCH:]):
            if time.monotonic() >= abroad.until:
                break
            sightings = self.link.ask(lambda s: self.link.sightings(s, binding, part, abroad.node))
            if not sightings:
                break
            for name, one in zip(part, sightings, strict=True):
                if one.tier is None:
                    return tiers, one.node is not None or (one.miss is not None and one.miss.reason == "not_complete")
                tier = one.tier if one.node is None else "peer"
                if tier in ("peer", "object"):
                    abroad.places.append((first + len(tiers) * step, binding, one.node, name))
                    abroad.keys[binding.key(name)] = tier
                tiers.append(tier)
        return tiers, False

    def _bring(self, abroad: _Abroad, computed: int, tokens: int) -> None:
        """Lets the daemon begin to fetch what is elsewhere between the two, each block from whom it is with."""
        wanted: dict[tuple[kvd.Binding, str | None], list[bytes]] = {}
        for at, binding, node, name in abroad.places:
            if computed <= at < tokens:
                wanted.setdefault((binding, node), []).append(name)
        for (binding, node), names in wanted.items():
            self.link.ask(lambda s: s.prefetch(binding, names, node=node))

    def _held(
        self, hashes: list[Any], owner: Owner, limit: int, abroad: _Abroad | None = None
    ) -> tuple[int, list[str], bool]:
        """Tokens from the start that kvd says it has, the tiers of the first group, and whether more is announced. With
        ``abroad``, what peers have and announce counts, and what the object store has, and is noted there."""
        tiers: list[str] = []
        pending = False

        def prefix(group: Group, first: int, end: int) -> int:
            nonlocal tiers, pending
            if first >= end:
                return end
            names = group.names(hashes, first, end)
            bindings = self.link.ask(lambda s: self._bindings(s, owner, group))
            if bindings is None:
                return first
            for binding in bindings:
                here = self.link.ask(lambda s: s.lookup(binding, names))
                if here is None:
                    return first
                found: list[str] = list(here.tiers)
                pending |= here.miss is not None and here.miss.reason == "not_complete"
                if abroad is not None and here.prefix < len(names):
                    at = (first + here.prefix) * group.block_tokens
                    more, announced = self._sighted(abroad, binding, names[here.prefix :], at, group.block_tokens)
                    found += more
                    pending |= announced
                if group is self.layout.groups[0] and first == 0:
                    tiers = found
                names = names[: len(found)]
            return first + len(names)

        def aligned(tokens: int) -> int:
            return tokens // self.layout.align_tokens * self.layout.align_tokens

        tokens = aligned(limit)
        for group in self.layout.groups:
            if group.window is None:
                tokens = min(tokens, aligned(prefix(group, 0, tokens // group.block_tokens) * group.block_tokens))
        moved = True
        while moved and tokens:
            moved = False
            for group in self.layout.groups:
                if group.window is not None:
                    end = tokens // group.block_tokens
                    here = prefix(group, group.first_needed(tokens), end)
                    if here < end:
                        tokens, moved = aligned(here * group.block_tokens), True
        return tokens, tiers, pending

    def _first_bad(
        self,
        hashes: list[Any],
        owner: Owner,
        computed: int,
        tokens: int,
        until: float,
        found: Found,
        abroad: _Abroad | None,
    ) -> int | None:
        """Reads what would be loaded of the first ``tokens``, and pins it. The token before which the first block begins
        that is not there or not right; ``None`` when all are."""
        for group in self.layout.groups:
            first = max(computed // group.block_tokens, group.first_needed(tokens))
            end = tokens // group.block_tokens
            bindings = self.link.ask(lambda s: self._bindings(s, owner, group))
            if bindings is None:
                return computed
            for binding in bindings:
                for at in range(first, end, BATCH):
                    names = group.names(hashes, at, min(at + BATCH, end))
                    left = until - time.monotonic()
                    good = self._check(binding, names, left, found, abroad) if left > 0 else 0
                    if good < len(names):
                        return (at + good) * group.block_tokens
        return None

    def _check(
        self, binding: kvd.Binding, names: list[bytes], seconds: float, found: Found, abroad: _Abroad | None
    ) -> int:
        """How many blocks from the first on are there within ``seconds``, and right; they are pinned."""
        keys = abroad.keys.keys() & {binding.key(name) for name in names} if abroad is not None else set()
        if abroad is not None and keys:
            # What has come by then is taken all the same.
            seconds = min(seconds, max(abroad.until - time.monotonic(), 0.001))

        def check(session: kvd.Session) -> int:
            pinned = session.pin(binding, names, PIN_SECONDS)
            found.pinned.append((binding, names))
            blocks = session.acquire(binding, names, wait=seconds)
            if pinned.absent:
                # They have come only now, and are open until they are pinned.
                session.pin(binding, [name for name, block in zip(names, blocks, strict=True) if block], PIN_SECONDS)
            for at, block in enumerate(blocks):
                if not block:
                    return at
                with block:
                    if not block.verify():
                        logger.warning("kvd: block %s is damaged; it is evicted and computed again", block.key.hex())
                        self.stats.add("damaged_blocks")
                        session.unpin(binding, [names[at]])
                        session.evict(binding, [names[at]])
                        return at
                    if abroad is not None and block.key in keys:
                        abroad.came.add(block.key)
            return len(names)

        return self.link.ask(check) or 0

    def _let_go(self, track: _Track) -> None:
        """The promise to this request is over."""
        looking, track.looking, track.found = track.looking, None, None

        def unpin(done: "Future[Found]") -> None:
            for binding, names in done.result().pinned:
                self.link.ask(lambda s: s.unpin(binding, names))

        def unpin_later(done: "Future[Found]") -> None:
            # Behind the engine's back: it need not wait for that. At the very end pins lapse by themselves.
            with contextlib.suppress(RuntimeError):
                self._lookers.submit(unpin, done)

        if looking is not None and not looking.cancel():
            looking.add_done_callback(unpin_later)

    # Stores

    def _offer(self, step: Step, track: _Track, computed: int, until: int, numbers: Sequence[list[int]]) -> None:
        """Stores what there is to store, if that goes well: the step has to go on, and can do without."""
        try:
            self._store(step, track, computed, until, numbers)
        except Exception:
            logger.exception("kvd: a defect of the connector; a request is not stored. Please report it")

    def _store(self, step: Step, track: _Track, computed: int, until: int, numbers: Sequence[list[int]]) -> None:
        """Blocks of a request that are full after this step, and that kvd may lack."""
        request = track.request
        full = min(until, len(request.block_hashes) * self.layout.hash_tokens)
        pieces = []
        for group in self.layout.groups:
            if group.index not in track.stored:
                there = track.found.tokens if track.found is not None else 0
                track.stored[group.index] = (there if group.window is None else max(there, computed)) // group.block_tokens
            first = track.stored[group.index]
            if computed < first * group.block_tokens and not track.loading:
                # A load failed, and what is computed instead is stored again.
                first = computed // group.block_tokens
            end = min(full // group.block_tokens, first + STORES_PER_STEP)
            if end <= first:
                continue
            names = group.names(request.block_hashes, first, end)
            mine = numbers[group.index][first:end]
            taken = [(name, number) for name, number in zip(names, mine, strict=False) if number != NULL_BLOCK]
            track.stored[group.index] = end
            if taken:
                pieces.append(Piece(group.index, [name for name, _ in taken], [number for _, number in taken]))
                if self.events is not None:
                    self.events.remember(request, group, first, names, track.owner)
        if pieces:
            step.stores.append(Work(request.request_id, track.owner, pieces))

    # Requests

    def _track(self, request: "Request") -> _Track:
        if (track := self._tracks.get(request.request_id)) is None:
            owner = Owner(self._weights, self._adapter(request), request.cache_salt or "")
            wait, node = _said_by(request)
            track = self._tracks[request.request_id] = _Track(request, owner, min(wait, self.request_wait_max), node)
        return track

    def _adapter(self, request: "Request") -> str:
        """The LoRA adapter's name and a digest of its weights."""
        lora = request.lora_request
        if lora is None:
            return ""
        # Files that were exchanged have other times; see `reset_external` for weights exchanged in memory.
        key = (lora.lora_name, lora.lora_path, *files_of(lora.lora_path))
        if key not in self._adapters:
            if len(self._adapters) >= ADAPTERS_KEPT:
                self._adapters.clear()
            self._adapters[key] = f"{lora.lora_name}@{weights_of(lora.lora_path) or lora.lora_path}"
        return self._adapters[key]


def _said_by(request: "Request") -> tuple[float, str]:
    """What the request says of itself: ``{"kvd": {"wait": SECONDS, "from": NODE}}``."""
    said = (request.kv_transfer_params or {}).get("kvd", {})
    known = isinstance(said, dict) and said.keys() <= {"wait", "from"}
    wait, node = (said.get("wait", 0), said.get("from", "")) if known else (None, None)
    if isinstance(wait, bool) or not isinstance(wait, int | float) or not 0 <= wait <= 600 or not isinstance(node, str):
        shown = repr(said)[:SHOWN]
        logger.warning(
            'kvd: kv_transfer_params["kvd"] is %s; expected {"wait": SECONDS, "from": NODE}, seconds up to 600', shown
        )
        return 0.0, ""
    return float(wait), node


@dataclass(frozen=True)
class _Named:
    """What an event says of a block."""

    hash: bytes
    parent: bytes | None
    tokens: list[int]
    block_tokens: int
    lora: str | None
    lora_id: int | None
    group: int


class Events:
    """Says through vLLM's event stream where blocks of this engine went: stored in host memory (medium ``CPU``) or on
    disk (``STORAGE``), and removed from there.

    It follows the daemon's own events, and names the blocks that this engine has stored; those of the first rank stand
    for all.
    """

    _MEDIA = {"host": MEDIUM_CPU, "disk": MEDIUM_STORAGE}

    def __init__(self, link: Link, layout: Layout, tenant: str):
        self.link, self.layout, self.tenant = link, layout, tenant
        self._lock = threading.Lock()
        self._named: OrderedDict[bytes, _Named] = OrderedDict()
        self._there: dict[int, dict[tuple[bytes, str], _Named]] = {}
        """By shard: what was said to be where."""
        self._stale: dict[int, dict[tuple[bytes, str], _Named]] = {}
        """By shard that is giving its inventory: what was there before, and has not come up yet."""
        self._ready: list[KVCacheEvent] = []
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="kvd-events", daemon=True)
        self._thread.start()

    def remember(self, request: "Request", group: Group, first: int, names: list[bytes], owner: Owner) -> None:
        """These blocks are about to be stored. Never raises: who stores them goes on."""
        try:
            self._remember(request, group, first, names, owner)
        except Exception:
            logger.exception("kvd: a defect of the connector; blocks are not named in events. Please report it")

    def _remember(self, request: "Request", group: Group, first: int, names: list[bytes], owner: Owner) -> None:
        scope = self.layout.scope(group, self.tenant, owner.weights, owner.lora, owner.salt)
        part = self.layout.part(group, 0)
        binding = self.link.ask(lambda s: self.link.binding(s, scope, group.block_bytes, part))
        if binding is None:
            return
        lora = request.lora_request
        hashes = group.names(request.block_hashes, max(first - 1, 0), first + len(names))
        parents: list[bytes | None] = [*([None] if first == 0 else []), *hashes]
        with self._lock:
            for at, name in enumerate(names):
                begin = (first + at) * group.block_tokens
                self._named[binding.key(name)] = _Named(
                    hash=name,
                    parent=parents[at],
                    tokens=list(request.all_token_ids[begin : begin + group.block_tokens]),
                    block_tokens=group.block_tokens,
                    lora=lora.lora_name if lora else None,
                    lora_id=lora.lora_int_id if lora else None,
                    group=group.index,
                )
            while len(self._named) > EVENTS_KEPT:
                self._named.popitem(last=False)

    def take(self) -> Iterable[KVCacheEvent]:
        """What happened since the last call."""
        with self._lock:
            taken, self._ready = self._ready, []
        return taken

    def close(self) -> None:
        self._closed.set()

    def _follow(self) -> None:
        while not self._closed.is_set():
            try:
                events = kvd.connect(self.link.endpoint, deadline=self.link.deadline).watch(tenants=[self.tenant])
                while not self._closed.is_set():
                    if (batch := events.next(0.5)) is not None:
                        self._take_in(batch)
            except kvd.KvdError as error:
                logger.debug("kvd: no events: %s", error)
                self._closed.wait(1)
            except Exception:
                logger.exception("kvd: events end")
                return

    def _take_in(self, batch: kvd.EventBatch) -> None:
        shard = batch.cursor[0]
        with self._lock:
            there = self._there.setdefault(shard, {})
            if batch.snapshot and shard not in self._stale:
                self._stale[shard] = dict(there)
            stale = self._stale.get(shard, {})
            for event in batch.events:
                if event.key is None:
                    for gone in [one for one in there if one[1] == event.tier]:
                        self._removed(there.pop(gone), event.tier)
                    continue
                place = (event.key, str(event.tier))
                if event.kind == "removed":
                    if (named := there.pop(place, None)) is not None:
                        self._removed(named, event.tier)
                elif (known := self._named.get(event.key)) is not None and event.tier in self._MEDIA:
                    stale.pop(place, None)
                    if place not in there:
                        there[place] = known
                        self._stored(known, event.tier)
            if batch.snapshot_end:
                for place, named in self._stale.pop(shard, {}).items():
                    there.pop(place, None)
                    self._removed(named, place[1])

    def _stored(self, named: _Named, tier: str) -> None:
        parent = None if named.parent is None else maybe_convert_block_hash(BlockHash(named.parent))
        self._ready.append(
            BlockStored(
                block_hashes=[maybe_convert_block_hash(BlockHash(named.hash))],
                parent_block_hash=parent,
                token_ids=named.tokens,
                block_size=named.block_tokens,
                lora_id=named.lora_id,
                medium=self._MEDIA[tier],
                lora_name=named.lora,
                group_idx=named.group,
            )
        )

    def _removed(self, named: _Named, tier: str) -> None:
        hash_ = maybe_convert_block_hash(BlockHash(named.hash))
        self._ready.append(
            BlockRemoved(block_hashes=[hash_], medium=self._MEDIA[tier], group_idx=named.group)
        )
