"""Speed of MemPool's bookkeeping with many pages indexed. Prints one JSON object.

    python benchmark/micro/pool.py [--pages 1000000] [--request-pages 256] [--rounds 200]

Blocks are small (64 bytes), so that bookkeeping is measured and not memory; times are in
microseconds for a whole request of ``--request-pages`` pages.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import resource
import statistics
import sys
import time
from collections.abc import Callable

from sglang_memserve.mempool import MemPool
from sglang_memserve.types import Namespace, PageKey

NAMESPACE = Namespace("benchmark", "1", "bfloat16", 1, 1, 1, 16, 16, 0, 1)


def chain(number: int, pages: int) -> list[PageKey]:
    """Keys of one prefix. Random bytes are as good as hashes here."""
    source = random.Random(number)
    return [PageKey(source.randbytes(32)) for _ in range(pages)]


def measure_us(rounds: int, run: Callable[[int], object]) -> dict[str, float]:
    samples = []
    for index in range(rounds):
        start = time.perf_counter()
        run(index)
        samples.append((time.perf_counter() - start) * 1e6)
    samples.sort()
    return {
        "median": round(statistics.median(samples), 1),
        "p99": round(samples[int(0.99 * (len(samples) - 1))], 1),
        "max": round(samples[-1], 1),
    }


def resident_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pages", type=int, default=1_000_000)
    parser.add_argument("--request-pages", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=200)
    options = parser.parse_args()
    size = options.request_pages
    chains = options.pages // size
    total = chains * size

    before = resident_bytes()
    pool = MemPool(NAMESPACE, arena_bytes=total * NAMESPACE.block_bytes, generation="benchmark")
    start = time.perf_counter()
    for number in range(chains):
        pool.prepare_store(chain(number, size)).commit()
    fill_s = time.perf_counter() - start
    index_bytes = resident_bytes() - before
    pool.drain_events()

    order = [random.Random(1).randrange(chains) for _ in range(options.rounds)]
    known = [chain(number, size) for number in order]
    fresh = [chain(chains + number, size) for number in range(options.rounds)]
    leases = []
    times = {
        "readable_pages": measure_us(options.rounds, lambda i: pool.readable_pages(known[i])),
        "acquire": measure_us(
            options.rounds, lambda i: leases.append(pool.acquire(known[i], owner="o", ttl_s=60))
        ),
        "release": measure_us(options.rounds, lambda i: leases[i].release()),
        "prepare_store of known pages": measure_us(
            options.rounds, lambda i: pool.prepare_store(known[i]).commit()
        ),
    }
    stores = []
    times["prepare_store, evicting as many"] = measure_us(
        options.rounds, lambda i: stores.append(pool.prepare_store(fresh[i]))
    )
    times["commit"] = measure_us(options.rounds, lambda i: stores[i].commit())
    times["drain_events"] = measure_us(1, lambda _: pool.drain_events())
    times["snapshot"] = measure_us(1, lambda _: pool.snapshot())
    times["clear"] = measure_us(1, lambda _: pool.clear())
    pool.close()
    report = {
        "benchmark": "micro/pool",
        "command": " ".join(["python", *sys.argv]),
        "machine": {"cpu": platform.machine(), "cores": os.cpu_count(), "python": sys.version[:6]},
        "pages": total,
        "request_pages": size,
        "fill_s": round(fill_s, 2),
        "bytes_per_page": round(index_bytes / total),
        "microseconds": times,
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
