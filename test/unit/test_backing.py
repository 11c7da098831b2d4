from __future__ import annotations

import ctypes
import mmap
import threading
import time
from collections.abc import Iterator

import pytest
from sglang_memserve.memory import attached, backing
from sglang_memserve.memory.backing import Backing
from sglang_memserve.mempool import MemPool
from sglang_memserve.types import Namespace, Prefault

MEGA = 1 << 20
LIMIT_S = 20.0


NAMESPACE = Namespace("model", "1", "bfloat16", 16, 2, 8, 128, 128, 0, 1)
BLOCK = NAMESPACE.block_bytes


class Fresh:
    """Memory that nobody has touched."""

    def __init__(self, length: int) -> None:
        self.map = mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.length = length
        self._first = ctypes.c_char.from_buffer(self.map)
        self.base = ctypes.addressof(self._first)

    def backed_pages(self) -> int:
        return backed_pages(self.base, self.length)

    def close(self) -> None:
        del self._first
        self.map.close()


def backed_pages(base: int, length: int) -> int:
    told = (ctypes.c_ubyte * (length // mmap.PAGESIZE))()
    libc = ctypes.CDLL(None, use_errno=True)
    code = libc.mincore(ctypes.c_void_p(base), ctypes.c_size_t(length), told)
    assert code == 0, ctypes.get_errno()
    return sum(value & 1 for value in told)


@pytest.fixture
def fresh() -> Iterator[Fresh]:
    memory = Fresh(16 * MEGA)
    yield memory
    memory.close()


def settle(work: Backing) -> None:
    until = time.monotonic() + LIMIT_S
    while work.waiting_bytes():
        assert time.monotonic() < until
        time.sleep(0.005)
    work.close()


def test_memory_is_there_before_it_is_touched(fresh: Fresh) -> None:
    fresh.map[5 * MEGA] = 7
    work = Backing(fresh)
    work.add(fresh.base, fresh.length)
    settle(work)
    assert fresh.backed_pages() == fresh.length // mmap.PAGESIZE
    assert fresh.map[5 * MEGA] == 7 and fresh.map[:MEGA] == bytes(MEGA)


def test_what_was_removed_is_not_touched(fresh: Fresh, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []
    gate = [False]

    def populate(start: int, length: int) -> bool:
        asked.append((start - fresh.base, length))
        while not gate[0]:
            time.sleep(0.001)
        return True

    monkeypatch.setattr(backing, "_populate", populate)
    work = Backing(fresh)
    work.add(fresh.base, fresh.length)
    while not asked:
        time.sleep(0.001)
    gate[0] = True
    # Between the first step and the last: whichever step is under way ends before this returns.
    work.remove(fresh.base + 8 * MEGA, 4 * MEGA)
    before = len(asked)
    settle(work)
    touched = {offset // MEGA for offset, _ in asked[before:]}
    assert not touched & {8, 9, 10, 11}
    assert sum(length for _, length in asked) >= fresh.length - 4 * MEGA


def test_closing_ends_it_at_once(fresh: Fresh, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def populate(start: int, length: int) -> bool:
        asked.append(start)
        time.sleep(0.05)
        return True

    monkeypatch.setattr(backing, "_populate", populate)
    work = Backing(fresh)
    work.add(fresh.base, fresh.length)
    work.close()
    assert len(asked) <= 2 and work.waiting_bytes() == 0


def test_a_kernel_that_cannot_leaves_it_to_the_first_touch(
    fresh: Fresh, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backing, "_populate", lambda start, length: False)
    work = Backing(fresh)
    work.add(fresh.base, fresh.length)
    settle(work)
    assert fresh.backed_pages() == 0


def test_nothing_is_touched_after_closing(fresh: Fresh) -> None:
    work = Backing(fresh)
    work.close()
    work.add(fresh.base, fresh.length)
    assert work.waiting_bytes() == 0 and fresh.backed_pages() == 0


def make(prefault: Prefault) -> MemPool:
    return MemPool(
        NAMESPACE,
        arena_bytes=16 * BLOCK,
        generation="g",
        reserve_bytes=64 * BLOCK,
        slab_bytes=4 * BLOCK,
        prefault=prefault,
    )


def is_backed(pool: MemPool) -> bool:
    return all(backed_pages(*region) == region[1] // mmap.PAGESIZE for region in pool.regions())


def wait_until_backed(pool: MemPool) -> None:
    until = time.monotonic() + LIMIT_S
    while not is_backed(pool):
        assert time.monotonic() < until
        time.sleep(0.005)


def test_a_pool_backs_its_memory_and_what_is_added(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attached, "WORTH_BYTES", BLOCK)
    pool = make(Prefault.BACKGROUND)
    wait_until_backed(pool)
    for blocks in (32, 8, 24):
        pool.resize(blocks * BLOCK)
        wait_until_backed(pool)
        pool.check()
    pool.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "memserve-backing"]


def test_a_pool_that_is_closed_amid_it_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attached, "WORTH_BYTES", BLOCK)
    asked = threading.Event()

    def populate(start: int, length: int) -> bool:
        ctypes.memset(start, 0, length)
        asked.set()
        return True

    monkeypatch.setattr(backing, "_populate", populate)
    for _ in range(5):
        pool = make(Prefault.BACKGROUND)
        growth = pool.prepare_resize(64 * BLOCK)
        assert asked.wait(LIMIT_S)
        pool.close()
        growth.complete()
        assert not [thread for thread in threading.enumerate() if thread.name == "memserve-backing"]


@pytest.mark.parametrize("prefault", Prefault)
def test_small_pools_and_those_told_so_have_no_thread(
    prefault: Prefault, monkeypatch: pytest.MonkeyPatch
) -> None:
    if prefault is Prefault.NONE:
        monkeypatch.setattr(attached, "WORTH_BYTES", BLOCK)
    pool = make(prefault)
    assert not [thread for thread in threading.enumerate() if thread.name == "memserve-backing"]
    assert not is_backed(pool)
    pool.close()
