"""What the watch over SGLang's device tree costs the scheduler thread, a page.

    python benchmark/micro/device_watch.py [--pages 64] [--rounds 2000]

A round is what a scheduler round with a prefilled chunk does: one node joins, one leaves, one batch
is made. Beside it: hashing the same pages, which SGLang does anyway.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time

from sglang_memserve.hashing import page_keys
from sglang_memserve.mempool import MemPool
from sglang_memserve.plugin.device_watch import DeviceWatch
from sglang_memserve.types import Namespace, PageKey

PAGE = 16
SPACE = Namespace("m", "1", "bfloat16", PAGE, 1, 1, 1, 1, 0, 1)


def chain(seed: int, pages: int) -> list[PageKey]:
    return [
        PageKey(hashlib.sha256(f"{seed} {number}".encode()).digest()) for number in range(pages)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pages", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=2000)
    arguments = parser.parse_args()
    pages, rounds = arguments.pages, arguments.rounds
    pool = MemPool(SPACE, arena_bytes=1024 * SPACE.block_bytes, generation="g")
    watch = DeviceWatch(pool, PAGE)
    chains = [chain(number, pages) for number in range(rounds)]
    texts = [[key.hex() for key in keys] for keys in chains]
    seconds = 0.0
    for number in range(1, rounds):
        started = time.perf_counter()
        if number > 1:
            watch.leaves(texts[number - 1])
        watch.joined(chains[number], None)
        watch.settle(pages * PAGE)
        seconds += time.perf_counter() - started
        pool.drain_events()  # another thread's work
    assert watch.lost == 0
    tokens = list(range(pages * PAGE))
    started = time.perf_counter()
    for _ in range(100):
        page_keys(tokens, PAGE)
    hashing = (time.perf_counter() - started) / 100 / pages
    print(
        json.dumps(
            {
                "pages_a_round": pages,
                "watch_us_a_page": round(seconds / (rounds - 1) / pages * 1e6, 3),
                "watch_us_a_round": round(seconds / (rounds - 1) * 1e6, 1),
                "hashing_us_a_page": round(hashing * 1e6, 3),
            }
        )
    )
    pool.close()


if __name__ == "__main__":
    main()
