"""Which blocks are free."""

from __future__ import annotations

from collections.abc import Iterable

from ..types import BlockId


class BlockAllocator:
    """A stack of free blocks. Neighbours are handed out together as long as the stack is fresh,
    which lets copies and network reads merge. Not thread-safe."""

    def __init__(self, total_blocks: int) -> None:
        assert total_blocks > 0, total_blocks
        self.total_blocks = total_blocks
        self._free = [BlockId(block) for block in range(total_blocks - 1, -1, -1)]
        self._used = bytearray(total_blocks)

    @property
    def free_blocks(self) -> int:
        return len(self._free)

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
            self._free.append(block)

    def used(self) -> set[BlockId]:
        return {BlockId(block) for block, used in enumerate(self._used) if used}

    def check(self) -> None:
        assert len(set(self._free)) == len(self._free), "a block is free twice"
        assert not any(self._used[block] for block in self._free)
        assert sum(self._used) + len(self._free) == self.total_blocks
