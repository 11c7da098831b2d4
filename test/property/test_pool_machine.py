"""MemPool against an oracle that is slow and obviously right, over random programs.

Which page goes when room is needed is the eviction policy's, and each has its own test with the
index alone (``test_index_machine``); here it is the simplest.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

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
from sglang_memserve.errors import LimitExceeded, OutOfBlocks
from sglang_memserve.hashing import short_key
from sglang_memserve.mempool import MemPool, PoolLease, PoolStore
from sglang_memserve.pool.hold import PoolHold
from sglang_memserve.types import BlockId, Eviction, Namespace, PageKey, ResizeOutcome


def load_oracle() -> ModuleType:
    path = Path(__file__).parents[1] / "oracle" / "pool.py"
    spec = importlib.util.spec_from_file_location("memserve_pool_oracle", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


oracle = load_oracle()
NAMESPACE = Namespace("model", "1", "bfloat16", 4, 2, 1, 2, 2, 0, 1)
MAX_LEASES = 5
MOST_BLOCKS = 20
OWNERS = ("ann", "bob")


def key_of(prefix: tuple[int, ...]) -> PageKey:
    return PageKey(hashlib.sha256(bytes(prefix)).digest())


def chain_of(prefix: tuple[int, ...]) -> list[PageKey]:
    return [key_of(prefix[: end + 1]) for end in range(len(prefix))]


# Two letters and up to six pages: chains share heads and fork often.
prefixes = st.lists(st.integers(0, 1), min_size=1, max_size=6).map(tuple)


@st.composite
def sections(draw: st.DrawFn) -> tuple[list[PageKey], PageKey | None]:
    """A chain, or the tail of one whose head lies elsewhere; the parent may be unknown."""
    chain = chain_of(draw(prefixes))
    start = draw(st.integers(0, len(chain) - 1)) if draw(st.booleans()) else 0
    parent = chain[start - 1] if start and draw(st.booleans()) else None
    return chain[start:], parent


@st.composite
def nonsense(draw: st.DrawFn) -> tuple[list[PageKey], PageKey | None]:
    """Keys that are no chain, with repetitions and any parent: what a broken peer may send."""
    some = prefixes.map(key_of)
    return draw(st.lists(some, max_size=5)), draw(st.none() | some)


requests = st.one_of(sections(), sections(), sections(), nonsense())


class PoolMachine(RuleBasedStateMachine):
    stores = Bundle("stores")
    leases = Bundle("leases")
    holds = Bundle("holds")
    blocks = Bundle("blocks")

    def __init__(self) -> None:
        super().__init__()
        self.now = 100.0

    @initialize(
        total=st.integers(1, 12),
        slab=st.integers(1, 4),
        contents=st.lists(prefixes, max_size=8),
    )
    def start(self, total: int, slab: int, contents: list[tuple[int, ...]]) -> None:
        self.wakes = 0
        self.readable_calls = 0
        self.pool = MemPool(
            NAMESPACE,
            arena_bytes=total * NAMESPACE.block_bytes,
            generation="g",
            reserve_bytes=MOST_BLOCKS * NAMESPACE.block_bytes,
            slab_bytes=slab * NAMESPACE.block_bytes,
            clock=lambda: self.now,
            max_leases=MAX_LEASES,
            max_holds=2,
            hold_share=0.5,
            eviction=Eviction.LRU,
            on_events=self._wake,
        )
        self.pool.subscribe(self._readable)
        self.oracle = oracle.PoolOracle(total, MAX_LEASES, self.now)
        self.mirror: dict[int, int | None] = {}
        self.next_seq = 0
        self.promised: list[tuple[PoolLease, list[PageKey]]] = []
        self.open_stores: list[PoolStore] = []
        self.by_hand: set[BlockId] = set()
        # Most of what can go wrong happens in a pool that is full.
        for prefix in contents:
            self.store_at_once((chain_of(prefix), None))

    def teardown(self) -> None:
        if hasattr(self, "pool"):
            self.pool.close()
            assert not any(lease.valid() and lease.blocks for lease, _ in self.promised)

    def _wake(self) -> None:
        self.wakes += 1
        self.pool.stats()  # would hang if called under the lock

    def _readable(self) -> None:
        self.readable_calls += 1
        self.pool.stats()

    def _write(self, keys: list[PageKey], blocks: list[BlockId]) -> None:
        for key, block in zip(keys, blocks, strict=True):
            self.pool.arena.view[block] = content(key, self.pool.block_bytes)

    # -- stores --

    @rule(target=stores, request=requests)
    def prepare(self, request: tuple[list[PageKey], PageKey | None]) -> object:
        keys, parent = request
        store = self.pool.prepare_store(keys, parent=parent)
        expected = self.oracle.prepare(keys, parent)
        assert [position for position, _ in store.missing] == expected.missing
        self.open_stores = [store, *(other for other in self.open_stores if not other.ended)]
        return store, expected

    @rule(request=requests)
    def store_at_once(self, request: tuple[list[PageKey], PageKey | None]) -> None:
        self.commit(self.prepare(request), 1.0, True)

    @rule(first=prefixes, second=prefixes)
    def use_and_crowd_out(self, first: tuple[int, ...], second: tuple[int, ...]) -> None:
        """What was just used must be the last to go."""
        pair = self.acquire((chain_of(first), None), "ann", 1.0)
        if isinstance(pair, tuple):
            self.release(pair)
        self.store_at_once((chain_of(second), None))

    @rule(pair=consumes(stores), share=st.floats(0, 1), everything=st.booleans())
    def commit(self, pair: tuple[PoolStore, object], share: float, everything: bool) -> None:
        store, expected = pair
        count = len(store.missing) if everything else int(share * len(store.missing))
        self._write(
            [store.keys[position] for position, _ in store.missing[:count]],
            [block for _, block in store.missing[:count]],
        )
        before = self.pool.stats()["stored_pages_total"], self.readable_calls
        store.commit(None if everything else count)
        self.oracle.finish(expected, count)
        store.abort()
        store.commit()
        stored = self.pool.stats()["stored_pages_total"] - before[0]
        assert self.readable_calls - before[1] == (1 if stored else 0)

    @rule(pair=consumes(stores))
    def abort(self, pair: tuple[PoolStore, object]) -> None:
        store, expected = pair
        for _, block in store.missing:
            self.pool.arena.view[block] = 0xEE
        store.abort()
        self.oracle.finish(expected, 0)
        store.commit()

    # -- blocks by hand --

    @rule(target=blocks, count=st.integers(0, 6))
    def allocate(self, count: int) -> object:
        possible = self.oracle.allocate(count)
        try:
            got = self.pool.alloc_mem(count)
        except OutOfBlocks:
            assert not possible
            return multiple()
        assert possible and len(got) == count
        self.by_hand.update(got)
        return got

    @rule(got=consumes(blocks))
    def free(self, got: list[BlockId]) -> None:
        self.pool.free_mem(got)
        self.by_hand.difference_update(got)
        self.oracle.give_back(len(got))

    @rule(got=consumes(blocks), prefix=prefixes, parent=st.none() | prefixes.map(key_of))
    def insert(self, got: list[BlockId], prefix: tuple[int, ...], parent: PageKey | None) -> None:
        keys = chain_of(prefix)[: len(got)]
        self.by_hand.difference_update(got)
        self.pool.free_mem(got[len(keys) :])
        self.oracle.give_back(len(got) - len(keys))
        self._write(keys, got[: len(keys)])
        assert self.pool.insert(keys, got[: len(keys)], parent) == self.oracle.insert(keys, parent)

    # -- readers --

    @rule(
        target=leases,
        request=requests,
        owner=st.sampled_from(OWNERS),
        ttl=st.sampled_from((1.0, 5.0, 50.0)),
    )
    def acquire(
        self, request: tuple[list[PageKey], PageKey | None], owner: str, ttl: float
    ) -> object:
        keys, _ = request
        expected = self.oracle.acquire(keys, owner, ttl)
        try:
            lease = self.pool.acquire(keys, owner=owner, ttl_s=ttl)
        except LimitExceeded:
            assert expected is None
            return multiple()
        assert expected is not None
        assert len(lease.blocks) == len(expected.copies)
        self.promised.append((lease, keys[: len(lease.blocks)]))
        return lease, expected

    @rule(pair=consumes(leases))
    def release(self, pair: tuple[PoolLease, object]) -> None:
        lease, expected = pair
        lease.release()
        lease.release()
        assert not lease.valid()
        self.oracle.release(expected)

    @rule(owner=st.sampled_from(OWNERS))
    def release_owner(self, owner: str) -> None:
        assert self.pool.release_owner(owner) == self.oracle.release_owner(owner)

    @rule(seconds=st.sampled_from((1.0, 4.0, 60.0)))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self.oracle.now = self.now

    @rule()
    def expire(self) -> None:
        assert self.pool.expire() == self.oracle.expire()

    @rule(request=requests)
    def look(self, request: tuple[list[PageKey], PageKey | None]) -> None:
        keys, _ = request
        found = self.oracle.leading(keys)
        assert self.pool.readable_pages(keys) == len(found)
        blocks = self.pool.match(keys)
        assert len(blocks) == len(found)
        for key, block in zip(found, blocks, strict=True):
            assert (self.pool.arena.view[block] == content(key, self.pool.block_bytes)).all()

    # -- pages that stay for a request --

    @rule(target=holds, request=requests)
    def prepare_hold(self, request: tuple[list[PageKey], PageKey | None]) -> object:
        keys, _ = request
        if not keys:
            return multiple()
        self.oracle.waiting.append(keys)
        return self.pool.prepare_hold(keys), keys

    @rule(pair=consumes(holds), ttl=st.sampled_from((1.0, 5.0, 50.0)))
    def complete_hold(self, pair: tuple[PoolHold, list[PageKey]], ttl: float) -> None:
        hold, keys = pair
        blocks = self.pool.match(keys)
        assert hold.complete(ttl).value == self.oracle.hold(keys, blocks, ttl)
        assert hold.complete(ttl).value == "needless"

    @rule(pair=consumes(holds))
    def abort_hold(self, pair: tuple[PoolHold, list[PageKey]]) -> None:
        hold, keys = pair
        hold.abort()
        self.oracle.waiting = [other for other in self.oracle.waiting if other is not keys]

    @rule(prefix=prefixes, ttl=st.sampled_from((5.0, 50.0)))
    def hold_at_once(self, prefix: tuple[int, ...], ttl: float) -> None:
        pair = self.prepare_hold((chain_of(prefix), None))
        assert isinstance(pair, tuple)
        self.complete_hold(pair, ttl)

    @rule(request=requests)
    def claim_hold(self, request: tuple[list[PageKey], PageKey | None]) -> None:
        self.pool.claim_hold(request[0])
        self.oracle.claim(request[0])

    # -- removal --

    @rule(request=requests)
    def delete(self, request: tuple[list[PageKey], PageKey | None]) -> None:
        assert self.pool.delete(request[0]) == self.oracle.delete(request[0])

    @rule()
    def clear(self) -> None:
        self.pool.clear()
        self.oracle.clear()

    # -- size --

    def in_the_way(self, first: int) -> bool:
        """Whether a block from ``first`` on is leased or being filled."""
        held = set(self.by_hand)
        for lease, _ in self.promised:
            held.update(lease.blocks if lease.valid() else ())
        for store in self.open_stores:
            if not store.ended:
                held.update(block for _, block in store.missing)
                held.update(store.held)
        return any(block >= first for block in held)

    @rule(total=st.integers(1, MOST_BLOCKS))
    def resize(self, total: int) -> None:
        self.oracle.expire()
        goal, expected = total, ResizeOutcome.RESIZED
        if total <= self.oracle.total:
            gone = [slab for slab in self.pool.arena.slabs[1:] if slab.first >= total]
            goal = gone[0].first if gone else self.oracle.total
        if goal < self.oracle.total:
            self.oracle.confine(goal)
        if goal == self.oracle.total:
            expected = ResizeOutcome.UNCHANGED
        elif self.in_the_way(goal) or not self.oracle.resize(goal):
            expected = ResizeOutcome.REFUSED
        result = self.pool.resize(total * NAMESPACE.block_bytes)
        assert result.outcome is expected, result
        assert result.total_blocks == self.pool.total_blocks == self.oracle.total
        assert bool(result.reason) == (expected is ResizeOutcome.REFUSED)

    @precondition(lambda self: hasattr(self, "pool"))
    @invariant()
    def agrees(self) -> None:
        self.pool.check()
        self._agrees_in_numbers()
        self._agrees_in_pages()
        for lease, keys in self.promised:
            if lease.valid():
                for key, block in zip(keys, lease.blocks, strict=True):
                    found = self.pool.arena.view[block]
                    assert (found == content(key, self.pool.block_bytes)).all(), "bytes changed"
        self.promised = [promise for promise in self.promised if promise[0].valid()]

    def _agrees_in_numbers(self) -> None:
        stats = self.pool.stats()
        expected = {
            "total_blocks": self.oracle.total,
            "free_blocks": self.oracle.free(),
            "filling_blocks": self.oracle.filling(),
            "ready_blocks": len(self.oracle.pages),
            "orphan_blocks": len(self.oracle.orphans),
            "pinned_blocks": len(self.oracle.pins()),
            "leases": len(self.oracle.leases),
            "stores": len(self.oracle.stores),
            "holds": len(self.oracle.holds),
        }
        assert {name: int(stats[name]) for name in expected} == expected

    def _agrees_in_pages(self) -> None:
        batches = self.pool.drain_events()
        assert bool(batches) == bool(self.wakes), "a batch without a wake, or a wake for nothing"
        self.wakes = 0
        for seq, events in batches:
            assert seq == self.next_seq and events
            self.next_seq += 1
            oracle.replay(events, self.mirror)
        snapshot = self.pool.snapshot()
        assert (snapshot.generation, snapshot.seq) == ("g", self.next_seq - 1)
        rebuilt: dict[int, int | None] = {}
        oracle.replay(snapshot.events, rebuilt)
        expected = {
            short_key(PageKey(key)): None if above is None else short_key(PageKey(above))
            for key, above in self.oracle.parents().items()
        }
        assert rebuilt == self.mirror == expected


def content(key: PageKey, length: int) -> np.ndarray:
    return np.resize(np.frombuffer(key, dtype=np.uint8), length)


EXAMPLES = int(os.environ.get("MEMSERVE_POOL_EXAMPLES", "100"))
PoolMachine.TestCase.settings = settings(
    max_examples=EXAMPLES,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)


TestPool = PoolMachine.TestCase
