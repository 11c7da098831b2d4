"""MemPool: one rank's KV pages in DRAM, under the verbs of the MemServe paper (section 4).

Joins ``index`` (which), ``memory`` (where) and the journal of events under one lock; what is done
beneath it is in ``pool``. Sections under the lock touch no bytes and call nobody back; the longest
are O(pages asked for), but for ``clear``, ``snapshot`` and a change of size, which are O(blocks).

Life of a block:

    FREE --prepare_store, alloc_mem--> FILLING --commit, insert--> READY --evict, delete--> FREE
                                       FILLING --abort, free_mem------------------------> FREE
    READY --delete or clear while leased--> ORPHAN --last lease ends--> FREE

    free + withdrawn + filling + ready + orphan = total                (checked by ``check()``)

WITHDRAWN is FREE above the new end of a pool that is shrinking.

A reader finds READY blocks only. A lease pins its blocks: they are not evicted, and a block whose
page is removed meanwhile keeps its bytes for the lease's holder as an orphan.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from .checksums import checksum_of
from .config import DEFAULT_EVICTION
from .errors import ConfigError, LimitExceeded, OutOfBlocks
from .index.journal import Record, rebuild, to_events
from .memory.arena import SLAB_BYTES, Arena, Pinner
from .memory.attached import Attached
from .memory.layout import BlockLayout
from .memory.lease import PoolLease, PoolStore
from .pool.arguments import (
    MAX_RESIZE_WAIT_S,
    require_keys,
    require_namespace,
    require_size,
    require_wait,
)
from .pool.hold import PoolHold
from .pool.ledger import Ledger
from .pool.resize import Resize, on_a_thread
from .protocol.events import Event, Snapshot
from .types import (
    BlockId,
    Checksums,
    Eviction,
    Generation,
    Namespace,
    PageKey,
    Prefault,
    Region,
    ResizeResult,
    Tier,
)

__all__ = ["MAX_RESIZE_WAIT_S", "MemPool", "PoolLease", "PoolStore", "Resize"]

MAX_SUBSCRIBERS = 64


class MemPool:
    """Thread-safe. Implements ``transfer.base.BlockStore``.

    ``arena_bytes`` is rounded down to whole blocks; ConfigError if that is none, or more than the
    machine has. It may change later up to ``reserve_bytes`` (the machine's memory if None), in
    slabs of about ``slab_bytes``. ``eviction`` says which pages make room; ``max_holds`` holds keep
    at most ``hold_share`` of the blocks from it. ``clock`` gives seconds and times leases.
    ``on_events`` is called, on any thread and outside the lock, after new events can be drained.
    ``prefault``: whether a thread of low priority has the memory backed from the start, and what is
    added later; a pool below 64 MiB has no such thread.
    """

    def __init__(
        self,
        namespace: Namespace,
        *,
        arena_bytes: int,
        generation: Generation | str,
        reserve_bytes: int | None = None,
        slab_bytes: int = SLAB_BYTES,
        eviction: Eviction = DEFAULT_EVICTION,
        clock: Callable[[], float] = time.monotonic,
        max_leases: int = 4096,
        max_lease_ttl_s: float = 3600.0,
        max_holds: int = 1024,
        hold_share: float = 0.5,
        on_events: Callable[[], None] | None = None,
        checksums: Checksums = Checksums.OFF,
        prefault: Prefault = Prefault.BACKGROUND,
    ) -> None:
        self.namespace = require_namespace(namespace)
        self.generation = Generation(generation)
        self.layout = BlockLayout.of(namespace)
        self.arena = Arena(
            self._blocks_in(arena_bytes),
            self.layout.block_bytes,
            reserve_bytes=reserve_bytes,
            slab_bytes=slab_bytes,
        )
        self._on_events = on_events
        self._checksumming = checksums
        self._lock = threading.Lock()
        self._ledger = Ledger(
            self.arena.total_blocks,
            eviction=eviction,
            clock=clock,
            max_leases=max_leases,
            max_lease_ttl_s=max_lease_ttl_s,
            max_holds=max_holds,
            hold_share=hold_share,
        )
        self._resize: Resize | None = None
        self._resizer: str | None = None
        self._held: NDArray[np.uint8] | None = None
        self._attached = Attached(self.arena, prefault)
        self._subscribers: list[Callable[[], None]] = []

    # -- geometry --

    @property
    def block_bytes(self) -> int:
        return self.layout.block_bytes

    @property
    def total_blocks(self) -> int:
        """Changes with ``resize``."""
        return self._ledger.total_blocks

    @property
    def arena_base(self) -> int:
        """Virtual address of block 0."""
        return self.arena.base

    @property
    def arena_bytes(self) -> int:
        """Of the blocks in use; they lie one after the other from ``arena_base`` on."""
        return self.total_blocks * self.block_bytes

    def regions(self) -> list[Region]:
        """The memory in use as (virtual address, bytes), one entry a slab: what is to be
        registered, each by itself."""
        with self._lock:
            return [self.arena.region(slab) for slab in self.arena.slabs]

    def address(self, block: BlockId) -> int:
        return self.arena.address(block)

    def addresses(self, blocks: Sequence[BlockId]) -> list[int]:
        """Many at once; the blocks must be of this pool."""
        base, size = self.arena.base, self.block_bytes
        return [base + block * size for block in blocks]

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
        if require_size(count) < 0:
            raise ConfigError(f"alloc_mem of {count} blocks")
        with self._lock:
            blocks, evicted = self._ledger.allocate(count)
            free = self._ledger.allocator.free_blocks
        self._notify(wrote=evicted, published=False)
        if blocks is None:
            raise OutOfBlocks(
                f"{count} blocks asked for; {free} of {self.total_blocks} are free and "
                f"the rest is leased, being filled or held up by leased pages"
            )
        return blocks

    def free_mem(self, blocks: Sequence[BlockId]) -> None:
        """Give back blocks of ``alloc_mem`` that were not inserted. ConfigError, and nothing
        changes, when one is not such a block or is named twice."""
        with self._lock:
            if self._ledger.closed:
                return
            self._ledger.take_unpublished(blocks)
            self._ledger.allocator.free(blocks)

    # -- the paper's index verbs --

    def insert(
        self, keys: Sequence[PageKey], blocks: Sequence[BlockId], parent: PageKey | None = None
    ) -> int:
        """Publish filled blocks of ``alloc_mem`` as the pages ``keys``, a chain under ``parent``.

        The pool owns all of ``blocks`` afterwards; those whose key was readable already are freed.
        Returns the number of pages published. ConfigError, and nothing changes, for keys that are
        not 32 bytes and for blocks as ``free_mem`` refuses them.
        """
        require_keys(keys, parent)
        if len(keys) != len(blocks):
            raise ConfigError(f"insert of {len(keys)} keys and {len(blocks)} blocks")
        with self._lock:
            if self._ledger.closed:
                return 0
            self._ledger.take_unpublished(blocks)
            published = self._ledger.publish(keys, parent, list(enumerate(blocks)))
        self._notify(wrote=published > 0, published=published > 0)
        return published

    def match(self, keys: Sequence[PageKey]) -> list[BlockId]:
        """Blocks of the leading readable run of ``keys``. Pins nothing and changes no recency: to
        read bytes, ``acquire``."""
        with self._lock:
            return self._ledger.index.match(keys)

    def delete(self, keys: Sequence[PageKey]) -> int:
        """Drop those of ``keys`` that are readable, but not what hangs under them; returns how
        many there were."""
        with self._lock:
            self._ledger.end_expired()
            removed = self._ledger.index.remove(keys)
            self._ledger.drop(removed, "deleted_pages_total")
        self._notify(wrote=bool(removed.keys), published=False)
        return len(removed.keys)

    def clear(self) -> None:
        """The engine flushed its cache: drop every page at once, and hold every tier for empty.
        Leased blocks keep their bytes until their last lease ends; stores under way end as usual
        but publish nothing."""
        with self._lock:
            if self._ledger.closed:
                return
            self._ledger.clear()
        self._notify(wrote=True, published=False)

    # -- BlockStore: what transfer and the engine use --

    def compute_checksums(self, blocks: Sequence[BlockId]) -> list[int]:
        """Of blocks that the caller has filled, to commit them with; empty if this pool keeps
        none or is closed. Reads every byte, without the GIL."""
        with self._lock:
            if self._checksumming is Checksums.OFF or self._ledger.closed:
                return []
            # Held while it is read: the pool may be closed meanwhile.
            memory = self.arena.view
        return [checksum_of(memory[block].data) for block in blocks]

    def checksums(self, blocks: Sequence[BlockId]) -> list[int]:
        with self._lock:
            return self._ledger.checksums.get(blocks)

    def readable_pages(self, keys: Sequence[PageKey]) -> int:
        with self._lock:
            return self._ledger.index.leading(keys)

    def acquire(self, keys: Sequence[PageKey], *, owner: str, ttl_s: float) -> PoolLease:
        """Pin the leading readable run of ``keys`` for ``ttl_s`` seconds and count it as used.

        Every call is a lease of its own, also for the same ``owner``. A lease of nothing is no
        burden and needs no release. Raises LimitExceeded.
        """
        with self._lock:
            return self._ledger.acquire(keys, owner, ttl_s, self._end_lease)

    def prepare_hold(self, keys: Sequence[PageKey]) -> PoolHold:
        """For pages that are about to come for a request: ``complete`` pins what is readable then
        until the request claims it, within ``max_holds`` and ``hold_share``; see ``index.holds``.
        ConfigError without keys."""
        if not keys:
            raise ConfigError("a hold needs keys")
        return PoolHold(self._lock, self._ledger, keys)

    def claim_hold(self, keys: Sequence[PageKey]) -> None:
        """The request that names ``keys`` is here and has acquired them: its hold ends."""
        with self._lock:
            self._ledger.holds.claim(keys)

    def prepare_store(self, keys: Sequence[PageKey], *, parent: PageKey | None = None) -> PoolStore:
        """Blocks for those of ``keys`` (a chain under ``parent``) that are neither readable nor
        being filled, evicting others if need be; see ``transfer.base.BlockStore``.

        ConfigError for keys that are not 32 bytes."""
        require_keys(keys, parent)
        with self._lock:
            store, evicted = self._ledger.begin_store(keys, parent, self._end_store)
        self._notify(wrote=evicted, published=False)
        return store

    def release_owner(self, owner: str) -> int:
        """End all leases of ``owner``; returns how many there were."""
        with self._lock:
            leases = self._ledger.leases.end_owner(owner)
            self._ledger.unpin(leases)
            return len(leases)

    def expire(self) -> int:
        """End leases whose deadline has passed; returns how many. Every call that gives out
        blocks or leases does this too."""
        with self._lock:
            return self._ledger.end_expired()

    def subscribe(self, on_readable: Callable[[], None]) -> Callable[[], None]:
        """Call back, on any thread and outside the lock, after pages became readable. Returns what
        ends it."""
        with self._lock:
            if len(self._subscribers) >= MAX_SUBSCRIBERS:
                raise LimitExceeded(f"a pool has at most {MAX_SUBSCRIBERS} subscribers")
            # Replaced, not appended to: _notify walks the list outside the lock.
            self._subscribers = [*self._subscribers, on_readable]

        def unsubscribe() -> None:
            with self._lock:
                self._subscribers = [one for one in self._subscribers if one is not on_readable]

        return unsubscribe

    # -- events --

    def set_event_wake(self, on_events: Callable[[], None] | None) -> None:
        """Replace ``on_events``: the thread that drains may start after the pool."""
        self._on_events = on_events

    def drain_events(self) -> list[tuple[int, list[Event]]]:
        """Numbered batches since the last drain, in order. For one thread.

        Numbers have no holes unless nobody drained for long; then the oldest batches were dropped,
        and who sees the hole takes the snapshot."""
        with self._lock:
            batches = self._ledger.journal.drain()
        page_size = self.namespace.page_size
        return [(batch.seq, to_events(batch.records, page_size)) for batch in batches]

    def snapshot(self) -> Snapshot:
        """All pages of all tiers, as the events that rebuild them, true right after ``seq``."""
        with self._lock:
            keys, parents = self._ledger.index.pages()
            device = self._ledger.device.pages()
            seq = self._ledger.journal.last_seq
        records = [*rebuild(keys, parents), *device]
        return Snapshot(self.generation, seq, to_events(records, self.namespace.page_size))

    @property
    def device_pages(self) -> int:
        """Pages in the engine's own pool, as told by ``apply_device``."""
        return len(self._ledger.device)

    def apply_device(self, changes: Sequence[Record]) -> None:
        """What became of the pages in the engine's own pool, for the events: MemPool neither owns
        nor reads them. One batch, of what was not known yet."""
        with self._lock:
            wrote = not self._ledger.closed and self._ledger.apply_device(changes)
        self._notify(wrote=wrote, published=False)

    # -- size --

    def pin_with(self, pinner: Pinner) -> None:
        """Let a device reach all of the pool's memory by itself, now and whatever its size becomes.

        Before the size can change, and once. Takes as long as touching the memory in use."""
        with self._lock:
            assert self._resize is None, "the size is changing"
        self._attached.pin_with(pinner)

    def resize(self, total_bytes: int, *, wait_s: float = 0.0) -> ResizeResult:
        """Grow or shrink to ``total_bytes`` (rounded down to whole blocks, then up to a slab's end
        when shrinking), for a pool that stands alone. What ends the waiting (Ctrl-C) calls it off.

        Shrinking moves pages down and evicts the least recently used when they do not fit. Leased
        blocks and blocks being filled are waited for up to ``wait_s`` seconds; with 0 they refuse
        it at once. Raises as ``prepare_resize``, and ConfigError when an agent owns the size.
        """
        if self._resizer is not None:
            raise ConfigError(f"{self._resizer} changes this pool's size: RankAgent.resize")
        require_wait(wait_s)
        return on_a_thread(lambda stop: self.prepare_resize(total_bytes).run(wait_s, stop))

    def prepare_resize(self, total_bytes: int) -> Resize:
        """For who registers memory: the first step of a resize, which its owner walks through.

        Raises ConfigError for a size that cannot be, LimitExceeded for too many slabs and while
        another resize is under way.
        """
        target_blocks = self._blocks_in(total_bytes)
        with self._lock:
            if self._ledger.closed:
                raise ConfigError("the pool is closed")
            if self._resize is not None:
                raise LimitExceeded("another change of the pool's size is under way")
            self._ledger.end_expired()
            self._resize = Resize(
                self._lock,
                self._ledger,
                self.arena,
                target_blocks,
                on_evicted=self._on_evicted,
                on_end=self._on_resized,
                attached=self._attached,
            )
            return self._resize

    def own_resizing(self, owner: str | None) -> None:
        """``owner`` registers this memory, so only it may change its size (None: nobody does). It
        stays mapped until then, also when the pool is closed first."""
        self._resizer = owner
        self._held = None if owner is None or self.arena.closed else self.arena.reserved

    def _on_evicted(self) -> None:
        self._notify(wrote=True, published=False)

    def _on_resized(self) -> None:
        """The lock is held."""
        self._resize = None

    def _blocks_in(self, nbytes: int) -> int:
        blocks = require_size(nbytes) // self.layout.block_bytes
        if blocks <= 0:
            raise ConfigError(
                f"a DRAM pool of {nbytes} bytes holds no block of "
                f"{self.layout.block_bytes} bytes; give it a larger size "
                f"(MemPool: arena_bytes; an instance: --mempool-dram)"
            )
        return blocks

    # -- state --

    def stats(self) -> dict[str, float]:
        """Gauges and counters; ``docs/mempool.md`` explains each."""
        with self._lock:
            values = self._ledger.stats()
            slabs = len(self.arena.slabs)
        sizes = {
            "block_bytes": self.block_bytes,
            "slabs": slabs,
            "capacity_blocks": self.arena.capacity_blocks,
        }
        return {**values, **{name: float(value) for name, value in sizes.items()}}

    def close(self) -> None:
        """Ends every lease, forgets every page and lets go of the memory. A copy under way in
        another thread stays harmless: memory is unmapped after the last array over it. Stores,
        leases and a resize that end later do nothing. No events: who mirrors this pool sees its
        instance go."""
        with self._lock:
            if self._ledger.closed:
                return
            self._ledger.close()
        self._attached.close()
        self.arena.close()

    def check(self) -> None:
        """Invariants of the whole pool, conservation of blocks among them; O(total blocks)."""
        with self._lock:
            if self._ledger.closed:
                return
            change = self._resize
            self.arena.check()
            self._ledger.check([] if change is None else change.moving_blocks)
            if change is None:
                assert self.arena.total_blocks == self.total_blocks, self.arena.total_blocks

    # -- callbacks of leases and stores --

    def _end_lease(self, lease: PoolLease) -> None:
        with self._lock:
            self._ledger.end_lease(lease)

    def _end_store(self, store: PoolStore, count: int, checksums: Sequence[int]) -> None:
        with self._lock:
            published = self._ledger.end_store(store, count, checksums)
        self._notify(wrote=published > 0, published=published > 0)

    def _notify(self, *, wrote: bool, published: bool) -> None:
        """The lock is not held."""
        if wrote and self._on_events is not None:
            self._on_events()
        if published:
            for on_readable in self._subscribers:
                on_readable()
