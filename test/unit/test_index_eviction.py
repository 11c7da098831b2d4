"""The eviction policies and their parts."""

from __future__ import annotations

import hashlib

import pytest
from sglang_memserve.index.eviction.ghosts import Ghosts
from sglang_memserve.index.eviction.heap import LeafHeap
from sglang_memserve.index.eviction.registry import POLICIES
from sglang_memserve.index.local_index import LocalIndex
from sglang_memserve.types import BlockId, Eviction, PageKey


def key(name: object) -> PageKey:
    return PageKey(hashlib.sha256(str(name).encode()).digest())


class Cache:
    """Single pages, each a prefix of its own, in an index that makes room for them."""

    def __init__(self, eviction: Eviction, capacity: int) -> None:
        self.index = LocalIndex(capacity, eviction)
        self.free = [BlockId(block) for block in range(capacity)]

    def use(self, *names: object) -> int:
        """How many were there; the others are stored."""
        hits = 0
        for name in names:
            found = self.index.match([key(name)])
            hits += len(found)
            self.index.touch(found)
            if not found:
                self.free += [] if self.free else self.index.evict(1).blocks
                self.index.insert([key(name)], [self.free.pop()], [None])
        self.index.check()
        return hits

    def holds(self, *names: object) -> bool:
        return all(key(name) in self.index for name in names)


def test_every_policy_has_a_name() -> None:
    assert set(POLICIES) == set(Eviction)


@pytest.mark.parametrize(("eviction", "kept"), [(Eviction.LRU, 0), (Eviction.TWO_QUEUE, 8)])
def test_a_scan_pushes_out_what_is_in_use_only_under_lru(eviction: Eviction, kept: int) -> None:
    cache = Cache(eviction, 40)
    used = [f"chat {number}" for number in range(8)]
    cache.use(*used)
    cache.use(*(f"other {number}" for number in range(5)))
    assert cache.use(*used) == 8
    cache.use(*(f"scan {number}" for number in range(1000)))
    assert sum(cache.holds(name) for name in used) == kept


def test_a_use_just_after_a_page_came_promotes_nothing() -> None:
    cache = Cache(Eviction.TWO_QUEUE, 40)
    cache.use("page", "page", "page")
    cache.use(*(f"scan {number}" for number in range(1000)))
    assert not cache.holds("page")


def test_a_page_that_comes_back_is_protected() -> None:
    cache = Cache(Eviction.TWO_QUEUE, 40)
    cache.use("page", *range(40))
    assert not cache.holds("page")
    cache.use("page", *range(100, 1100))
    assert cache.holds("page")


def test_protected_pages_make_room_while_they_fill_more_than_half() -> None:
    cache = Cache(Eviction.TWO_QUEUE, 16)
    cache.use(*range(16))
    assert cache.use(*range(14)) == 14
    cache.use("one more")
    kept = [name for name in range(14) if cache.holds(name)][:7]
    cache.use(*kept)
    cache.use(*range(100, 1100))
    assert len(cache.index) == 16
    # Least recently used first; new pages keep half of the blocks and the one that was to go next.
    assert [name for name in range(14) if cache.holds(name)] == kept


def test_growing_forgets_ghosts_and_nothing_else() -> None:
    cache = Cache(Eviction.TWO_QUEUE, 8)
    cache.use("page", *range(8))
    cache.index.resize(16)
    cache.free += [BlockId(block) for block in range(8, 16)]
    cache.use("page", *range(100, 1100))
    assert not cache.holds("page")
    assert len(cache.index) == 16


def test_a_ghost_is_recalled_once_and_gives_way_to_newer_ones() -> None:
    ghosts = Ghosts(64)
    page, numbers = key("page"), [key(number) for number in range(2000)]
    assert ghosts.recall([page]) == [False]
    ghosts.remember([page])
    assert ghosts.recall([page, key("other"), page]) == [True, False, False]
    ghosts.remember([page])
    ghosts.remember(numbers)
    assert ghosts.recall([page]) == [False]
    assert 0 < sum(ghosts.recall(numbers)) <= 64 == len(ghosts)


def test_heap_forgets_what_is_not_evictable_until_it_is_offered_again() -> None:
    heap = LeafHeap(4)
    stamps = [5, 3, 9, 1]
    for block, stamp in enumerate(stamps):
        heap.offer(block, stamp)
        heap.offer(block, stamp)
    assert len(heap) == 4
    stamps[3] = 20
    assert heap.take(stamps, lambda block: block != 1) == 0
    assert heap.take(stamps, lambda block: block != 1) == 2
    heap.offer(1, stamps[1])
    heap.check(stamps, lambda block: block in (1, 3))
    assert [heap.take(stamps, lambda _: True) for _ in range(3)] == [1, 3, None]


def test_touching_leaves_no_garbage() -> None:
    heap = LeafHeap(3)
    stamps = [1, 2, 3]
    for stamp in range(1000):
        stamps[stamp % 3] = 10 + stamp
        heap.offer(stamp % 3, stamps[stamp % 3])
        heap.check(stamps, lambda block: block in heap)
    assert len(heap) == 3
