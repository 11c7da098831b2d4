"""What a decision takes: hash, match and score of an 8,000-token prompt. Writes one JSON object.

    python benchmark/router/decision.py [--pages 1000000] [--instances 64]
        [--dynamo PYTHON] [--json FILE]

Half of the instances prefill, half decode; prompts of 500 pages share their first 62, and each is
held by one to three instances. The fits are taught, and as many requests are in flight as there
are instances. A sample is a prompt that agrees with a random one for a random part of it.

- ``hash``: page keys of its token ids, in both forms
- ``match``: who holds how much
- ``views``: what is known of all instances, bookings included
- ``score``: the policy ``cost``
- ``decision``: the four together
- ``book``: noting the plan, and taking an older one back

Times are of this thread alone. Those next to Dynamo's, whose tree has a thread of its own, are by
the clock.

``--dynamo``: the interpreter of an environment with ``ai-dynamo-runtime``. Its ``RadixTree`` gets
the same events and the same prompts in a process of its own.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
from sglang_memserve.hashing import page_keys, short_keys
from sglang_memserve.protocol.events import BlockStored
from sglang_memserve.router.cost.backlog import Ending
from sglang_memserve.router.cost.bookings import Booking, Bookings, Order
from sglang_memserve.router.cost.learned import CostModel
from sglang_memserve.router.members.instances import Instances
from sglang_memserve.router.policy.base import Rotation
from sglang_memserve.router.policy.registry import make_policy
from sglang_memserve.router.request.placement import key_prompts, look_up, prompt_of
from sglang_memserve.router.tree.merged import MergedTree, merged_tree
from sglang_memserve.types import InstanceId, ShortKey, Tier

from benchmark.harness import report
from benchmark.router.described import PAGE, instance_info

PROMPT_PAGES, SHARED_PAGES = 500, 62
EVENT_PAGES = 16
VOCABULARY = 50_000
PEER = Path(__file__).with_name("dynamo_tree.py")


@dataclass(frozen=True)
class Work:
    """``chains``: token ids of the prompts that are held; ``events``: who holds what."""

    chains: list[list[int]]
    events: list[tuple[int, list[ShortKey], ShortKey | None]]


def work(pages: int, instances: int) -> Work:
    source = random.Random(1)
    shared = tokens(source, SHARED_PAGES)
    chains, events = [], []
    for number in range(max(pages // (PROMPT_PAGES - SHARED_PAGES), 1)):
        ids = shared + tokens(source, PROMPT_PAGES - SHARED_PAGES)
        chains.append(ids)
        keys = short_keys(page_keys(ids, PAGE))
        for host in source.sample(range(instances), min(1 + number % 3, instances)):
            for at in range(0, PROMPT_PAGES, EVENT_PAGES):
                events.append((host, keys[at : at + EVENT_PAGES], keys[at - 1] if at else None))
    return Work(chains, events)


def tokens(source: random.Random, pages: int) -> list[int]:
    return source.choices(range(VOCABULARY), k=pages * PAGE)


def samples(task: Work, count: int) -> list[list[int]]:
    """Prompts of 8,000 tokens, and one more that is always computed."""
    source = random.Random(2)
    made = []
    for _ in range(count):
        known = source.choice(task.chains)[: source.randrange(PROMPT_PAGES) * PAGE]
        rest = source.choices(range(VOCABULARY), k=PROMPT_PAGES * PAGE + 1 - len(known))
        made.append(known + rest)
    return made


def url(number: int) -> InstanceId:
    return InstanceId(f"http://host{number}:30000")


class Router:
    """The router's parts that decide, with everything in them that a busy one has."""

    def __init__(self, task: Work, instances: int) -> None:
        self.costs, self.rotation = CostModel(), Rotation()
        self.bookings = Bookings(time.monotonic, self.costs)
        self.policy = make_policy("cost", self.rotation, self.costs)
        self.instances = Instances(time.monotonic, expire_s=1e6)
        source = random.Random(3)
        for number in range(instances):
            role = "decode" if number % 2 else "prefill"
            self.instances.register(instance_info(url(number), f"g{number}", role))
            for _ in range(5):
                new, cached = source.randrange(100, 8000), source.randrange(0, 8000)
                self.costs.observe_prefill(url(number), new, cached, 0.01 + 1e-4 * new)
                other = url(source.randrange(instances))
                self.costs.observe_transfer(url(number), other, 10_000_000, 0.01)
        self.tree: MergedTree = merged_tree()
        self.busy: list[Booking] = []

    def fill(self, task: Work) -> dict[str, float]:
        events = [
            (url(host), BlockStored(list(keys), parent, [], PAGE, medium=Tier.DRAM.value))
            for host, keys, parent in task.events
        ]
        gc.collect()
        before = psutil.Process().memory_info().rss
        start = time.perf_counter()
        for host, event in events:
            self.tree.apply(host, event)
        seconds = time.perf_counter() - start
        grown = psutil.Process().memory_info().rss - before
        stats = self.tree.stats()
        return {
            "pages": stats.pages,
            "pages_an_event": EVENT_PAGES,
            "events_per_s": round(len(events) / seconds),
            "bytes_per_page": round(grown / stats.pages, 1),
        }

    def decide(self, ids: Sequence[int]) -> dict[str, float]:
        """Microseconds by stage."""
        marks = [time.thread_time()]
        keyed = key_prompts([ids], [(None, None)], PAGE)
        marks.append(time.thread_time())
        holdings = look_up(self.tree, keyed)
        marks.append(time.thread_time())
        prompt, chain = prompt_of(keyed, None), keyed.one_chain()
        views = self.instances.views(holdings.whole, (), self.bookings, chain)
        marks.append(time.thread_time())
        plan = self.policy.decide(prompt, views)
        marks.append(time.thread_time())
        booking = self.bookings.book(plan, Order(prompt, chain, Ending.SEEN), views)
        self.rotation.advance()
        booked = time.thread_time()
        self.busy.append(booking)
        released = 0.0
        if len(self.busy) > len(views):
            start = time.thread_time()
            self.busy.pop(0).release()
            released = time.thread_time() - start
        parts = [(b - a) * 1e6 for a, b in pairwise(marks)]
        return {
            **dict(zip(("hash", "match", "views", "score"), parts, strict=True)),
            "decision": sum(parts),
            "book": (booked - marks[-1] + released) * 1e6,
        }


def percentiles(values: Sequence[float]) -> dict[str, float]:
    cuts = statistics.quantiles(values, n=100)
    return {"p50_us": round(cuts[49], 1), "p99_us": round(cuts[98], 1)}


def timed(prompts: Sequence[Any], call: Callable[[Any], object]) -> dict[str, float]:
    taken = []
    for one in prompts:
        start = time.perf_counter()
        call(one)
        taken.append((time.perf_counter() - start) * 1e6)
    return percentiles(taken)


def dynamo(python: str, task: Work, prompts: Sequence[Sequence[int]]) -> dict[str, Any]:
    """The same events and prompts in Dynamo's tree. Says why when that is not to be had."""
    keys = [short_keys(page_keys(ids[:-1], PAGE)) for ids in prompts]
    lines = [json.dumps([host, hashes, parent]) for host, hashes, parent in task.events]
    lines += [
        json.dumps({"ids": ids, "keys": chain}) for ids, chain in zip(prompts, keys, strict=True)
    ]
    try:
        done = subprocess.run(
            [python, str(PEER), str(len(task.events)), str(PAGE)],
            input="\n".join(lines),
            capture_output=True,
            text=True,
            timeout=600,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return {"not_run": str(error)}
    if done.returncode:
        return {"not_run": done.stderr.strip().splitlines()[-1:] or f"exit {done.returncode}"}
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def measure(pages: int, instances: int, rounds: int, python: str | None) -> dict[str, Any]:
    task = work(pages, instances)
    router = Router(task, instances)
    results: dict[str, Any] = {"tree": router.fill(task)}
    prompts = samples(task, rounds)
    for ids in prompts[:100]:
        router.decide(ids)
    gc.collect()
    gc.freeze()
    taken = [router.decide(ids) for ids in prompts]
    results |= {stage: percentiles([one[stage] for one in taken]) for stage in taken[0]}
    keys = [short_keys(page_keys(ids[:-1], PAGE)) for ids in prompts[:1000]]
    results["match_by_the_clock"] = timed(keys, router.tree.match)
    if python is not None:
        results["dynamo"] = dynamo(python, task, prompts[:1000])
    else:
        results["dynamo"] = {"not_run": "no --dynamo PYTHON was given"}
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pages", type=int, default=1_000_000)
    parser.add_argument("--instances", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3000)
    parser.add_argument("--dynamo", metavar="PYTHON")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    started = time.monotonic()
    results = measure(options.pages, options.instances, options.rounds, options.dynamo)
    if options.dynamo:
        # The report names the command, not the machine's paths.
        sys.argv = ["PYTHON" if one == options.dynamo else one for one in sys.argv]
    report("router_decision", results, started, options.json)


if __name__ == "__main__":
    main()
