"""MemPool's edges: settings, limits, leases in time, the end of its life, and threads."""

from __future__ import annotations

import hashlib
import random
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import numpy as np
import pytest
from sglang_memserve.errors import ConfigError, LimitExceeded, OutOfBlocks
from sglang_memserve.hashing import short_key
from sglang_memserve.index.journal import Dropped, Stored
from sglang_memserve.mempool import MAX_SUBSCRIBERS, MemPool
from sglang_memserve.protocol.events import (
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    Event,
    Snapshot,
    decode_snapshot,
    encode_snapshot,
)
from sglang_memserve.transfer.base import BlockStore
from sglang_memserve.types import BlockId, Eviction, Namespace, PageKey, Tier

NAMESPACE = Namespace("model", "1", "bfloat16", 4, 2, 1, 8, 8, 0, 1)


def chain(name: str, pages: int) -> list[PageKey]:
    return [PageKey(hashlib.sha256(f"{name}{page}".encode()).digest()) for page in range(pages)]


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def make(blocks: int = 8, **options: object) -> MemPool:
    size = blocks * NAMESPACE.block_bytes
    return MemPool(NAMESPACE, arena_bytes=size, generation="g", **options)  # type: ignore[arg-type]


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def pool(clock: Clock) -> Iterator[MemPool]:
    made = make(clock=clock, max_leases=3)
    yield made
    made.check()
    made.close()


def fill(pool: MemPool, keys: list[PageKey], parent: PageKey | None = None) -> None:
    pool.prepare_store(keys, parent=parent).commit()


def test_is_a_block_store(pool: MemPool) -> None:
    store: BlockStore = pool
    assert store.arena_bytes == 8 * store.block_bytes
    assert store.address(pool.alloc_mem(1)[0]) - store.arena_base < store.arena_bytes


def test_importing_it_leaves_torch_out() -> None:
    code = "import sys, sglang_memserve.mempool; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_settings_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match="holds no block"):
        MemPool(NAMESPACE, arena_bytes=NAMESPACE.block_bytes - 1, generation="g")
    with pytest.raises(ConfigError, match="does not fit"):
        MemPool(NAMESPACE, arena_bytes=1 << 60, generation="g")
    odd = make(2)
    assert MemPool(NAMESPACE, arena_bytes=odd.arena_bytes + 5, generation="g").total_blocks == 2


def test_only_dram_is_served(pool: MemPool) -> None:
    with pytest.raises(ConfigError, match=r"Tier\.DRAM only"):
        pool.alloc_mem(1, Tier.HBM)
    with pytest.raises(ConfigError):
        pool.alloc_mem(-1)


def test_alloc_is_all_or_nothing_and_spares_pages_it_cannot_replace(pool: MemPool) -> None:
    fill(pool, chain("a", 6))
    lease = pool.acquire(chain("a", 5), owner="o", ttl_s=10)
    with pytest.raises(OutOfBlocks, match="4 blocks asked for"):
        pool.alloc_mem(4)
    assert pool.readable_pages(chain("a", 6)) == 6
    assert len(pool.alloc_mem(3)) == 3
    assert pool.readable_pages(chain("a", 6)) == 5
    lease.release()


def test_free_mem_takes_only_what_alloc_mem_gave(pool: MemPool) -> None:
    blocks = pool.alloc_mem(2)
    pool.free_mem(blocks)
    with pytest.raises(ConfigError, match="not one of alloc_mem's"):
        pool.free_mem(blocks)
    store = pool.prepare_store(chain("a", 1))
    with pytest.raises(ConfigError, match="not one of alloc_mem's"):
        pool.free_mem([store.missing[0][1]])
    store.abort()


def test_blocks_that_are_refused_are_not_lost(pool: MemPool) -> None:
    first, second = pool.alloc_mem(2)
    foreign, keys = BlockId(999), chain("a", 2)
    for wrong in ([first, foreign], [first, first]):
        with pytest.raises(ConfigError, match="block"):
            pool.free_mem(wrong)
        pool.check()
        with pytest.raises(ConfigError, match="block"):
            pool.insert(keys, wrong)
        pool.check()
    with pytest.raises(ConfigError, match="2 keys and 1 blocks"):
        pool.insert(keys, [first])
    assert pool.insert(keys, [first, second]) == 2


@pytest.mark.parametrize("eviction", Eviction)
def test_only_keys_of_32_bytes_are_stored(eviction: Eviction) -> None:
    pool = make(eviction=eviction)
    blocks, good = pool.alloc_mem(1), chain("a", 1)[0]
    text, mutable = cast(PageKey, "k" * 32), cast(PageKey, bytearray(32))
    for wrong in (*(PageKey(b"k" * size) for size in (0, 3, 8, 31, 33, 64)), text, mutable):
        for keys, parent in (([good, wrong], None), ([good], wrong)):
            with pytest.raises(ConfigError, match="32 bytes"):
                pool.prepare_store(keys, parent=parent)
        with pytest.raises(ConfigError, match="32 bytes"):
            pool.insert([wrong], blocks)
        pool.check()
    assert pool.insert([good], blocks) == 1
    pool.check()
    pool.close()


def test_commit_of_more_than_there_is(pool: MemPool) -> None:
    store = pool.prepare_store(chain("a", 2))
    for count in (-1, 3):
        with pytest.raises(ConfigError, match="commit of"):
            store.commit(count)
    for checksums in ([1], [-1, 1], [1, 2**64]):
        with pytest.raises(ConfigError, match="checksum"):
            store.commit(checksums=checksums)
        pool.check()
    store.commit(2, [0, 2**64 - 1])
    assert pool.readable_pages(chain("a", 2)) == 2


def test_a_namespace_that_is_none() -> None:
    with pytest.raises(ConfigError, match="Namespace, not 'ns'"):
        MemPool(cast(Namespace, "ns"), arena_bytes=1 << 20, generation="g")


def is_mapped(address: int) -> bool:
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, end = (int(part, 16) for part in line.split()[0].split("-"))
        if start <= address < end:
            return True
    return False


def test_memory_that_an_agent_registered_outlives_the_pool() -> None:
    pool = make()
    base = pool.arena_base
    pool.own_resizing("the agent")
    pool.close()
    assert is_mapped(base)
    pool.own_resizing(None)
    assert not is_mapped(base)


def test_sizes_that_are_no_whole_numbers(pool: MemPool) -> None:
    for size in (float("inf"), float("nan"), 3e6):
        with pytest.raises(ConfigError, match="whole number"):
            pool.resize(cast(int, size))
        with pytest.raises(ConfigError, match="whole number"):
            pool.alloc_mem(cast(int, size))
    pool.resize(np.int64(pool.arena_bytes))  # type: ignore[arg-type]


def test_a_page_being_filled_is_invisible_and_asked_for_once(pool: MemPool) -> None:
    keys = chain("a", 4)
    first = pool.prepare_store(keys[:2])
    second = pool.prepare_store(keys)
    assert [position for position, _ in second.missing] == [2, 3]
    assert pool.readable_pages(keys) == 0
    second.commit()
    assert pool.readable_pages(keys) == 0
    first.commit()
    assert pool.readable_pages(keys) == 4


def test_a_store_keeps_the_head_of_its_chain(pool: MemPool) -> None:
    head, tail = chain("a", 3), chain("b", 2)
    fill(pool, head)
    store = pool.prepare_store(tail, parent=head[-1])
    others = pool.prepare_store(chain("c", 8))
    assert len(others.missing) == 3
    assert pool.readable_pages(head) == 3
    others.abort()
    store.commit()
    assert pool.readable_pages(head + tail) == 5


def test_a_chain_longer_than_the_pool_is_stored_in_part(pool: MemPool) -> None:
    store = pool.prepare_store(chain("a", 11))
    assert [position for position, _ in store.missing] == list(range(8))
    store.commit()
    assert pool.readable_pages(chain("a", 11)) == 8
    assert pool.stats()["blocks_denied_total"] == 3


def test_leaving_a_store_aborts_and_leaving_a_lease_releases(pool: MemPool) -> None:
    with pool.prepare_store(chain("a", 2)):
        pass
    assert pool.stats()["free_blocks"] == 8
    with pool.prepare_store(chain("a", 2)) as store:
        store.commit()
    with pool.acquire(chain("a", 2), owner="o", ttl_s=1) as lease:
        assert lease.valid() and pool.stats()["pinned_blocks"] == 2
    assert not lease.valid() and pool.stats()["pinned_blocks"] == 0


def test_leases_end_at_their_deadline(pool: MemPool, clock: Clock) -> None:
    fill(pool, chain("a", 8))
    lease = pool.acquire(chain("a", 8), owner="o", ttl_s=5)
    clock.now = 4.9
    assert lease.valid() and not pool.prepare_store(chain("b", 8)).missing
    clock.now = 5.0
    assert not lease.valid()
    store = pool.prepare_store(chain("b", 8))
    assert len(store.missing) == 8
    lease.release()
    store.commit()
    assert pool.stats()["leases_expired_total"] == 1


def test_limits_of_leases(pool: MemPool) -> None:
    fill(pool, chain("a", 1))
    for ttl_s in (0.0, -1.0, 1e9, float("nan"), float("inf")):
        with pytest.raises(LimitExceeded, match="allowed is more than 0"):
            pool.acquire(chain("a", 1), owner="o", ttl_s=ttl_s)
    for _ in range(3):
        pool.acquire(chain("a", 1), owner="o", ttl_s=1)
    with pytest.raises(LimitExceeded, match="the limit is 3"):
        pool.acquire(chain("a", 1), owner="o", ttl_s=1)
    assert pool.release_owner("nobody") == 0
    assert pool.release_owner("o") == 3


def test_short_leases_do_not_pile_up(pool: MemPool) -> None:
    fill(pool, chain("a", 1))
    for _ in range(1000):
        pool.acquire(chain("a", 1), owner="o", ttl_s=3000).release()
    pool.check()
    assert len(pool._ledger.leases._deadlines) <= 64


def test_clear_spares_the_bytes_of_leases_and_flushes_stores(pool: MemPool) -> None:
    keys = chain("a", 3)
    fill(pool, keys)
    lease = pool.acquire(keys[:2], owner="o", ttl_s=9)
    pool.arena.view[lease.blocks[0]] = 77
    stale = pool.prepare_store(chain("b", 2))
    pool.clear()
    pool.check()
    assert pool.readable_pages(keys) == 0
    fresh = pool.prepare_store(keys + chain("b", 2))
    assert [position for position, _ in fresh.missing] == [0, 1, 2, 3]
    for _, block in fresh.missing:
        pool.arena.view[block] = 1
    assert lease.valid() and (pool.arena.view[lease.blocks[0]] == 77).all()
    stale.commit()
    assert pool.readable_pages(chain("b", 2)) == 0
    lease.release()
    fresh.commit()
    assert pool.stats()["free_blocks"] == 4


def test_events_tell_the_story(pool: MemPool) -> None:
    head, tail = chain("a", 2), chain("b", 2)
    fill(pool, head)
    fill(pool, tail, parent=head[1])
    pool.delete([tail[1]])
    a: list[int] = [short_key(key) for key in head]
    b: list[int] = [short_key(key) for key in tail]
    medium = "CPU_PINNED"
    assert pool.drain_events() == [
        (0, [BlockStored(a, None, [], 4, medium=medium)]),
        (1, [BlockStored(b, a[1], [], 4, medium=medium)]),
        (2, [BlockRemoved([b[1]], medium=medium)]),
    ]
    snapshot = pool.snapshot()
    assert snapshot.seq == 2 and snapshot.generation == "g"
    assert snapshot.events == [BlockStored([*a, b[0]], None, [], 4, medium=medium)]
    assert decode_snapshot(encode_snapshot(snapshot)) == snapshot


def test_both_tiers_are_in_one_stream_and_one_snapshot(pool: MemPool) -> None:
    keys = chain("a", 3)
    a: list[int] = [short_key(key) for key in keys]
    fill(pool, keys[:2])
    pool.apply_device([Stored(keys, None, Tier.HBM), Dropped(keys[2:], Tier.HBM)])
    pool.apply_device([Stored(keys[:2], None, Tier.HBM), Dropped([keys[2]], Tier.HBM)])
    pool.delete(keys[1:])
    assert pool.drain_events() == [
        (0, [BlockStored(a[:2], None, [], 4, medium="CPU_PINNED")]),
        (1, [BlockStored(a, None, [], 4, medium="GPU"), BlockRemoved(a[2:], medium="GPU")]),
        (2, [BlockRemoved([a[1]], medium="CPU_PINNED")]),
    ]
    assert pool.device_pages == pool.stats()["device_pages"] == 2
    assert pool.snapshot().events == [
        BlockStored(a[:1], None, [], 4, medium="CPU_PINNED"),
        BlockStored(a[:2], None, [], 4, medium="GPU"),
    ]
    pool.clear()
    assert pool.drain_events() == [(3, [AllBlocksCleared()])]
    assert pool.snapshot().events == [] and pool.device_pages == 0


def test_one_batch_for_a_round_of_evictions(pool: MemPool) -> None:
    fill(pool, chain("a", 8))
    pool.drain_events()
    pool.prepare_store(chain("b", 5)).abort()
    [(_, events)] = pool.drain_events()
    assert len(events) == 1 and isinstance(events[0], BlockRemoved)
    assert events[0].block_hashes == [short_key(key) for key in chain("a", 8)[:2:-1]]


def test_wakes_come_outside_the_lock() -> None:
    calls: list[str] = []
    woken: MemPool = make(on_events=lambda: calls.append(f"events {len(woken.drain_events())}"))
    woken.subscribe(lambda: calls.append(f"readable {woken.readable_pages(chain('a', 2))}"))
    fill(woken, chain("a", 2))
    assert calls == ["events 1", "readable 2"]
    woken.clear()
    assert calls[2:] == ["events 1"]
    later: list[str] = []
    woken.set_event_wake(lambda: later.append("wake"))
    woken.prepare_store(chain("a", 2)).commit()
    assert later == ["wake"]
    unsubscribe = [woken.subscribe(lambda: None) for _ in range(MAX_SUBSCRIBERS - 1)]
    with pytest.raises(LimitExceeded):
        woken.subscribe(lambda: None)
    unsubscribe[0]()
    woken.subscribe(lambda: None)
    woken.close()


def test_after_close_everything_is_quietly_empty() -> None:
    pool = make()
    fill(pool, chain("a", 2))
    lease = pool.acquire(chain("a", 2), owner="o", ttl_s=9)
    store = pool.prepare_store(chain("b", 2))
    blocks = pool.alloc_mem(1)
    view = pool.arena.view
    pool.close()
    pool.close()
    view[:] = 1
    assert not lease.valid()
    lease.release()
    store.commit()
    pool.free_mem(blocks)
    assert pool.readable_pages(chain("a", 2)) == 0
    assert not pool.prepare_store(chain("c", 2)).missing
    assert not pool.acquire(chain("a", 2), owner="o", ttl_s=9).blocks
    with pytest.raises(OutOfBlocks):
        pool.alloc_mem(1)
    pool.clear()
    pool.check()
    assert pool.drain_events() == []


class Hammer:
    """Threads that store, read, delete and clear at once; every reader checks the bytes it sees."""

    def __init__(self, threads: int, steps: int) -> None:
        self.pool = make(24, max_leases=16)
        self.failures: list[BaseException] = []
        self.steps = steps
        self.threads = [
            threading.Thread(target=self._guarded, args=(number,)) for number in range(threads)
        ]
        self.stop = threading.Event()
        self.seen: list[tuple[int, list[Event]]] = []
        self.snapshots: list[Snapshot] = []
        self.drainer = threading.Thread(target=self._drain)

    def run(self) -> None:
        for thread in [*self.threads, self.drainer]:
            thread.start()
        for thread in self.threads:
            thread.join(60)
        self.stop.set()
        self.drainer.join(60)
        assert not any(thread.is_alive() for thread in [*self.threads, self.drainer])
        if self.failures:
            raise self.failures[0]

    def _guarded(self, seed: int) -> None:
        try:
            source = random.Random(seed)
            for _ in range(self.steps):
                self._step(source, str(seed))
        except BaseException as error:
            self.failures.append(error)
            raise

    def _step(self, source: random.Random, owner: str) -> None:
        keys = chain(source.choice("abcd"), source.randint(1, 12))
        action = source.random()
        if action < 0.45:
            store = self.pool.prepare_store(keys)
            for position, block in store.missing:
                self.pool.arena.view[block] = np.frombuffer(
                    keys[position] * (self.pool.block_bytes // 32), dtype=np.uint8
                )
            store.commit(source.randint(0, len(store.missing)))
        elif action < 0.9:
            try:
                with self.pool.acquire(keys, owner=owner, ttl_s=60) as lease:
                    for key, block in zip(keys, lease.blocks, strict=False):
                        assert bytes(self.pool.arena.view[block][:32]) == key
                        assert bytes(self.pool.arena.view[block][-32:]) == key
            except LimitExceeded:
                self.pool.release_owner(owner)
        elif action < 0.97:
            self.pool.delete(keys[-2:])
        else:
            self.pool.clear()

    def _drain(self) -> None:
        while not self.stop.wait(0.001):
            self.seen += self.pool.drain_events()
            self.snapshots.append(self.pool.snapshot())
        self.seen += self.pool.drain_events()


def replay(events: list[Event], state: set[int]) -> None:
    for event in events:
        if isinstance(event, BlockStored):
            state.update(event.block_hashes)
        elif isinstance(event, BlockRemoved):
            assert state.issuperset(event.block_hashes)
            state.difference_update(event.block_hashes)
        else:
            state.clear()


def test_threads() -> None:
    hammer = Hammer(threads=4, steps=400)
    hammer.run()
    pool = hammer.pool
    pool.check()
    stats = pool.stats()
    assert stats["leases"] == stats["stores"] == stats["orphan_blocks"] == 0
    assert stats["free_blocks"] + stats["ready_blocks"] == stats["total_blocks"]
    assert [seq for seq, _ in hammer.seen] == list(range(len(hammer.seen)))
    # What every snapshot says is what the events up to its number say.
    states: list[set[int]] = [set()]
    for _, events in hammer.seen:
        state = set(states[-1])
        replay(events, state)
        states.append(state)
    for snapshot in [*hammer.snapshots, pool.snapshot()]:
        rebuilt: set[int] = set()
        replay(snapshot.events, rebuilt)
        assert rebuilt == states[snapshot.seq + 1]
    pool.close()
