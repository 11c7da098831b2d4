"""Committed results, and reading those of ``benchmark.serving``."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent

Run = dict[str, Any]


class Missing(Exception):
    """A results file that is asked for is not there, or is none."""


def load(name: str, has: str = "ttft_ms") -> list[Run]:
    """Committed runs that have such a figure: by default those in which something was answered.
    Raises Missing."""
    return load_file(FOLDER / f"{name}.json", has)


def load_file(file: Path, has: str = "ttft_ms") -> list[Run]:
    """``load`` of any file. Raises Missing."""
    if not file.is_file():
        raise Missing(f"{file.name} is not there")
    try:
        results: list[Run] = json.loads(file.read_text())["results"]
    except (ValueError, LookupError, TypeError) as error:
        raise Missing(f"{file.name} has no results of benchmark.serving: {error}") from error
    return [run for run in results if has in run]


def merged(runs: Sequence[Run]) -> list[Run]:
    """Rounds of the same measured thing as one run: the median of each figure, all samples. In
    order of workload, rate and first appearance."""
    rounds: dict[tuple[str, float, str], list[Run]] = {}
    for run in runs:
        key = (str(run["workload"]), float(run["rate"]), str(run["setup"]))
        rounds.setdefault(key, []).append(run)
    workloads = list(dict.fromkeys(key[0] for key in rounds))
    ordered = sorted(rounds, key=lambda key: (workloads.index(key[0]), key[1]))
    return [_median(rounds[key]) for key in ordered]


def _median(same: Sequence[Any]) -> Any:
    first = same[0]
    if isinstance(first, dict):
        whole = [key for key in first if all(key in one for one in same)]
        return {key: _median([one[key] for one in same]) for key in whole}
    if isinstance(first, list):
        return [item for one in same for item in one]
    if isinstance(first, int | float):
        return statistics.median(same)
    return first
