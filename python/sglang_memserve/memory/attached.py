"""What goes with an arena's memory in use, whatever its size becomes: a thread that backs it ahead
of its use, and a device that reaches it by itself."""

from __future__ import annotations

from ..types import Prefault
from .arena import Arena, Pinner
from .backing import WORTH_BYTES, Backing


class Attached:
    """Of ``arena``, for its whole life. ``attach`` and ``detach`` are for one thread at a time."""

    def __init__(self, arena: Arena, prefault: Prefault) -> None:
        self._arena = arena
        self._pinner: Pinner | None = None
        self._backing: Backing | None = None
        if prefault is Prefault.BACKGROUND:
            self._backing = Backing(arena.reserved)
        for slab in arena.slabs:
            self.attach(*arena.region(slab))

    def pin_with(self, pinner: Pinner) -> None:
        """Once. Takes as long as touching the memory in use."""
        assert self._pinner is None, "another device pins it"
        self._pinner = pinner
        for slab in self._arena.slabs:
            pinner.pin(*self._arena.region(slab))

    def attach(self, base: int, length: int) -> None:
        """This range is in use from now on."""
        if self._pinner is not None:
            self._pinner.pin(base, length)
        if self._backing is not None and self._arena.nbytes >= WORTH_BYTES:
            self._backing.add(base, length)

    def detach(self, base: int, length: int) -> None:
        """Before the range is given back; nobody uses it any more."""
        if self._backing is not None:
            self._backing.remove(base, length)
        if self._pinner is not None:
            self._pinner.unpin(base, length)

    def close(self) -> None:
        """Before the arena's memory goes. Devices unpin it themselves."""
        if self._backing is not None:
            self._backing.close()
