"""What MemServe costs requests that share nothing: throughput of an instance with it and without.

Two instances with the same flags, one of them with ``--no-mempool``, take turns: each round sends
the same number of new prompts, some at a time, straight to one of them and waits for all answers.

    PYTHONPATH=. python benchmark/serving/cost_of_memserve.py [--rounds 8] [--json FILE]
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import requests

from benchmark.harness import ROOT, report, spread

LIMIT_S = 300.0


def run_round(url: str, prompts: list[list[int]], new_tokens: int, at_once: int) -> float:
    """Prompt and generated tokens a second."""

    def ask(ids: list[int]) -> None:
        body = {
            "input_ids": ids,
            "sampling_params": {
                "temperature": 0,
                "max_new_tokens": new_tokens,
                "ignore_eos": True,
            },
        }
        answer = requests.post(f"{url}/generate", json=body, timeout=LIMIT_S)
        answer.raise_for_status()
        if answer.json()["meta_info"]["cached_tokens"]:
            raise RuntimeError("the prompts were to share nothing")

    started = time.perf_counter()
    with ThreadPoolExecutor(at_once) as pool:
        list(pool.map(ask, prompts))
    seconds = time.perf_counter() - started
    return sum(len(ids) + new_tokens for ids in prompts) / seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=ROOT / ".cache/models/SmolLM2-135M-Instruct")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--requests", type=int, default=8, help="in a round (default 8)")
    parser.add_argument("--at-once", type=int, default=4)
    parser.add_argument("--prompt-tokens", type=int, default=500)
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    from integration.harness import launch_server

    started = time.monotonic()
    source = random.Random(time.time_ns())

    def prompts() -> list[list[int]]:
        return [
            [source.randrange(100, 40000) for _ in range(options.prompt_tokens)]
            for _ in range(options.requests)
        ]

    flags = ["--cpu-threads", "1"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with (
            launch_server(options.model, folder, name="with", flags=flags) as with_it,
            launch_server(
                options.model, folder, name="without", flags=[*flags, "--no-mempool"]
            ) as without,
        ):
            rates: dict[str, list[float]] = {"with": [], "without": []}
            for index in range(options.rounds + 1):
                # Who goes first changes, and the first round of each only warms up.
                order = [("with", with_it), ("without", without)][:: 1 if index % 2 else -1]
                for key, server in order:
                    rate = run_round(server.url, prompts(), options.new_tokens, options.at_once)
                    if index:
                        rates[key].append(rate)
            pairs = zip(rates["with"], rates["without"], strict=True)
            result = {
                "rounds": options.rounds,
                "requests_in_a_round": options.requests,
                "at_once": options.at_once,
                "prompt_tokens": options.prompt_tokens,
                "new_tokens": options.new_tokens,
                "with_tokens_per_s": spread(rates["with"], 1),
                "without_tokens_per_s": spread(rates["without"], 1),
                "with_over_without": spread([a / b for a, b in pairs], 3),
            }
    report("serving/cost_of_memserve", [result], started, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
