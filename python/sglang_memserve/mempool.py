"""MemPool: one rank's KV pages in DRAM, under the verbs of the MemServe paper (section 4).

Joins ``index`` (which), ``memory`` (where) and the journal of events under one lock. Sections under
the lock touch no bytes and call nobody back; the longest are O(pages asked for), but for ``clear``
and ``snapshot``, which are O(pages held).

Life of a block:

    FREE --prepare_store, alloc_mem--> FILLING --commit, insert--> READY --evict, delete--> FREE
                                       FILLING --abort, free_mem------------------------> FREE
    READY --delete or clear while leased--> ORPHAN --last lease ends--> FREE

    free + filling + ready + orphan = total                            (checked by ``check()``)

A reader finds READY blocks only. A lease pins its blocks: they are not evicted, and a block whose
page is removed meanwhile keeps its bytes for the lease's holder as an orphan.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence

from .errors import ConfigError, LimitExceeded, OutOfBlocks
from .index.journal import Cleared, Dropped, Journal, Record, Stored, rebuild, to_events
from .index.local_index import LocalIndex, Removed
from .memory.allocator import BlockAllocator
from .memory.arena import Arena
from .memory.layout import BlockLayout
from .memory.lease import LeaseTable, PoolLease, PoolStore
from .protocol.events import Event, Snapshot
from .types import BlockId, Generation, Namespace, PageKey, Tier

__all__ = ["MemPool", "PoolLease", "PoolStore"]

MAX_SUBSCRIBERS = 64
MIN_JOURNAL_PAGES = 65_536


class MemPool:
    """Thread-safe. Implements ``transfer.base.BlockStore``.

    ``arena_bytes`` is rounded down to whole blocks; ConfigError if that is none, or more than the
    machine has. ``clock`` gives seconds and times leases. ``on_events`` is called, on any thread
    and outside the lock, after new events can be drained.
    """

    def __init__(
        self,
        namespace: Namespace,
        *,
        arena_bytes: int,
        generation: Generation | str,
        clock: Callable[[], float] = time.monotonic,
        max_leases: int = 4096,
        max_lease_ttl_s: float = 3600.0,
        on_events: Callable[[], None] | None = None,
    ) -> None:
        self.namespace = namespace
        self.generation = Generation(generation)
        self.layout = BlockLayout.of(namespace)
        self.total_blocks = arena_bytes // self.layout.block_bytes
        if self.total_blocks <= 0:
            raise ConfigError(
                f"a DRAM pool of {arena_bytes} bytes holds no block of "
                f"{self.layout.block_bytes} bytes; give --mempool-dram a larger size"
            )
        self.arena = Arena(self.total_blocks, self.layout.block_bytes)
        self._clock = clock
        self._on_events = on_events
        self._lock = threading.Lock()
        self._closed = False
        self._allocator = BlockAllocator(self.total_blocks)
        self._index = LocalIndex(self.total_blocks)
        self._leases = LeaseTable(max_leases, max_lease_ttl_s)
        self._journal = Journal(max(MIN_JOURNAL_PAGES, 2 * self.total_blocks))
        self._unpublished: set[BlockId] = set()
        self._stores: set[PoolStore] = set()
        self._filling: dict[PageKey, PoolStore] = {}
        self._subscribers: list[Callable[[], None]] = []
        self._counts: Counter[str] = Counter()

    # -- geometry --

    @property
    def block_bytes(self) -> int:
        return self.layout.block_bytes

    @property
    def arena_base(self) -> int:
        """Virtual address of block 0."""
        return self.arena.base

    @property
    def arena_bytes(self) -> int:
        return self.arena.nbytes

    def address(self, block: BlockId) -> int:
        return self.arena.address(block)

    # -- the paper's memory verbs --

    def alloc_mem(self, count: int, tier: Tier = Tier.DRAM) -> list[BlockId]:
        """``count`` blocks to fill, all or none, evicting if need be.

        Raises OutOfBlocks when so many cannot be had, ConfigError for a tier other than DRAM: HBM
        pages belong to the engine's own pool.
        """
        if tier is not Tier.DRAM:
            raise ConfigError(
                f"alloc_mem supports Tier.DRAM only, not {tier}: the engine's own pool manages HBM"
            )
        if count < 0:
            raise ConfigError(f"alloc_mem of {count} blocks")
        with self._lock:
            self._end_expired()
            # Orphans are pinned, so what is not pinned and not being filled is free or evictable.
            most = self.total_blocks - self._filling_blocks() - self._index.pinned_blocks
            evicted = self._make_room(count) if count <= most and not self._closed else False
            blocks = None if self._closed else self._allocator.allocate(count)
            if blocks is None:
                self._counts["blocks_denied_total"] += count
                free = self._allocator.free_blocks
            else:
                self._unpublished.update(blocks)
        self._notify(wrote=evicted, published=False)
        if blocks is None:
            raise OutOfBlocks(
                f"{count} blocks asked for; {free} of {self.total_blocks} are free and "
                f"the rest is leased, being filled or held up by leased pages"
            )
        return blocks

    def free_mem(self, blocks: Sequence[BlockId]) -> None:
        """Give back blocks of ``alloc_mem`` that were not inserted."""
        with self._lock:
            if self._closed:
                return
            self._take_unpublished(blocks)
            self._allocator.free(blocks)

    # -- the paper's index verbs --

    def insert(
        self, keys: Sequence[PageKey], blocks: Sequence[BlockId], parent: PageKey | None = None
    ) -> int:
        """Publish filled blocks of ``alloc_mem`` as the pages ``keys``, a chain under ``parent``.

        The pool owns all of ``blocks`` afterwards; those whose key was readable already are freed.
        Returns the number of pages published.
        """
        assert len(keys) == len(blocks), (len(keys), len(blocks))
        with self._lock:
            if self._closed:
                return 0
            self._take_unpublished(blocks)
            published = self._publish(keys, parent, list(enumerate(blocks)))
        self._notify(wrote=published > 0, published=published > 0)
        return published

    def match(self, keys: Sequence[PageKey]) -> list[BlockId]:
        """Blocks of the leading readable run of ``keys``. Pins nothing and changes no recency: to
        read bytes, ``acquire``."""
        with self._lock:
            return self._index.match(keys)

    def delete(self, keys: Sequence[PageKey]) -> int:
        """Drop those of ``keys`` that are readable, but not what hangs under them; returns how
        many there were."""
        with self._lock:
            self._end_expired()
            removed = self._index.remove(keys)
            self._drop(removed, "deleted_pages_total")
        self._notify(wrote=bool(removed.keys), published=False)
        return len(removed.keys)

    def clear(self) -> None:
        """Drop every page at once. Leased blocks keep their bytes until their last lease ends;
        stores under way end as usual but publish nothing."""
        with self._lock:
            if self._closed:
                return
            self._end_expired()
            removed = self._index.clear()
            self._allocator.free(removed.blocks)
            self._counts["cleared_pages_total"] += len(removed.keys)
            for store in self._stores:
                store.flushed = True
            self._filling.clear()
            self._journal.write((Cleared(),))
        self._notify(wrote=True, published=False)

    # -- BlockStore: what transfer and the engine use --

    def readable_pages(self, keys: Sequence[PageKey]) -> int:
        with self._lock:
            return self._index.leading(keys)

    def acquire(self, keys: Sequence[PageKey], *, owner: str, ttl_s: float) -> PoolLease:
        """Pin the leading readable run of ``keys`` for ``ttl_s`` seconds and count it as used.

        Every call is a lease of its own, also for the same ``owner``. A lease of nothing is no
        burden and needs no release. Raises LimitExceeded.
        """
        with self._lock:
            self._end_expired()
            self._leases.require_allowed(ttl_s)
            blocks = self._index.match(keys)
            self._counts["lookups_total"] += 1
            self._counts["lookup_pages_total"] += len(keys)
            self._counts["hit_pages_total"] += len(blocks)
            deadline_s = self._clock() + ttl_s
            lease = PoolLease(blocks, owner, deadline_s, self._clock, self._end_lease)
            if blocks:
                self._index.touch(blocks)
                self._index.pin(blocks)
                self._leases.add(lease)
            return lease

    def prepare_store(self, keys: Sequence[PageKey], *, parent: PageKey | None = None) -> PoolStore:
        """Blocks for those of ``keys`` (a chain under ``parent``) that are neither readable nor
        being filled, evicting others if need be; see ``transfer.base.BlockStore``."""
        with self._lock:
            self._end_expired()
            store, evicted = self._begin_store(keys, parent)
        self._notify(wrote=evicted, published=False)
        return store

    def release_owner(self, owner: str) -> int:
        """End all leases of ``owner``; returns how many there were."""
        with self._lock:
            leases = self._leases.end_owner(owner)
            self._unpin(leases)
            return len(leases)

    def expire(self) -> int:
        """End leases whose deadline has passed; returns how many. Every call that gives out
        blocks or leases does this too."""
        with self._lock:
            return self._end_expired()

    def subscribe(self, on_readable: Callable[[], None]) -> None:
        """Call back, on any thread and outside the lock, after pages became readable."""
        with self._lock:
            if len(self._subscribers) >= MAX_SUBSCRIBERS:
                raise LimitExceeded(f"a pool has at most {MAX_SUBSCRIBERS} subscribers")
            # Replaced, not appended to: _notify walks the list outside the lock.
            self._subscribers = [*self._subscribers, on_readable]

    # -- events --

    def set_event_wake(self, on_events: Callable[[], None] | None) -> None:
        """Replace ``on_events``: the thread that drains may start after the pool."""
        self._on_events = on_events

    def drain_events(self) -> list[tuple[int, list[Event]]]:
        """Numbered batches since the last drain, in order. For one thread.

        Numbers have no holes unless nobody drained for long; then the oldest batches were dropped,
        and who sees the hole takes the snapshot."""
        with self._lock:
            batches = self._journal.drain()
        page_size = self.namespace.page_size
        return [(batch.seq, to_events(batch.records, page_size, Tier.DRAM)) for batch in batches]

    def snapshot(self) -> Snapshot:
        """All pages, as the events that rebuild them, true right after batch ``seq``."""
        with self._lock:
            keys, parents = self._index.pages()
            seq = self._journal.last_seq
        events = to_events(rebuild(keys, parents), self.namespace.page_size, Tier.DRAM)
        return Snapshot(self.generation, seq, events)

    # -- state --

    def stats(self) -> dict[str, float]:
        """Gauges and counters; ``docs/mempool.md`` explains each."""
        with self._lock:
            values = {
                "total_blocks": self.total_blocks,
                "free_blocks": self._allocator.free_blocks,
                "filling_blocks": self._filling_blocks(),
                "ready_blocks": len(self._index),
                "orphan_blocks": self._index.orphan_blocks,
                "pinned_blocks": self._index.pinned_blocks,
                "block_bytes": self.block_bytes,
                "leases": len(self._leases),
                "stores": len(self._stores),
                "event_seq": self._journal.last_seq,
                "event_batches_waiting": self._journal.waiting_batches,
                "event_batches_dropped_total": self._journal.dropped_batches,
            }
            for name in COUNTERS:
                values[name] = self._counts[name]
        return {name: float(value) for name, value in values.items()}

    def close(self) -> None:
        """Ends every lease, forgets every page and lets go of the memory. A copy under way in
        another thread stays harmless: memory is unmapped after the last array over it. Stores and
        leases that end later do nothing. No events: who mirrors this pool sees its instance go."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._leases.end_all()
            self._index.clear()
            self._filling.clear()
            self._stores.clear()
            self._unpublished.clear()
            self._journal.drain()
        self.arena.close()

    def check(self) -> None:
        """Invariants of the whole pool, conservation of blocks among them; O(total blocks)."""
        with self._lock:
            if self._closed:
                return
            for part in (self._index, self._allocator, self._leases, self._journal, self.arena):
                part.check()
            stored = [block for store in self._stores for _, block in store.missing]
            filling = self._unpublished.union(stored)
            assert len(filling) == self._filling_blocks() == len(self._unpublished) + len(stored)
            keys, _ = self._index.pages()
            ready = set(self._index.match(keys))
            orphans = self._index.orphans()
            assert not filling & ready and not filling & orphans and not ready & orphans
            assert filling | ready | orphans == self._allocator.used(), "blocks are not conserved"
            pins = Counter(self._leases.pinned())
            for store in self._stores:
                pins.update(store.held)
            assert pins == self._index.pins(), "pins and their holders differ"
            for key, store in self._filling.items():
                assert store in self._stores and not store.flushed, key

    # -- inside; the lock is held --

    def _filling_blocks(self) -> int:
        return len(self._unpublished) + sum(len(store.missing) for store in self._stores)

    def _make_room(self, count: int) -> bool:
        """Evict until ``count`` blocks are free or nothing is left to evict; whether it did."""
        short = count - self._allocator.free_blocks
        if short <= 0:
            return False
        removed = self._index.evict(short)
        self._drop(removed, "evicted_pages_total")
        return bool(removed.keys)

    def _drop(self, removed: Removed, counter: str) -> None:
        if removed.keys:
            self._allocator.free(removed.blocks)
            self._counts[counter] += len(removed.keys)
            self._journal.write((Dropped(removed.keys),))

    def _take_unpublished(self, blocks: Sequence[BlockId]) -> None:
        for block in blocks:
            assert block in self._unpublished, f"block {block} does not come from alloc_mem"
            self._unpublished.remove(block)

    def _begin_store(
        self, keys: Sequence[PageKey], parent: PageKey | None
    ) -> tuple[PoolStore, bool]:
        held: list[BlockId] = []
        wanted: dict[PageKey, int] = {}
        above = None if parent is None else self._index.get(parent)
        if above is not None:
            held.append(above)
        for position, key in enumerate(keys):
            block = self._index.get(key)
            if block is not None:
                held.append(block)
            elif key not in self._filling and key not in wanted:
                wanted[key] = position
        self._index.touch(held)
        # Pinned before room is made: evicting the head to store the tail would be absurd.
        self._index.pin(held)
        evicted = self._make_room(len(wanted)) if not self._closed else False
        given = 0 if self._closed else min(len(wanted), self._allocator.free_blocks)
        blocks = self._allocator.allocate(given)
        assert blocks is not None, given
        self._counts["blocks_denied_total"] += len(wanted) - given
        # strict=False: wanted ends early where blocks ran out.
        missing = list(zip(wanted.values(), blocks, strict=False))
        store = PoolStore(keys, parent, missing, held, self._end_store)
        if missing:
            self._stores.add(store)
            for position, _ in missing:
                self._filling[keys[position]] = store
        else:
            store.ended = True
            self._index.unpin(held)
        return store, evicted

    def _publish(
        self,
        keys: Sequence[PageKey],
        parent: PageKey | None,
        filled: Sequence[tuple[int, BlockId]],
    ) -> int:
        """Make ``filled`` (positions in ``keys`` and their blocks) readable; returns how many.
        A block whose key is readable already is freed."""
        fresh: dict[PageKey, BlockId] = {}
        parents: list[PageKey | None] = []
        for position, block in filled:
            key = keys[position]
            if key in self._index or key in fresh:
                self._allocator.free((block,))
                continue
            fresh[key] = block
            parents.append(keys[position - 1] if position else parent)
        if not fresh:
            return 0
        linked = self._index.insert(list(fresh), list(fresh.values()), parents)
        records: list[Record] = []
        chain: list[PageKey] = []
        for key, above in zip(fresh, linked, strict=True):
            if not chain or above != chain[-1]:
                chain = []
                records.append(Stored(chain, above))
            chain.append(key)
        self._journal.write(records)
        self._counts["stored_pages_total"] += len(fresh)
        return len(fresh)

    def _end_expired(self) -> int:
        leases = self._leases.end_expired(self._clock())
        self._counts["leases_expired_total"] += len(leases)
        self._unpin(leases)
        return len(leases)

    def _unpin(self, leases: Sequence[PoolLease]) -> None:
        for lease in leases:
            self._allocator.free(self._index.unpin(lease.blocks))

    # -- callbacks of leases and stores --

    def _end_lease(self, lease: PoolLease) -> None:
        with self._lock:
            if not lease.blocks:
                lease.ended = True
            elif self._leases.end(lease):
                self._unpin((lease,))

    def _end_store(self, store: PoolStore, count: int) -> None:
        with self._lock:
            if store.ended:
                return
            store.ended = True
            if self._closed:
                return
            self._stores.remove(store)
            for position, _ in store.missing:
                if self._filling.get(store.keys[position]) is store:
                    del self._filling[store.keys[position]]
            if store.flushed:
                count = 0
            published = self._publish(store.keys, store.parent, store.missing[:count])
            self._allocator.free([block for _, block in store.missing[count:]])
            self._counts["aborted_pages_total"] += len(store.missing) - count
            self._allocator.free(self._index.unpin(store.held))
        self._notify(wrote=published > 0, published=published > 0)

    def _notify(self, *, wrote: bool, published: bool) -> None:
        """The lock is not held."""
        if wrote and self._on_events is not None:
            self._on_events()
        if published:
            for on_readable in self._subscribers:
                on_readable()


COUNTERS = (
    "lookups_total",
    "lookup_pages_total",
    "hit_pages_total",
    "stored_pages_total",
    "aborted_pages_total",
    "evicted_pages_total",
    "deleted_pages_total",
    "cleared_pages_total",
    "blocks_denied_total",
    "leases_expired_total",
)
