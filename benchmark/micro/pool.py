"""Speed and memory of MemPool's bookkeeping with many pages indexed.

    python benchmark/micro/pool.py [--pages 1000000] [--tokens 4096] [--rounds 100] [--json FILE]

Blocks are small (64 bytes), so that bookkeeping is measured and not memory. Times are microseconds
for one prompt of ``--tokens`` tokens in pages of 16: wall time, and processor time of the calling
thread, which other work on the machine disturbs less; the policies take turns. The pools are full,
so storing evicts as many pages as it stores. Memory is what a process with one pool grew by: all of
it but its blocks, the keys included.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import psutil
from sglang_memserve.config import DEFAULT_EVICTION
from sglang_memserve.hashing import page_keys
from sglang_memserve.mempool import MemPool
from sglang_memserve.types import BlockId, Eviction, Namespace, PageKey

from benchmark.harness import report, spread

PAGE = 16
NAMESPACE = Namespace("benchmark", "1", "bfloat16", PAGE, 1, 1, 1, 1, 0, 1)
LIMIT_S = 600


def chain(number: int, pages: int) -> list[PageKey]:
    """Keys of one prefix. Random bytes are as good as hashes here."""
    source = random.Random(number)
    return [PageKey(source.randbytes(32)) for _ in range(pages)]


def fill(pages: int, size: int, eviction: Eviction) -> MemPool:
    total = pages // size * size
    pool = MemPool(
        NAMESPACE,
        arena_bytes=total * NAMESPACE.block_bytes,
        generation="benchmark",
        eviction=eviction,
    )
    for number in range(total // size):
        pool.prepare_store(chain(number, size)).commit()
        if number % 64 == 0:
            pool.drain_events()
    pool.drain_events()
    return pool


def bytes_per_page(pages: int, size: int, eviction: Eviction) -> float:
    process = psutil.Process()
    before = process.memory_info().rss
    pool = fill(pages, size, eviction)
    grown: float = process.memory_info().rss - before
    return round(grown / pool.total_blocks, 1)


class Verbs:
    """Every verb on one pool; those of one number belong together and run in this order."""

    def __init__(self, pool: MemPool, size: int, rounds: int) -> None:
        self.pool = pool
        chains = pool.total_blocks // size
        # Keys of pages that are there are made anew: equal, but not the same objects.
        order = random.Random(2)
        known = [order.randrange(chains // 2, chains) for _ in range(rounds)]
        self.known = [chain(number, size) for number in known]
        self.fresh = [chain(chains + number, size) for number in range(2 * rounds)]
        self.size = size
        self.blocks: list[BlockId] = []

    def match(self, number: int) -> None:
        self.pool.match(self.known[number])

    def acquire(self, number: int) -> None:
        self.lease = self.pool.acquire(self.known[number], owner="o", ttl_s=600)

    def release(self, number: int) -> None:
        self.lease.release()

    def prepare_store(self, number: int) -> None:
        self.store = self.pool.prepare_store(self.fresh[2 * number])

    def commit(self, number: int) -> None:
        self.store.commit()

    def alloc_mem(self, number: int) -> None:
        self.blocks = self.pool.alloc_mem(self.size)

    def insert(self, number: int) -> None:
        self.pool.insert(self.fresh[2 * number + 1], self.blocks)


VERBS = ("match", "acquire", "release", "prepare_store", "commit", "alloc_mem", "insert")


def time_us(sides: dict[str, Verbs], rounds: int) -> dict[str, Any]:
    wall: dict[tuple[str, str], list[float]] = defaultdict(list)
    processor: dict[tuple[str, str], list[float]] = defaultdict(list)
    for number in range(rounds):
        for verb in VERBS:
            for name, side in sides.items():
                run = getattr(side, verb)
                start, start_thread = time.perf_counter(), time.thread_time()
                run(number)
                processor[name, verb].append((time.thread_time() - start_thread) * 1e6)
                wall[name, verb].append((time.perf_counter() - start) * 1e6)
        for side in sides.values():
            side.pool.drain_events()
    return {
        name: {
            verb: {
                "wall": spread(wall[name, verb], 0),
                "processor": spread(processor[name, verb], 0),
            }
            for verb in VERBS
        }
        for name in sides
    }


def time_keys_us(tokens: int, rounds: int) -> dict[str, float]:
    chance = random.Random(1)
    samples = []
    for _ in range(rounds):
        words = [chance.randrange(1 << 17) for _ in range(tokens)]
        start = time.thread_time()
        page_keys(words, PAGE)
        samples.append((time.thread_time() - start) * 1e6)
    return spread(samples, 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pages", type=int, default=1_000_000)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    started = time.monotonic()
    size = options.tokens // PAGE
    context = multiprocessing.get_context("spawn")
    memory = {}
    for eviction in Eviction:
        with context.Pool(1) as workers:
            job = workers.apply_async(bytes_per_page, (options.pages, size, eviction))
            memory[eviction.value] = job.get(timeout=LIMIT_S)
    sides = {
        eviction.value: Verbs(fill(options.pages, size, eviction), size, options.rounds)
        for eviction in Eviction
    }
    results = {
        "default_eviction": DEFAULT_EVICTION.value,
        "tokens": options.tokens,
        "pages": options.pages // size * size,
        "bytes_per_page": memory,
        "keys_us": time_keys_us(options.tokens, options.rounds),
        "verbs_us": time_us(sides, options.rounds),
    }
    report("pool", results, started, options.json)


if __name__ == "__main__":
    main()
