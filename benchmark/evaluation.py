"""``python -m benchmark.evaluation``: the measurements that docs/evaluation.md quotes, in parts.

``--quick`` runs one part with no peer and no data files in under ten minutes. Without it, all
parts; those whose peer is not given are left out, and so named.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmark.harness import RESULTS, ROOT, exit_on_sigterm

_LIMIT_S = 3600.0
# To take its servers down.
_END_LIMIT_S = 60.0
_EACH = ("chat", "react", "documents", "control")
# Set-ups take turns, all instances up: four or six, 3 GB each.
_TURNS = ("--together", "--rounds", "2")
_STOCK = "stock-cache-aware-tuned"
_DESIGNS = ("basic", "caching-1", "caching-2", "caching-3")


@dataclass(frozen=True, slots=True)
class Part:
    """One call of ``benchmark.serving``. ``needs``: the options it cannot do without."""

    name: str
    setups: tuple[str, ...]
    workloads: tuple[str, ...]
    rates: tuple[float, ...] = (1.0,)
    needs: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()

    @property
    def file(self) -> Path:
        return RESULTS / f"evaluation-{self.name}.json"


QUICK = Part("quick", ("stock", "pool", "no-pool"), ("chat", "control"), (2.0,),
             extra=("--requests", "40"))  # fmt: skip
PARTS = (
    Part("main", (_STOCK, "stock-round-robin:chat+control", "pool",
                  "no-pool:chat+documents+control", "pool-session:documents"), _EACH, (2.0,),
         needs=("peer_router", "data"), extra=_TURNS),
    # Differences of a few percent need more rounds.
    Part("control", (_STOCK, "no-pool", "pool"), ("control",), (2.0,), needs=("peer_router",),
         extra=("--together", "--rounds", "3")),
    # Half the device pool: conversations do not fit any more.
    Part("small-hbm", (_STOCK, "no-pool", "pool"), ("chat", "react"), (2.0,),
         needs=("peer_router", "data"), extra=("--hbm-tokens", "4096", *_TURNS)),
    Part("programs", (_STOCK, "no-pool", "pool"), ("programs",), (2.0,), needs=("peer_router",),
         extra=_TURNS),
    # As it comes, it sends every conversation to one worker.
    Part("untuned", ("stock-cache-aware",), ("chat",), (2.0,), needs=("peer_router",)),
    # With --record also what the simulator is compared with.
    Part("load", (_STOCK, "pool"), ("chat", "react"), (1.0, 2.0, 3.0),
         needs=("peer_router", "data"), extra=("--together",)),
    Part("sharegpt", (_STOCK, "pool"), ("sharegpt",), (2.0,), needs=("peer_router", "data"),
         extra=("--together",)),
    Part("memory", ("stock-large-cache-aware-tuned",), ("chat", "react"), (2.0,),
         needs=("peer_router", "data"), extra=("--hbm-tokens", "4096")),
    Part("documents", ("pool", "pool-session", "no-pool-session"), ("documents",), (2.0, 4.0, 6.0),
         needs=("data",), extra=("--rounds", "2")),
    Part("routing", ("pool", "pool-prefix", "pool-session", "pool-least-load", "pool-round-robin",
                     "no-pool", "no-pool-session"), ("documents",)),
    Part("designs", ("1p1d", *(f"1p1d-{design}" for design in _DESIGNS)), ("chat",)),
    # Three instances on two cores: for the order of the steps alone.
    Part("designs-2p1d", ("2p1d", *(f"2p1d-{design}" for design in _DESIGNS)), ("chat",),
         extra=("--requests", "60")),
    Part("shapes", (_STOCK, "pool", "1p1d"), ("chat", "react"), (2.0,),
         needs=("peer_router", "data"), extra=("--together",)),
    Part("vllm", ("vllm",), ("chat", "react", "control"), (2.0,), needs=("peer_vllm", "data")),
    Part("vllm-1p1d", ("vllm-1p1d",), ("chat",), needs=("peer_vllm",)),
)  # fmt: skip


def command(part: Part, options: argparse.Namespace) -> list[str]:
    argv = [sys.executable, "-m", "benchmark.serving"]
    argv += ["--setup", ",".join(part.setups), "--workload", ",".join(part.workloads)]
    argv += ["--rate", ",".join(f"{rate * options.rate:g}" for rate in part.rates)]
    argv += ["--json", str(part.file.relative_to(ROOT)), *part.extra]
    for flag in ("peer_router", "peer_vllm", "data"):
        value = getattr(options, flag)
        if value is not None:
            argv += [f"--{flag.replace('_', '-')}", str(value)]
    if options.record is not None:
        # Parts have replays of the same name.
        argv += ["--record", str(options.record / part.name)]
    return argv


def run(argv: Sequence[str]) -> int:
    """Its exit status; 1 when it was given up. What ends this process ends it too."""
    process = subprocess.Popen(argv, cwd=ROOT)
    try:
        return process.wait(_LIMIT_S)
    except subprocess.TimeoutExpired:
        print(f"given up after {_LIMIT_S:.0f} s", file=sys.stderr)
        return 1
    finally:
        if process.poll() is None:
            _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(_END_LIMIT_S)
    except subprocess.TimeoutExpired:
        # Its servers end with it: they are guarded.
        process.kill()
        process.wait()


def possible(parts: Sequence[Part], options: argparse.Namespace) -> Iterator[Part]:
    for part in parts:
        missing = [flag for flag in part.needs if getattr(options, flag) is None]
        if options.only and part.name not in options.only.split(","):
            continue
        if missing:
            flags = ", ".join(f"--{flag.replace('_', '-')}" for flag in missing)
            print(f"{part.name}: left out, needs {flags}", file=sys.stderr)
        else:
            yield part


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmark.evaluation", description=__doc__)
    add = parser.add_argument
    add("--quick", action="store_true")
    add("--only", metavar="NAMES", help=", ".join(part.name for part in PARTS))
    add("--rate", type=float, default=1.0, help="times that of each part, for other machines")
    add("--peer-router", metavar="PYTHON", help="of an environment with sglang-router")
    add("--peer-vllm", metavar="PYTHON", help="of an environment with vLLM's CPU build")
    add("--data", type=Path, metavar="DIR", help="files of the react and documents workloads")
    add("--record", type=Path, metavar="DIR", help="write what was sent, for the simulator")
    return parser


def main() -> int:
    parser = build_parser()
    options = parser.parse_args()
    exit_on_sigterm()
    parts = (QUICK,) if options.quick else PARTS
    names = [part.name for part in parts]
    unknown = set((options.only or names[0]).split(",")).difference(names)
    if unknown:
        parser.error(f"no part {sorted(unknown)[0]!r}: choose of {', '.join(names)}")
    failed = []
    for part in possible(parts, options):
        argv = command(part, options)
        if options.record is not None:
            (options.record / part.name).mkdir(parents=True, exist_ok=True)
        print(" ".join(["python", *argv[1:]]), file=sys.stderr, flush=True)
        code = run(argv)
        failed += [part.name] if code else []
    if failed:
        print("failed: " + ", ".join(failed), file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
