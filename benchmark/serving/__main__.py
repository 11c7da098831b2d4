"""Replays workloads against set-ups and writes what came of it.

    python -m benchmark.serving --setup pool,stock-cache-aware --workload chat,control --rate 1
           [--peer-router PYTHON] [--data DIR] [--json FILE]

Set-ups with the same instances share them; before each replay the front starts anew, is warmed up
unmeasured, and all caches are emptied. With ``--together`` all instances are up from the start, and
set-ups take turns within each workload. ``--attach URL`` measures a cluster that runs already.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import requests
from sglang_memserve.errors import ConfigError, MemServeError

from benchmark.harness import ROOT, exit_on_sigterm, report, require_writable
from benchmark.workloads.registry import get, warm_up
from benchmark.workloads.request import Workload, first

from . import fronts, servers, trace
from .neighbours import others_cores, used
from .replay import Target, replay
from .servers import Given, RunningFleet, Sizes
from .setups import SETUPS, Chosen, Engine, Setup, choose
from .summary import difference, router_counters, summarize

EXIT_BAD_INPUT = 2
# Events and the last transfers are over, caches can be emptied.
_QUIET_S = 1.0


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that is replayed against each set-up. ``limit_s``: for one replay. ``record``:
    the folder for what was sent, a file a replay (``trace.name_of``)."""

    workloads: tuple[Workload, ...]
    rates: tuple[float, ...]
    rounds: int
    limit_s: float
    record: Path | None = None

    def runs(self) -> Iterator[tuple[int, Workload, float]]:
        return itertools.product(range(self.rounds), self.workloads, self.rates)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmark.serving",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--setup",
        help="names with commas between, see --list; pool:chat+react: with those workloads alone",
    )
    add("--attach", metavar="URL", help="measure what runs there, as one set-up")
    add("--workload", default="chat", help="names or JSONL files, with commas between")
    add("--rate", default="1", help="times the workload's own speed; several with commas")
    add("--requests", type=int, metavar="N", help="only the first N to arrive")
    add("--rounds", type=int, default=1, help="of everything on each fleet (default %(default)s)")
    add("--together", action="store_true", help="all fleets at once: 3 GB of memory an instance")
    add("--seed", type=int, default=1)
    add("--data", type=Path, metavar="DIR", help="files of the react and documents workloads")
    add("--model", type=Path, default=ROOT / ".cache/models/SmolLM2-135M-Instruct", metavar="DIR")
    add("--hbm-tokens", type=int, default=Sizes().hbm_tokens, help="default %(default)s")
    add("--dram-mib", type=int, default=Sizes().dram_mib, help="default %(default)s")
    add("--peer-router", metavar="PYTHON", help="of an environment with sglang-router")
    add("--peer-vllm", metavar="PYTHON", help="of an environment with vLLM's CPU build")
    add("--limit-s", type=float, default=400.0, help="for one replay (default %(default)g)")
    add("--record", type=Path, metavar="DIR", help="write what was sent, for the simulator")
    add("--json", type=Path, metavar="FILE")
    add("--list", action="store_true", help="say what set-ups there are")
    return parser


def make_plan(options: argparse.Namespace) -> Plan:
    """Raises ConfigError."""
    try:
        rates = tuple(float(rate) for rate in options.rate.split(","))
    except ValueError as error:
        raise ConfigError(f"--rate {options.rate}: {error}") from error
    if not all(0 < rate < 1e6 for rate in rates):
        raise ConfigError(f"--rate {options.rate}: rates are positive")
    if options.rounds < 1 or not 0 < options.limit_s < 1e6:
        raise ConfigError("--rounds and --limit-s must be positive")
    workloads = [get(name, options.seed, options.data) for name in options.workload.split(",")]
    if options.requests is not None:
        if options.requests < 1:
            raise ConfigError("--requests must be positive")
        workloads = [first(workload, options.requests) for workload in workloads]
    if options.record is not None and not options.record.is_dir():
        raise ConfigError(f"--record {options.record}: not a folder")
    return Plan(tuple(workloads), rates, options.rounds, options.limit_s, options.record)


def require_measured(chosen: Sequence[Chosen], plan: Plan) -> None:
    """Raises ConfigError for a set-up that is to be measured with nothing."""
    names = [workload.name for workload in plan.workloads]
    for one in chosen:
        unknown = sorted(one.workloads.difference(names))
        if unknown:
            raise ConfigError(
                f"{one.setup.name}:{unknown[0]}: --workload has {', '.join(names)} alone"
            )


def measure(
    target: Target, workload: Workload, rate: float, plan: Plan, by: dict[str, Any]
) -> dict[str, Any]:
    """``by``: what this replay is told apart by, besides its workload and rate."""
    before = router_counters(target.url)
    samples = asyncio.run(replay(target, workload, rate, plan.limit_s))
    result = {**by, "workload": workload.name, "about": workload.about, "rate": rate}
    if plan.record is not None:
        trace.write(samples, Path(target.model), plan.record / trace.name_of(result))
    result |= summarize(samples)
    time.sleep(_QUIET_S)
    after = router_counters(target.url)
    if after:
        result["router"] = difference(before, after)
    return result


def run_attached(url: str, plan: Plan) -> Iterator[dict[str, Any]]:
    """Nothing is warmed up or emptied there. Raises MemServeError when nobody answers."""
    try:
        models = requests.get(f"{url}/v1/models", timeout=30).json()
        target = Target(url.rstrip("/"), models["data"][0]["id"])
        if plan.record is not None and not Path(target.model).is_dir():
            raise ConfigError(
                f"--record needs the tokenizer of what {url} serves: "
                f"{target.model} is no folder here"
            )
    except (requests.RequestException, ValueError, LookupError, TypeError) as error:
        raise MemServeError(f"{url} does not say which models it serves: {error}") from error
    for number, workload, rate in plan.runs():
        yield measure(target, workload, rate, plan, {"setup": "attached", "round": number})


def run_setups(
    chosen: Sequence[Chosen], plan: Plan, given: Given, folder: Path
) -> Iterator[dict[str, Any]]:
    """In rounds over the set-ups of a fleet, fleet after fleet."""
    for _, group in itertools.groupby(chosen, key=lambda one: one.setup.fleet):
        sharing = list(group)
        started = time.monotonic()
        with servers.start(sharing[0].setup.fleet, given, folder) as fleet:
            _say(f"{fleet.fleet.name}: up in {time.monotonic() - started:.0f} s")
            for number, one in itertools.product(range(plan.rounds), sharing):
                yield from _run_setup(one, fleet, plan, given, number)


def run_together(
    chosen: Sequence[Chosen], plan: Plan, given: Given, folder: Path
) -> Iterator[dict[str, Any]]:
    """All set-ups one after the other for each workload; every second round the other way round,
    so that what drifts does so for all."""
    with ExitStack() as stack:
        fleets = {
            fleet: stack.enter_context(servers.start(fleet, given, folder))
            for fleet in dict.fromkeys(one.setup.fleet for one in chosen)
        }
        for number, workload, one in in_turns(chosen, plan):
            only = replace(plan, workloads=(workload,))
            yield from _run_setup(one, fleets[one.setup.fleet], only, given, number)


def in_turns(chosen: Sequence[Chosen], plan: Plan) -> Iterator[tuple[int, Workload, Chosen]]:
    """Round, workload and set-up, each set-up with the workloads it takes."""
    for number, workload in itertools.product(range(plan.rounds), plan.workloads):
        for one in chosen[::-1] if number % 2 else chosen:
            if one.takes(workload.name):
                yield number, workload, one


def _run_setup(
    chosen: Chosen, fleet: RunningFleet, plan: Plan, given: Given, number: int
) -> Iterator[dict[str, Any]]:
    setup = chosen.setup
    by = {**_describe(setup, fleet, given), "round": number}
    with fronts.start(setup.front, fleet, given) as url:
        target = Target(url, str(given.model), setup.salt)
        asyncio.run(replay(target, warm_up(), 1.0, plan.limit_s))
        workloads = [one for one in plan.workloads if chosen.takes(one.name)]
        for workload, rate in itertools.product(workloads, plan.rates):
            time.sleep(_QUIET_S)
            fleet.flush()
            time.sleep(_QUIET_S)
            before = used()
            result = measure(target, workload, rate, plan, by)
            result["others_cores"] = others_cores(before, used())
            _say_result(setup.name, result)
            yield result


def _describe(setup: Setup, fleet: RunningFleet, given: Given) -> dict[str, Any]:
    sizes = given.sizes
    return {
        "setup": setup.name,
        "about_setup": setup.about,
        "cores": [instance.core for instance in fleet.instances],
        "hbm_tokens": sizes.device_tokens(setup.fleet.device_pool),
        "dram_mib": sizes.dram_mib if setup.fleet.engine is Engine.MEMSERVE else 0,
    }


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _say_result(name: str, result: dict[str, Any]) -> None:
    if "ttft_ms" not in result:
        _say(f"{name} {result['workload']}: nothing was answered: {result.get('first_errors')}")
        return
    ttft, jct = result["ttft_ms"], result["jct_ms"]
    _say(
        f"{name} {result['workload']} x{result['rate']:g}: {result['requests']} requests, "
        f"{result['failed']} failed, {result['seconds']} s; "
        f"TTFT {ttft['mean']:.0f} / {ttft['p50']:.0f} / {ttft['p99']:.0f}, "
        f"TPOT {result['tpot_ms']['mean']:.0f}, JCT {jct['mean']:.0f} / {jct['p99']:.0f} ms; "
        f"cached {100 * result['cached_share']:.0f} %; others took {result['others_cores']} cores"
    )


def commit() -> str:
    """What was measured, with a plus sign where the files differ from it."""
    command = ["git", "describe", "--always", "--exclude=*", "--dirty=+"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30)
    return done.stdout.strip() or "unknown"


def run(options: argparse.Namespace) -> int:
    """Raises MemServeError; ConfigError is one."""
    if options.list:
        for setup in SETUPS.values():
            print(f"{setup.name:24} {setup.about}")
        return 0
    started = time.monotonic()
    plan = make_plan(options)
    if (options.setup is None) == (options.attach is None):
        raise ConfigError("say what to measure: --setup NAMES or --attach URL")
    chosen = [] if options.setup is None else choose(options.setup)
    require_measured(chosen, plan)
    require_writable(options.json)
    sizes = Sizes(options.hbm_tokens, options.dram_mib)
    given = Given(options.model, sizes, options.peer_router, options.peer_vllm)
    results = []
    with tempfile.TemporaryDirectory() as folder:
        if options.attach is not None:
            made = run_attached(options.attach, plan)
        else:
            run_all = run_together if options.together else run_setups
            made = run_all(chosen, plan, given, Path(folder))
        # Before the first result is written, which may be to a file that is committed.
        measured = commit()
        for result in made:
            results.append({"commit": measured, **result})
            if options.json is not None:
                # Hours may be lost otherwise.
                report("serving", results, started, options.json)
    if options.json is None:
        report("serving", results, started, None)
    return 1 if any(result["failed"] for result in results) else 0


def main() -> int:
    exit_on_sigterm()
    try:
        return run(build_parser().parse_args())
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except MemServeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
