"""``python -m benchmark.serving`` against a cluster that runs, as ``make eval-quick`` runs it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from integration.harness import RunningCluster

from benchmark.workloads.request import Message, Turn, Workload, write

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 120.0

pytestmark = pytest.mark.integration


def _tiny() -> Workload:
    """Two conversations and a fork, of a few tokens a turn: the tiny model has one a byte."""
    said = "Tell me of the sea, please. " * 3
    turns = [
        Turn(
            conversation=f"c{place}",
            turn=number,
            arrival_s=0.1 * number,
            messages=(Message("user", f"{place}{number} {said}"),),
            max_tokens=6,
            after=after,
            session=f"c{place}",
        )
        for place in range(2)
        for number, after in enumerate((None, 0, 1, 1))
    ]
    return Workload("tiny", "for the test", tuple(turns))


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmark.serving", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S)


def test_a_replay_is_measured(cluster: RunningCluster, tmp_path: Path) -> None:
    workload, result = tmp_path / "tiny.jsonl", tmp_path / "result.json"
    write(_tiny(), workload)
    done = _run(
        *("--attach", cluster.url, "--workload", str(workload)),
        *("--rate", "2", "--limit-s", "90", "--json", str(result)),
    )
    assert done.returncode == 0, done.stderr
    (run,) = json.loads(result.read_text())["results"]
    assert (run["requests"], run["failed"], run["generated_tokens"]) == (8, 0, 48)
    # A later turn's prompt begins with the one before, answer included.
    assert run["cached_tokens"] > 0
    assert run["router"]["prompt_tokens"] == run["prompt_tokens"]
    assert run["router"]["moved_bytes"] > 0
    for latency in ("ttft_ms", "tpot_ms", "jct_ms"):
        assert 0 < run[latency]["p50"] <= run[latency]["p99"]


def test_bad_input_is_a_line(tmp_path: Path) -> None:
    for arguments, says in (
        (["--setup", "best"], "no set-up 'best'"),
        ([], "say what to measure"),
        (["--setup", "stock", "--rate", "0"], "rates are positive"),
        (["--setup", "stock", "--workload", "none"], "no workload and no file"),
    ):
        done = _run(*arguments)
        assert (done.returncode, done.stdout) == (2, "")
        assert says in done.stderr
        assert done.stderr.count("\n") == 1
