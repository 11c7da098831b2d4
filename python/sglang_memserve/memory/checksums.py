"""The checksum of each block of an arena, as far as it is known."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..checksums import UNKNOWN
from ..types import BlockId


class ChecksumTable:
    """8 bytes a block, grown when blocks with higher numbers come. Not thread-safe."""

    def __init__(self) -> None:
        self._values = np.zeros(0, dtype=np.uint64)

    def set(self, block: BlockId, checksum: int) -> None:
        if block >= len(self._values):
            if checksum == UNKNOWN:
                return
            longer = np.zeros(max(1024, 2 * block), dtype=np.uint64)
            longer[: len(self._values)] = self._values
            self._values = longer
        self._values[block] = checksum

    def get(self, blocks: Sequence[BlockId]) -> list[int]:
        """One for each, UNKNOWN where none was set."""
        if not len(self._values):
            return [UNKNOWN] * len(blocks)
        known = len(self._values)
        return [int(self._values[b]) if b < known else UNKNOWN for b in blocks]

    def move(self, source: BlockId, target: BlockId) -> None:
        self.set(target, self.get([source])[0])
