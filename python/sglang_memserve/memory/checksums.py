"""The checksum of each block of an arena, as far as it is known."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..checksums import UNKNOWN
from ..types import BlockId


class ChecksumTable:
    """8 bytes a block once there is a checksum, nothing before. Not thread-safe."""

    def __init__(self) -> None:
        self._values = np.zeros(0, dtype=np.uint64)

    def set(self, blocks: Sequence[BlockId], checksums: Sequence[int]) -> None:
        """One for each of ``blocks``, or none at all: they are not known then."""
        if not blocks or not (checksums or len(self._values)):
            return
        highest = max(blocks)
        if highest >= len(self._values):
            longer = np.full(max(1024, 2 * highest), UNKNOWN, dtype=np.uint64)
            longer[: len(self._values)] = self._values
            self._values = longer
        self._values[blocks] = np.array(checksums, dtype=np.uint64) if checksums else UNKNOWN

    def get(self, blocks: Sequence[BlockId]) -> list[int]:
        """One for each, UNKNOWN where none was set; empty where none was ever set."""
        known = len(self._values)
        if not known:
            return []
        return [int(self._values[b]) if b < known else UNKNOWN for b in blocks]

    def move(self, source: BlockId, target: BlockId) -> None:
        self.set([target], self.get([source]))
