"""Speed and memory of the router's merged tree. Prints one JSON object.

    python benchmark/micro/global_tree.py [--prompts 200] [--pages 512] [--shared 64]

``runs``: prompts that share their beginning, held whole by one instance and in part by another.
``singles``: the worst case, a page held by another set of instances than its neighbours are.
Times are medians in microseconds.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import time
import tracemalloc
from collections.abc import Callable

from sglang_memserve.protocol.events import (
    BlockRemoved,
    BlockStored,
    EventBatch,
    decode_frames,
    encode_frames,
)
from sglang_memserve.router.global_tree import GlobalTree
from sglang_memserve.types import InstanceId, ShortKey, Tier

HOSTS = [InstanceId(f"http://host{number}:30000") for number in range(4)]
DRAM = Tier.DRAM.value


def stored(keys: list[int], parent: int | None = None) -> BlockStored:
    """As it comes off the wire: with integers of its own."""
    event = BlockStored(keys, parent, [], 16, medium=DRAM)
    decoded = decode_frames(encode_frames(0, EventBatch(0.0, [event])))[1].events[0]
    assert isinstance(decoded, BlockStored)
    return decoded


def median_us(run: Callable[[], object], rounds: int = 100) -> float:
    samples = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        samples.append((time.perf_counter() - start) * 1e6)
    return round(statistics.median(samples), 1)


def each_us(run: Callable[[], object], count: int) -> float:
    start = time.perf_counter()
    run()
    return round((time.perf_counter() - start) * 1e6 / count, 2)


def in_runs(chains: list[list[int]]) -> GlobalTree:
    tree = GlobalTree()
    for number, chain in enumerate(chains):
        tree.apply(HOSTS[number % 4], stored(chain))
        if number % 3 == 0:
            tree.apply(HOSTS[(number + 1) % 4], stored(chain[: len(chain) * 3 // 5]))
    return tree


def in_singles(chains: list[list[int]]) -> GlobalTree:
    tree = GlobalTree()
    for chain in chains:
        tree.apply(HOSTS[0], stored(chain))
        for at in range(0, len(chain), 2):
            tree.apply(HOSTS[1], stored([chain[at]], chain[at - 1] if at else None))
    return tree


def shape(
    build: Callable[[list[list[int]]], GlobalTree], chains: list[list[int]]
) -> dict[str, float]:
    tracemalloc.start()
    tree = build(chains)
    held_bytes = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    stats = tree.stats()
    prompt = [ShortKey(key) for key in stored(chains[0]).block_hashes]
    return {
        "pages": stats.pages,
        "nodes": stats.nodes,
        "bytes_per_page": round(held_bytes / stats.pages, 1),
        "match_us": median_us(lambda: tree.match(prompt)),
    }


def changes(chains: list[list[int]]) -> dict[str, float]:
    tree = GlobalTree()
    events = [stored(chain) for chain in chains]
    pages = sum(map(len, chains))
    host = HOSTS[0]

    def store() -> None:
        for event in events:
            tree.apply(host, event)

    def evict() -> None:
        for event in events:
            for key in reversed(event.block_hashes):
                tree.apply(host, BlockRemoved([key], DRAM))

    measured = {
        "store_us_per_page": each_us(store, pages),
        "evict_one_by_one_us_per_page": each_us(evict, pages),
    }
    store()
    measured["drop_us_per_page"] = each_us(lambda: tree.drop(host), pages)
    return measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--pages", type=int, default=512)
    parser.add_argument("--shared", type=int, default=64)
    options = parser.parse_args()
    source = random.Random(1)

    def keys(count: int) -> list[int]:
        return [source.getrandbits(64) - 2**63 for _ in range(count)]

    shared = keys(options.shared)
    chains = [shared + keys(options.pages - options.shared) for _ in range(options.prompts)]
    result = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "pages_per_prompt": options.pages,
        "runs": shape(in_runs, chains),
        "singles": shape(in_singles, chains[: max(options.prompts // 4, 1)]),
        "changes": changes(chains),
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
