"""The router's merged tree, native and in Python, on the same events. Writes one JSON object.

    python benchmark/micro/global_tree.py [--pages 1000000] [--instances 64] [--json FILE]

Prompts of 512 pages that share their first 64; each is held by one to three instances. ``apply``:
millions of pages a second out of ``BlockStored`` events of so many pages, and the longest single
event (the table grows in it). ``match``: microseconds for a prompt of 512 pages whose keys were
just made, as a request's are. ``bytes_per_page``: what building the tree added to the process; the
tree in Python also keeps the events' integers, 32 bytes each, which are here already. Times are of
this thread alone (``thread_time``), since others share the machine.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import random
import statistics
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
from sglang_memserve.kernels import native
from sglang_memserve.protocol.events import BlockRemoved, BlockStored
from sglang_memserve.router.tree.merged import MergedTree, merged_tree
from sglang_memserve.router.tree.reference import GlobalTree
from sglang_memserve.types import InstanceId, ShortKey, Tier

from benchmark.harness import report

PROMPT, SHARED = 512, 64
DRAM = Tier.DRAM.value


@dataclass(frozen=True)
class Work:
    chains: list[list[int]]
    events: list[tuple[InstanceId, BlockStored]]


def work(pages: int, instances: int, event_pages: int) -> Work:
    source = random.Random(1)

    def keys(count: int) -> list[int]:
        return [source.getrandbits(64) - 2**63 for _ in range(count)]

    hosts = [InstanceId(f"http://host{number}:30000") for number in range(instances)]
    shared = keys(SHARED)
    chains = [shared + keys(PROMPT - SHARED) for _ in range(pages // (PROMPT - SHARED))]
    events = []
    for number, chain in enumerate(chains):
        for host in source.sample(hosts, min(1 + number % 3, instances)):
            for at in range(0, PROMPT, event_pages):
                parent = chain[at - 1] if at else None
                hashes = chain[at : at + event_pages]
                events.append((host, BlockStored(hashes, parent, [], 16, medium=DRAM)))
    return Work(chains, events)


def applied(tree: MergedTree, task: Work) -> dict[str, float]:
    samples = []
    for host, event in task.events:
        start = time.thread_time()
        tree.apply(host, event)
        samples.append(time.thread_time() - start)
    pages = sum(len(event.block_hashes) for _, event in task.events)
    return {
        "million_pages_per_s": round(pages / sum(samples) / 1e6, 2),
        "longest_event_ms": round(max(samples) * 1e3, 1),
    }


def matched(tree: MergedTree, task: Work, rounds: int = 2000) -> dict[str, float]:
    source, samples = random.Random(2), []
    for _ in range(rounds):
        prompt = [ShortKey(key + 0) for key in source.choice(task.chains)]
        start = time.thread_time()
        tree.match(prompt)
        samples.append((time.thread_time() - start) * 1e6)
    cuts = statistics.quantiles(samples, n=100)
    return {"p50_us": round(cuts[49], 1), "p99_us": round(cuts[98], 1)}


def removed(tree: MergedTree, task: Work) -> float:
    """Microseconds a page: leaf-first eviction that names pages one by one."""
    host, _ = task.events[0]
    mine = [event for who, event in task.events if who == host]
    pages = [key for event in mine for key in reversed(event.block_hashes)]
    start = time.thread_time()
    for key in pages:
        tree.apply(host, BlockRemoved([key], DRAM))
    return round((time.thread_time() - start) * 1e6 / len(pages), 2)


def measure(pipe: Connection, kind: str, pages: int, instances: int, event_pages: int) -> None:
    """In a process of its own, so that memory is this tree's alone."""
    task = work(pages, instances, event_pages)
    tree = GlobalTree() if kind == "python" else merged_tree()
    gc.collect()
    gc.disable()
    before = psutil.Process().memory_info().rss
    result: dict[str, Any] = {"apply": applied(tree, task)}
    grown = psutil.Process().memory_info().rss - before
    stats = tree.stats()
    result["pages"], result["nodes"] = stats.pages, stats.nodes
    result["bytes_per_page"] = round(grown / stats.pages, 1)
    result["match"] = matched(tree, task)
    result["remove_us_per_page"] = removed(tree, task)
    busiest = max(stats.held, key=lambda who: sum(stats.held[who].values()))
    start = time.thread_time()
    tree.drop(busiest)
    result["drop_ms"] = round((time.thread_time() - start) * 1e3, 2)
    pipe.send(json.dumps(result))


def apart(*arguments: Any) -> Any:
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(
        target=measure, args=(theirs, *arguments), daemon=True
    )
    process.start()
    theirs.close()
    if not ours.poll(600):
        raise SystemExit(f"no result for {arguments} within 600 s")
    result = json.loads(ours.recv())
    process.join(60)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pages", type=int, default=1_000_000)
    parser.add_argument("--instances", type=int, default=64)
    parser.add_argument("--event-pages", type=int, nargs="+", default=[512, 16])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    started = time.monotonic()
    kinds = ["python"] if native() is None else ["native", "python"]
    results = {
        f"events of {event_pages} pages": {
            kind: apart(kind, options.pages, options.instances, event_pages) for kind in kinds
        }
        for event_pages in options.event_pages
    }
    report("global_tree", results, started, options.json)


if __name__ == "__main__":
    main()
