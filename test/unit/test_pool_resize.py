"""A pool that grows and shrinks: what moves, what goes, and what is in the way."""

from __future__ import annotations

import hashlib
import os
import signal
import threading
from collections.abc import Iterator

import numpy as np
import pytest
from numpy.typing import NDArray
from sglang_memserve.errors import ConfigError, LimitExceeded
from sglang_memserve.memory import arena as arena_module
from sglang_memserve.mempool import MemPool
from sglang_memserve.protocol.events import BlockRemoved
from sglang_memserve.types import Namespace, PageKey, Progress, ResizeOutcome, ResizeResult

NAMESPACE = Namespace("model", "1", "bfloat16", 4, 2, 1, 8, 8, 0, 1)
BLOCK = NAMESPACE.block_bytes
SLAB = 4  # blocks


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def chain(name: str, pages: int) -> list[PageKey]:
    return [PageKey(hashlib.sha256(f"{name}{page}".encode()).digest()) for page in range(pages)]


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def pool(clock: Clock) -> Iterator[MemPool]:
    """Four slabs of four blocks, room for as many again."""
    made = MemPool(
        NAMESPACE,
        arena_bytes=4 * SLAB * BLOCK,
        generation="g",
        reserve_bytes=8 * SLAB * BLOCK,
        slab_bytes=SLAB * BLOCK,
        clock=clock,
    )
    yield made
    made.check()
    made.close()


def put(pool: MemPool, keys: list[PageKey]) -> None:
    with pool.prepare_store(keys) as store:
        for position, block in store.missing:
            pool.arena.view[block] = content(keys[position])
        store.commit()


def content(key: PageKey) -> np.ndarray:
    return np.resize(np.frombuffer(key, dtype=np.uint8), BLOCK)


def holds(pool: MemPool, keys: list[PageKey]) -> bool:
    blocks = pool.match(keys)
    pairs = zip(keys, blocks, strict=False)
    right = all((pool.arena.view[block] == content(key)).all() for key, block in pairs)
    assert right, "a page has other bytes"
    return len(blocks) == len(keys)


def resize(pool: MemPool, blocks: int, wait_s: float = 0.0) -> ResizeResult:
    result = pool.resize(blocks * BLOCK, wait_s=wait_s)
    pool.check()
    assert result.total_blocks == pool.total_blocks
    assert result.total_bytes == pool.arena_bytes == pool.total_blocks * BLOCK
    return result


def test_it_starts_in_slabs_that_tile_its_memory(pool: MemPool) -> None:
    base = pool.arena_base
    assert pool.regions() == [(base + i * SLAB * BLOCK, SLAB * BLOCK) for i in range(4)]
    stats = pool.stats()
    assert (stats["slabs"], stats["capacity_blocks"]) == (4, 32)


def test_a_pool_that_grew_holds_more_and_keeps_what_it_had(pool: MemPool) -> None:
    first, second = chain("a", 16), chain("b", 10)
    put(pool, first)
    before = pool.match(first)
    assert resize(pool, 26).outcome is ResizeOutcome.RESIZED
    assert pool.match(first) == before, "growing moves nothing"
    put(pool, second)
    assert holds(pool, first) and holds(pool, second)
    assert pool.stats()["evicted_pages_total"] == 0
    assert [length // BLOCK for _, length in pool.regions()] == [4, 4, 4, 4, 4, 4, 2]


def test_shrinking_moves_pages_down_when_there_is_room(pool: MemPool) -> None:
    blocks = pool.alloc_mem(12)
    keys = chain("a", 4)
    put(pool, keys)
    assert pool.match(keys) == [12, 13, 14, 15]
    pool.free_mem(blocks)
    result = resize(pool, 8)
    assert (result.outcome, result.moved_pages, result.evicted_pages) == (
        ResizeOutcome.RESIZED,
        4,
        0,
    )
    assert holds(pool, keys) and max(pool.match(keys)) < 8
    assert not pool.drain_events()[1:], "a page that moves is no event"


def test_shrinking_evicts_the_oldest_wherever_they_lie(pool: MemPool) -> None:
    old, new = chain("old", 8), chain("new", 8)
    put(pool, old)
    put(pool, new)
    pool.drain_events()
    result = resize(pool, 8)
    assert (result.moved_pages, result.evicted_pages) == (8, 8)
    assert holds(pool, new) and pool.readable_pages(old) == 0
    removed = 0
    for _, events in pool.drain_events():
        for event in events:
            assert isinstance(event, BlockRemoved)
            removed += len(event.block_hashes)
    assert removed == 8
    assert pool.stats()["ready_blocks"] == 8


def test_memory_that_was_given_back_reads_as_zeros_and_can_be_had_again(pool: MemPool) -> None:
    view = pool.arena.reserved
    view[:16] = 7
    resize(pool, 8)
    # The page of memory that both sides share keeps its bytes.
    first_whole = -(-8 * BLOCK // 4096) * 4096
    flat = view.reshape(-1)
    assert (flat[: 8 * BLOCK] == 7).all() and not flat[first_whole:].any()
    assert resize(pool, 16).outcome is ResizeOutcome.RESIZED
    put(pool, chain("a", 16))
    assert holds(pool, chain("a", 16))


def test_a_size_between_slabs_is_rounded_up_when_shrinking(pool: MemPool) -> None:
    assert resize(pool, 9).total_blocks == 12
    assert resize(pool, 9).outcome is ResizeOutcome.UNCHANGED
    assert resize(pool, 1).total_blocks == 4
    assert pool.stats()["resizes_total"] == 2


def test_what_is_leased_or_being_filled_refuses_and_nothing_is_lost(
    pool: MemPool, clock: Clock
) -> None:
    keys = chain("a", 15)
    put(pool, keys)
    lease = pool.acquire(keys, owner="peer", ttl_s=9.0)
    store = pool.prepare_store(chain("b", 1))
    clock.now = 2.0
    result = resize(pool, 8)
    assert result.outcome is ResizeOutcome.REFUSED
    assert "7 leased (the last lease ends in 7.0 s at most)" in result.reason
    assert "1 being filled" in result.reason
    assert pool.total_blocks == 16 and lease.valid() and holds(pool, keys)
    assert pool.stats()["resizes_refused_total"] == 1
    store.commit()
    assert resize(pool, 8).outcome is ResizeOutcome.REFUSED
    lease.release()
    assert resize(pool, 8).outcome is ResizeOutcome.RESIZED
    assert pool.readable_pages(keys) <= 8


def test_patience_outlasts_a_lease(pool: MemPool) -> None:
    keys = chain("a", 16)
    put(pool, keys)
    lease = pool.acquire(keys, owner="peer", ttl_s=9.0)
    timer = threading.Timer(0.05, lease.release)
    timer.start()
    assert resize(pool, 8, wait_s=20.0).outcome is ResizeOutcome.RESIZED
    timer.join(10)


def test_patience_ends(pool: MemPool) -> None:
    store = pool.prepare_store(chain("a", 16))
    result = resize(pool, 8, wait_s=0.02)
    assert result.outcome is ResizeOutcome.REFUSED and "8 being filled" in result.reason
    store.commit()
    assert pool.readable_pages(chain("a", 16)) == 16


def test_a_page_in_use_moves_under_its_readers(pool: MemPool) -> None:
    """They keep the old block, the next reader gets the new one."""
    blocks = pool.alloc_mem(12)
    keys = chain("a", 4)
    put(pool, keys)
    pool.free_mem(blocks)
    lease = pool.acquire(keys, owner="reader", ttl_s=9.0)
    change = pool.prepare_resize(8 * BLOCK)
    assert change.vacate() is Progress.BLOCKED
    pool.check()
    assert holds(pool, keys) and max(pool.match(keys)) < 8
    assert lease.valid() and list(lease.blocks) == [12, 13, 14, 15]
    for key, block in zip(keys, lease.blocks, strict=True):
        assert (pool.arena.reserved[block] == content(key)).all()
    later = pool.acquire(keys, owner="reader", ttl_s=9.0)
    assert max(later.blocks) < 8 and change.vacate() is Progress.BLOCKED
    lease.release()
    assert change.vacate() is Progress.DONE
    assert change.complete().total_blocks == 8
    assert later.valid() and holds(pool, keys)
    later.release()


def test_nothing_new_is_put_into_what_is_to_go(pool: MemPool) -> None:
    keys = chain("a", 16)
    put(pool, keys)
    lease = pool.acquire(keys, owner="peer", ttl_s=9.0)
    change = pool.prepare_resize(8 * BLOCK)
    lease.release()
    store = pool.prepare_store(chain("b", 6))
    assert len(store.missing) == 6 and all(block < 8 for _, block in store.missing)
    pool.check()
    assert len(pool.alloc_mem(2)) == 2
    assert not pool.prepare_store(chain("c", 1)).missing, "all blocks that stay are being filled"
    store.commit()
    assert change.vacate() in (Progress.DONE, Progress.BLOCKED)
    change.abort()
    pool.check()
    assert pool.total_blocks == 16 and len(pool.alloc_mem(8)) == 8


def test_what_goes_while_it_is_copied_is_not_revived(
    pool: MemPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(pool, chain("a", 16))
    pool.delete(chain("a", 8))
    change = pool.prepare_resize(8 * BLOCK)
    shrink = change._shrink
    assert shrink is not None
    end_moves = shrink.end_moves
    gone = chain("a", 16)[8:12]

    def removed_meanwhile() -> None:
        for key in gone:
            assert pool._ledger.index.get(key) is not None
        removed = pool._ledger.index.remove(gone)
        pool._ledger.drop(removed, "deleted_pages_total")
        end_moves()

    monkeypatch.setattr(shrink, "end_moves", removed_meanwhile)
    assert change.vacate() is Progress.DONE
    change.complete()
    assert pool.stats()["ready_blocks"] == 4 and pool.stats()["free_blocks"] == 4


def test_one_change_at_a_time_and_closed_pools_do_not_change(pool: MemPool) -> None:
    change = pool.prepare_resize(8 * BLOCK)
    with pytest.raises(LimitExceeded, match="under way"):
        pool.resize(4 * BLOCK)
    change.abort()
    change.abort()
    late = pool.prepare_resize(8 * BLOCK)
    pool.close()
    assert late.vacate() is Progress.DONE
    late.complete()
    with pytest.raises(ConfigError, match="closed"):
        pool.resize(8 * BLOCK)


def test_a_grow_that_is_taken_back_leaves_no_trace(pool: MemPool) -> None:
    change = pool.prepare_resize(24 * BLOCK)
    assert [length for _, length in change.adds] == [SLAB * BLOCK] * 2
    assert pool.total_blocks == 16 and pool.stats()["free_blocks"] == 16
    change.abort("no network")
    pool.check()
    assert pool.arena.total_blocks == 16
    assert resize(pool, 24).outcome is ResizeOutcome.RESIZED


def test_sizes_that_cannot_be(pool: MemPool, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="holds no block"):
        pool.resize(BLOCK - 1)
    with pytest.raises(ConfigError, match="holds no block"):
        pool.resize(-5)
    with pytest.raises(ConfigError, match="addresses for 32 of 256 bytes"):
        pool.resize(33 * BLOCK)
    with pytest.raises(ConfigError, match="does not fit"):
        pool.resize(1 << 60)
    for wait_s in (-1.0, float("nan"), 1e9):
        with pytest.raises(LimitExceeded, match="wait of"):
            pool.resize(8 * BLOCK, wait_s=wait_s)
    pool.own_resizing("the agent of rank 0")
    with pytest.raises(ConfigError, match="the agent of rank 0 changes"):
        pool.resize(8 * BLOCK)
    pool.own_resizing(None)
    monkeypatch.setattr(arena_module, "MAX_SLABS", 5)
    assert resize(pool, 20).outcome is ResizeOutcome.RESIZED
    with pytest.raises(LimitExceeded, match="the limit is 5"):
        pool.resize(21 * BLOCK)
    assert resize(pool, 4).outcome is ResizeOutcome.RESIZED


def test_readers_and_writers_beside_it(pool: MemPool) -> None:
    """Threads that store, lease and compare bytes while the size goes up and down."""
    stop = threading.Event()
    wrong: list[str] = []
    keys = [chain(name, 3) for name in "abcdefgh"]

    def work(mine: list[list[PageKey]]) -> None:
        while not stop.is_set():
            for run in mine:
                put(pool, run)
                with pool.acquire(run, owner="w", ttl_s=60.0) as lease:
                    for key, block in zip(run, lease.blocks, strict=False):
                        if not (pool.arena.reserved[block] == content(key)).all():
                            wrong.append(f"{key.hex()} in block {block}")

    threads = [threading.Thread(target=work, args=(keys[i::2],)) for i in range(2)]
    for thread in threads:
        thread.start()
    try:
        outcomes = [pool.resize(size * BLOCK, wait_s=5.0).outcome for size in (4, 24, 8, 32) * 10]
    finally:
        stop.set()
        for thread in threads:
            thread.join(20)
    assert not wrong, wrong[:3]
    assert ResizeOutcome.RESIZED in outcomes
    pool.check()
    stats = pool.stats()
    assert stats["moved_pages_total"] > 0
    assert stats["free_blocks"] + stats["ready_blocks"] == stats["total_blocks"]


class Interrupted:
    """Stands for the arena's memory: a signal comes while the second block is copied."""

    def __init__(self, memory: NDArray[np.uint8]) -> None:
        self._memory = memory
        self._copied = 0

    def __getitem__(self, block: int) -> NDArray[np.uint8]:
        page: NDArray[np.uint8] = self._memory[block]
        return page

    def __setitem__(self, block: int, page: NDArray[np.uint8]) -> None:
        if self._copied == 1:
            raise KeyboardInterrupt
        self._copied += 1
        self._memory[block] = page


def test_an_interrupted_copy_leaves_a_pool_that_works(
    pool: MemPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = chain("a", 16)
    put(pool, keys)
    pool.delete(keys[:8])
    with monkeypatch.context() as patch:
        reserved = Interrupted(pool.arena.reserved)
        patch.setattr(arena_module.Arena, "reserved", property(lambda arena: reserved))
        with pytest.raises(KeyboardInterrupt):
            pool.resize(2 * SLAB * BLOCK, wait_s=5.0)
    pool.check()
    values = pool.stats()
    assert [values[f"{kind}_blocks"] for kind in ("withdrawn", "filling", "pinned")] == [0, 0, 0]
    assert pool.resize(2 * SLAB * BLOCK).outcome is ResizeOutcome.RESIZED
    for key in keys[8:]:
        assert pool.arena.view[pool.match([key])[0]].tobytes() == content(key).tobytes()


class Pressed(Exception):
    """What the handler of a signal raises, in the main thread."""


class Signalling(Interrupted):
    """The signal comes while the first block is copied, and is seen to before the next."""

    def __setitem__(self, block: int, page: NDArray[np.uint8]) -> None:
        self._memory[block] = page
        if not self._copied:
            self._copied = 1
            os.kill(os.getpid(), signal.SIGUSR1)
            assert handled.wait(10.0)


handled = threading.Event()


def test_a_signal_while_it_waits_calls_it_off(
    pool: MemPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def press(*_: object) -> None:
        handled.set()
        raise Pressed

    handled.clear()
    keys = chain("a", 16)
    put(pool, keys)
    pool.delete(keys[:4])
    lease = pool.acquire([keys[15]], owner="o", ttl_s=60.0)
    before = signal.signal(signal.SIGUSR1, press)
    try:
        with monkeypatch.context() as patch:
            reserved = Signalling(pool.arena.reserved)
            patch.setattr(arena_module.Arena, "reserved", property(lambda arena: reserved))
            with pytest.raises(Pressed):
                pool.resize(SLAB * BLOCK, wait_s=60.0)
    finally:
        signal.signal(signal.SIGUSR1, before)
    pool.check()
    assert pool.stats()["withdrawn_blocks"] == 0
    lease.release()
    assert pool.resize(SLAB * BLOCK).outcome is ResizeOutcome.RESIZED
