"""Ranges that a device reaches, over a driver that refuses as CUDA's does."""

from __future__ import annotations

import contextlib
import logging
import mmap
import random

import numpy as np
import pytest
import torch
from oracle.pages import PagedPool
from sglang_memserve.errors import DeviceError
from sglang_memserve.memory.arena import Arena
from sglang_memserve.memory.layout import BlockLayout
from sglang_memserve.memory.pinning import CudaDriver, PinnedRanges
from sglang_memserve.memory.swap import DevicePool
from sglang_memserve.mempool import MemPool
from sglang_memserve.types import Namespace

PAGE = mmap.PAGESIZE


class Driver:
    """Refuses what overlaps, what is unknown, and more than ``limit`` bytes in all."""

    def __init__(self, limit: int = 1 << 62) -> None:
        self.held: dict[int, int] = {}
        self.limit = limit

    def register(self, base: int, length: int) -> None:
        assert base % PAGE == 0 and length % PAGE == 0 and length > 0
        for other, size in self.held.items():
            if base < other + size and other < base + length:
                raise DeviceError("already registered")
        if sum(self.held.values()) + length > self.limit:
            raise DeviceError("out of memory")
        self.held[base] = length

    def unregister(self, base: int) -> None:
        if base not in self.held:
            raise DeviceError("not registered")
        del self.held[base]


def at(*pages: float) -> np.ndarray:
    return np.array([int(page * PAGE) for page in pages], dtype=np.int64)


def test_covers_what_is_pinned_only() -> None:
    ranges = PinnedRanges(Driver())
    assert not ranges.covers(at(0), 1)
    ranges.pin(4 * PAGE, 4 * PAGE)
    ranges.pin(8 * PAGE, 2 * PAGE)
    ranges.check()
    assert ranges.pinned_bytes == 6 * PAGE
    assert ranges.covers(at(4, 5, 9), PAGE)
    assert ranges.covers(at(), PAGE)
    assert not ranges.covers(at(4, 3), PAGE)
    assert not ranges.covers(at(10), PAGE)
    # Across the seam of two registrations: the driver copies no such thing at once.
    assert not ranges.covers(at(7.5), PAGE)
    assert ranges.numbers(at(3, 4, 7, 8, 9, 10)).tolist() == [-1, 0, 0, 1, 1, -1]
    ranges.unpin(4 * PAGE, 4 * PAGE)
    assert not ranges.covers(at(4), PAGE) and ranges.covers(at(8), PAGE)
    ranges.close()
    assert ranges.pinned_bytes == 0


def test_whole_memory_pages_only() -> None:
    driver = Driver()
    ranges = PinnedRanges(driver)
    ranges.pin(4 * PAGE + 100, 3 * PAGE)
    assert driver.held == {5 * PAGE: 2 * PAGE}
    # What shares a page with the first is free for nobody, so neighbours never collide.
    ranges.pin(7 * PAGE + 100, 2 * PAGE)
    assert driver.held == {5 * PAGE: 2 * PAGE, 8 * PAGE: PAGE}
    ranges.pin(20 * PAGE + 1, 100)
    assert not ranges.covers(at(20), 1)
    ranges.check()


def test_a_refusal_changes_nothing() -> None:
    driver = Driver(limit=4 * PAGE)
    ranges = PinnedRanges(driver)
    ranges.pin(0, 3 * PAGE)
    with pytest.raises(DeviceError, match="out of memory"):
        ranges.pin(8 * PAGE, 2 * PAGE)
    ranges.check()
    assert ranges.covers(at(0, 2), PAGE) and not ranges.covers(at(8), PAGE)
    ranges.pin(8 * PAGE, PAGE)
    del driver.held[0]
    with pytest.raises(DeviceError, match="not registered"):
        ranges.unpin(0, PAGE)
    assert not ranges.covers(at(0), 1)
    ranges.check()


@pytest.mark.parametrize("seed", range(5))
def test_against_a_set_of_pages(seed: int) -> None:
    source = random.Random(seed)
    ranges, pinned = PinnedRanges(Driver()), set[int]()
    slabs = [(first, 3) for first in range(0, 60, 3)]
    held: set[tuple[int, int]] = set()
    for _ in range(200):
        first, length = slab = source.choice(slabs)
        if slab in held:
            ranges.unpin(first * PAGE, length * PAGE)
            pinned -= set(range(first, first + length))
            held.remove(slab)
        else:
            ranges.pin(first * PAGE, length * PAGE)
            pinned |= set(range(first, first + length))
            held.add(slab)
        ranges.check()
        asked = [source.randrange(60) for _ in range(3)]
        assert ranges.covers(at(*asked), PAGE) == (set(asked) <= pinned)
    assert ranges.pinned_bytes == len(pinned) * PAGE


def test_a_pool_that_cannot_pin_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    layout = BlockLayout(1, 16, 2, 16, 16, 4)
    paged = PagedPool.random(layout, 4, seed=1)
    pool = DevicePool(layout, paged.k, paged.v)
    pool._pins = PinnedRanges(Driver(limit=2 * PAGE))
    with Arena(4, PAGE) as arena, caplog.at_level(logging.WARNING):
        pool.pin(arena.base, 2 * PAGE)
        assert pool.pinned_bytes == 2 * PAGE and not caplog.records
        pool.pin(arena.base + 2 * PAGE, 2 * PAGE)
        assert pool.pinned_bytes == 2 * PAGE
        assert len(caplog.records) == 1 and "out of memory" in caplog.text
        pool.unpin(arena.base, 2 * PAGE)
        assert pool.pinned_bytes == 0
        pool.close()


def test_a_pool_pins_its_slabs_as_they_come_and_go() -> None:
    space = Namespace("m", "1", "bfloat16", 16, 1, 2, 32, 32, 0, 1)
    assert space.block_bytes == PAGE
    driver = Driver()
    ranges = PinnedRanges(driver)
    with contextlib.closing(
        MemPool(
            space,
            arena_bytes=8 * PAGE,
            generation="g",
            reserve_bytes=64 * PAGE,
            slab_bytes=4 * PAGE,
        )
    ) as pool:
        pool.pin_with(ranges)
        assert sorted(driver.held.items()) == pool.regions()
        assert len(driver.held) == 2
        for size in (20, 12, 12, 24, 4):
            pool.resize(size * PAGE)
            assert sorted(driver.held.items()) == pool.regions()
            assert ranges.pinned_bytes == size * PAGE
        ranges.check()


def test_no_driver_is_one_clear_error() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA driver")
    with pytest.raises(DeviceError, match=r"no CUDA driver: libcuda\.so\.1"):
        CudaDriver(torch.device("cuda", 0))
