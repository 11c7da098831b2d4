"""Dynamo's ``RadixTree`` on the events and prompts that ``decision.py`` writes to it.

Runs in an environment of its own, with ``ai-dynamo-runtime`` alone: nothing of this project is
imported. Arguments: how many of the input lines are events, and the page size.
"""

from __future__ import annotations

import json
import resource
import statistics
import sys
import time
from importlib.metadata import version

from dynamo.llm import (  # type: ignore[import-not-found]
    RadixTree,
    compute_block_hash_for_seq,
)


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def percentiles(values: list[float]) -> dict[str, float]:
    cuts = statistics.quantiles(values, n=100)
    return {"p50_us": round(cuts[49], 1), "p99_us": round(cuts[98], 1)}


def stored(number: int, keys: list[int], parent: int | None) -> bytes:
    mask = 2**64 - 1
    blocks = [{"block_hash": key & mask, "tokens_hash": key & mask} for key in keys]
    data = {"parent_hash": None if parent is None else parent & mask, "blocks": blocks}
    return json.dumps({"event_id": number, "data": {"stored": data}}).encode()


def main() -> None:
    count, page = int(sys.argv[1]), int(sys.argv[2])
    lines = sys.stdin.read().split("\n")
    events = [
        (host, stored(number, keys, parent), keys)
        for number, (host, keys, parent) in enumerate(map(json.loads, lines[:count]))
    ]
    prompts = [json.loads(line) for line in lines[count:]]
    pages = len({key for _, _, keys in events for key in keys})
    tree, before, start = RadixTree(), resident_bytes(), time.perf_counter()
    for host, event, _ in events:
        tree.apply_event(host, event)
    # The tree's thread answers in order: this returns when all events are applied.
    tree.find_matches([0])
    seconds = time.perf_counter() - start
    grown = resident_bytes() - before
    hashed, matched, found = [], [], 0
    for prompt in prompts:
        keys = [key & (2**64 - 1) for key in prompt["keys"]]
        start = time.perf_counter()
        compute_block_hash_for_seq(prompt["ids"], page)
        hashed.append((time.perf_counter() - start) * 1e6)
        start = time.perf_counter()
        scores = tree.find_matches(keys)
        matched.append((time.perf_counter() - start) * 1e6)
        found += bool(scores.scores)
    result = {
        "version": version("ai-dynamo-runtime"),
        "events_per_s": round(len(events) / seconds),
        "bytes_per_page": round(grown / pages, 1),
        "hash": percentiles(hashed),
        "match_by_the_clock": percentiles(matched),
        "prompts_with_a_match": found,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
