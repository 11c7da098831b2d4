"""A pool that is resized in steps, with everything else going on between two of them.

No oracle: which pages lie where is the pool's own affair. What must hold after every step: its
invariants, the bytes of every readable page and under every lease, and that what a lease or a store
holds is still theirs.
"""

from __future__ import annotations

import hashlib

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
)
from sglang_memserve.errors import OutOfBlocks
from sglang_memserve.mempool import MemPool, PoolLease, PoolStore, Resize
from sglang_memserve.pool import resize as resize_module
from sglang_memserve.types import (
    BlockId,
    Eviction,
    Namespace,
    PageKey,
    Progress,
    ResizeOutcome,
)

NAMESPACE = Namespace("model", "1", "bfloat16", 4, 2, 1, 2, 2, 0, 1)
BLOCK = NAMESPACE.block_bytes
MOST_BLOCKS = 24

prefixes = st.lists(st.integers(0, 1), min_size=1, max_size=6).map(tuple)


def chain_of(prefix: tuple[int, ...]) -> list[PageKey]:
    ends = range(1, len(prefix) + 1)
    return [PageKey(hashlib.sha256(bytes(prefix[:end])).digest()) for end in ends]


ALL_KEYS = {key for length in range(64) for key in chain_of(tuple(map(int, f"{length:06b}")))}


def content(key: PageKey) -> np.ndarray:
    return np.resize(np.frombuffer(key, dtype=np.uint8), BLOCK)


class ResizeMachine(RuleBasedStateMachine):
    stores = Bundle("stores")
    leases = Bundle("leases")
    blocks = Bundle("blocks")

    @initialize(
        total=st.integers(4, 16), slab=st.integers(1, 4), eviction=st.sampled_from(Eviction)
    )
    def start(self, total: int, slab: int, eviction: Eviction) -> None:
        self.now = 0.0
        # Two blocks a step, so that much can happen between two.
        self.move_bytes, resize_module.MOVE_BYTES = resize_module.MOVE_BYTES, 2 * BLOCK
        self.change: Resize | None = None
        self.promised: list[tuple[PoolLease, list[PageKey]]] = []
        self.pool = MemPool(
            NAMESPACE,
            arena_bytes=total * BLOCK,
            generation="g",
            reserve_bytes=MOST_BLOCKS * BLOCK,
            slab_bytes=slab * BLOCK,
            clock=lambda: self.now,
            eviction=eviction,
            hold_share=0.6,
        )

    def teardown(self) -> None:
        if hasattr(self, "pool"):
            resize_module.MOVE_BYTES = self.move_bytes
            self.pool.close()
            if self.change is not None:
                assert self.change.vacate() is Progress.DONE
                self.change.abort()

    # -- the change, in steps --

    @precondition(lambda self: self.change is None)
    @rule(total=st.integers(1, MOST_BLOCKS))
    def begin(self, total: int) -> None:
        self.change = self.pool.prepare_resize(total * BLOCK)

    @precondition(lambda self: self.change is not None)
    @rule()
    def step(self) -> None:
        assert self.change is not None
        self.change.vacate()

    @precondition(lambda self: self.change is not None)
    @rule()
    def complete(self) -> None:
        change = self.change
        assert change is not None
        while (progress := change.vacate()) is Progress.WORKING:
            self.pool.check()
        if progress is Progress.DONE:
            assert change.obstacle() == ""
            change.complete()
            self.change = None
        else:
            assert change.obstacle() != "", "blocked by nothing"

    @precondition(lambda self: self.change is not None)
    @rule()
    def abort(self) -> None:
        assert self.change is not None
        before = self.pool.total_blocks
        assert self.change.abort("enough").outcome is ResizeOutcome.REFUSED
        assert self.pool.total_blocks == before
        self.change = None

    # -- everything else --

    @rule(target=stores, prefix=prefixes)
    def prepare(self, prefix: tuple[int, ...]) -> object:
        store = self.pool.prepare_store(chain_of(prefix))
        limit = self.pool._ledger.allocator.limit
        assert all(block < limit for _, block in store.missing), "put where blocks are to go"
        for position, block in store.missing:
            self.pool.arena.view[block] = content(store.keys[position])
        return store

    @rule(store=consumes(stores), whole=st.booleans())
    def finish(self, store: PoolStore, whole: bool) -> None:
        for position, block in store.missing:
            found = self.pool.arena.reserved[block]
            assert store.ended or (found == content(store.keys[position])).all(), "overwritten"
        if whole:
            store.commit()
        else:
            store.abort()

    @rule(target=blocks, count=st.integers(1, 4))
    def allocate(self, count: int) -> object:
        try:
            return self.pool.alloc_mem(count)
        except OutOfBlocks:
            return multiple()

    @rule(got=consumes(blocks))
    def free(self, got: list[BlockId]) -> None:
        self.pool.free_mem(got)

    @rule(target=leases, prefix=prefixes, ttl_s=st.sampled_from((2.0, 100.0)))
    def acquire(self, prefix: tuple[int, ...], ttl_s: float) -> object:
        keys = chain_of(prefix)
        lease = self.pool.acquire(keys, owner="o", ttl_s=ttl_s)
        self.promised.append((lease, keys[: len(lease.blocks)]))
        return lease

    @rule(lease=consumes(leases))
    def release(self, lease: PoolLease) -> None:
        lease.release()

    @rule(prefix=prefixes, ttl_s=st.sampled_from((2.0, 100.0)))
    def hold(self, prefix: tuple[int, ...], ttl_s: float) -> None:
        """Never in the way of a change, as ``complete`` would find."""
        self.pool.prepare_hold(chain_of(prefix)).complete(ttl_s)

    @rule(prefix=prefixes)
    def delete(self, prefix: tuple[int, ...]) -> None:
        self.pool.delete(chain_of(prefix))

    @rule()
    def clear(self) -> None:
        self.pool.clear()

    @rule(seconds=st.sampled_from((1.0, 5.0)))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @precondition(lambda self: hasattr(self, "pool"))
    @invariant()
    def holds(self) -> None:
        self.pool.check()
        for key in ALL_KEYS:
            for block in self.pool.match([key]):
                assert (self.pool.arena.view[block] == content(key)).all(), "a page changed"
        self.promised = [promise for promise in self.promised if promise[0].valid()]
        for lease, keys in self.promised:
            for key, block in zip(keys, lease.blocks, strict=True):
                assert (self.pool.arena.view[block] == content(key)).all(), "leased bytes changed"


ResizeMachine.TestCase.settings = settings(
    max_examples=100,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)


TestResize = ResizeMachine.TestCase
