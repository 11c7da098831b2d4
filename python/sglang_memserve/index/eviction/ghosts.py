"""Pages evicted not long ago, by fingerprint.

A table of 16-bit fingerprints in which a newer page takes the place of an older one that falls on
the same slot: no chain, no queue, two bytes a slot. A page evicted as many evictions ago as there
are slots is still remembered with probability 1/e. A page that was never here is taken for a ghost
once in 2**16, which protects a page that did not earn it, no more.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from ...types import PageKey

_SLOT_MASK = 0xFFFF_FFFF
_PRINT_SHIFT = 48


class Ghosts:
    def __init__(self, slots: int) -> None:
        assert slots > 0, slots
        # 0 is an empty slot.
        self._prints = array("H", bytes(2 * slots))

    def __len__(self) -> int:
        return len(self._prints)

    def remember(self, keys: Sequence[PageKey]) -> None:
        prints, slots = self._prints, len(self._prints)
        for number in _numbers(keys):
            prints[(number & _SLOT_MASK) % slots] = number >> _PRINT_SHIFT

    def recall(self, keys: Sequence[PageKey]) -> list[bool]:
        """Which of ``keys`` were remembered; they no longer are."""
        prints, slots = self._prints, len(self._prints)
        found: list[bool] = []
        for number in _numbers(keys):
            slot = (number & _SLOT_MASK) % slots
            known = prints[slot] == number >> _PRINT_SHIFT != 0
            if known:
                prints[slot] = 0
            found.append(known)
        return found


def _numbers(keys: Sequence[PageKey]) -> array[int]:
    """The first eight bytes of each: keys are hashes, so that is a slot and a fingerprint."""
    return array("Q", b"".join(keys))[::4]
