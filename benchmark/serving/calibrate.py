"""Measures one MemServe instance on one core and writes the profile that the simulator takes.

    python -m benchmark.serving.calibrate --profile FILE [--in-fleet] [--model DIR] [--json FILE]

Prefill: time to the only token of prompts of several lengths, new and with all but a part cached.
Decode: time a token of some streams at once. Each is fitted by least squares of the relative error,
no coefficient below zero; how far the fit is off is written beside it.

That is an instance at its best. In a fleet on one machine it shares the memory's bandwidth with the
others, and its core with routers and clients. With ``--in-fleet`` another instance on a core of its
own answers all the while, and both are asked through a router, as clients of OpenAI's API do; what
a round takes in the middle counts then, not at its shortest.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
from sglang_memserve.cluster.machine import free_ports
from sglang_memserve.errors import MemServeError
from sglang_memserve.types import Role

from benchmark.harness import ROOT, exit_on_sigterm, report, require_writable

from . import fronts, servers
from .servers import Given, Sizes
from .setups import Engine, Fleet, Front, FrontKind

_CHUNK = 512
_PREFILLS = ((64, 0), (256, 0), (512, 0), (1024, 0), (2048, 0), (576, 512), (1088, 1024),
             (1280, 1024), (2112, 2048), (2560, 2048))  # fmt: skip
_STREAMS = ((1, 128), (2, 128), (4, 128), (8, 128), (1, 1024), (4, 1024), (6, 1024))
_NEW_TOKENS = 24
# What the other instance answers, one after the other: prompt tokens and tokens generated.
_BESIDE = ((512, 96), (256, 64))
_LIMIT_S = 300.0


@dataclass(frozen=True, slots=True)
class Timed:
    """``terms``: what is multiplied with the figures that are looked for."""

    name: str
    terms: tuple[float, ...]
    seconds: float


def fit(timed: Sequence[Timed]) -> list[float]:
    """The figures, none negative: the best of what leaves some of them out."""
    weights = np.array([1 / one.seconds for one in timed])
    table = np.array([one.terms for one in timed]) * weights[:, None]
    best: tuple[float, list[float]] | None = None
    columns = range(table.shape[1])
    for kept in itertools.chain.from_iterable(
        itertools.combinations(columns, size) for size in range(1, len(columns) + 1)
    ):
        found = np.linalg.lstsq(table[:, kept], np.ones(len(timed)), rcond=None)[0]
        if (found < 0).any():
            continue
        off = float(((table[:, kept] @ found - 1) ** 2).sum())
        figures = [0.0] * len(columns)
        for column, figure in zip(kept, found, strict=True):
            figures[column] = float(figure)
        if best is None or off < best[0]:
            best = off, figures
    assert best is not None, timed
    return best[1]


def off_by(timed: Sequence[Timed], figures: Sequence[float]) -> dict[str, float]:
    """Prediction over measurement, of each."""
    return {
        one.name: round(
            sum(a * b for a, b in zip(one.terms, figures, strict=True)) / one.seconds, 3
        )
        for one in timed
    }


@dataclass(frozen=True, slots=True)
class How:
    """``of_rounds``: the figure of several rounds."""

    model: str
    rounds: int
    of_rounds: Callable[[Sequence[float]], float]


class _Instance:
    """``url``: its own, or that of a router before it."""

    def __init__(self, session: aiohttp.ClientSession, url: str, how: How) -> None:
        self._session, self._url, self._how = session, url, how
        self._source = random.Random(time.time_ns())

    def _ids(self, count: int) -> list[int]:
        return [self._source.randrange(100, 40000) for _ in range(count)]

    async def _ask(self, ids: list[int], new_tokens: int) -> tuple[float, float]:
        """Seconds to the first token, and from there to the last."""
        body = {"model": self._how.model, "prompt": ids, "max_tokens": new_tokens}
        body |= {"temperature": 0, "ignore_eos": True, "stream": True}
        began = time.perf_counter()
        first = 0.0
        async with self._session.post(f"{self._url}/v1/completions", json=body) as response:
            response.raise_for_status()
            async for line in response.content:
                if line.startswith(b"data: {"):
                    last = time.perf_counter()
                    first = first or last
        return first - began, last - first

    async def prefill(self, length: int, cached: int) -> Timed:
        samples = []
        for number in range(self._how.rounds + 1):
            prefix = self._ids(cached)
            if cached:
                await self._ask(prefix, 1)
            seconds, _ = await self._ask(prefix + self._ids(length - cached), 1)
            # The first warms up kernels of this shape.
            samples += [seconds] if number else []
        new = length - cached
        terms = (float(-(-new // _CHUNK)), float(new), new * (cached + new / 2))
        return Timed(f"prefill {new} after {cached}", terms, self._how.of_rounds(samples))

    async def decode(self, streams: int, context: int) -> Timed:
        samples = []
        for _ in range(self._how.rounds):
            asked = [self._ask(self._ids(context), _NEW_TOKENS) for _ in range(streams)]
            # The last to begin has the others beside it from the first to the last token.
            spans = [span for _, span in await asyncio.gather(*asked)]
            samples.append(min(spans) / (_NEW_TOKENS - 1))
        held = streams * (context + _NEW_TOKENS / 2)
        terms = (1.0, float(streams), held)
        return Timed(f"decode {streams} x {context}", terms, self._how.of_rounds(samples))

    async def go_on(self) -> None:
        """Answer until cancelled."""

        async def one(context: int, new_tokens: int) -> None:
            while True:
                await self._ask(self._ids(context), new_tokens)

        await asyncio.gather(*(one(*sizes) for sizes in _BESIDE))


async def measure(urls: Sequence[str], how: How) -> tuple[list[Timed], list[Timed]]:
    """Of the first, while the others are kept busy."""
    timeout = aiohttp.ClientTimeout(total=_LIMIT_S)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        instance, *others = (_Instance(session, url, how) for url in urls)
        busy = asyncio.gather(*(other.go_on() for other in others))
        try:
            prefills = [await instance.prefill(*sizes) for sizes in _PREFILLS]
            decodes = [await instance.decode(*sizes) for sizes in _STREAMS]
        finally:
            if others and busy.done():
                # What was measured had nobody beside it: say why.
                busy.result()
            busy.cancel()
            with suppress(asyncio.CancelledError):
                await busy
    return prefills, decodes


def run(given: Given, rounds: int, *, in_fleet: bool) -> tuple[list[Timed], list[Timed]]:
    fleet = Fleet("calibrated", Engine.MEMSERVE, (Role.BOTH,) * (2 if in_fleet else 1))
    # Alone, whatever comes between only adds; in a fleet, that is what is asked for.
    how = How(str(given.model), rounds, statistics.median if in_fleet else min)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        running = stack.enter_context(servers.start(fleet, given, folder))
        if not in_fleet:
            return asyncio.run(measure(running.urls(), how))
        # A router each: one for both would choose the idle one.
        ports = free_ports(len(running.instances), taken={running.front_port})
        urls = []
        for instance, port in zip(running.instances, ports, strict=True):
            own = folder / f"router-{port}"
            own.mkdir()
            alone = replace(running, instances=(instance,), front_port=port, folder=own)
            front = Front(FrontKind.ROUTER, ("--worker-urls", instance.url))
            urls.append(stack.enter_context(fronts.start(front, alone, given)))
        return asyncio.run(measure(urls, how))


def profile_of(
    prefill: Sequence[float], decode: Sequence[float], sizes: Sizes, *, in_fleet: bool
) -> dict[str, Any]:
    how = "through a router, another instance busy" if in_fleet else "alone"
    return {
        "name": "measured",
        "model": "SmolLM2-135M in bfloat16, one core an instance",
        "source": f"benchmark/serving/calibrate.py: prefill and decode, fitted; {how}.",
        "estimates": ["load_bytes_per_s", "hop_s", "link, but for its order of magnitude"],
        "kv_bytes_per_token": servers.TOKEN_BYTES,
        "hbm_tokens": sizes.hbm_tokens,
        "dram_bytes": sizes.dram_mib * 2**20,
        "load_bytes_per_s": 3.0e9,
        # In ``fixed_s`` where a router was asked.
        "hop_s": 0.0 if in_fleet else 0.0022,
        "prefill": {"fixed_s": prefill[0], "token_s": prefill[1], "pair_s": prefill[2],
                    "chunk_tokens": _CHUNK},
        "decode": {"fixed_s": decode[0], "stream_s": decode[1], "context_token_s": decode[2],
                   "max_streams": 32},
        "link": {"latency_s": 0.003, "bytes_per_s": 1.0e10},
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmark.serving.calibrate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--profile", type=Path, required=True, metavar="FILE")
    add("--model", type=Path, default=ROOT / ".cache/models/SmolLM2-135M-Instruct", metavar="DIR")
    add("--rounds", type=int, default=3)
    add("--in-fleet", action="store_true", help="through a router, beside a busy instance")
    add("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error("--rounds must be positive")
    exit_on_sigterm()
    started = time.monotonic()
    sizes = Sizes()
    given = Given(options.model, sizes)
    try:
        require_writable(options.profile, options.json)
        prefills, decodes = run(given, options.rounds, in_fleet=options.in_fleet)
    except MemServeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    prefill, decode = fit(prefills), fit(decodes)
    profile = profile_of(prefill, decode, sizes, in_fleet=options.in_fleet)
    options.profile.write_text(json.dumps(profile, indent=2) + "\n")
    results = {
        "ms": {one.name: round(1e3 * one.seconds, 1) for one in (*prefills, *decodes)},
        "predicted_over_measured": off_by(prefills, prefill) | off_by(decodes, decode),
    }
    report("serving/calibrate", [results], started, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
