"""Evictable blocks by recency: a min-heap of stamps in which every block has at most one entry.

A touch does not move the entry: it only makes the block's stamp newer than the entry's. The entry
is put right when it surfaces. So touching costs nothing here, and the heap never holds more
entries than there are blocks, however many touches come between two evictions.
"""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heapify, heappop, heappush, heapreplace

from ...types import BlockId
from .base import Evictable

_BLOCK_BITS = 32
_BLOCK_MASK = (1 << _BLOCK_BITS) - 1


class LeafHeap:
    """Candidates for eviction, blocks 0 .. total_blocks - 1. Stamps of a block only grow."""

    def __init__(self, total_blocks: int) -> None:
        assert total_blocks <= _BLOCK_MASK, total_blocks
        # One int holds (stamp, block): smaller than a tuple and compared in one step.
        self._entries: list[int] = []
        self._listed = bytearray(total_blocks)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, block: int) -> bool:
        return bool(self._listed[block])

    def resize(self, total_blocks: int) -> None:
        """Entries of blocks that went stay until they surface."""
        assert total_blocks <= _BLOCK_MASK, total_blocks
        self._listed += bytes(max(0, total_blocks - len(self._listed)))

    def offer(self, block: int, stamp: int) -> None:
        """``block`` is evictable from now on; ``take`` finds out when it no longer is."""
        if not self._listed[block]:
            self._listed[block] = 1
            heappush(self._entries, stamp << _BLOCK_BITS | block)

    def take(self, stamps: Sequence[int], evictable: Evictable) -> BlockId | None:
        """Remove and return the evictable block with the least stamp; None when there is none.

        A block that ``evictable`` denies loses its entry: offer it again when it changes."""
        entries = self._entries
        while entries:
            entry = entries[0]
            block = entry & _BLOCK_MASK
            if not evictable(block):
                heappop(entries)
                self._listed[block] = 0
                continue
            stamp = stamps[block]
            if stamp != entry >> _BLOCK_BITS:
                heapreplace(entries, stamp << _BLOCK_BITS | block)
                continue
            heappop(entries)
            self._listed[block] = 0
            return BlockId(block)
        return None

    def tidy(self, evictable: Evictable) -> None:
        """Drop the entries of blocks that are not evictable now; O(entries)."""
        kept: list[int] = []
        for entry in self._entries:
            if evictable(entry & _BLOCK_MASK):
                kept.append(entry)
            else:
                self._listed[entry & _BLOCK_MASK] = 0
        heapify(kept)
        self._entries = kept

    def clear(self) -> None:
        self._entries.clear()
        self._listed = bytearray(len(self._listed))

    def check(self, stamps: Sequence[int], evictable: Evictable) -> None:
        """One entry a listed block, none newer than its block; every evictable block listed."""
        blocks = [entry & _BLOCK_MASK for entry in self._entries]
        assert len(blocks) == len(set(blocks)) == sum(self._listed), (len(blocks), blocks[:16])
        for entry, block in zip(self._entries, blocks, strict=True):
            assert self._listed[block], block
            assert entry >> _BLOCK_BITS <= stamps[block] or not evictable(block), (entry, block)
        for block in range(len(self._listed)):
            assert self._listed[block] or not evictable(block), f"block {block} is forgotten"
