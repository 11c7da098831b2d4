"""Speed and memory of MemPool's bookkeeping with many pages indexed.

    python benchmark/micro/pool.py [--pages 1000000] [--tokens 4096] [--rounds 100] [--json FILE]

Blocks are small (64 bytes), so that bookkeeping is measured and not memory. Times are microseconds
for one prompt of ``--tokens`` tokens in pages of 16: wall time, and processor time of the calling
thread, which other work on the machine disturbs less. The pool is full, so storing evicts as many
pages as it stores. Each policy is measured in a process of its own, and memory is what the process
grew by: all of the pool but its blocks, the keys included.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
from sglang_memserve.config import DEFAULT_EVICTION
from sglang_memserve.hashing import page_keys
from sglang_memserve.mempool import MemPool
from sglang_memserve.types import Eviction, Namespace, PageKey

from benchmark.harness import report, spread

PAGE = 16
NAMESPACE = Namespace("benchmark", "1", "bfloat16", PAGE, 1, 1, 1, 1, 0, 1)
LIMIT_S = 600


def chain(number: int, pages: int) -> list[PageKey]:
    """Keys of one prefix. Random bytes are as good as hashes here."""
    source = random.Random(number)
    return [PageKey(source.randbytes(32)) for _ in range(pages)]


def measure_us(rounds: int, run: Callable[[int], object]) -> dict[str, dict[str, float]]:
    wall: list[float] = []
    thread: list[float] = []
    for index in range(rounds):
        start, start_thread = time.perf_counter(), time.thread_time()
        run(index)
        thread.append((time.thread_time() - start_thread) * 1e6)
        wall.append((time.perf_counter() - start) * 1e6)
    return {"wall": spread(wall, 0), "processor": spread(thread, 0)}


def measure(pages: int, tokens: int, rounds: int, eviction: Eviction) -> dict[str, Any]:
    size = tokens // PAGE
    chains = pages // size
    process = psutil.Process()
    before = process.memory_info().rss
    pool = MemPool(
        NAMESPACE,
        arena_bytes=chains * size * NAMESPACE.block_bytes,
        generation="benchmark",
        eviction=eviction,
    )
    for number in range(chains):
        pool.prepare_store(chain(number, size)).commit()
        if number % 64 == 0:
            pool.drain_events()
    pool.drain_events()
    grown = process.memory_info().rss - before
    chance = random.Random(1)
    words = [[chance.randrange(1 << 17) for _ in range(tokens)] for _ in range(rounds)]
    times = {"keys of the tokens": measure_us(rounds, lambda i: page_keys(words[i], PAGE))}
    times |= time_verbs(pool, chains, size, rounds)
    return {"pages": chains * size, "bytes_per_page": round(grown / chains / size, 1), "us": times}


def time_verbs(pool: MemPool, chains: int, size: int, rounds: int) -> dict[str, Any]:
    # Keys of pages that are there are made anew: equal, but not the same objects.
    order = random.Random(2)
    known = [chain(order.randrange(chains // 2, chains), size) for _ in range(rounds)]
    fresh = [chain(chains + number, size) for number in range(3 * rounds)]
    times: dict[str, Any] = {"match": measure_us(rounds, lambda i: pool.match(known[i]))}
    leases = []
    times["acquire"] = measure_us(
        rounds, lambda i: leases.append(pool.acquire(known[i], owner="o", ttl_s=600))
    )
    times["release"] = measure_us(rounds, lambda i: leases[i].release())
    stores = []
    times["prepare_store, evicting as many"] = measure_us(
        rounds, lambda i: stores.append(pool.prepare_store(fresh[i]))
    )
    times["commit"] = measure_us(rounds, lambda i: stores[i].commit())
    times["both"] = measure_us(rounds, lambda i: pool.prepare_store(fresh[rounds + i]).commit())
    blocks = []
    times["alloc_mem, evicting as many"] = measure_us(
        rounds, lambda i: blocks.append(pool.alloc_mem(size))
    )
    times["insert"] = measure_us(rounds, lambda i: pool.insert(fresh[2 * rounds + i], blocks[i]))
    pool.drain_events()
    times["snapshot of all pages"] = measure_us(1, lambda _: pool.snapshot())
    times["clear of all pages"] = measure_us(1, lambda _: pool.clear())
    pool.close()
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pages", type=int, default=1_000_000)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    started = time.monotonic()
    results: dict[str, Any] = {"default": DEFAULT_EVICTION.value, "tokens": options.tokens}
    context = multiprocessing.get_context("spawn")
    for eviction in Eviction:
        with context.Pool(1) as workers:
            job = workers.apply_async(
                measure, (options.pages, options.tokens, options.rounds, eviction)
            )
            results[eviction.value] = job.get(timeout=LIMIT_S)
    report("pool", results, started, options.json)


if __name__ == "__main__":
    main()
