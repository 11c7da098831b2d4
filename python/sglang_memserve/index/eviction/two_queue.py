"""Two queues: a page that came back is not displaced by pages that may never do.

After 2Q (Johnson and Shasha, VLDB 1994), changed for a forest. Every page is *on probation* or
*protected*, and each of the two gives up its least recently used leaf first:

    new page ---------> probation --used again, not just after it came--> protected
    page that was evicted not long ago --------------------------------> protected

    probation > half of the blocks:  its pages go first
    else:                            protected pages go first

- *Just after it came* is not used again: a page is read back by the very request that stored it,
  by the decode instance that fetches it, by the next chunk of the same prompt. So a page on
  probation is not touched by a use before an eighth of the pool's blocks have arrived since it did.
  Stamps count arrivals, not seconds and not uses: uses between two arrivals are one.
- *Half* leaves probation long enough for the next turn of a conversation, which comes many prompts
  later; a probation of a tenth, as for web objects, evicts a page before its first reuse.
- A page's ancestors are used whenever it is, so they are promoted with it or before it, and the
  leaf that goes is the right one of its queue. Where keys form no such chain, pages still go leaf
  first, only their order is less well chosen.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from ...types import BlockId, PageKey
from .base import Evictable
from .ghosts import Ghosts
from .heap import LeafHeap

_PROBATION_SHARE = 2
_SETTLING_SHARE = 8


class TwoQueue:
    """An ``EvictionPolicy``. Thirteen bytes a block, and an int a leaf."""

    def __init__(self, total_blocks: int) -> None:
        self._set_shares(total_blocks)
        # On probation: when the page came. Protected: when it was used last.
        self._stamp = array("q", bytes(8 * total_blocks))
        self._arrivals = 0
        self._protected = bytearray(total_blocks)
        self._probation_pages = 0
        self._probation_leaves = LeafHeap(total_blocks)
        self._protected_leaves = LeafHeap(total_blocks)
        self._ghosts = Ghosts(max(1, total_blocks))

    def resize(self, total_blocks: int) -> None:
        self._set_shares(total_blocks)
        more = max(0, total_blocks - len(self._stamp))
        self._stamp.frombytes(bytes(8 * more))
        self._protected += bytes(more)
        self._probation_leaves.resize(total_blocks)
        self._protected_leaves.resize(total_blocks)
        if total_blocks > len(self._ghosts):
            # A fingerprint does not tell its slot in a larger table: ghosts are forgotten.
            self._ghosts = Ghosts(total_blocks)

    def _set_shares(self, total_blocks: int) -> None:
        self._probation_limit = total_blocks // _PROBATION_SHARE
        self._settling = total_blocks // _SETTLING_SHARE

    def insert(self, keys: Sequence[PageKey], blocks: Sequence[BlockId]) -> None:
        self._arrivals += len(blocks)
        stamps, protected, now = self._stamp, self._protected, self._arrivals
        known = self._ghosts.recall(keys)
        for block, proven in zip(blocks, known, strict=True):
            stamps[block] = now
            protected[block] = proven
        self._probation_pages += len(blocks) - sum(known)

    def touch(self, blocks: Sequence[BlockId]) -> None:
        stamps, protected, now = self._stamp, self._protected, self._arrivals
        settled = now - self._settling
        for block in blocks:
            if protected[block]:
                stamps[block] = now
            elif stamps[block] <= settled:
                stamps[block] = now
                self._promote(block)

    def _promote(self, block: BlockId) -> None:
        self._protected[block] = 1
        self._probation_pages -= 1
        if block in self._probation_leaves:
            # What is not evictable now loses this entry when it surfaces.
            self._protected_leaves.offer(block, self._stamp[block])

    def offer(self, block: BlockId) -> None:
        leaves = self._protected_leaves if self._protected[block] else self._probation_leaves
        leaves.offer(block, self._stamp[block])

    def take(self, evictable: Evictable) -> BlockId | None:
        if self._probation_pages > self._probation_limit:
            block = self._take_probation(evictable)
            return self._take_protected(evictable) if block is None else block
        block = self._take_protected(evictable)
        return self._take_probation(evictable) if block is None else block

    def _take_probation(self, evictable: Evictable) -> BlockId | None:
        while (block := self._probation_leaves.take(self._stamp, evictable)) is not None:
            if not self._protected[block]:
                self._probation_pages -= 1
                return block
            # Promoted, or another page than the one that was offered here.
            self._protected_leaves.offer(block, self._stamp[block])
        return None

    def _take_protected(self, evictable: Evictable) -> BlockId | None:
        while (block := self._protected_leaves.take(self._stamp, evictable)) is not None:
            if self._protected[block]:
                self._protected[block] = 0
                return block
            self._probation_leaves.offer(block, self._stamp[block])
        return None

    def evicted(self, keys: Sequence[PageKey]) -> None:
        self._ghosts.remember(keys)

    def removed(self, block: BlockId) -> None:
        self._probation_pages -= not self._protected[block]
        self._protected[block] = 0

    def outlive(self, parent: BlockId, child: BlockId) -> None:
        stamps = self._stamp
        if stamps[child] > stamps[parent]:
            stamps[parent] = stamps[child]

    def move(self, source: BlockId, target: BlockId) -> None:
        if target in self._probation_leaves or target in self._protected_leaves:
            # An entry of a page removed by name since ``tidy``: its stamp must not fall.
            self.outlive(target, source)
        else:
            self._stamp[target] = self._stamp[source]
        self._protected[target], self._protected[source] = self._protected[source], 0

    def tidy(self, evictable: Evictable) -> None:
        self._probation_leaves.tidy(evictable)
        self._protected_leaves.tidy(evictable)

    def clear(self) -> None:
        self._protected = bytearray(len(self._protected))
        self._probation_pages = 0
        self._probation_leaves.clear()
        self._protected_leaves.clear()

    def check(self, resident: Sequence[int], evictable: Evictable) -> None:
        protected = self._protected
        assert all(self._stamp[block] <= self._arrivals for block in resident), self._arrivals
        assert sum(protected[block] for block in resident) == sum(protected), "absent but protected"
        assert self._probation_pages == len(resident) - sum(protected), self._probation_pages
        self._probation_leaves.check(
            self._stamp, lambda block: not protected[block] and evictable(block)
        )
        self._protected_leaves.check(
            self._stamp, lambda block: bool(protected[block]) and evictable(block)
        )
