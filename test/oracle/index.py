"""What LocalIndex must do, written so that it is obviously right: every question is a scan.

Both eviction policies are modelled on the pages themselves; only the slot of a ghost is taken from
the definition of the table, since which ghosts collide is part of what can be seen.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass
class Page:
    block: int
    parent: bytes | None
    stamp: int
    protected: bool


@dataclass
class IndexOracle:
    total_blocks: int
    two_queues: bool
    pages: dict[bytes, Page] = field(default_factory=dict)
    pins: Counter[int] = field(default_factory=Counter)
    orphans: set[int] = field(default_factory=set)
    ghost_slots: int = field(init=False)
    ghosts: dict[int, bytes] = field(default_factory=dict)
    clock: int = 0

    def __post_init__(self) -> None:
        self.ghost_slots = self.total_blocks

    # -- what can be seen --

    def unused(self) -> list[int]:
        used = {page.block for page in self.pages.values()} | self.orphans
        return [block for block in range(self.total_blocks) if block not in used]

    def in_block(self, block: int) -> bytes | None:
        for key, page in self.pages.items():
            if page.block == block:
                return key
        return None

    def is_leaf(self, key: bytes) -> bool:
        return all(page.parent != key for page in self.pages.values())

    def may_go(self) -> list[bytes]:
        return [
            k for k, page in self.pages.items() if self.is_leaf(k) and not self.pins[page.block]
        ]

    # -- what can be done --

    def insert(
        self, keys: Sequence[bytes], blocks: Sequence[int], parents: Sequence[bytes | None]
    ) -> list[bytes | None]:
        linked = []
        for key, block, parent in zip(keys, blocks, parents, strict=True):
            above = parent
            while above is not None and above != key:
                above = self.pages[above].parent if above in self.pages else None
            parent = None if above == key else parent
            known = self.ghosts.get(self.slot(key)) == key
            if known:
                del self.ghosts[self.slot(key)]
            self.pages[key] = Page(block, parent, 0, known)
            linked.append(parent)
        self.clock += len(keys)
        for place, key in enumerate(keys):
            self._stamp(key, self.clock if self.two_queues else self.clock - place)
        return linked

    def touch(self, keys: Sequence[bytes]) -> None:
        if self.two_queues:
            # The clock counts arrivals only.
            for key in keys:
                page = self.pages[key]
                if page.protected or self.clock - page.stamp >= self.total_blocks // 8:
                    page.protected = True
                    self._stamp(key, self.clock)
        else:
            self.clock += len(keys)
            for place, key in enumerate(keys):
                self._stamp(key, self.clock - place)

    def evict(self, count: int) -> list[bytes]:
        gone: list[bytes] = []
        while len(gone) < count:
            key = self._next()
            if key is None:
                break
            self._remove(key)
            self.ghosts[self.slot(key)] = key
            gone.append(key)
        return gone

    def remove(self, keys: Sequence[bytes]) -> list[bytes]:
        gone = [key for key in dict.fromkeys(keys) if key in self.pages]
        for key in gone:
            self._remove(key)
        return gone

    def relocate(self, source: int, target: int) -> None:
        key = self.in_block(source)
        assert key is not None
        page = self.pages[key]
        page.block = target
        if self.pins[source]:
            self.orphans.add(source)

    def resize(self, total_blocks: int) -> None:
        self.total_blocks = total_blocks
        if total_blocks > self.ghost_slots:
            self.ghost_slots = total_blocks
            self.ghosts.clear()

    def clear(self) -> None:
        for key in list(self.pages):
            self._remove(key)

    # -- inside --

    def slot(self, key: bytes) -> int:
        return (int.from_bytes(key[:8], sys.byteorder) & 0xFFFFFFFF) % self.ghost_slots

    def _stamp(self, key: bytes, stamp: int) -> None:
        self.pages[key].stamp = stamp

    def _next(self) -> bytes | None:
        leaves = self.may_go()
        if self.two_queues:
            on_probation = sum(not page.protected for page in self.pages.values())
            first = [
                key
                for key in leaves
                if self.pages[key].protected != (on_probation > self.total_blocks // 2)
            ]
            leaves = first or leaves
        return min(leaves, key=lambda k: (self.pages[k].stamp, self.pages[k].block), default=None)

    def _remove(self, key: bytes) -> None:
        page = self.pages.pop(key)
        if page.parent in self.pages:
            parent = self.pages[page.parent]
            parent.stamp = max(parent.stamp, page.stamp)
        if self.pins[page.block]:
            self.orphans.add(page.block)
