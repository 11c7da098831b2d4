"""``python -m benchmark.tables NAME...``: results of ``benchmark.serving`` as tables in Markdown.

NAME is a file in ``benchmark/results`` without its ``.json``, or the path of any file with it.
Medians over rounds, where there were several. Milliseconds become seconds.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmark.results import Missing, Run, load, load_file, merged


def not_computed(run: Run) -> float:
    """Share of prompt tokens. With separate roles the answer's own figure is decode's and counts
    what prefill has just computed; so it is the router's, where that knows."""
    router = run.get("router", {})
    if run.get("dram_mib") and router.get("prompt_tokens"):
        return float(router["cached_tokens"] / router["prompt_tokens"])
    return float(run["cached_share"])


_COLUMNS: tuple[tuple[str, Callable[[Run], float], str], ...] = (
    ("TTFT mean, s", lambda run: run["ttft_ms"]["mean"] / 1e3, ".2f"),
    ("P50", lambda run: run["ttft_ms"]["p50"] / 1e3, ".2f"),
    ("P90", lambda run: run["ttft_ms"]["p90"] / 1e3, ".2f"),
    ("P99", lambda run: run["ttft_ms"]["p99"] / 1e3, ".2f"),
    ("TPOT mean, ms", lambda run: run["tpot_ms"]["mean"], ".0f"),
    ("P99", lambda run: run["tpot_ms"]["p99"], ".0f"),
    ("JCT mean, s", lambda run: run["jct_ms"]["mean"] / 1e3, ".2f"),
    ("P99", lambda run: run["jct_ms"]["p99"] / 1e3, ".2f"),
    ("requests/s", lambda run: run["requests_per_s"], ".2f"),
    ("tokens/s", lambda run: run["generated_tokens_per_s"], ".0f"),
    ("cached", lambda run: 100 * not_computed(run), ".0f"),
    ("moved, MB", lambda run: run.get("router", {}).get("moved_bytes", 0) / 1e6, ",.0f"),
    ("others, cores", lambda run: run.get("others_cores", 0.0), ".1f"),
)


def table(runs: Sequence[Run]) -> str:
    """One row a set-up, workload and rate, in the order of the runs."""
    heads = ["workload", "rate", "set-up", *(name for name, _, _ in _COLUMNS)]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for run in runs:
        cells = [run["workload"], f"{run['rate']:g}", f"`{run['setup']}`"]
        for name, value, form in _COLUMNS:
            cells.append(f"{value(run):{form}}" + (" %" if name == "cached" else ""))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmark.tables", description=__doc__)
    parser.add_argument("names", nargs="+", metavar="NAME")
    for name in parser.parse_args().names:
        file = Path(name)
        try:
            runs = load_file(file) if file.suffix == ".json" else load(name)
        except Missing as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        if not all({"workload", "setup"} <= run.keys() for run in runs) or not runs:
            print(f"error: {name} has no answered runs of benchmark.serving", file=sys.stderr)
            return 2
        print(f"{name}\n\n{table(merged(runs))}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
