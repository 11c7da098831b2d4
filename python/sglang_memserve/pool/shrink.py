"""Emptying the last blocks of a pool that shrinks: their pages move down or are evicted.

Belongs to ``MemPool``, whose lock is held in every call; bytes are copied between two calls,
without it. Blocks above the new end are *withdrawn*: nothing new is put there, so what is left only
gets less.

- A page moves into a free block below. When none is free, pages are evicted first, as for any
  other need, wherever they lie: what goes is what was used longest ago, not what lies high.
- A leased page moves too: its bytes never change while it is leased. The block becomes an orphan
  that the lease keeps in place, and whoever asks for the page from then on gets the new block. So a
  page that is in use all the time does not hold the shrink up; only its readers of now do.
- A block that is being filled is waited for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from ..types import BlockId
from .ledger import Ledger


class Move(NamedTuple):
    source: BlockId
    target: BlockId


@dataclass(frozen=True, slots=True)
class Blockers:
    """Blocks that cannot go yet. ``held_up``: their pages could neither move nor be evicted.
    ``leases_end_s``: seconds until the last lease in the way ends by itself."""

    leased: int
    filling: int
    held_up: int
    leases_end_s: float

    @property
    def none(self) -> bool:
        return not (self.leased or self.filling or self.held_up)

    def __str__(self) -> str:
        parts: list[str] = []
        if self.leased:
            parts.append(
                f"{self.leased} leased (the last lease ends in {self.leases_end_s:.1f} s at most)"
            )
        if self.filling:
            parts.append(f"{self.filling} being filled")
        if self.held_up:
            parts.append(f"{self.held_up} held up by leased pages elsewhere")
        return f"blocks in the way: {', '.join(parts) or 'none'}"


class Shrink:
    """From ``begin_moves`` to ``end_moves`` the bytes of each move's source are copied to its
    target; neither block changes otherwise meanwhile."""

    def __init__(self, ledger: Ledger, target_blocks: int) -> None:
        self.moves: list[Move] = []
        self.moved_pages = 0
        self.evicted_pages = 0
        self._ledger = ledger
        self._target = target_blocks
        ledger.allocator.withdraw(target_blocks)
        ledger.holds.confine(target_blocks)
        ledger.index.prepare_relocations()
        # Looked at from the end; a block that cannot go yet waits for the next round.
        self._left = sorted(ledger.allocator.used(target_blocks))
        self._waiting: list[BlockId] = []

    def is_empty(self) -> bool:
        """Nothing is left above the new end, or of the pool."""
        allocator = self._ledger.allocator
        return (
            self._ledger.closed
            or allocator.withdrawn_blocks == allocator.total_blocks - allocator.limit
        )

    @property
    def round_over(self) -> bool:
        """Every block was looked at: the next round is worth while only when something ended."""
        return not self._left

    def begin_moves(self, count: int) -> list[Move]:
        """Up to ``count`` pages to move, room made for them if need be; none at a round's end."""
        assert not self.moves, "the last moves have not ended"
        ledger = self._ledger
        ledger.end_expired()
        if not self._left:
            self._left, self._waiting = sorted(self._waiting), []
        pages = self._next_pages(count)
        short = len(pages) - ledger.allocator.free_blocks
        if short > 0:
            self.evicted_pages += ledger.evict(short)
            pages = [block for block in pages if ledger.index.key_of(block) is not None]
        targets = ledger.allocator.allocate(min(len(pages), ledger.allocator.free_blocks))
        assert targets is not None
        self._waiting += pages[len(targets) :]
        self.moves = [Move(*pair) for pair in zip(pages, targets, strict=False)]
        ledger.index.pin([move.source for move in self.moves])
        ledger.moving.update(targets)
        return self.moves

    def end_moves(self) -> None:
        ledger, moves = self._ledger, self.moves
        self.moves = []
        if ledger.closed:
            return
        for source, target in moves:
            ledger.moving.remove(target)
            if ledger.index.key_of(source) is not None:
                ledger.index.relocate(source, target)
                ledger.checksums.move(source, target)
                self.moved_pages += 1
                ledger.counts["moved_pages_total"] += 1
            else:  # deleted or cleared while it was copied
                ledger.allocator.free((target,))
            ledger.allocator.free(ledger.index.unpin((source,)))

    def complete(self) -> None:
        self._ledger.shrink()

    def abort(self) -> None:
        """Pages whose copy was interrupted stay where they are."""
        ledger, moves = self._ledger, self.moves
        self.moves = []
        for source, target in moves:
            ledger.moving.remove(target)
            ledger.allocator.free((target,))
            ledger.allocator.free(ledger.index.unpin((source,)))
        ledger.allocator.restore()
        ledger.holds.confine(ledger.total_blocks)

    def blockers(self) -> Blockers:
        """O(blocks in use above the new end + pinned blocks)."""
        ledger = self._ledger
        ledger.end_expired()
        used = ledger.allocator.used(self._target)
        stored = [block for store in ledger.stores for _, block in store.missing]
        filling = used & ledger.unpublished.union(stored)
        leased = used & ledger.index.pins().keys()
        held_up = used.intersection(self._waiting) - filling - leased
        end_s = ledger.leases.latest_deadline_s(used)
        left_s = 0.0 if end_s is None else max(0.0, end_s - ledger.clock())
        return Blockers(len(leased), len(filling), len(held_up), left_s)

    def _next_pages(self, count: int) -> list[BlockId]:
        ledger = self._ledger
        pages: list[BlockId] = []
        while self._left and len(pages) < count:
            block = self._left.pop()
            if ledger.index.key_of(block) is not None:
                pages.append(block)
            elif ledger.allocator.is_used(block):
                self._waiting.append(block)
        return pages
