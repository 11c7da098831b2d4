"""Which blocks are free."""

from __future__ import annotations

from collections.abc import Iterable

from ..types import BlockId


class BlockAllocator:
    """A stack of free blocks. Neighbours are handed out together as long as the stack is fresh,
    which lets copies and network reads merge. Not thread-safe.

    Before the last blocks can go they are *withdrawn*: not handed out any more, and not free again
    when they come back.

        free + withdrawn + used = total
    """

    def __init__(self, total_blocks: int) -> None:
        assert total_blocks > 0, total_blocks
        self.total_blocks = total_blocks
        self._free = [BlockId(block) for block in range(total_blocks - 1, -1, -1)]
        self._used = bytearray(total_blocks)
        self._limit = total_blocks
        self._withdrawn: list[BlockId] = []

    @property
    def free_blocks(self) -> int:
        return len(self._free)

    @property
    def withdrawn_blocks(self) -> int:
        return len(self._withdrawn)

    @property
    def limit(self) -> int:
        """Blocks from here on are not handed out."""
        return self._limit

    def allocate(self, count: int) -> list[BlockId] | None:
        """``count`` blocks, or None (and nothing taken) when there are not as many."""
        assert count >= 0, count
        if count > len(self._free):
            return None
        if count == 0:
            return []
        blocks = self._free[-count:]
        del self._free[-count:]
        blocks.reverse()
        for block in blocks:
            self._used[block] = 1
        return blocks

    def free(self, blocks: Iterable[BlockId]) -> None:
        for block in blocks:
            assert self._used[block], f"block {block} is freed twice"
            self._used[block] = 0
            (self._free if block < self._limit else self._withdrawn).append(block)

    def is_used(self, block: BlockId) -> bool:
        return bool(self._used[block])

    def used(self, first: int = 0) -> set[BlockId]:
        """Blocks in use from ``first`` on."""
        return {BlockId(block) for block in range(first, self.total_blocks) if self._used[block]}

    # -- size --

    def grow(self, total_blocks: int) -> None:
        assert self._limit == self.total_blocks <= total_blocks, (self._limit, total_blocks)
        new = [BlockId(block) for block in range(total_blocks - 1, self.total_blocks - 1, -1)]
        # At the bottom of the stack: what was given back last is what caches still hold.
        self._free = new + self._free
        self._used += bytes(len(new))
        self._limit = self.total_blocks = total_blocks

    def withdraw(self, first: int) -> None:
        """Hand out no block from ``first`` on, until ``shrink`` or ``restore``."""
        assert self._limit == self.total_blocks and 0 < first <= self.total_blocks, first
        self._limit = first
        self._withdrawn = [block for block in self._free if block >= first]
        self._free = [block for block in self._free if block < first]

    def restore(self) -> None:
        self._free = self._withdrawn + self._free
        self._withdrawn = []
        self._limit = self.total_blocks

    def shrink(self) -> None:
        """The withdrawn blocks are gone. All above the limit must be."""
        assert len(self._withdrawn) == self.total_blocks - self._limit, self.used(self._limit)
        self._withdrawn = []
        del self._used[self._limit :]
        self.total_blocks = self._limit

    def check(self) -> None:
        unused = self._free + self._withdrawn
        assert len(set(unused)) == len(unused), "a block is free twice"
        assert not any(self._used[block] for block in unused)
        assert sum(self._used) + len(unused) == self.total_blocks == len(self._used)
        assert all(block < self._limit for block in self._free)
        assert all(block >= self._limit for block in self._withdrawn)
