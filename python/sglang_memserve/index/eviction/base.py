"""What an eviction policy is.

The index knows which pages may go (resident, without resident children, not pinned); the policy
knows which of them goes next. It keeps what it needs in arrays indexed by block, so its memory is
bounded by the number of blocks, and every call is O(log blocks) for each block named.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from ...types import BlockId, PageKey

Evictable = Callable[[int], bool]
"""Whether the page of a block may go now."""


class EvictionPolicy(Protocol):
    """Over blocks 0 .. total_blocks - 1, of which every resident page has one."""

    def resize(self, total_blocks: int) -> None:
        """There are so many blocks from now on, and no page in those above."""
        ...

    def insert(self, keys: Sequence[PageKey], blocks: Sequence[BlockId]) -> None:
        """Pages arrived (head first), which is a use of each."""
        ...

    def touch(self, blocks: Sequence[BlockId]) -> None:
        """Resident pages (a chain, head first) were used now; the head counts as used last."""
        ...

    def offer(self, block: BlockId) -> None:
        """The page of ``block`` may go from now on; ``take`` finds out when it no longer may."""
        ...

    def take(self, evictable: Evictable) -> BlockId | None:
        """The next to go among the blocks offered that are ``evictable``; None when there is none.

        The caller removes its page."""
        ...

    def evicted(self, keys: Sequence[PageKey]) -> None:
        """These pages were taken and removed; they may come back."""
        ...

    def removed(self, block: BlockId) -> None:
        """The page was removed by name, not taken."""
        ...

    def outlive(self, parent: BlockId, child: BlockId) -> None:
        """``child`` goes and ``parent`` stays: it is as recent as the child was, at least."""
        ...

    def move(self, source: BlockId, target: BlockId) -> None:
        """The page of ``source`` lies in ``target`` from now on."""
        ...

    def tidy(self, evictable: Evictable) -> None:
        """Many pages are about to ``move``: forget what is left of pages that went by name, which
        would make moved pages look newer than they are."""
        ...

    def clear(self) -> None:
        """No page is resident any more."""
        ...

    def check(self, resident: Sequence[int], evictable: Evictable) -> None:
        """Invariants; every evictable block can be taken. O(blocks)."""
        ...
