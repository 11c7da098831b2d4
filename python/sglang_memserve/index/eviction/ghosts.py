"""Pages evicted not long ago, by fingerprint.

A table of 32-bit fingerprints in which a newer page takes the place of an older one that falls on
the same slot: no chain, no queue, four bytes a slot. A page evicted as many evictions ago as there
are slots is still remembered with probability 1/e. A page that was never here is taken for a ghost
once in 2**32.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from ...types import PageKey

_HALF = 0xFFFF_FFFF


class Ghosts:
    def __init__(self, slots: int) -> None:
        assert slots > 0, slots
        # 0 is an empty slot.
        self._prints = array("I", bytes(4 * slots))

    def __len__(self) -> int:
        return len(self._prints)

    def remember(self, keys: Sequence[PageKey]) -> None:
        prints, slots = self._prints, len(self._prints)
        for number in _numbers(keys):
            prints[(number & _HALF) % slots] = number >> 32

    def recall(self, keys: Sequence[PageKey]) -> list[bool]:
        """Which of ``keys`` were remembered; they no longer are."""
        prints, slots = self._prints, len(self._prints)
        found: list[bool] = []
        for number in _numbers(keys):
            slot = (number & _HALF) % slots
            known = prints[slot] == number >> 32 != 0
            if known:
                prints[slot] = 0
            found.append(known)
        return found


def _numbers(keys: Sequence[PageKey]) -> array[int]:
    """The first eight bytes of each: keys are hashes, so that is a slot and a fingerprint."""
    return array("Q", b"".join(keys))[::4]
