"""Checksums of blocks: kept with the page, compared beside the agent's thread."""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
import xxhash
from numpy.typing import NDArray
from sglang_memserve import mempool
from sglang_memserve.checksums import (
    UNKNOWN,
    block_checksum,
    block_checksums,
    checksum_of,
    first_damaged,
)
from sglang_memserve.memory.checksums import ChecksumTable
from sglang_memserve.mempool import MemPool
from sglang_memserve.transfer.verify import InlineVerifier, ThreadVerifier, Verdict, Verifier
from sglang_memserve.types import BlockId, Checksums, Namespace, PageKey

NAMESPACE = Namespace("m", "1", "float16", 16, 1, 1, 64, 64, 0, 1)
SIZE = 4096
LIMIT_S = 10.0
KEYS = [PageKey(bytes([index + 1]) * 32) for index in range(8)]


class Done:
    def __init__(self) -> None:
        self.event = threading.Event()

    def __call__(self) -> None:
        self.event.set()


@pytest.fixture(params=["inline", "thread"])
def verifier(request: pytest.FixtureRequest) -> Iterator[Verifier]:
    made: Verifier = InlineVerifier() if request.param == "inline" else ThreadVerifier(Done())
    yield made
    made.close()
    assert not [t for t in threading.enumerate() if t.name == "memserve-verify"]


@pytest.fixture
def memory() -> NDArray[np.uint8]:
    return np.random.default_rng(5).integers(0, 256, 8 * SIZE, dtype=np.uint8)


def addresses(memory: NDArray[np.uint8]) -> list[int]:
    return [memory.ctypes.data + index * SIZE for index in range(len(memory) // SIZE)]


def verdicts(verifier: Verifier, count: int) -> list[Verdict]:
    found: list[Verdict] = []
    end = time.monotonic() + LIMIT_S
    while len(found) < count:
        found += verifier.take()
        assert time.monotonic() < end, "no verdict"
        time.sleep(0.001)
    return sorted(found)


def test_it_is_xxh3(memory: NDArray[np.uint8]) -> None:
    assert block_checksum(memory.ctypes.data, len(memory)) == xxhash.xxh3_64_intdigest(
        memory.tobytes()
    )


def test_any_flipped_bit_is_seen(memory: NDArray[np.uint8]) -> None:
    blocks = addresses(memory)
    sums = block_checksums(blocks, SIZE)
    assert first_damaged(blocks, SIZE, sums) is None
    for place in (0, SIZE, 5 * SIZE - 1, 8 * SIZE - 1):
        memory[place] ^= 1
        assert first_damaged(blocks, SIZE, sums) == place // SIZE
        memory[place] ^= 1


def test_an_unknown_checksum_passes(memory: NDArray[np.uint8]) -> None:
    blocks = addresses(memory)
    assert first_damaged(blocks, SIZE, [UNKNOWN] * len(blocks)) is None


def test_a_verifier_says_which_block(verifier: Verifier, memory: NDArray[np.uint8]) -> None:
    blocks = addresses(memory)
    sums = block_checksums(blocks, SIZE)
    memory[6 * SIZE + 17] ^= 0x40
    verifier.submit(1, blocks[:6], SIZE, sums[:6])
    verifier.submit(2, blocks[4:], SIZE, sums[4:])
    assert verdicts(verifier, 2) == [Verdict(1, None), Verdict(2, 2)]


def test_a_full_queue_is_worked_off_on_the_spot(memory: NDArray[np.uint8]) -> None:
    hold, entered = threading.Event(), threading.Event()

    def on_done() -> None:
        if threading.current_thread().name == "memserve-verify":
            entered.set()
            hold.wait(LIMIT_S)

    verifier = ThreadVerifier(on_done, queued=1)
    blocks = addresses(memory)
    sums = block_checksums(blocks, SIZE)
    verifier.submit(1, blocks, SIZE, sums)
    assert entered.wait(LIMIT_S)
    for ticket in (2, 3):
        verifier.submit(ticket, blocks, SIZE, sums)
    assert [verdict.ticket for verdict in verdicts(verifier, 2)] == [1, 3]
    hold.set()
    assert verdicts(verifier, 1) == [Verdict(2, None)]
    verifier.close()


def test_the_table_grows_and_forgets() -> None:
    table = ChecksumTable()
    table.set([BlockId(5)], [])
    assert table.get([BlockId(5)]) == []
    table.set([BlockId(5)], [2**64 - 1])
    table.set([BlockId(5000), BlockId(4)], [7, UNKNOWN])
    assert table.get([BlockId(5), BlockId(5000), BlockId(6), BlockId(10**6)]) == [
        2**64 - 1,
        7,
        UNKNOWN,
        UNKNOWN,
    ]
    table.move(BlockId(5), BlockId(6))
    table.set([BlockId(5)], [])
    assert table.get([BlockId(5), BlockId(6)]) == [UNKNOWN, 2**64 - 1]


@pytest.mark.parametrize("checksums", Checksums)
def test_a_pool_keeps_what_was_committed_with_each_page(checksums: Checksums) -> None:
    pool = MemPool(
        NAMESPACE, arena_bytes=8 * NAMESPACE.block_bytes, generation="g", checksums=checksums
    )
    with pool.prepare_store(KEYS[:4]) as store:
        blocks = [block for _, block in store.missing]
        for index, block in enumerate(blocks):
            ctypes.memset(pool.address(block), index + 1, pool.block_bytes)
        store.commit(checksums=pool.compute_checksums(blocks))
    kept = pool.checksums(blocks)
    if checksums is Checksums.OFF:
        assert kept == []
    else:
        assert kept == block_checksums(map(pool.address, blocks), pool.block_bytes)
    pool.delete(KEYS)
    with pool.prepare_store(KEYS[4:]) as store:
        again = [block for _, block in store.missing]
        store.commit()
    assert set(again) & set(blocks) and not any(pool.checksums(again))
    pool.close()


def test_a_page_that_moves_takes_its_checksum_along() -> None:
    size = NAMESPACE.block_bytes
    pool = MemPool(
        NAMESPACE,
        arena_bytes=8 * size,
        generation="g",
        reserve_bytes=8 * size,
        slab_bytes=4 * size,
        checksums=Checksums.ON,
    )
    with pool.prepare_store(KEYS) as store:
        blocks = [block for _, block in store.missing]
        for index, block in enumerate(blocks):
            ctypes.memset(pool.address(block), index + 1, size)
        store.commit(checksums=pool.compute_checksums(blocks))
    pool.delete(KEYS[:4])
    pool.resize(4 * size)
    blocks = pool.match(KEYS[4:])
    assert pool.total_blocks == 4 and blocks
    assert pool.checksums(blocks) == block_checksums(map(pool.address, blocks), size)
    pool.close()


def test_a_pool_that_is_closed_meanwhile_keeps_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    size = NAMESPACE.block_bytes
    pool = MemPool(NAMESPACE, arena_bytes=8 * size, generation="g", checksums=Checksums.ON)
    store = pool.prepare_store(KEYS[:2])
    blocks = [block for _, block in store.missing]

    def close_first(memory: memoryview) -> int:
        pool.close()
        return checksum_of(memory)

    monkeypatch.setattr(mempool, "checksum_of", close_first)
    zeros = checksum_of(memoryview(bytes(size)))
    assert pool.compute_checksums(blocks) == [zeros, zeros]
    assert pool.compute_checksums(blocks) == []
    store.commit(checksums=[])
