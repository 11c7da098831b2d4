"""The watch over the device tree: what it tells, and when it must say no more."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import pytest
from sglang_memserve.hashing import short_key
from sglang_memserve.mempool import MemPool
from sglang_memserve.plugin.device_watch import DeviceWatch
from sglang_memserve.protocol.events import AllBlocksCleared, BlockRemoved, BlockStored, Event
from sglang_memserve.types import Namespace, PageKey

PAGE = 4
SPACE = Namespace("m", "1", "bfloat16", PAGE, 1, 1, 1, 1, 0, 1)
KEYS = [PageKey(hashlib.sha256(bytes([number])).digest()) for number in range(4)]
SHORT: list[int] = [short_key(key) for key in KEYS]


@pytest.fixture
def pool() -> Iterator[MemPool]:
    made = MemPool(SPACE, arena_bytes=2 * SPACE.block_bytes, generation="g")
    yield made
    made.check()
    made.close()


def told(pool: MemPool) -> list[list[Event]]:
    return [events for _, events in pool.drain_events()]


def test_a_round_is_one_batch_in_order(pool: MemPool) -> None:
    watch = DeviceWatch(pool, PAGE)
    watch.joined(KEYS[:2], None)
    watch.joined(KEYS[2:], KEYS[1])
    watch.leaves([key.hex() for key in KEYS[2:]])
    assert told(pool) == []
    watch.settle(2 * PAGE)
    assert told(pool) == [
        [
            BlockStored(SHORT[:2], None, [], PAGE, medium="GPU"),
            BlockStored(SHORT[2:], SHORT[1], [], PAGE, medium="GPU"),
            BlockRemoved(SHORT[2:], medium="GPU"),
        ]
    ]
    watch.settle(2 * PAGE)
    assert told(pool) == [] and watch.stats() == {"device_watch_lost_total": 0}


def test_a_node_told_of_twice_is_told_once(pool: MemPool) -> None:
    watch = DeviceWatch(pool, PAGE)
    watch.joined(KEYS[:1], None)
    watch.joined(KEYS[:2], None)
    watch.settle(2 * PAGE)
    assert told(pool) == [
        [
            BlockStored(SHORT[:1], None, [], PAGE, medium="GPU"),
            BlockStored(SHORT[1:2], SHORT[0], [], PAGE, medium="GPU"),
        ]
    ]


@pytest.mark.parametrize("tokens", [PAGE, 3 * PAGE, 2 * PAGE + 1])
def test_a_count_that_differs_silences_it_until_a_flush(pool: MemPool, tokens: int) -> None:
    watch = DeviceWatch(pool, PAGE)
    watch.joined(KEYS[:2], None)
    watch.settle(tokens)
    _, removed = told(pool)
    assert removed == [BlockRemoved(SHORT[:2], medium="GPU")]
    assert watch.lost == 1 and pool.device_pages == 0
    watch.joined(KEYS[2:], None)
    watch.leaves([KEYS[0].hex()])
    watch.settle(2 * PAGE)
    assert told(pool) == [] and watch.lost == 1
    watch.reset()
    pool.clear()
    watch.joined(KEYS[2:3], None)
    watch.settle(PAGE)
    assert told(pool) == [
        [AllBlocksCleared()],
        [BlockStored(SHORT[2:3], None, [], PAGE, medium="GPU")],
    ]
