"""What every benchmark shares, and ``python -m benchmark.harness``, which runs them all.

A benchmark prints one JSON object that names the machine and the command, or writes it with
``--json FILE``. Figures are ratios of interleaved runs; absolute times belong to the machine alone.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
from sglang_memserve.errors import ConfigError

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmark" / "results"
# Taken when the benchmark begins: it makes load itself.
_LOAD_BEFORE = round(os.getloadavg()[0], 2)
# A list of numbers alone.
_ROW = re.compile(r"\[[\d\s.,eE+-]+\]")
# Clusters are started by the tests' harness: one way to start and to end servers.
sys.path.insert(0, str(ROOT / "test"))

BENCHMARKS = (
    ("micro/kernels.py", "micro-kernels.json"),
    ("micro/engine_ops.py", "micro-engine-ops.json"),
    ("micro/attention.py", "micro-attention.json"),
    ("micro/engine_layers.py", "micro-engine-layers.json"),
    ("micro/pool.py", "micro-pool.json"),
    # With --trace it also replays a recorded trace: micro-eviction.json.
    ("micro/eviction.py", "micro-eviction-synthetic.json"),
    ("micro/global_tree.py", "micro-global-tree.json"),
    # With --dynamo PYTHON it also measures Dynamo's tree.
    ("router/decision.py", "router-decision.json"),
    ("micro/copies.py", "micro-copies.json"),
    ("micro/transfer.py", "micro-transfer.json"),
    ("micro/first_fetch.py", "micro-first-fetch.json"),
    ("micro/router_overhead.py", "micro-router-overhead.json"),
    ("router/restart.py", "router-restart.json"),
    # With --peer it also measures sglang-router.
    ("router/service.py", "router-service-alone.json"),
    # With --vllm PYTHON, and --llama-server and --llama-model, it also measures those.
    ("engine/latency.py", "engine-latency.json"),
    ("engine/answers.py", "engine-answers.json"),
    ("serving/moved_prefix.py", "serving-moved-prefix.json"),
    ("serving/pipelined_fetch.py", "serving-pipelined-fetch.json"),
    ("serving/scheduler_share.py", "serving-scheduler-share.json"),
    ("serving/cost_of_memserve.py", "serving-cost-of-memserve.json"),
)


def machine() -> dict[str, Any]:
    """What the figures depend on, without naming the machine."""
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "python": platform.python_version(),
        "load_before": _LOAD_BEFORE,
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [line.split(":", 1)[1].strip() for line in info.splitlines() if "model name" in line]
    flags = [f for f in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f" {f} " in info + " "]
    return f"{names[0] if names else platform.machine()} ({', '.join(flags)})"


def spread(samples: Sequence[float], digits: int = 4) -> dict[str, float]:
    """Median and the extremes."""
    return {
        "median": round(statistics.median(samples), digits),
        "min": round(min(samples), digits),
        "max": round(max(samples), digits),
    }


def _on_one_line(row: re.Match[str]) -> str:
    return "[" + " ".join(row[0][1:-1].split()) + "]"


def _started_as() -> list[str]:
    """A module by its name: the path of its file is the machine's own affair."""
    spec = sys.modules["__main__"].__spec__
    if spec is None:
        return [sys.argv[0]]
    return ["-m", spec.name.removesuffix(".__main__")]


def exit_on_sigterm() -> None:
    """Let SIGTERM end this process as an exception does: servers and logs are cleared away."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))


def require_writable(*files: Path | None) -> None:
    """Raises ConfigError where a result could not be written, before it is measured."""
    for file in files:
        if file is None:
            continue
        if file.is_dir():
            raise ConfigError(f"{file} cannot be written: it is a folder")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            # Tried: what may be written is more than what permissions say.
            _part(file).touch()
            _part(file).unlink()
        except OSError as error:
            raise ConfigError(f"{file} cannot be written: {error.strerror}") from error


def _part(file: Path) -> Path:
    return file.with_name(f"{file.name}.part")


def report(name: str, results: Any, started_s: float, file: Path | None) -> None:
    value = {
        "benchmark": name,
        "command": " ".join(["python", *_started_as(), *sys.argv[1:]]),
        "machine": machine(),
        "seconds": round(time.monotonic() - started_s, 1),
        "results": results,
    }
    text = _ROW.sub(_on_one_line, json.dumps(value, indent=2)) + "\n"
    if file is None:
        print(text, end="")
    else:
        file.parent.mkdir(parents=True, exist_ok=True)
        # At once: nobody finds half of it.
        _part(file).write_text(text)
        _part(file).replace(file)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmark.harness", description=__doc__)
    parser.add_argument("--only", default="", metavar="TEXT", help="those whose name contains it")
    parser.add_argument("--limit-s", type=float, default=900.0, help="for each (default 900)")
    options = parser.parse_args()
    failed = []
    for script, result in BENCHMARKS:
        if options.only not in script:
            continue
        command = [sys.executable, f"benchmark/{script}", "--json", f"benchmark/results/{result}"]
        print(" ".join(["python", *command[1:]]), flush=True)
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        code = subprocess.run(
            command, cwd=ROOT, env=environment, timeout=options.limit_s
        ).returncode
        failed += [script] if code else []
    if failed:
        print("failed: " + ", ".join(failed), file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
