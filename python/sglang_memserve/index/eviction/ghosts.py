"""Pages evicted not long ago, by fingerprint.

A table of 32-bit fingerprints in which a newer page takes the place of an older one that falls on
the same slot: no chain, no queue, four bytes a slot. A page evicted as many evictions ago as there
are slots is still remembered with probability 1/e. A page that was never here is taken for a ghost
once in 2**32.
"""

from __future__ import annotations

from array import array

from ...types import PageKey

_HALF = 0xFFFF_FFFF


class Ghosts:
    def __init__(self, slots: int) -> None:
        assert slots > 0, slots
        # 0 is an empty slot.
        self._prints = array("I", bytes(4 * slots))

    def __len__(self) -> int:
        return len(self._prints)

    def remember(self, key: PageKey) -> None:
        # Keys are hashes: any eight bytes of one serve as two numbers.
        number = int.from_bytes(key[:8], "little")
        self._prints[(number & _HALF) % len(self._prints)] = number >> 32

    def recall(self, key: PageKey) -> bool:
        """Whether ``key`` was remembered; it no longer is."""
        number = int.from_bytes(key[:8], "little")
        slot = (number & _HALF) % len(self._prints)
        found = self._prints[slot] == number >> 32 != 0
        if found:
            self._prints[slot] = 0
        return found
