"""``python -m sglang_memserve.simulate``: replay a trace against fleets that are not there."""

from __future__ import annotations

import argparse
import os
import platform
import re
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import isfinite
from pathlib import Path

import msgspec
from sglang_memserve.config import DEFAULT_EVICTION, parse_eviction, parse_size
from sglang_memserve.errors import ConfigError, MemServeError
from sglang_memserve.types import Eviction, Role

from . import bound, trace
from .fleet import NAMES, Fleet, Terms
from .profile import Profile, load, shipped
from .report import Report, Setting, comparison, report, text

MOST_INSTANCES = 1024
LEAST_HEARTBEAT_S = 0.01
# Each takes some hundred bytes here.
MOST_PAGES = 2**24
_PART = re.compile(r"(\d{1,4})([PDB])")
_ROLES = {"P": Role.PREFILL, "D": Role.DECODE, "B": Role.BOTH}


@dataclass(frozen=True, slots=True)
class Shape:
    """A fleet's roles by a name such as ``4P4D`` or ``8B``."""

    name: str
    roles: tuple[Role, ...]


@dataclass(frozen=True, slots=True)
class Options:
    """``until``: seconds of the run after which it stops, whatever is not finished."""

    trace: Path
    block_tokens: int
    profile: Profile
    shapes: tuple[Shape, ...]
    policies: tuple[str, ...]
    rates: tuple[float, ...]
    requests: int | None
    spread_s: float
    seed: int
    until: float | None
    terms: Terms
    json: Path | None


def parse_shape(name: str) -> Shape:
    """Raises ConfigError."""
    parts = _PART.findall(name.upper())
    roles = [role for count, letter in parts for role in [_ROLES[letter]] * int(count)]
    if "".join(count + letter for count, letter in parts) != name.upper():
        raise ConfigError(f"shape {name!r}: numbers with P, D or B behind them, as 4P4D or 8B")
    if not 1 <= len(roles) <= MOST_INSTANCES:
        raise ConfigError(f"shape {name!r}: 1 to {MOST_INSTANCES} instances")
    if not any(role.can_decode for role in roles):
        raise ConfigError(f"shape {name!r}: nobody decodes")
    return Shape(name.upper(), tuple(roles))


def parse_args(argv: Sequence[str]) -> Options:
    """Raises ConfigError for values that make no sense; argparse exits for unknown flags."""
    args = _parser().parse_args(argv)
    named = _shapes(args)
    # "4P4D0B" is 4P4D.
    shapes = [re.sub(r"(?<!\d)0+[PDBpdb]", "", name) for name in named.split(",")]
    policies = tuple(args.policy.split(","))
    for policy in policies:
        if policy not in NAMES:
            raise ConfigError(f"unknown policy {policy!r}: choose among {', '.join(NAMES)}")
    if args.block_tokens <= 0 or args.page_tokens <= 0 or args.block_tokens % args.page_tokens:
        raise ConfigError(
            f"--page-tokens ({args.page_tokens}) must divide --block-tokens ({args.block_tokens})"
        )
    if args.requests is not None and args.requests <= 0:
        raise ConfigError("--requests must be positive")
    if args.bypass_tokens is not None and args.bypass_tokens < 0:
        raise ConfigError("--bypass-tokens must not be negative")
    for name in ("spread", "event_delay_s", "until"):
        value = getattr(args, name)
        if value is not None and not (isfinite(value) and value >= 0):
            raise ConfigError(f"--{name.replace('_', '-')} must not be negative")
    if not (isfinite(args.heartbeat_s) and args.heartbeat_s >= LEAST_HEARTBEAT_S):
        raise ConfigError(f"--heartbeat-s must be {LEAST_HEARTBEAT_S} at least")
    profile = load(args.profile)
    if args.hbm_tokens is not None:
        if args.hbm_tokens <= 0:
            raise ConfigError("--hbm-tokens must be positive")
        profile = msgspec.structs.replace(profile, hbm_tokens=args.hbm_tokens)
    terms = Terms(
        page_tokens=args.page_tokens,
        dram_bytes=_dram_bytes(args.dram),
        eviction=parse_eviction(args.eviction),
        bypass_tokens=args.bypass_tokens,
        heartbeat_s=args.heartbeat_s,
        event_delay_s=args.event_delay_s,
    )
    dram_bytes = profile.dram_bytes if terms.dram_bytes is None else terms.dram_bytes
    page_bytes = args.page_tokens * profile.kv_bytes_per_token
    for flag, pages in (
        ("--hbm-tokens", profile.hbm_tokens // args.page_tokens),
        ("--dram", dram_bytes // page_bytes),
    ):
        if pages > MOST_PAGES:
            raise ConfigError(f"{flag}: {pages} pages an instance, {MOST_PAGES} at most")
    if args.json is not None and (args.json.is_dir() or not args.json.absolute().parent.is_dir()):
        raise ConfigError(f"--json {args.json} cannot be written")
    return Options(
        args.trace,
        args.block_tokens,
        profile,
        tuple(parse_shape(name) for name in shapes),
        policies,
        _rates(args.rate),
        args.requests,
        args.spread,
        args.seed,
        args.until,
        terms,
        args.json,
    )


def _shapes(args: argparse.Namespace) -> str:
    """1P1D where nothing is said, and ``--both N`` alone is N. Raises ConfigError for both ways."""
    counts = args.prefill, args.decode, args.both
    if args.shape is not None:
        if counts != (None, None, None):
            raise ConfigError("say --shape, or --prefill, --decode and --both")
        return str(args.shape)
    separate = 0 if args.both else 1
    prefill, decode = (separate if one is None else one for one in counts[:2])
    return f"{prefill}P{decode}D{args.both or 0}B"


def _dram_bytes(text: str | None) -> int | None:
    if text is None:
        return None
    return 0 if text == "0" else parse_size(text)


def _rates(text: str) -> tuple[float, ...]:
    try:
        rates = tuple(float(part) for part in text.split(","))
    except ValueError:
        rates = ()
    if not rates or not all(isfinite(rate) and rate > 0 for rate in rates):
        raise ConfigError(f"--rate {text!r}: positive numbers with commas between them")
    return rates


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m sglang_memserve.simulate",
        description="Replay a trace against simulated instances, under the router's own decisions.",
    )
    add = parser.add_argument
    add("--trace", type=Path, required=True, metavar="FILE", help="JSON lines (docs/simulator.md)")
    add("--block-tokens", type=int, default=trace.BLOCK_TOKENS, help="tokens of one hash id")
    profiles = f"{', '.join(shipped())}, or a file (default %(default)s)"
    add("--profile", default="h100-llama-70b", help=profiles)
    add("--prefill", type=int, metavar="N", help="prefill instances (default 1; 0 with --both)")
    add("--decode", type=int, metavar="N", help="decode instances (default 1; 0 with --both)")
    add("--both", type=int, metavar="N", help="instances that do both (default 0)")
    add("--shape", metavar="4P4D,8B", help="several fleets to compare, instead of these three")
    add("--policy", default="cost", help=f"one or several of {', '.join(NAMES)}")
    add("--rate", "--speedup", default="1", help="requests a second, as multiples of the trace's")
    add("--requests", type=int, metavar="N", help="the first N alone")
    add("--spread", type=float, default=0.0, metavar="S", help="each up to S seconds later")
    add("--seed", type=int, default=0, help="of --spread")
    add("--until", type=float, metavar="S", help="stop after so many seconds of the run")
    add("--hbm-tokens", type=int, metavar="N", help="KV slots of an instance (default: profile's)")
    add(
        "--dram",
        metavar="SIZE",
        help="MemPool of each instance, as 64GiB; or 0 (default: profile's)",
    )
    add("--eviction", default=DEFAULT_EVICTION.value, help=_either(Eviction))
    add("--page-tokens", type=int, default=128, help="tokens of a page; divides --block-tokens")
    add("--bypass-tokens", type=int, metavar="N", help="as the router's flag")
    add("--heartbeat-s", type=float, default=2.0, metavar="S", help="as the router's flag")
    add("--event-delay-s", type=float, default=0.002, metavar="S", help="until the router knows")
    add("--json", type=Path, metavar="FILE", help="write all figures there")
    return parser


def _either(kind: type[Eviction]) -> str:
    return " or ".join(one.value for one in kind)


def read(options: Options) -> list[trace.Arrival]:
    """What is replayed, at the trace's own rate. Raises ConfigError for a bad trace."""
    everybody = trace.read(options.trace, options.block_tokens)[: options.requests]
    return trace.spread(everybody, options.spread_s, options.seed)


def least(options: Options, arrivals: Sequence[trace.Arrival]) -> bound.Bound:
    """What no fleet and no policy can beat."""
    page, block = options.terms.page_tokens, options.block_tokens
    return bound.bound(arrivals, options.profile, page, block)


def simulate(options: Options, arrivals: Sequence[trace.Arrival]) -> Iterator[Report]:
    """One report for each rate, shape and policy."""
    for rate, shape, policy in product(options.rates, options.shapes, options.policies):
        yield run(options, shape, policy, rate, trace.at_rate(arrivals, rate))


def run(
    options: Options, shape: Shape, policy: str, rate: float, arrivals: Sequence[trace.Arrival]
) -> Report:
    fleet = Fleet(options.profile, shape.roles, replace(options.terms, policy=policy))
    page, block = options.terms.page_tokens, options.block_tokens
    for one in arrivals:
        keyed = trace.keyed(one, page, block)
        answered = trace.answered_keys(one, page, block)
        fleet.submit(one.at_s, keyed, one.output_tokens, one.session, answered)
    served = fleet.run(float("inf") if options.until is None else options.until)
    fleet.check()
    return report(
        Setting(policy, shape.name, rate),
        served,
        fleet.work(),
        transfers=fleet.network.transfers,
        moved_bytes=fleet.network.moved_bytes,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """The process's exit status: 0, or 2 for a bad command line or trace."""
    words = list(sys.argv[1:] if argv is None else argv)
    began = time.monotonic()
    reports: list[Report] = []
    try:
        options = parse_args(words)
        arrivals = read(options)
        best = least(options, arrivals)
        print(bound.text(best), end="\n\n", flush=True)
        for one in simulate(options, arrivals):
            reports.append(one)
            print(text(one), end="\n\n", flush=True)
        if len(reports) > 1:
            print(comparison(reports))
        if options.json is not None:
            _write(options.json, words, options, best, reports, time.monotonic() - began)
    except MemServeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # Whoever read has enough (``| head``). What is left to flush at the end goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0


def _write(
    file: Path,
    words: Sequence[str],
    options: Options,
    best: bound.Bound,
    reports: Sequence[Report],
    seconds: float,
) -> None:
    """Raises ConfigError where that cannot be written."""
    told = {
        "benchmark": "simulate",
        "command": shlex.join(["python", "-m", "sglang_memserve.simulate", *words]),
        "machine": {"python": platform.python_version(), "cpu": platform.machine()},
        "seconds": round(seconds, 1),
        "profile": msgspec.to_builtins(options.profile),
        "bound": best.json(),
        "results": [one.json() for one in reports],
    }
    try:
        file.write_bytes(msgspec.json.format(msgspec.json.encode(told), indent=1) + b"\n")
    except OSError as error:
        raise ConfigError(f"--json {file}: {error.strerror}") from error
