"""What an instance of several ranks holds: the pages that every rank holds.

Each rank keeps its shard of a page and evicts for itself, so ranks part: one has dropped a page
that another still has. Only a page that all have can be used. This mirrors what each rank says it
holds and writes the events of the intersection, in the form of one rank's own events (``protocol.
events``): who mirrors an instance need not know how many ranks it has.

    rank 0   stored a b c . . . . . . . removed c . . . .
    rank 1   . . . . . . stored a b c . . . . . . . . . .
    merged   . . . . . . stored a b c . removed c . . . .

A page is there in a tier when all ranks have it in that tier. Its entry lives as long as one rank
holds it: memory is bounded by what the ranks hold together, and by ``max_pages``; 140 to 240
bytes a page by ``tracemalloc``. Batches are numbered 0, 1, 2, ... without holes; what changes
nothing makes none.

Pure and not thread-safe. Ranks are trusted to hash alike: a page's parent is the first one told.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from ..protocol.events import AllBlocksCleared, BlockRemoved, BlockStored, Event
from ..types import Tier
from .chains import chains

DEFAULT_MAX_PAGES = 16_000_000

# SGLang leaves the medium out where there is only the device tier.
_TIER: dict[str | None, Tier] = {None: Tier.HBM} | {tier.value: tier for tier in Tier}


class Merged(NamedTuple):
    """A batch of the intersection's own stream."""

    seq: int
    events: list[Event]


class Intersection:
    """``ranks``: how many there are; they are numbered from 0."""

    def __init__(self, ranks: int, max_pages: int = DEFAULT_MAX_PAGES) -> None:
        assert ranks > 0, ranks
        self._ranks = ranks
        self._tiers = {tier: _Pages(ranks) for tier in Tier}
        self._max_pages = max_pages
        self._block_size = 0
        self._next_seq = 0
        self._ignored_events = 0

    @property
    def last_seq(self) -> int:
        """Number of the last batch made; -1 before the first."""
        return self._next_seq - 1

    def apply(self, rank: int, events: Iterable[Event]) -> Merged | None:
        """Rank ``rank`` says that ``events`` have happened to it; None when that changes nothing
        for the instance. Unknown media, and pages beyond ``max_pages``, are counted and ignored.
        """
        made: list[Event] = []
        for event in events:
            made += self._apply(rank, event)
        return self._number(made)

    def replace(self, rank: int, events: Sequence[Event]) -> Merged | None:
        """Rank ``rank`` holds what ``events`` (its snapshot) lead to and nothing else."""
        kept = _outcome(events)
        made: list[Event] = []
        for tier, pages in self._tiers.items():
            gone = [key for key in pages.held_by(rank) if key not in kept[tier]]
            made += self._removed(tier, pages.remove(rank, gone))
        for tier, parents in kept.items():
            for chain, parent in chains(list(parents), list(parents.values())):
                made += self._stored(rank, tier, chain, parent)
        for event in events:
            if isinstance(event, BlockStored):
                self._block_size = event.block_size
        return self._number(made)

    def snapshot(self) -> tuple[int, list[Event]]:
        """The events that rebuild the intersection, true right after batch ``last_seq``."""
        events: list[Event] = []
        for tier, pages in self._tiers.items():
            keys, parents = pages.complete()
            for chain, parent in chains(keys, parents):
                events.append(self._stored_event(tier, chain, parent))
        return self.last_seq, events

    def stats(self) -> dict[str, float]:
        """``residency_pages``: held by all ranks; ``residency_partial_pages``: by some only, so
        of no use to anybody. A page counts once a tier."""
        known = sum(len(pages.masks) for pages in self._tiers.values())
        complete = sum(pages.complete_pages for pages in self._tiers.values())
        return {
            "residency_pages": complete,
            "residency_partial_pages": known - complete,
            "residency_event_seq": self.last_seq,
            "residency_ignored_events_total": self._ignored_events,
            "residency_ignored_pages_total": sum(p.ignored for p in self._tiers.values()),
        }

    def check(self) -> None:
        for pages in self._tiers.values():
            pages.check()
        assert sum(len(pages.masks) for pages in self._tiers.values()) <= self._max_pages

    # -- from a rank's events to the intersection's --

    def _apply(self, rank: int, event: Event) -> list[Event]:
        if isinstance(event, AllBlocksCleared):
            return self._clear(rank)
        tier = _TIER.get(event.medium)
        if tier is None:
            self._ignored_events += 1
            return []
        if isinstance(event, BlockRemoved):
            return self._removed(tier, self._tiers[tier].remove(rank, event.block_hashes))
        self._block_size = event.block_size
        return self._stored(rank, tier, event.block_hashes, event.parent_block_hash)

    def _clear(self, rank: int) -> list[Event]:
        """One rank holds nothing: neither does the instance."""
        dropped = 0
        for pages in self._tiers.values():
            dropped += len(pages.remove(rank, pages.held_by(rank)))
        return [AllBlocksCleared()] if dropped else []

    def _stored(
        self, rank: int, tier: Tier, keys: Sequence[int], parent: int | None
    ) -> list[Event]:
        room = self._max_pages - sum(len(pages.masks) for pages in self._tiers.values())
        runs = self._tiers[tier].store(rank, keys, parent, room)
        return [self._stored_event(tier, run, above) for run, above in runs]

    def _stored_event(self, tier: Tier, run: Sequence[int], above: int | None) -> Event:
        return BlockStored(list(run), above, [], self._block_size, medium=tier.value)

    def _removed(self, tier: Tier, keys: list[int]) -> list[Event]:
        return [BlockRemoved(keys, medium=tier.value)] if keys else []

    def _number(self, events: list[Event]) -> Merged | None:
        if not events:
            return None
        self._next_seq += 1
        return Merged(self.last_seq, events)


class _Pages:
    """One tier: for each page that any rank holds, who holds it (a bit a rank) and its parent."""

    def __init__(self, ranks: int) -> None:
        self.masks: dict[int, int] = {}
        self.complete_pages = 0
        self.ignored = 0
        self._parents: dict[int, int | None] = {}
        self._all = (1 << ranks) - 1

    def store(
        self, rank: int, keys: Sequence[int], parent: int | None, room: int
    ) -> list[tuple[list[int], int | None]]:
        """The runs of ``keys`` that all ranks hold now and did not before, with their parents.

        Only ``room`` pages that nobody held so far are taken: what nobody is told of costs a
        computation, never a wrong answer."""
        runs: list[tuple[list[int], int | None]] = []
        bit = 1 << rank
        joins = False
        for key in keys:
            before = self.masks.get(key, 0)
            after = before | bit
            if before or room > 0:
                self.masks[key] = after
                if not before:
                    room -= 1
                    self._parents[key] = parent
            else:
                self.ignored += 1
                after = before
            completed = after == self._all != before
            if completed:
                self.complete_pages += 1
                if joins:
                    runs[-1][0].append(key)
                else:
                    runs.append(([key], parent))
            joins = completed
            parent = key
        return runs

    def remove(self, rank: int, keys: Iterable[int]) -> list[int]:
        """Those of ``keys`` that all ranks held until now."""
        gone: list[int] = []
        bit = 1 << rank
        for key in keys:
            before = self.masks.get(key, 0)
            if not before & bit:
                continue
            if before == self._all:
                self.complete_pages -= 1
                gone.append(key)
            if before == bit:
                del self.masks[key]
                del self._parents[key]
            else:
                self.masks[key] = before & ~bit
        return gone

    def held_by(self, rank: int) -> list[int]:
        bit = 1 << rank
        return [key for key, mask in self.masks.items() if mask & bit]

    def complete(self) -> tuple[list[int], list[int | None]]:
        """The pages that all ranks hold, in the order they became known, and their parents."""
        keys = [key for key, mask in self.masks.items() if mask == self._all]
        return keys, [self._parents[key] for key in keys]

    def check(self) -> None:
        assert self.masks.keys() == self._parents.keys()
        assert all(0 < mask <= self._all for mask in self.masks.values())
        complete = sum(mask == self._all for mask in self.masks.values())
        assert complete == self.complete_pages, (complete, self.complete_pages)


def _outcome(events: Sequence[Event]) -> dict[Tier, dict[int, int | None]]:
    """Pages by tier, with their parents, that ``events`` lead to from an empty cache."""
    held: dict[Tier, dict[int, int | None]] = {tier: {} for tier in Tier}
    for event in events:
        if isinstance(event, AllBlocksCleared):
            held = {tier: {} for tier in Tier}
            continue
        tier = _TIER.get(event.medium)
        if tier is None:
            continue
        if isinstance(event, BlockRemoved):
            for key in event.block_hashes:
                held[tier].pop(key, None)
            continue
        above = event.parent_block_hash
        for key in event.block_hashes:
            held[tier][key] = above
            above = key
    return held
