"""Hit rates of the eviction policies, beside the best possible.

    python benchmark/micro/eviction.py [--trace FILE] [--capacity 1000 ...] [--json FILE]

A workload is a list of prompts, a prompt a list of page names; equal names at equal places mean an
equal prefix. Each prompt goes through a real ``LocalIndex`` as through a MemPool: its leading
resident pages are hits and are used; room is made for the others, which are stored; then all of it
is used once more, as by the decode instance that fetches it. The hit rate is hits over pages asked
for. Three workloads:

``chats and documents``  seeded: conversations that grow turn by turn, and long documents of which
                         each is read once
``trace``                ``--trace``: a file in the format of the Mooncake traces, one JSON object
                         a line with ``hash_ids``
``trace and documents``  the trace with documents read once between its requests

The best possible is Belady's: whoever knows the future keeps, after each prompt, those of the pages
held and the pages just computed that are asked for again soonest, at most as many as there are
blocks. It bounds every policy from above, because it maximizes the hits of any cache of that many
pages that need not store what it computes (Belady 1966), and ours are such caches with rules more:
only leaves go, only leading pages hit, new pages are stored. The first two rules cost it nothing:
whoever asks for a page asks for its ancestors, so the page wanted last is a leaf if ties go to the
deeper one (asserted below).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from heapq import heappop, heappush
from pathlib import Path

from sglang_memserve.index.local_index import LocalIndex
from sglang_memserve.types import BlockId, Eviction, PageKey

from benchmark.harness import report

Prompt = Sequence[int]
NEVER = 1 << 40
CAPACITIES = (1000, 2000, 5000, 10000, 20000, 50000)


def read_trace(file: Path) -> list[Prompt]:
    with file.open() as lines:
        return [json.loads(line)["hash_ids"] for line in lines]


def with_documents(prompts: Sequence[Prompt], share: float, seed: int) -> Iterator[Prompt]:
    """After a ``share`` of the prompts comes a document of 100 to 250 pages, never seen again."""
    chance = random.Random(seed)
    fresh = 1 << 32
    for prompt in prompts:
        yield prompt
        if chance.random() < share:
            length = chance.randint(100, 250)
            yield range(fresh, fresh + length)
            fresh += length


def chats(count: int, seed: int) -> list[Prompt]:
    """Conversations of 1 to 12 turns, 200 open at a time; a turn adds 2 to 8 pages."""
    chance = random.Random(seed)
    fresh = 1
    prompts: list[Prompt] = []
    going: list[tuple[list[int], int]] = []
    while len(prompts) < count:
        if len(going) < 200:
            going.append(([0], chance.choice((1, 1, 2, 4, 8, 12))))
            continue
        place = chance.randrange(len(going))
        pages, turns = going[place]
        added = chance.randint(2, 8)
        pages = [*pages, *range(fresh, fresh + added)]
        fresh += added
        prompts.append(pages)
        going[place] = (pages, turns - 1)
        if turns == 1:
            going.pop(place)
    return prompts


def best_possible(prompts: Sequence[Prompt], capacity: int) -> int:
    """Hits of Belady's choice; see above."""
    uses: dict[int, list[int]] = defaultdict(list)
    for turn in range(len(prompts) - 1, -1, -1):
        for page in prompts[turn]:
            uses[page].append(turn)
    next_use: dict[int, int] = {}
    children: dict[int, int] = defaultdict(int)
    parent: dict[int, int] = {}
    order: list[tuple[int, int, int]] = []
    hits = 0
    for prompt in prompts:
        hits += sum(page in next_use for page in prompt)
        for depth, page in enumerate(prompt):
            if page not in next_use and depth:
                parent[page] = prompt[depth - 1]
                children[prompt[depth - 1]] += 1
            uses[page].pop()
            next_use[page] = uses[page][-1] if uses[page] else NEVER
            heappush(order, (-next_use[page], -depth, page))
        while len(next_use) > capacity:
            use, _, page = heappop(order)
            if next_use.get(page) != -use:
                continue
            assert not children[page], f"page {page} is no leaf"
            del next_use[page]
            if page in parent:
                children[parent.pop(page)] -= 1
    return hits


def replay(prompts: Sequence[Sequence[PageKey]], capacity: int, eviction: Eviction) -> int:
    """Hits of a policy."""
    index = LocalIndex(capacity, eviction)
    free = [BlockId(block) for block in range(capacity)]
    hits = 0
    for keys in prompts:
        held = index.match(keys)
        hits += len(held)
        index.touch(held)
        index.pin(held)
        short = len(keys) - len(held) - len(free)
        if short > 0:
            free += index.evict(short).blocks
        fresh = keys[len(held) : len(held) + len(free)]
        blocks = [free.pop() for _ in fresh]
        parents = [keys[i - 1] if i else None for i in range(len(held), len(held) + len(fresh))]
        index.insert(fresh, blocks, parents)
        index.touch(held + blocks)
        index.unpin(held)
    index.check()
    return hits


def compare(prompts: Sequence[Prompt], capacities: Sequence[int]) -> dict[str, object]:
    asked = sum(len(prompt) for prompt in prompts)
    names = {page: key_of(page) for prompt in prompts for page in prompt}
    keyed = [[names[page] for page in prompt] for prompt in prompts]
    rates: dict[str, dict[str, float]] = {}
    for capacity in capacities:
        best = best_possible(prompts, capacity)
        row = {"best possible": round(best / asked, 4)}
        for eviction in Eviction:
            hits = replay(keyed, capacity, eviction)
            assert hits <= best, (eviction, capacity, hits, best)
            row[eviction.value] = round(hits / asked, 4)
        rates[str(capacity)] = row
    return {
        "prompts": len(prompts),
        "pages_asked": asked,
        "pages_distinct": len(names),
        "hit_rate_by_blocks": rates,
    }


def key_of(page: int) -> PageKey:
    return PageKey(hashlib.sha256(page.to_bytes(8, "little")).digest())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trace", type=Path, metavar="FILE")
    parser.add_argument("--capacity", type=int, nargs="+", default=CAPACITIES, metavar="BLOCKS")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    started = time.monotonic()
    workloads = {
        "chats and documents": list(with_documents(chats(8000, options.seed), 0.15, options.seed))
    }
    if options.trace is not None:
        workloads["trace"] = trace = read_trace(options.trace)
        workloads["trace and documents"] = list(with_documents(trace, 0.05, options.seed))
    results = {name: compare(prompts, options.capacity) for name, prompts in workloads.items()}
    report("eviction", results, started, options.json)


if __name__ == "__main__":
    main()
