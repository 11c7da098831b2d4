"""How well the simulator predicts real replays.

    python -m benchmark.serving --setup pool,stock --workload chat,react --rate 1,2
           --record DIR --json RUNS
    python -m benchmark.serving.validate --runs RUNS --traces DIR [--profile NAME|FILE]

Each replay was recorded as it was sent (``trace``). The simulator gets the same requests at the
same times, and instances with as much memory that are as quick as the profile says, which was
measured on one such instance alone. Only set-ups are compared whose front is MemServe's router,
left to move what it decides to move: the simulator runs that router's code.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sglang_memserve.errors import ConfigError, MemServeError
from sglang_memserve.router.simulate import command
from sglang_memserve.router.simulate.bound import Bound
from sglang_memserve.router.simulate.report import Report, Spread

from benchmark.harness import report, require_writable
from benchmark.results import Missing, Run, load_file

from . import trace
from .setups import SETUPS, FrontKind, Salt

_LETTERS = {"prefill": "P", "decode": "D", "both": "B"}
_LATENCIES = ("ttft_ms", "tpot_ms", "jct_ms")
_QUANTILES = ("mean", "p50", "p90", "p99")


def policy_of(name: str) -> str:
    """Of a set-up. Raises ConfigError for one that the simulator cannot be compared with."""
    setup = SETUPS.get(name)
    if setup is None or setup.front.kind is not FrontKind.ROUTER or setup.salt is not Salt.NONE:
        raise ConfigError(f"{name}: not behind MemServe's router, or salted")
    flags = dict(zip(setup.front.arguments[::2], setup.front.arguments[1::2], strict=True))
    policy = flags.pop("--policy", "cost")
    if flags:
        raise ConfigError(f"{name}: the simulator knows no {', '.join(flags)}")
    return policy


def simulated(run: Run, traces: Path, profile: str) -> tuple[Report, Bound]:
    """What the simulator makes of ``run``, and the least that it could come to. Raises ConfigError
    for a set-up that it cannot be compared with, and for a trace that is not there."""
    policy = policy_of(run["setup"])
    if lacking := [name for name in ("dram_mib", "hbm_tokens", "rate", "round") if name not in run]:
        raise ConfigError(f"{run['setup']}: the run does not say its {', '.join(lacking)}")
    roles = SETUPS[run["setup"]].fleet.roles
    dram = f"{run['dram_mib']}MiB" if run["dram_mib"] else "0"
    options = command.parse_args(
        [
            *("--trace", str(traces / trace.name_of(run)), "--profile", profile),
            *("--block-tokens", str(trace.BLOCK_TOKENS), "--page-tokens", str(trace.BLOCK_TOKENS)),
            *("--shape", "".join(f"1{_LETTERS[role.value]}" for role in roles)),
            *("--hbm-tokens", str(run["hbm_tokens"]), "--dram", dram),
            *("--policy", policy),
        ]
    )
    arrivals = command.read(options)
    (found,) = command.simulate(options, arrivals)
    return found, command.least(options, arrivals)


def compared(run: Run, found: Report, least: Bound) -> dict[str, Any]:
    """Measured and simulated, their ratios, and the least that any cache could come to."""
    told = {name: run[name] for name in ("setup", "workload", "rate", "round", "requests")}
    told |= {"measured": {}, "simulated": {}, "simulated_over_measured": {}}
    for latency in _LATENCIES:
        spread: Spread = getattr(found, latency)
        for quantile in _QUANTILES:
            name = f"{latency.removesuffix('_ms')}_{quantile}_ms"
            real, predicted = run[latency][quantile], getattr(spread, quantile)
            told["measured"][name] = real
            told["simulated"][name] = round(predicted, 1)
            # Answers of one token take no time a token.
            told["simulated_over_measured"][name] = round(predicted / real, 3) if real else None
    told["measured"]["cached_share"] = run["cached_share"]
    told["simulated"]["cached_share"] = round(found.cached_share, 4)
    told["measured"]["moved_mb"] = round(run.get("router", {}).get("moved_bytes", 0) / 1e6, 1)
    told["simulated"]["moved_mb"] = round(found.moved_bytes / 1e6, 1)
    told["bound"] = {
        "ttft_mean_ms": round(least.ttft_ms.mean, 1),
        "ttft_p99_ms": round(least.ttft_ms.p99, 1),
        "jct_mean_ms": round(least.jct_ms.mean, 1),
        "cached_share": round(least.cached_share, 4),
    }
    return told


def line(found: dict[str, Any]) -> str:
    ratios = ", ".join(
        f"{name.removesuffix('_mean_ms')} " + ("-" if ratio is None else f"{ratio:.2f}")
        for name, ratio in found["simulated_over_measured"].items()
        if name.endswith("_mean_ms")
    )
    cached, predicted = (found[kind]["cached_share"] for kind in ("measured", "simulated"))
    return (
        f"{found['setup']} {found['workload']} x{found['rate']:g}: means, simulated over measured: "
        f"{ratios}; cached {predicted:.3f} and {cached:.3f}"
    )


def choose(runs: Sequence[Run]) -> list[Run]:
    """Those that can be compared; says why the others cannot. Raises ConfigError if none can."""
    chosen: list[Run] = []
    reasons: dict[str, None] = {}
    for run in runs:
        try:
            policy_of(run["setup"])
            chosen.append(run)
        except ConfigError as error:
            reasons[str(error)] = None
    if not chosen:
        raise ConfigError("nothing to compare: " + "; ".join(reasons))
    for reason in reasons:
        print(f"left out: {reason}", file=sys.stderr)
    return chosen


def main() -> int:
    began = time.monotonic()
    parser = argparse.ArgumentParser(
        prog="python -m benchmark.serving.validate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--runs", type=Path, required=True, metavar="FILE", help="what benchmark.serving wrote")
    add("--traces", type=Path, required=True, metavar="DIR", help="what it recorded")
    add(
        "--profile",
        default="cpu-smollm2-135m-in-fleet",
        help="of the instances (default %(default)s)",
    )
    add("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    results: list[dict[str, Any]] = []
    status = 0
    try:
        require_writable(options.json)
        for run in choose(load_file(options.runs)):
            found = compared(run, *simulated(run, options.traces, options.profile))
            results.append(found)
            print(line(found), file=sys.stderr)
    except (MemServeError, Missing) as error:
        print(f"error: {error}", file=sys.stderr)
        status = 2
    if results:
        report("serving/validate", results, began, options.json)
    return status


if __name__ == "__main__":
    sys.exit(main())
