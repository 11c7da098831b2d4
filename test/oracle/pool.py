"""What MemPool must do, written so that it is obviously right: scans, no clever data structure.

A *copy* is one block's worth of a page, named by a number that is never used again; the oracle
knows no block numbers. Times are the test's own clock.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field


@dataclass
class Page:
    copy: int
    parent: bytes | None
    stamp: int


@dataclass
class OracleLease:
    copies: list[int]
    owner: str
    deadline: float
    ended: bool = False


@dataclass
class OracleStore:
    keys: list[bytes]
    parent: bytes | None
    missing: list[int]
    held: list[int]
    flushed: bool = False
    ended: bool = False


@dataclass
class OracleHold:
    """``blocks``: the pool's own numbers, which say what shrinking ends."""

    last: bytes
    copies: list[int]
    blocks: list[int]
    deadline: float


@dataclass
class PoolOracle:
    total: int
    max_leases: int
    now: float = 0.0
    max_holds: int = 2
    hold_share: float = 0.5
    holds: list[OracleHold] = field(default_factory=list)
    waiting: list[Sequence[bytes]] = field(default_factory=list)
    pages: dict[bytes, Page] = field(default_factory=dict)
    orphans: set[int] = field(default_factory=set)
    leases: list[OracleLease] = field(default_factory=list)
    stores: list[OracleStore] = field(default_factory=list)
    allocated: int = 0
    clock: int = 0
    serial: int = 0

    # -- what can be seen --

    def pins(self) -> Counter[int]:
        count: Counter[int] = Counter()
        for lease in self.leases:
            count.update(lease.copies)
        for hold in self.holds:
            count.update(hold.copies)
        for store in self.stores:
            count.update(store.held)
        return count

    def filling(self) -> int:
        return self.allocated + sum(len(store.missing) for store in self.stores)

    def free(self) -> int:
        return self.total - self.filling() - len(self.pages) - len(self.orphans)

    def being_filled(self) -> set[bytes]:
        return {
            store.keys[position]
            for store in self.stores
            if not store.flushed
            for position in store.missing
        }

    def leading(self, keys: Sequence[bytes]) -> list[bytes]:
        for count, key in enumerate(keys):
            if key not in self.pages:
                return list(keys[:count])
        return list(keys)

    def parents(self) -> dict[bytes, bytes | None]:
        return {key: page.parent for key, page in self.pages.items()}

    # -- what can be done --

    def acquire(self, keys: Sequence[bytes], owner: str, ttl: float) -> OracleLease | None:
        """None: refused, there are too many."""
        self.expire()
        if len(self.leases) >= self.max_leases:
            return None
        found = self.leading(keys)
        self._touch(found)
        lease = OracleLease([self.pages[key].copy for key in found], owner, self.now + ttl)
        if found:
            self.leases.append(lease)
        return lease

    def release(self, lease: OracleLease) -> None:
        lease.ended = True
        if lease in self.leases:
            self.leases.remove(lease)
        self._drop_orphans()

    def release_owner(self, owner: str) -> int:
        mine = [lease for lease in self.leases if lease.owner == owner]
        for lease in mine:
            self.release(lease)
        return len(mine)

    def expire(self) -> int:
        late = [lease for lease in self.leases if lease.deadline <= self.now]
        for lease in late:
            self.release(lease)
        self.holds = [hold for hold in self.holds if hold.deadline > self.now]
        self._drop_orphans()
        return len(late)

    def hold(self, keys: Sequence[bytes], blocks: list[int], ttl: float) -> str:
        """``keys`` is the object that was appended to ``waiting``; ``blocks``: of its pages."""
        self.expire()
        wanted = any(other is keys for other in self.waiting)
        self.waiting = [other for other in self.waiting if other is not keys]
        copies = [self.pages[key].copy for key in self.leading(keys)]
        if not wanted or not copies:
            return "needless"
        same = [hold for hold in self.holds if hold.last == keys[-1]]
        held = {copy for hold in self.holds for copy in hold.copies}
        if len(held | set(copies)) > self.hold_share * self.total:
            return "refused"
        if not same and len(self.holds) >= self.max_holds:
            return "refused"
        deadline = max([self.now + ttl, *(hold.deadline for hold in same)])
        self.holds = [hold for hold in self.holds if hold.last != keys[-1]]
        self.holds.append(OracleHold(keys[-1], copies, blocks, deadline))
        self._drop_orphans()
        return "held"

    def claim(self, keys: Sequence[bytes]) -> None:
        """The deepest hold whose last key is among ``keys``."""
        lasts = {hold.last for hold in self.holds} | {waiting[-1] for waiting in self.waiting}
        for key in reversed(keys):
            if key in lasts:
                self.holds = [hold for hold in self.holds if hold.last != key]
                self.waiting = [waiting for waiting in self.waiting if waiting[-1] != key]
                break
        self._drop_orphans()

    def confine(self, limit: int) -> None:
        """Blocks from ``limit`` on are to be emptied."""
        self.holds = [hold for hold in self.holds if max(hold.blocks) < limit]
        while len({copy for h in self.holds for copy in h.copies}) > self.hold_share * limit:
            self.holds.pop()
        self._drop_orphans()

    def prepare(self, keys: Sequence[bytes], parent: bytes | None) -> OracleStore:
        self.expire()
        wanted: list[int] = []
        for position, key in enumerate(keys):
            known = key in self.pages or key in self.being_filled()
            if not known and key not in keys[:position]:
                wanted.append(position)
        head = [parent] if parent is not None and parent in self.pages else []
        resident = head + [key for key in keys if key in self.pages]
        self._touch(resident)
        held = [self.pages[key].copy for key in resident]
        store = OracleStore(list(keys), parent, [], held)
        self.stores.append(store)
        self._make_room(len(wanted))
        store.missing = wanted[: self.free()]
        if not store.missing:
            store.ended = True
            self.stores.remove(store)
        return store

    def finish(self, store: OracleStore, count: int) -> None:
        if store.ended:
            return
        store.ended = True
        self.stores.remove(store)
        if not store.flushed:
            self._publish(store.keys, store.parent, store.missing[:count])
        self._drop_orphans()

    def allocate(self, count: int) -> bool:
        self.expire()
        if count > self.total - self.filling() - len(self.pins()):
            return False
        self._make_room(count)
        if self.free() < count:
            return False
        self.allocated += count
        return True

    def give_back(self, count: int) -> None:
        self.allocated -= count

    def insert(self, keys: Sequence[bytes], parent: bytes | None) -> int:
        self.allocated -= len(keys)
        return self._publish(keys, parent, range(len(keys)))

    def delete(self, keys: Iterable[bytes]) -> int:
        self.expire()
        gone = {key for key in keys if key in self.pages}
        for key in keys:
            if key in self.pages:
                self._remove(key)
        return len(gone)

    def clear(self) -> None:
        self.expire()
        self.holds.clear()
        self._drop_orphans()
        pins = self.pins()
        self.orphans |= {page.copy for page in self.pages.values() if pins[page.copy]}
        self.pages.clear()
        for store in self.stores:
            store.flushed = True

    def resize(self, total: int) -> bool:
        """To ``total`` blocks, when no block is in the way. False: the pages do not fit."""
        self.total = max(total, self.total)
        self._make_room(self.total - total)
        if self.free() < self.total - total:
            return False
        self.total = total
        return True

    # -- how --

    def _touch(self, keys: Sequence[bytes]) -> None:
        """The head of a chain counts as used last."""
        self.clock += len(keys)
        for index, key in enumerate(keys):
            self.pages[key].stamp = self.clock - index

    def _publish(
        self, keys: Sequence[bytes], parent: bytes | None, positions: Iterable[int]
    ) -> int:
        fresh: list[bytes] = []
        for position in positions:
            key = keys[position]
            if key in self.pages:
                continue
            above = keys[position - 1] if position else parent
            self.serial += 1
            if above is not None and key in self._ancestors(above):
                above = None
            self.pages[key] = Page(self.serial, above, 0)
            fresh.append(key)
        self._touch(fresh)
        return len(fresh)

    def _ancestors(self, key: bytes) -> list[bytes]:
        """``key`` itself, then upwards."""
        line = [key]
        while key in self.pages:
            above = self.pages[key].parent
            if above is None:
                break
            line.append(above)
            key = above
        return line

    def _make_room(self, count: int) -> None:
        while self.free() < count:
            pins = self.pins()
            has_children = {page.parent for page in self.pages.values()}
            leaves = [
                key
                for key, page in self.pages.items()
                if key not in has_children and not pins[page.copy]
            ]
            if not leaves:
                return
            self._remove(min(leaves, key=lambda key: self.pages[key].stamp))

    def _remove(self, key: bytes) -> None:
        page = self.pages.pop(key)
        if self.pins()[page.copy]:
            self.orphans.add(page.copy)
        above = self.pages.get(page.parent) if page.parent is not None else None
        if above is not None:
            above.stamp = max(above.stamp, page.stamp)

    def _drop_orphans(self) -> None:
        pins = self.pins()
        self.orphans = {copy for copy in self.orphans if pins[copy]}


def replay(events: Iterable[object], state: dict[int, int | None]) -> None:
    """Apply wire events to ``state``: short key to its parent's, checking each step's sense."""
    for event in events:
        kind = type(event).__name__
        if kind == "BlockStored":
            above = event.parent_block_hash  # type: ignore[attr-defined]
            for block_hash in event.block_hashes:  # type: ignore[attr-defined]
                assert block_hash not in state, "stored twice"
                state[block_hash] = above
                above = block_hash
        elif kind == "BlockRemoved":
            for block_hash in event.block_hashes:  # type: ignore[attr-defined]
                del state[block_hash]
        else:
            assert kind == "AllBlocksCleared", kind
            state.clear()
