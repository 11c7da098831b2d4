"""Which block is in which state: keeps index, allocator, leases, stores and journal in step.

Belongs to ``MemPool``, whose lock is held in every call. Touches no bytes, calls nobody back.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from ..errors import ConfigError
from ..index.device_pages import DevicePages
from ..index.holds import Holds
from ..index.journal import Cleared, Dropped, Journal, Record, Stored
from ..index.local_index import LocalIndex, Removed
from ..memory.allocator import BlockAllocator
from ..memory.checksums import ChecksumTable
from ..memory.lease import LeaseTable, PoolLease, PoolStore
from ..types import BlockId, Eviction, PageKey

MIN_JOURNAL_PAGES = 65_536

COUNTERS = (
    "lookups_total",
    "lookup_pages_total",
    "hit_pages_total",
    "stored_pages_total",
    "aborted_pages_total",
    "evicted_pages_total",
    "moved_pages_total",
    "deleted_pages_total",
    "cleared_pages_total",
    "blocks_denied_total",
    "leases_expired_total",
    "resizes_total",
    "resizes_refused_total",
)


class Ledger:
    """``moving``: free blocks that pages are being copied to; they count as being filled."""

    def __init__(
        self,
        total_blocks: int,
        *,
        eviction: Eviction,
        clock: Callable[[], float],
        max_leases: int,
        max_lease_ttl_s: float,
        max_holds: int,
        hold_share: float,
    ) -> None:
        self.clock = clock
        self.closed = False
        self.allocator = BlockAllocator(total_blocks)
        self.index = LocalIndex(total_blocks, eviction)
        self.device = DevicePages()
        self.leases = LeaseTable(max_leases, max_lease_ttl_s)
        self.holds = Holds(self.index, hold_share, max_holds, self.allocator.free)
        self.journal = Journal(journal_pages(total_blocks))
        self.checksums = ChecksumTable()
        self.unpublished: set[BlockId] = set()
        self.stores: set[PoolStore] = set()
        self.filling: dict[PageKey, PoolStore] = {}
        self.moving: set[BlockId] = set()
        self.counts: Counter[str] = Counter()

    @property
    def total_blocks(self) -> int:
        return self.allocator.total_blocks

    @property
    def filling_blocks(self) -> int:
        stored = sum(len(store.missing) for store in self.stores)
        return len(self.unpublished) + stored + len(self.moving)

    # -- room --

    def grow(self, total_blocks: int) -> None:
        self.allocator.grow(total_blocks)
        self.index.resize(total_blocks)
        self.holds.confine(total_blocks)
        self.journal.raise_limit(journal_pages(total_blocks))

    def shrink(self) -> None:
        """The blocks withdrawn are gone."""
        self.allocator.shrink()
        self.index.resize(self.total_blocks)

    def make_room(self, count: int) -> bool:
        """Evict until ``count`` blocks are free or nothing is left to evict; whether it did."""
        evicted = False
        # More than one round only while blocks are withdrawn: those that come back are not free.
        while (short := count - self.allocator.free_blocks) > 0 and self.evict(short):
            evicted = True
        return evicted

    def evict(self, count: int) -> int:
        """Returns how many pages went."""
        removed = self.index.evict(count)
        self.drop(removed, "evicted_pages_total")
        return len(removed.keys)

    def drop(self, removed: Removed, counter: str) -> None:
        if removed.keys:
            self.allocator.free(removed.blocks)
            self.counts[counter] += len(removed.keys)
            self.journal.write((Dropped(removed.keys),))

    # -- blocks by hand --

    def allocate(self, count: int) -> tuple[list[BlockId] | None, bool]:
        """``count`` blocks, or None; and whether pages were evicted for them."""
        self.end_expired()
        if self.closed:
            return None, False
        # Orphans are pinned, so what is not pinned and not being filled is free or evictable.
        most = self.total_blocks - self.filling_blocks - self.index.pinned_blocks
        evicted = self.make_room(count) if count <= most else False
        blocks = self.allocator.allocate(count)
        if blocks is None:
            self.counts["blocks_denied_total"] += count
        else:
            self.unpublished.update(blocks)
        return blocks, evicted

    def take_unpublished(self, blocks: Sequence[BlockId]) -> None:
        """ConfigError, and nothing changes, unless all are of ``allocate``, each named once."""
        taken = set(blocks)
        if not taken <= self.unpublished:
            block = next(iter(taken - self.unpublished))
            raise ConfigError(f"block {block} is not one of alloc_mem's that wait to be inserted")
        if len(taken) != len(blocks):
            raise ConfigError(f"a block is named twice among {list(blocks)!s:.100}")
        self.unpublished -= taken

    # -- stores --

    def begin_store(
        self,
        keys: Sequence[PageKey],
        parent: PageKey | None,
        end: Callable[[PoolStore, int, Sequence[int]], None],
    ) -> tuple[PoolStore, bool]:
        """The store, and whether pages were evicted for it."""
        self.end_expired()
        held: list[BlockId] = []
        wanted: dict[PageKey, int] = {}
        above = None if parent is None else self.index.get(parent)
        if above is not None:
            held.append(above)
        for position, key in enumerate(keys):
            block = self.index.get(key)
            if block is not None:
                held.append(block)
            elif key not in self.filling and key not in wanted:
                wanted[key] = position
        self.index.touch(held)
        # Pinned before room is made: evicting the head to store the tail would be absurd.
        self.index.pin(held)
        evicted = self.make_room(len(wanted)) if not self.closed else False
        given = 0 if self.closed else min(len(wanted), self.allocator.free_blocks)
        blocks = self.allocator.allocate(given)
        assert blocks is not None, given
        self.counts["blocks_denied_total"] += len(wanted) - given
        # strict=False: wanted ends early where blocks ran out.
        missing = list(zip(wanted.values(), blocks, strict=False))
        store = PoolStore(keys, parent, missing, held, end)
        if missing:
            self.stores.add(store)
            for position, _ in missing:
                self.filling[keys[position]] = store
        else:
            store.ended = True
            self.allocator.free(self.index.unpin(held))
        return store, evicted

    def end_store(self, store: PoolStore, count: int, checksums: Sequence[int]) -> int:
        """Publish the first ``count`` of what it filled; returns how many pages that were."""
        if store.ended:
            return 0
        store.ended = True
        if self.closed:
            return 0
        self.stores.remove(store)
        for position, _ in store.missing:
            if self.filling.get(store.keys[position]) is store:
                del self.filling[store.keys[position]]
        if store.flushed:
            count = 0
        published = self.publish(store.keys, store.parent, store.missing[:count], checksums)
        self.allocator.free([block for _, block in store.missing[count:]])
        self.counts["aborted_pages_total"] += len(store.missing) - count
        self.allocator.free(self.index.unpin(store.held))
        return published

    def publish(
        self,
        keys: Sequence[PageKey],
        parent: PageKey | None,
        filled: Sequence[tuple[int, BlockId]],
        checksums: Sequence[int] = (),
    ) -> int:
        """Make ``filled`` (positions in ``keys`` and their blocks) readable; returns how many.
        A block whose key is readable already is freed."""
        fresh: dict[PageKey, BlockId] = {}
        parents: list[PageKey | None] = []
        kept: list[int] = []
        for index, (position, block) in enumerate(filled):
            key = keys[position]
            if key in self.index or key in fresh:
                self.allocator.free((block,))
                continue
            fresh[key] = block
            if checksums:
                kept.append(checksums[index])
            parents.append(keys[position - 1] if position else parent)
        if not fresh:
            return 0
        self.checksums.set(list(fresh.values()), kept)
        linked = self.index.insert(list(fresh), list(fresh.values()), parents)
        records: list[Record] = []
        chain: list[PageKey] = []
        for key, above in zip(fresh, linked, strict=True):
            if not chain or above != chain[-1]:
                chain = []
                records.append(Stored(chain, above))
            chain.append(key)
        self.journal.write(records)
        self.counts["stored_pages_total"] += len(fresh)
        return len(fresh)

    def clear(self) -> None:
        self.end_expired()
        self.holds.end_all()
        removed = self.index.clear()
        self.allocator.free(removed.blocks)
        self.counts["cleared_pages_total"] += len(removed.keys)
        for store in self.stores:
            store.flushed = True
        self.filling.clear()
        self.device.clear()
        self.journal.write((Cleared(),))

    # -- the engine's own pool --

    def apply_device(self, changes: Sequence[Record]) -> bool:
        """Whether they changed anything, which is then one batch."""
        made = self.device.apply(changes)
        if made:
            self.journal.write(made)
        return bool(made)

    # -- leases --

    def acquire(
        self,
        keys: Sequence[PageKey],
        owner: str,
        ttl_s: float,
        end: Callable[[PoolLease], None],
    ) -> PoolLease:
        self.end_expired()
        self.leases.require_allowed(ttl_s)
        blocks = self.index.match(keys)
        self.counts["lookups_total"] += 1
        self.counts["lookup_pages_total"] += len(keys)
        self.counts["hit_pages_total"] += len(blocks)
        lease = PoolLease(blocks, owner, self.clock() + ttl_s, self.clock, end)
        if blocks:
            self.index.touch(blocks)
            self.index.pin(blocks)
            self.leases.add(lease)
        return lease

    def end_lease(self, lease: PoolLease) -> None:
        if not lease.blocks:
            lease.ended = True
        elif self.leases.end(lease):
            self.unpin((lease,))

    def end_expired(self) -> int:
        now = self.clock()
        self.holds.end_expired(now)
        leases = self.leases.end_expired(now)
        self.counts["leases_expired_total"] += len(leases)
        self.unpin(leases)
        return len(leases)

    def unpin(self, leases: Sequence[PoolLease]) -> None:
        for lease in leases:
            self.allocator.free(self.index.unpin(lease.blocks))

    # -- state --

    def close(self) -> None:
        self.closed = True
        self.leases.end_all()
        self.holds.end_all()
        self.index.clear()
        self.device.clear()
        self.filling.clear()
        self.stores.clear()
        self.unpublished.clear()
        self.moving.clear()
        self.journal.drain()

    def stats(self) -> dict[str, float]:
        values = {
            "total_blocks": self.total_blocks,
            "free_blocks": self.allocator.free_blocks,
            "withdrawn_blocks": self.allocator.withdrawn_blocks,
            "filling_blocks": self.filling_blocks,
            "ready_blocks": len(self.index),
            "orphan_blocks": self.index.orphan_blocks,
            "pinned_blocks": self.index.pinned_blocks,
            "device_pages": len(self.device),
            "leases": len(self.leases),
            "stores": len(self.stores),
            **self.holds.stats(),
            "event_seq": self.journal.last_seq,
            "event_batches_waiting": self.journal.waiting_batches,
            "event_batches_dropped_total": self.journal.dropped_batches,
        }
        for name in COUNTERS:
            values[name] = self.counts[name]
        return {name: float(value) for name, value in values.items()}

    def check(self, moving_from: Sequence[BlockId] = ()) -> None:
        """``moving_from``: blocks that are pinned because they are being copied."""
        for part in (self.index, self.allocator, self.leases, self.holds, self.journal):
            part.check()
        stored = [block for store in self.stores for _, block in store.missing]
        filling = self.unpublished.union(stored, self.moving)
        assert len(filling) == self.filling_blocks, "a block is filled twice"
        keys, _ = self.index.pages()
        ready = set(self.index.match(keys))
        orphans = self.index.orphans()
        assert not filling & ready and not filling & orphans and not ready & orphans
        assert filling | ready | orphans == self.allocator.used(), "blocks are not conserved"
        pins = Counter(self.leases.pinned())
        pins.update(moving_from)
        pins.update(self.holds.pinned())
        for store in self.stores:
            pins.update(store.held)
        assert pins == self.index.pins(), "pins and their holders differ"
        for key, store in self.filling.items():
            assert store in self.stores and not store.flushed, key


def journal_pages(total_blocks: int) -> int:
    return max(MIN_JOURNAL_PAGES, 2 * total_blocks)
