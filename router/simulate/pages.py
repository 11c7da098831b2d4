"""One tier's pages on one instance: the product's own index and eviction over numbered blocks.

    free + private + resident = total

``private``: blocks of a request that hold no finished page (yet).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sglang_memserve.index.local_index import LocalIndex
from sglang_memserve.types import BlockId, Eviction, PageKey


@dataclass(frozen=True, slots=True)
class Change:
    """Pages that became readable (consecutive ones of one prefix) and pages that ceased to be."""

    stored: Sequence[PageKey]
    removed: Sequence[PageKey]


class Pages:
    def __init__(self, total: int, eviction: Eviction) -> None:
        self.index = LocalIndex(total, eviction)
        self._free = [BlockId(block) for block in range(total)]
        self.private = 0

    @property
    def total(self) -> int:
        return self.index.total_blocks

    @property
    def available(self) -> int:
        """Blocks that are free or can be made so. Those in use are pinned with all above them."""
        return len(self._free) + len(self.index) - self.index.pinned_blocks

    def take(self, count: int) -> tuple[list[BlockId], list[PageKey]]:
        """Up to ``count`` blocks, private from now on, and the pages that went to make room."""
        removed: list[PageKey] = []
        if count > len(self._free):
            gone = self.index.evict(count - len(self._free))
            self._free += gone.blocks
            removed = gone.keys
        count = min(count, len(self._free))
        blocks = [self._free.pop() for _ in range(count)]
        self.private += count
        return blocks, removed

    def give(self, blocks: Sequence[BlockId]) -> None:
        """Private ones back."""
        self.private -= len(blocks)
        self._free += blocks

    def give_back(self, blocks: Sequence[BlockId]) -> None:
        """Blocks whose page was removed while something pinned them."""
        self._free += blocks

    def publish(
        self, keys: Sequence[PageKey], start: int, end: int, blocks: Sequence[BlockId]
    ) -> None:
        """Private ``blocks`` hold the pages ``start`` to ``end`` of ``keys`` from now on."""
        parents = [keys[at - 1] if at else None for at in range(start, end)]
        self.private -= end - start
        self.index.insert(keys[start:end], blocks, parents)

    def store(self, keys: Sequence[PageKey], start: int, end: int) -> Change:
        """Keep the pages ``start`` to ``end`` of ``keys``, as many as there is room for, leading
        ones first. Those that are here count as used."""
        index = self.index
        here = index.match(keys[start:end])
        index.touch(here)
        start += len(here)
        # What hangs behind a page that is missing here is left alone: it is found again once the
        # gap is filled.
        stop = start
        while stop < end and keys[stop] not in index:
            stop += 1
        blocks, removed = self.take(stop - start)
        stop = start + len(blocks)
        self.publish(keys, start, stop, blocks)
        return Change(keys[start:stop], removed)

    def check(self) -> None:
        self.index.check()
        resident = len(self.index)
        assert len(self._free) + self.private + resident == self.total, (
            f"{len(self._free)} free + {self.private} private + {resident} resident"
        )
