"""How much of a fetch is left when prefill ends: D reads pages while P still computes them.

    pipelined  P computes a new prompt; at the same moment D is asked to fetch its pages from P, as
               the router asks. ``lag``: from P's answer to D's, when D can start
    alone      D has forgotten them, P holds them all: the same pages fetched again
    routed     a shorter new prompt through the router, which does the same: how many of its tokens
               D did not compute, which should be all but the last page's

The first two take turns, with a new prompt each round. ``lag_over_alone`` is the part of the
transfer that prefill did not hide.

    PYTHONPATH=. python benchmark/serving/pipelined_fetch.py [--rounds 5] [--json FILE]
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests

from benchmark.harness import ROOT, report, spread

PROMPT_TOKENS = 8000
CHUNK_TOKENS = 512
PAGE = 16
LIMIT_S = 300.0
WAIT_S = 100.0
DEADLINE_S = 110.0


@dataclass(frozen=True, slots=True)
class Sample:
    """Seconds as the client sees them; ``alone_inside_s`` as the rank does. ``early_pages``:
    readable on D just after P's answer."""

    prefill_s: float
    lag_s: float
    alone_s: float
    alone_inside_s: float
    early_pages: int


def post(url: str, body: object) -> tuple[Any, float]:
    """The answer, and when it had come."""
    response = requests.post(url, json=body, timeout=LIMIT_S)
    response.raise_for_status()
    return response.json(), time.perf_counter()


def fetch_body(source: str, ids: list[int], wait_s: float) -> dict[str, Any]:
    from sglang_memserve.hashing import page_keys

    keys = [key.hex() for key in page_keys(ids[: len(ids) - 1], PAGE)]
    return {"source": source, "keys": keys, "wait_s": wait_s, "deadline_s": DEADLINE_S}


def resident(url: str) -> int:
    """Pages readable in the instance's MemPool."""
    stats = requests.get(f"{url}/memserve/stats", timeout=LIMIT_S).json()
    return int(stats["ranks"][0]["ready_blocks"])


def forget(url: str) -> None:
    """Flush the instance and see it done: pins of the last fetch end after a grace."""
    deadline = time.monotonic() + 30
    while True:
        requests.post(f"{url}/flush_cache", timeout=LIMIT_S)
        if resident(url) == 0:
            return
        if time.monotonic() > deadline:
            raise RuntimeError(f"{url} keeps {resident(url)} pages after a flush")
        time.sleep(0.5)


def round_of(cluster: Any, ids: list[int]) -> Sample:
    prefill, decode = cluster.one("prefill").url, cluster.one("decode").url
    fetch = f"{decode}/memserve/fetch"
    pages = (len(ids) - 1) // PAGE
    with ThreadPoolExecutor(2) as threads:
        started = time.perf_counter()
        fetching = threads.submit(post, fetch, fetch_body(prefill, ids, WAIT_S))
        compute = {"input_ids": ids, "sampling_params": {"max_new_tokens": 0}}
        _, computed_at = threads.submit(post, f"{prefill}/generate", compute).result(LIMIT_S)
        early_pages = resident(decode)
        answer, fetched_at = fetching.result(LIMIT_S)
    if answer["outcome"] != "complete" or answer["fetched_pages"] != pages:
        raise RuntimeError(f"the pipelined fetch ended as {answer}")
    forget(decode)
    asked = time.perf_counter()
    answer, answered_at = post(fetch, fetch_body(prefill, ids, 0.0))
    if answer["outcome"] != "complete" or answer["fetched_pages"] != pages:
        raise RuntimeError(f"the fetch alone ended as {answer}")
    forget(decode)
    return Sample(
        prefill_s=computed_at - started,
        lag_s=fetched_at - computed_at,
        alone_s=answered_at - asked,
        alone_inside_s=answer["seconds"],
        early_pages=early_pages,
    )


def routed(cluster: Any, ids: list[int]) -> int:
    """Prompt tokens that D did not compute."""
    body = {"input_ids": ids, "sampling_params": {"temperature": 0, "max_new_tokens": 2}}
    answer, _ = post(f"{cluster.url}/generate", body)
    return int(answer["meta_info"]["cached_tokens"])


def summary(samples: list[Sample], tokens: int) -> dict[str, Any]:
    return {
        "prompt_tokens": tokens,
        "pages": (tokens - 1) // PAGE,
        "chunk_tokens": CHUNK_TOKENS,
        "rounds": len(samples),
        "prefill_s": spread([s.prefill_s for s in samples], 2),
        "lag_ms": spread([1e3 * s.lag_s for s in samples], 1),
        "alone_ms": spread([1e3 * s.alone_s for s in samples], 1),
        "alone_inside_ms": spread([1e3 * s.alone_inside_s for s in samples], 1),
        "lag_over_alone": spread([s.lag_s / s.alone_s for s in samples], 3),
        "pages_readable_just_after_prefill": spread([s.early_pages for s in samples], 0),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=ROOT / ".cache/models/SmolLM2-135M-Instruct")
    parser.add_argument("--tokens", type=int, default=PROMPT_TOKENS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    from integration.harness import launch_cluster

    started = time.monotonic()
    source = random.Random(time.time_ns())

    def prompt() -> list[int]:
        return [source.randrange(100, 40000) for _ in range(options.tokens)]

    flags = ["--mempool-dram", "1GiB", "--chunked-prefill-size", str(CHUNK_TOKENS)]
    with (
        tempfile.TemporaryDirectory() as folder,
        launch_cluster(options.model, Path(folder), flags=flags) as cluster,
    ):
        round_of(cluster, prompt()[: 4 * CHUNK_TOKENS])  # warm
        samples = []
        for _ in range(options.rounds):
            samples.append(round_of(cluster, prompt()))
            print(samples[-1], file=sys.stderr, flush=True)
        results = summary(samples, options.tokens)
        short = prompt()[: 4 * CHUNK_TOKENS]
        results["routed"] = {"prompt_tokens": len(short), "fetched": routed(cluster, short)}
    report("serving/pipelined_fetch", results, started, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
