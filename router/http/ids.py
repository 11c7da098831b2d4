"""Ids of requests, unguessable: who knows one may abort what it names."""

from __future__ import annotations

import os
from collections.abc import Callable

ID_BYTES = 16
# A system call an id is a tenth of what short requests cost altogether on some machines.
IDS_A_READ = 256


class Ids:
    """32 hexadecimal digits a call, from the system's random numbers."""

    def __init__(self, random: Callable[[int], bytes] = os.urandom) -> None:
        self._random = random
        self._left = b""

    def __call__(self) -> str:
        if not self._left:
            self._left = self._random(ID_BYTES * IDS_A_READ)
        taken, self._left = self._left[:ID_BYTES], self._left[ID_BYTES:]
        return taken.hex()


new_id = Ids()
