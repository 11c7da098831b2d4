"""Time to first token of a prompt that another instance has computed, against computing it.

    moved      P has computed the prompt; the client asks the router; D fetches the pages over NIXL,
               loads them, computes the last page and answers
    computed   a new prompt of the same length, straight to D

Both end at the first streamed byte with a token in it. They alternate, with new prompts each round.
The answer must say that D computed nothing but the last page (or everything), or the round fails.

    PYTHONPATH=. python benchmark/serving/moved_prefix.py [--rounds 7] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import requests

from benchmark.harness import ROOT, report, spread

LENGTHS = (527, 1500, 3900)
PAGE = 16
LIMIT_S = 120.0


def first_token(url: str, ids: list[int]) -> tuple[float, int]:
    """Seconds to the first token, and the prompt tokens the engine did not compute."""
    body = {
        "input_ids": ids,
        "stream": True,
        "sampling_params": {"temperature": 0, "max_new_tokens": 2, "ignore_eos": True},
    }
    started = time.perf_counter()
    with requests.post(f"{url}/generate", json=body, stream=True, timeout=LIMIT_S) as response:
        response.raise_for_status()
        for line in response.iter_lines():
            if line.startswith(b"data: {"):
                seconds = time.perf_counter() - started
                cached = json.loads(line.removeprefix(b"data: "))["meta_info"]["cached_tokens"]
                for _ in response.iter_lines():
                    pass
                return seconds, int(cached)
    raise RuntimeError(f"{url} streamed no token")


def compute_on(url: str, ids: list[int]) -> None:
    body = {"input_ids": ids, "sampling_params": {"max_new_tokens": 0}}
    requests.post(f"{url}/generate", json=body, timeout=LIMIT_S).raise_for_status()


def round_of(cluster: Any, length: int, source: random.Random) -> tuple[float, float]:
    prefill, decode = cluster.one("prefill").url, cluster.one("decode").url

    def prompt() -> list[int]:
        return [source.randrange(100, 40000) for _ in range(length)]

    ids = prompt()
    compute_on(prefill, ids)
    time.sleep(0.3)  # the router hears of it
    moved_s, cached = first_token(cluster.url, ids)
    if cached != (length - 1) // PAGE * PAGE:
        raise RuntimeError(f"D had {cached} of {length} tokens: the pages did not arrive in time")
    computed_s, cached = first_token(decode, prompt())
    if cached:
        raise RuntimeError(f"D had {cached} tokens of a new prompt")
    return moved_s, computed_s


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=ROOT / ".cache/models/SmolLM2-135M-Instruct")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    from integration.harness import launch_cluster

    started = time.monotonic()
    source = random.Random(time.time_ns())
    results = []
    with (
        tempfile.TemporaryDirectory() as folder,
        launch_cluster(options.model, Path(folder), flags=["--mempool-dram", "2GiB"]) as cluster,
    ):
        for length in LENGTHS:
            round_of(cluster, length, source)  # warm: connections, kernels of this shape
        for length in LENGTHS:
            pairs = [round_of(cluster, length, source) for _ in range(options.rounds)]
            moved, computed = [p[0] for p in pairs], [p[1] for p in pairs]
            row = {
                "prompt_tokens": length,
                "rounds": options.rounds,
                "moved_ms": spread([1e3 * s for s in moved], 1),
                "computed_ms": spread([1e3 * s for s in computed], 1),
                "moved_over_computed": spread([a / b for a, b in pairs], 3),
            }
            print(row, file=sys.stderr, flush=True)
            results.append(row)
    report("serving/moved_prefix", results, started, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
