"""SGLang's own load generator runs against the router unchanged."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from integration.harness import RunningCluster

pytestmark = pytest.mark.integration

LIMIT_S = 240.0


@pytest.mark.parametrize("backend", ["sglang", "sglang-oai"])
def test_benchmark_serving(
    cluster: RunningCluster, tiny_model: Path, tmp_path: Path, backend: str
) -> None:
    output = tmp_path / "result.jsonl"
    command = [sys.executable, "-m", "sglang.benchmark.serving", "--backend", backend]
    command += ["--base-url", cluster.url, "--dataset-name", "random-ids", "--num-prompts", "6"]
    command += ["--model", str(tiny_model), "--tokenizer", str(tiny_model)]
    command += ["--random-input-len", "120", "--random-output-len", "8"]
    command += ["--random-range-ratio", "0.5", "--max-concurrency", "3", "--disable-tqdm"]
    command += ["--flush-cache", "--output-file", str(output)]
    if backend == "sglang":
        # With completions the load generator itself stumbles over the frame that holds the report.
        command += ["--cache-report"]
    result = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    report = json.loads(output.read_text().splitlines()[-1])
    assert report["completed"] == 6, report
    assert report["total_output_tokens"] > 0
