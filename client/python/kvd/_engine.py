"""What the connectors of all engines need: a link to the daemon that may be away, settings, and the name of a model.

An engine must not fail or wait because its cache does. So a connector asks through a :class:`Link`, which gives the
answer or ``None``; it says once that the daemon went away, does not ask again for a moment, and says once that it is back.
"""

import contextlib
import difflib
import hashlib
import json
import os
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import field, fields
from logging import Logger, LoggerAdapter
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias, TypeVar

import kvd

T = TypeVar("T")
_Log: TypeAlias = "Logger | LoggerAdapter[Any]"

PAUSE_SECONDS = (0.1, 3.0)
"""How long a link asks nothing after the first failed call, and after many."""
NAME_BYTES = 128
"""Longest name of a session."""
BINDINGS = 512
"""Bindings that a link keeps: one for each group and slice of each adapter and salt in use."""
LOOKUP = 64
"""Blocks to a lookup of those that may have gaps."""


class Link:
    """A session with the node's daemon, from whenever there is one. May be used by several threads.

    ``endpoint``: see :func:`kvd.connect`. ``deadline``: seconds that a call may take.
    """

    def __init__(
        self, name: str, *, endpoint: str | None, deadline: float, log: _Log, staging_bytes: int | None = None
    ):
        self.name = name.encode()[:NAME_BYTES].decode(errors="ignore")
        self.endpoint, self.deadline, self.log = endpoint, deadline, log
        self._staging_bytes = staging_bytes
        self._lock = threading.Lock()
        self._client: kvd.Client | None = None
        self._session: kvd.Session | None = None
        self._described: tuple[int, kvd.Description] | None = None
        self._bindings: OrderedDict[tuple[Any, ...], kvd.Binding] = OrderedDict()
        self._failures, self._silent_until = 0, 0.0

    @property
    def is_up(self) -> bool:
        """Whether asking makes sense now."""
        return time.monotonic() >= self._silent_until

    def ask(self, what: Callable[[kvd.Session], T]) -> T | None:
        """What ``what`` answers; ``None`` while the daemon is away, when it refuses, and whatever else goes wrong: engines
        do not catch what a connector raises."""
        if not self.is_up:
            return None
        try:
            answer = what(self._connected())
        except (kvd.Unavailable, kvd.DeadlineExceeded, kvd.Fenced) as error:
            self._pause(error)
            return None
        except (kvd.Busy, kvd.Full) as error:
            self.log.debug("kvd: %s", error)
            return None
        except (kvd.KvdError, ValueError, OverflowError) as error:
            # The latter two: what cannot even be asked, such as a salt that is too long.
            self.log.error("kvd refuses a call; the engine goes on without it: %s", error)
            return None
        except Exception:
            self.log.exception("kvd: a defect of the connector; the engine goes on without it. Please report it")
            return None
        if self._failures:
            with self._lock:
                self._failures = 0
            self.log.info("kvd is there again")
        return answer

    def binding(
        self, session: kvd.Session, scope: Mapping[str, Any], block_bytes: int, part: tuple[int, int, int, int]
    ) -> kvd.Binding:
        """What ``scope`` (arguments of :class:`kvd.Scope`) and ``part`` are registered as. ``part``: layers, heads of all
        ranks, and the half-open range of this piece's heads."""
        key = (tuple(sorted(scope.items())), block_bytes, part)
        with self._lock:
            if (known := self._bindings.get(key)) is not None:
                self._bindings.move_to_end(key)
                return known
        layers, heads, first, end = part
        piece = kvd.Slice(layers, heads, head_range=(first, end))
        binding = session.register(kvd.Scope(**scope), block_bytes, slice=piece)
        with self._lock:
            self._bindings[key] = binding
            while len(self._bindings) > BINDINGS:
                self._bindings.popitem(last=False)
        return binding

    def daemon(self) -> kvd.Description | None:
        """What the daemon says of itself, asked once in each of its lives."""

        def describe(session: kvd.Session) -> kvd.Description:
            if (known := self._described) is not None and known[0] == session.epoch:
                return known[1]
            assert self._client is not None, "there is a session"
            told = self._client.describe()
            self._described = session.epoch, told
            return told

        return self.ask(describe)

    def sightings(
        self, session: kvd.Session, binding: kvd.Binding, names: Sequence[bytes | str], node: str | None = None
    ) -> list[kvd.Sighting]:
        """Where blocks are that are not here; none where the daemon has neither peers nor an object store, or they do not
        answer in time."""
        daemon = self.daemon()
        if daemon is None or not (daemon.peers or daemon.object) or not names:
            return []
        try:
            return session.locate(binding, names, node=node)
        except kvd.DeadlineExceeded:
            # A peer is slow, not the daemon.
            return []

    def _connected(self) -> kvd.Session:
        with self._lock:
            if self._session is None:
                self._client = kvd.connect(self.endpoint, deadline=self.deadline)
                self._session = self._client.session(self.name, staging_bytes=self._staging_bytes)
                self.log.info("kvd: session %r, %s", self.name, self._session.doors)
            return self._session

    def _pause(self, error: kvd.KvdError) -> None:
        with self._lock:
            first, most = PAUSE_SECONDS
            self._silent_until = time.monotonic() + min(first * 2**self._failures, most)
            self._failures = min(self._failures + 1, 10)
            if self._failures > 1:
                return
        self.log.warning("kvd is away; the engine computes what it would have loaded: %s", error)


def held(
    link: Link,
    session: kvd.Session,
    binding: kvd.Binding,
    names: Sequence[bytes | str],
    *,
    seconds: float,
    peers: bool,
) -> list[bool]:
    """For each block whether it is here, beyond gaps too, or with one of the ``peers`` or in the object store, which counts
    as one. What was not asked within ``seconds`` counts as absent."""
    until = time.monotonic() + seconds
    found: list[bool] = []
    while len(found) < len(names) and time.monotonic() < until:
        asked = names[len(found) : len(found) + LOOKUP]
        prefix = session.lookup(binding, asked).prefix
        found += [True] * prefix
        if prefix < len(asked):
            found.append(False)
    found += [False] * (len(names) - len(found))
    if peers:
        absent = [at for at, here in enumerate(found) if not here]
        for at, one in zip(absent, link.sightings(session, binding, [names[at] for at in absent]), strict=False):
            found[at] = one.tier is not None
    return found


def checked(
    session: kvd.Session, binding: kvd.Binding, names: Sequence[bytes | str], log: _Log
) -> list[kvd.Block | None]:
    """Blocks open for reading, of which every byte has been checked; ``None`` where one is absent or damaged.

    Waits for the disk, for peers, for the object store, and for who has announced a block and is about to store it, as long
    as a call may take.
    """
    try:
        answers = session.acquire(binding, names, wait=session.deadline)
    except kvd.Corrupt as error:
        if len(names) == 1:
            _discard(session, binding, names[0], error, log)
            return [None]
        # One that came as a copy was damaged, and spoilt the answer for all.
        return [block for name in names for block in checked(session, binding, [name], log)]
    blocks: list[kvd.Block | None] = []
    for name, answer in zip(names, answers, strict=True):
        if isinstance(answer, kvd.Miss):
            log.debug("kvd: a block is not there: %s", answer.reason)
            blocks.append(None)
        elif answer.verify():
            blocks.append(answer)
        else:
            key = answer.key.hex()
            answer.release()
            _discard(session, binding, name, key, log)
            blocks.append(None)
    return blocks


def _discard(session: kvd.Session, binding: kvd.Binding, name: bytes | str, what: object, log: _Log) -> None:
    """Host memory gives a damaged block up, so that it can come from disk, or be stored again."""
    log.warning("kvd: a damaged block is not used, but removed from host memory: %s", what)
    session.evict(binding, [name], tier="host")


def number(default: Any, *, least: float, most: float) -> Any:
    """A field of settings: a number within ``least`` and ``most``."""
    return field(default=default, metadata={"least": least, "most": most})


def text(default: str = "", *, form: str = "", most: int = 1024) -> Any:
    """A field of settings: a text of at most ``most`` bytes that is of the regular expression ``form``."""
    return field(default=default, metadata={"form": form, "most": most})


TENANT = "[a-z0-9-]{1,63}"
WEIGHTS_BYTES = 512
"""A name of weights has more than that: digests, and the life of the engine."""
WAIT_SECONDS = 600.0
"""The longest that a setting may make anybody wait: beyond it, a request is as good as lost."""
STAGING_BYTES = 1 << 38
"""What the daemon's own limit on one session is."""


def settings(kind: type[T], given: Mapping[str, Any], where: str) -> T:
    """``given`` as ``kind``, a dataclass of plain values.

    Raises ``ValueError`` that names the key: unknown (with the nearest known), of another type than the default, or out
    of the bounds that its field (:func:`number`, :func:`text`) has.
    """
    known = {one.name: one for one in fields(kind)}  # type: ignore[arg-type]
    for key, value in given.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(sorted(known))}"
            raise ValueError(f"{where}: unknown key {key!r}{hint}")
        default = known[key].default
        wanted: tuple[type, ...] = (int, float) if isinstance(default, float) else (type(default),)
        if not isinstance(value, wanted) or isinstance(value, bool) != isinstance(default, bool):
            raise ValueError(f"{where}: {key!r} is {value!r}; expected {type(default).__name__}")
        if wrong := _out_of_bounds(value, known[key].metadata):
            raise ValueError(f"{where}: {key!r} {wrong}")
    return kind(**given)


def _out_of_bounds(value: Any, bounds: Mapping[str, Any]) -> str:
    """What is wrong with a value; empty when nothing is."""
    if "least" in bounds:
        # NaN is not within any.
        if not bounds["least"] <= value <= bounds["most"]:
            return f"is {value!r}; expected {bounds['least']:,} to {bounds['most']:,}"
    elif "most" in bounds:
        if (length := len(value.encode(errors="replace"))) > bounds["most"]:
            return f"has {length} bytes; at most {bounds['most']} are allowed"
        if bounds["form"] and not re.fullmatch(bounds["form"], value):
            return f"is {value!r}; expected the form {bounds['form']}"
    return ""


def fits(staging_bytes: int, block_bytes: int, what: str, where: str) -> None:
    """Raises ``ValueError`` when not even one block fits what may be announced and not yet stored: all stores would
    fail."""
    if staging_bytes < block_bytes:
        raise ValueError(
            f"{where}: 'staging_bytes' is {staging_bytes:,}, and {what} has {block_bytes:,}: nothing would be stored"
        )


WEIGHTS = frozenset({".safetensors", ".bin", ".pt", ".pth", ".gguf"})
CONFIGURATIONS = frozenset(
    {
        *("config.json", "adapter_config.json", "params.json"),
        *("hf_quant_config.json", "quantize_config.json", "quant_config.json", "quantization_config.json"),
        *("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"),
    }
)
"""What decides how weights are computed with, and what pictures and sounds become; a model's own code beside it."""


def files_of(model: str) -> list[tuple[str, int, int]]:
    """Name, size and time of each file that :func:`weights_of` reads; none when ``model`` is no directory."""
    folder = Path(model)
    if not folder.is_dir():
        return []
    paths = [one for one in folder.iterdir() if one.suffix in WEIGHTS | {".py"} or one.name in CONFIGURATIONS]
    return sorted((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in paths)


def has_weights(model: str) -> bool:
    """Whether a directory has files of weights; others hold a configuration, and weights come from elsewhere."""
    return any(Path(name).suffix in WEIGHTS for name, _, _ in files_of(model))


def weights_of(model: str, revision: str | None = None) -> str:
    """Tells one set of weights from another: a digest over the configuration and the model's own code, and over three
    places of each tensor of a safetensors file, or 256 of another, when ``model`` is a directory; else the revision. Equal
    on all nodes that hold equal files. Training changes a tensor everywhere; a change that keeps to the gaps between these places is not seen.
    """
    if not (files := files_of(model)):
        return revision or ""
    digest = hashlib.blake2b(digest_size=16)
    for name, size, _ in files:
        digest.update(f"{name}\0{size}\0".encode())
        with (Path(model) / name).open("rb") as file:
            for at, length in _places(file, name, size):
                file.seek(at)
                digest.update(file.read(length))
    return digest.hexdigest()


def _places(file: BinaryIO, name: str, size: int) -> Iterator[tuple[int, int]]:
    if name.endswith((".json", ".py")):
        yield 0, size
        return
    piece = 4 << 10
    if name.endswith(".safetensors"):
        header = int.from_bytes(file.read(8), "little")
        if header <= min(size, 100 << 20):
            text = file.read(header)
            yield 0, 8 + header
            with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
                for about in (one for key, one in json.loads(text).items() if key != "__metadata__"):
                    first, end = (8 + header + offset for offset in about["data_offsets"])
                    for at in (first, (first + end - piece) // 2, end - piece):
                        yield max(first, at), min(piece, end - first)
                return
    for sample in range(256):
        yield max(size - piece, 0) * sample // 255, piece


def model_name(model: str) -> str:
    """What a model is called in a scope: as given, but a directory by its last part, for it lies elsewhere on other
    nodes; :func:`weights_of` tells directories of one name apart."""
    return os.path.basename(os.path.normpath(model)) if os.path.isdir(model) else model
