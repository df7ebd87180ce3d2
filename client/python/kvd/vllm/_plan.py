"""What the scheduler's half tells the ranks: which blocks to load and to store in a step."""

from dataclasses import dataclass, field

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata

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

    @property
    def blocks(self) -> int:
        return sum(len(piece.names) for piece in self.pieces)


@dataclass
class Step(KVConnectorMetadata):
    """What the scheduler's half tells the ranks in one step."""

    loads: list[Work] = field(default_factory=list)
    later: list[Work] = field(default_factory=list)
    """Loads of requests that wait until they are done."""
    stores: list[Work] = field(default_factory=list)
    failures_seen: int = 0
    """Steps with failed loads that the scheduler knew of when it planned this one."""
