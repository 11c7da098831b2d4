"""Least recently used leaf first.

Right where prompts come back soon or never. Pages that are used once push out whatever has not been
used since they came, so a scan (many long prompts that nobody repeats) empties the cache.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from ...types import BlockId, PageKey
from .base import Evictable
from .heap import LeafHeap


class Lru:
    """An ``EvictionPolicy``. Nine bytes a block, and an int a leaf."""

    def __init__(self, total_blocks: int) -> None:
        self._stamp = array("q", bytes(8 * total_blocks))
        self._clock = 0
        self._leaves = LeafHeap(total_blocks)

    def resize(self, total_blocks: int) -> None:
        self._stamp.frombytes(bytes(8 * max(0, total_blocks - len(self._stamp))))
        self._leaves.resize(total_blocks)

    def insert(self, keys: Sequence[PageKey], blocks: Sequence[BlockId]) -> None:
        self.touch(blocks)

    def touch(self, blocks: Sequence[BlockId]) -> None:
        self._clock += len(blocks)
        stamp = self._clock
        stamps = self._stamp
        for block in blocks:
            stamps[block] = stamp
            stamp -= 1

    def offer(self, block: BlockId) -> None:
        self._leaves.offer(block, self._stamp[block])

    def take(self, evictable: Evictable) -> BlockId | None:
        return self._leaves.take(self._stamp, evictable)

    def evicted(self, keys: Sequence[PageKey]) -> None:
        """They start anew when they come back."""

    def removed(self, block: BlockId) -> None:
        """Its entry goes when it surfaces."""

    def outlive(self, parent: BlockId, child: BlockId) -> None:
        stamps = self._stamp
        if stamps[child] > stamps[parent]:
            stamps[parent] = stamps[child]

    def move(self, source: BlockId, target: BlockId) -> None:
        if target in self._leaves:
            # An entry of a page removed by name since ``tidy``: its stamp must not fall.
            self.outlive(target, source)
        else:
            self._stamp[target] = self._stamp[source]

    def tidy(self, evictable: Evictable) -> None:
        self._leaves.tidy(evictable)

    def clear(self) -> None:
        self._leaves.clear()

    def check(self, resident: Sequence[int], evictable: Evictable) -> None:
        assert all(self._stamp[block] <= self._clock for block in resident), self._clock
        self._leaves.check(self._stamp, evictable)
