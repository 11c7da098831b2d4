"""What became readable and what ceased to be: numbered batches for those who mirror the index.

Batches are numbered 0, 1, 2, ... without holes. They wait here until somebody drains them; when
too many wait, the oldest are dropped: the subscriber then sees a hole and takes the snapshot, which
is the same kind of events, so mirror and original are built by one mechanism.

Records hold page keys; they are turned into wire events by whoever drains, outside the pool's lock.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..hashing import short_key
from ..protocol.events import AllBlocksCleared, BlockRemoved, BlockStored, Event
from ..types import PageKey, Tier
from .chains import chains


@dataclass(frozen=True, slots=True)
class Stored:
    """``keys`` form a chain that hangs under ``parent``."""

    keys: Sequence[PageKey]
    parent: PageKey | None
    tier: Tier = Tier.DRAM


@dataclass(frozen=True, slots=True)
class Dropped:
    keys: Sequence[PageKey]
    tier: Tier = Tier.DRAM


@dataclass(frozen=True, slots=True)
class Cleared:
    """Every tier is empty."""

    keys: tuple[()] = ()


Record = Stored | Dropped | Cleared


@dataclass(frozen=True, slots=True)
class Batch:
    seq: int
    records: Sequence[Record]

    @property
    def weight(self) -> int:
        """What it costs to keep: its keys, and something for itself."""
        return 1 + sum(len(record.keys) for record in self.records)


class Journal:
    """Batches not drained yet, of at most ``limit`` keys together. Not thread-safe."""

    def __init__(self, limit: int) -> None:
        assert limit > 0, limit
        self._limit = limit
        self._batches: deque[Batch] = deque()
        self._weight = 0
        self._next = 0
        self._dropped = 0

    @property
    def last_seq(self) -> int:
        """Number of the last batch written; -1 before the first."""
        return self._next - 1

    @property
    def dropped_batches(self) -> int:
        return self._dropped

    @property
    def waiting_batches(self) -> int:
        return len(self._batches)

    def raise_limit(self, limit: int) -> None:
        self._limit = max(self._limit, limit)

    def write(self, records: Sequence[Record]) -> None:
        batch = Batch(self._next, records)
        self._next += 1
        self._batches.append(batch)
        self._weight += batch.weight
        while self._weight > self._limit:
            self._weight -= self._batches.popleft().weight
            self._dropped += 1

    def drain(self) -> list[Batch]:
        """Everything written since the last drain, oldest first, except what was dropped."""
        batches = list(self._batches)
        self._batches.clear()
        self._weight = 0
        return batches

    def check(self) -> None:
        assert self._weight == sum(batch.weight for batch in self._batches) <= self._limit
        numbers = [batch.seq for batch in self._batches]
        assert numbers == list(range(self._next - len(numbers), self._next)), numbers


def to_events(records: Iterable[Record], page_size: int) -> list[Event]:
    """SGLang's own KV events for ``records``."""
    events: list[Event] = []
    for record in records:
        hashes: list[int] = [short_key(key) for key in record.keys]
        match record:
            case Stored(parent=parent, tier=tier):
                above = None if parent is None else short_key(parent)
                events.append(BlockStored(hashes, above, [], page_size, medium=tier.value))
            case Dropped(tier=tier):
                events.append(BlockRemoved(hashes, medium=tier.value))
            case Cleared():
                events.append(AllBlocksCleared())
    return events


def rebuild(
    keys: Sequence[PageKey], parents: Sequence[PageKey | None], tier: Tier = Tier.DRAM
) -> list[Stored]:
    """Records that lead from an empty index to one that holds ``keys[i]`` under ``parents[i]`` in
    ``tier``, parents before children."""
    return [Stored(chain, parent, tier) for chain, parent in chains(keys, parents)]
