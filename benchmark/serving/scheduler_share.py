"""What part of its time the scheduler thread spends in MemPool under a shared-prefix load.

One instance whose device pool is too small for the prefixes, so that they leave HBM and come back
from DRAM all the time. The instance itself counts, see ``/memserve/stats``:
``scheduler_seconds_total`` in MemPool's code, ``scheduler_wait_seconds_total`` waiting for layers
that are being loaded.

    PYTHONPATH=. python benchmark/serving/scheduler_share.py [--requests 60] [--json FILE]
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import requests

from benchmark.harness import ROOT, report

LIMIT_S = 300.0
COUNTED = ("scheduler_seconds_total", "scheduler_wait_seconds_total", "scheduler_calls_total")


def ask(url: str, ids: list[int], new_tokens: int) -> dict[str, int]:
    """Tokens found by tier, of ``len(ids)``."""
    sampling = {"temperature": 0, "max_new_tokens": new_tokens, "ignore_eos": True}
    body = {"input_ids": ids, "sampling_params": sampling}
    answer = requests.post(f"{url}/generate", json=body, timeout=LIMIT_S)
    answer.raise_for_status()
    found: dict[str, int] = answer.json()["meta_info"]["cached_tokens_details"] or {}
    return found


def measure(server: Any, options: argparse.Namespace) -> dict[str, float]:
    from integration.harness import stats

    source = random.Random(options.seed)

    def tokens(count: int) -> list[int]:
        return [source.randrange(100, 40000) for _ in range(count)]

    prefixes = [tokens(options.prefix_tokens) for _ in range(options.prefixes)]
    with ThreadPoolExecutor(options.at_once) as pool:
        list(pool.map(lambda ids: ask(server.url, ids, 1), prefixes))
        prompts = [
            [*source.choice(prefixes), *tokens(options.tail_tokens)]
            for _ in range(options.requests)
        ]
        before, started = stats(server), time.perf_counter()
        found = list(pool.map(lambda ids: ask(server.url, ids, options.new_tokens), prompts))
        seconds = time.perf_counter() - started
        after = stats(server)
    spent, waited, calls = (after[name] - before[name] for name in COUNTED)
    asked = sum(map(len, prompts))
    return {
        "seconds": round(seconds, 2),
        "requests_per_s": round(len(prompts) / seconds, 2),
        "from_hbm": round(sum(f.get("device", 0) for f in found) / asked, 3),
        "from_dram": round(sum(f.get("host", 0) for f in found) / asked, 3),
        "mempool_percent": round(100 * spent / seconds, 3),
        "waiting_for_loads_percent": round(100 * waited / seconds, 3),
        "microseconds_a_call": round(1e6 * spent / calls, 1),
        "calls_per_request": round(calls / len(prompts), 1),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=ROOT / ".cache/models/SmolLM2-135M-Instruct")
    parser.add_argument("--requests", type=int, default=60)
    parser.add_argument("--at-once", type=int, default=4)
    parser.add_argument("--prefixes", type=int, default=8)
    parser.add_argument("--prefix-tokens", type=int, default=1024)
    parser.add_argument("--tail-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--hbm-tokens", type=int, default=6144)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    from integration.harness import launch_server

    started = time.monotonic()
    flags = ["--cpu-threads", "1", "--mempool-dram", "1GiB"]
    flags += ["--max-total-tokens", str(options.hbm_tokens)]
    with (
        tempfile.TemporaryDirectory() as name,
        launch_server(options.model, Path(name), flags=flags) as server,
    ):
        result = measure(server, options)
    settings = ("requests", "at_once", "prefixes", "prefix_tokens", "tail_tokens", "new_tokens")
    load = {name: getattr(options, name) for name in (*settings, "hbm_tokens", "seed")}
    report("serving/scheduler_share", [{**load, **result}], started, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
