"""The router as an HTTP service, beside ``sglang-router`` before the same mock workers.

The workers and the load generator are C++ (``worker.cpp``, ``client.cpp``), built here with the
system's compiler, so that the router is what is measured: it has a core of its own, they share
another. Everything is interleaved: latencies request by request, throughput round by round.

- ``latency``: what is added to a request over asking the worker itself, over kept connections: to
  the first byte of the answer (streams: the first event) and to the last.
- ``throughput``: as much as 32 connections carry, a second of the router's processor time.
- ``processes``: the same through ``--processes 2`` and through one, both free to use all cores.
- ``paced``: 500 streams at once, 20 events a second each; how much longer than asked directly.
- ``start``: from ``python -m sglang_memserve.router`` to the first answer of ``/liveness``, and the
  memory it then has.

"new" prompts are there once, "seen" ones are 64 in turn: as in conversations that go on, the router
has met their text.

``--peer PYTHON``: an interpreter that has ``sglang-router`` (in an environment of its own, since
its pins are not ours); without it only our router is measured.

    python benchmark/router/service.py [--peer PYTHON] [--quick] [--json FILE]
"""

from __future__ import annotations

import argparse
import http.client
import itertools
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import psutil
from sglang_memserve.protocol.events import Snapshot, encode_snapshot

from benchmark.harness import report, spread
from benchmark.micro.router_overhead import WORDS, free_port, make_tokenizer
from benchmark.router.described import instance_info

HERE = Path(__file__).parent
START_S = 30.0
RUN_S = 300.0
SEEN = 64
EVENTS = 20
PACED_EVENTS, PACE_MS = 100, 50
CONNECTIONS = 32


@dataclass(frozen=True)
class Plan:
    """How much of each; ``--quick`` is for seeing that it runs."""

    requests: int = 300
    rounds: int = 3
    seconds: float = 2.5
    streams: int = 500


QUICK = Plan(requests=150, rounds=1, seconds=1.0, streams=100)


@dataclass(frozen=True)
class Body:
    """One kind of request."""

    words: int
    streamed: bool
    new: bool

    @property
    def name(self) -> str:
        new, streamed = "new" if self.new else "seen", ", streamed" if self.streamed else ""
        return f"{self.words} words, {new}{streamed}"


SHORT, SHORT_STREAM = Body(200, False, False), Body(200, True, False)
LONG, LONG_STREAM, LONG_NEW = (
    Body(8000, False, False),
    Body(8000, True, False),
    Body(8000, False, True),
)
BODIES = (SHORT, SHORT_STREAM, LONG, LONG_STREAM, LONG_NEW)


@dataclass(frozen=True)
class Bench:
    """What is running and where things lie."""

    folder: Path
    plan: Plan
    worker: int
    routers: Mapping[str, tuple[int, psutil.Process]]
    numbers: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    def client(self, *words: object) -> Any:
        command = [str(self.folder / "client"), *map(str, words)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=RUN_S, check=False)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)}: {done.stderr.strip()}")
        return json.loads(done.stdout)

    def bodies(self, body: Body, events: int = EVENTS) -> Path:
        """A file of requests, whose prompts differ from their first word on; with new ones each
        time if they are to be new."""
        count = SEEN
        if body.new:
            count = self.plan.requests + self.plan.requests // 10 + 5
        first = next(self.numbers) * 10_000 if body.new else 0
        file = self.folder / f"{body.words}-{body.streamed}-{events}-{first}"
        if not file.exists():
            lines = (f"{_body(body, events, first + i)}\n" for i in range(count))
            file.write_text("".join(lines))
        return file


def _body(body: Body, events: int, number: int) -> str:
    words = random.Random(number).choices(WORDS, k=body.words - 1)
    request: dict[str, Any] = {
        "text": " ".join([f"{number:09d}", *words]),
        "sampling_params": {"max_new_tokens": events, "temperature": 0},
        "stream": body.streamed,
    }
    return json.dumps(request, separators=(",", ":"))


# -- what is measured --


def latency(bench: Bench) -> dict[str, Any]:
    ports = [port for port, _ in bench.routers.values()]
    result: dict[str, Any] = {}
    for body in BODIES:
        file = bench.bodies(body)
        samples = bench.client("latency", file, bench.plan.requests, bench.worker, *ports)
        direct = samples[0]
        result[body.name] = {
            "direct_first_p50_ms": direct["first_ms"]["p50"],
            "direct_total_p50_ms": direct["total_ms"]["p50"],
        }
        for name, sample in zip(bench.routers, samples[1:], strict=True):
            result[body.name][name] = {
                f"added_{what}_{point}_ms": round(
                    sample[f"{what}_ms"][point] - direct[f"{what}_ms"][point], 3
                )
                for what in ("first", "total")
                for point in ("min", "p50", "p99")
            }
    return result


def throughput(bench: Bench) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for body in BODIES:
        rates: dict[str, list[tuple[float, float, float]]] = {name: [] for name in bench.routers}
        for _ in range(bench.plan.rounds):
            file = bench.bodies(body)
            for name, (port, process) in bench.routers.items():
                before = processor_s(process)
                run = bench.client("load", file, CONNECTIONS, bench.plan.seconds, port)
                used = processor_s(process) - before
                rates[name].append(
                    (run["requests_per_s"], run["requests"] / used, run["events_per_s"])
                )
        result[body.name] = {
            name: {
                "requests_per_s": round(statistics.median(r[0] for r in runs)),
                "requests_per_processor_s": round(statistics.median(r[1] for r in runs)),
                "events_per_s": round(statistics.median(r[2] for r in runs)),
            }
            for name, runs in rates.items()
        }
    return result


def paced(bench: Bench, worker: int, routers: Mapping[str, int]) -> dict[str, Any]:
    """Streams that begin within a second and last five: those of a busy fleet."""
    file = bench.bodies(SHORT_STREAM, PACED_EVENTS)
    ideal_ms = (PACED_EVENTS - 1) * PACE_MS
    result: dict[str, Any] = {"streams": bench.plan.streams, "events_per_s_each": 1000 / PACE_MS}
    for name, port in {"direct": worker, **routers}.items():
        runs = [
            bench.client("once", file, bench.plan.streams, 1000, port)
            for _ in range(bench.plan.rounds)
        ]
        result[name] = {
            f"stretch_{point}": round(
                statistics.median(run["body_ms"][point] for run in runs) / ideal_ms, 4
            )
            for point in ("p50", "p99", "max")
        } | {"first_p50_ms": round(statistics.median(run["first_ms"]["p50"] for run in runs), 2)}
    return result


def processes(folder: Path, plan: Plan, worker: int) -> dict[str, Any]:
    rates: dict[int, list[float]] = {1: [], 2: []}
    with ExitStack() as stack:
        routers = {}
        for count in rates:
            port = free_port()
            command = [
                "-m",
                "sglang_memserve.router",
                "--port",
                str(port),
                "--log-level",
                "warning",
            ]
            command += ["--instance", f"http://127.0.0.1:{worker}", "--processes", str(count)]
            routers[count] = (port, stack.enter_context(running(command, None)))
            until_followed(port)
        bench = Bench(folder, plan, worker, {})
        for _ in range(plan.rounds):
            for count, (port, _) in routers.items():
                run = bench.client("load", bench.bodies(SHORT), CONNECTIONS, plan.seconds, port)
                rates[count].append(run["requests_per_s"])
        grown = [two / one for one, two in zip(rates[1], rates[2], strict=True)]
        resident = [
            round(process.memory_info().rss / 1e6, 1)
            for process in [routers[2][1], *routers[2][1].children()]
        ]
    return {
        "requests_per_s": {count: round(statistics.median(runs)) for count, runs in rates.items()},
        "two_over_one": spread(grown, 2),
        "resident_mb": resident,
    }


def start_up(rounds: int) -> dict[str, Any]:
    """The least of some rounds too: the first one reads files that the others find in memory."""
    seconds, used, memory = [], [], []
    for _ in range(rounds):
        port = free_port()
        began = time.monotonic()
        with running(("-m", "sglang_memserve.router", "--port", str(port)), None) as process:
            until(port, "/liveness", 200)
            seconds.append(time.monotonic() - began)
            used.append(processor_s(process))
            time.sleep(0.5)
            memory.append(process.memory_info().rss / 1e6)
    return {
        "seconds_median": round(statistics.median(seconds), 2),
        "seconds_min": round(min(seconds), 2),
        "processor_seconds_median": round(statistics.median(used), 2),
        "resident_mb": round(statistics.median(memory), 1),
    }


# -- what it runs on --


def build(folder: Path) -> None:
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        raise SystemExit("a C++ compiler is needed: set CXX")
    for name in ("worker", "client"):
        command = [compiler, "-std=c++17", "-O2", "-o", str(folder / name), f"{HERE}/{name}.cpp"]
        subprocess.run(command, check=True, timeout=120)


def describe_worker(folder: Path, port: int) -> list[str]:
    """The fixed answers of a MemServe instance that holds nothing: paths and files."""
    info = instance_info(f"http://127.0.0.1:{port}", f"boot-{port}", "both", str(folder))
    answers = {
        "/memserve/info": msgspec.json.encode(info),
        "/memserve/stats": b'{"event_seq":-1,"instance":{},"ranks":[{}]}',
        "/memserve/snapshot": encode_snapshot(Snapshot(f"boot-{port}", -1, [])),
        "/memserve/peers": b'{"members":0,"connected":0}',
        "/v1/loads": b'{"loads":[]}',
        "/tokenize": b'{"error":"no tokenizer"}',
    }
    words: list[str] = []
    for path, answer in answers.items():
        file = folder / f"{port}{path.replace('/', '_')}"
        file.write_bytes(answer)
        words += [path, str(file)]
    return words


@contextmanager
def running(
    command: Sequence[str], core: int | None, python: str = sys.executable
) -> Iterator[psutil.Process]:
    """A Python process, or with an absolute path for its first word any other."""
    words = list(command) if command[0].startswith("/") else [python, *command]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL)
    try:
        if core is not None:
            os.sched_setaffinity(process.pid, {core})
        yield psutil.Process(process.pid)
    finally:
        process.terminate()
        try:
            process.wait(timeout=START_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(timeout=START_S)


def processor_s(process: psutil.Process) -> float:
    """Of the process and those it started."""
    total = 0.0
    for one in [process, *process.children(recursive=True)]:
        times = one.cpu_times()
        total += times.user + times.system
    return total


def until(port: int, path: str, status: int) -> bytes:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        line = http.client.HTTPConnection("127.0.0.1", port, timeout=2)
        try:
            line.request("GET", path)
            answer = line.getresponse()
            data = answer.read()
            if answer.status == status:
                return data
        except OSError:
            pass
        finally:
            line.close()
        time.sleep(0.01)
    raise SystemExit(f"port {port} did not answer {path} with {status}")


def until_followed(port: int) -> None:
    until(port, "/liveness", 200)
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        members = json.loads(until(port, "/readiness", 200))["members"]
        if members and all(one["source"] == "exact" for one in members):
            time.sleep(1.0)  # the tokenizer is loaded at the same time
            return
        time.sleep(0.05)
    raise SystemExit("the router does not follow the worker")


def start_worker(stack: ExitStack, folder: Path, pace_ms: int, core: int | None) -> int:
    port = free_port()
    words = describe_worker(folder, port)
    stack.enter_context(running([f"{folder}/worker", str(port), str(pace_ms), *words], core))
    until(port, "/health", 200)
    return port


def start_routers(
    stack: ExitStack, worker: int, peer: str | None, core: int | None
) -> dict[str, tuple[int, psutil.Process]]:
    url = f"http://127.0.0.1:{worker}"
    routers = {}
    for policy in ("cost", "round-robin"):
        port = free_port()
        command = ["-m", "sglang_memserve.router", "--port", str(port), "--instance", url]
        command += ["--policy", policy, "--log-level", "warning"]
        routers[f"memserve {policy}"] = (port, stack.enter_context(running(command, core)))
        until_followed(port)
    for policy in ("cache_aware", "round_robin") if peer else ():
        port = free_port()
        command = ["-m", "sglang_router.launch_router", "--worker-urls", url, "--policy", policy]
        command += ["--host", "127.0.0.1", "--port", str(port), "--log-level", "error"]
        command += ["--prometheus-port", str(free_port())]
        process = stack.enter_context(running(command, core, peer or ""))
        routers[f"sglang-router {policy}"] = (port, process)
        until(port, "/health", 200)
        time.sleep(1.0)
    return routers


def measure(folder: Path, plan: Plan, peer: str | None) -> dict[str, Any]:
    cores = sorted(os.sched_getaffinity(0))
    routing, asking = (cores[0], cores[1]) if len(cores) > 1 else (None, None)
    build(folder)
    make_tokenizer(folder)
    result: dict[str, Any] = {"start": start_up(2 * plan.rounds + 1)}
    if asking is not None:
        os.sched_setaffinity(0, {asking})
    with ExitStack() as stack:
        worker = start_worker(stack, folder, 0, asking)
        bench = Bench(folder, plan, worker, start_routers(stack, worker, peer, routing))
        result["latency"] = latency(bench)
        result["throughput"] = throughput(bench)
        result["processes"] = processes(folder, plan, worker)
        result["resident_mb"] = {
            name: round(process.memory_info().rss / 1e6, 1)
            for name, (_, process) in bench.routers.items()
        }
    with ExitStack() as stack:
        worker = start_worker(stack, folder, PACE_MS, asking)
        routers = start_routers(stack, worker, peer, routing)
        ports = {name: port for name, (port, _) in routers.items()}
        result["paced"] = paced(Bench(folder, plan, worker, routers), worker, ports)
    os.sched_setaffinity(0, cores)
    return result


def main() -> None:
    started = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer", metavar="PYTHON")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.peer:
        # Where that environment lies is nothing to report.
        sys.argv[1:] = [word.replace(options.peer, "PYTHON") for word in sys.argv[1:]]
    with tempfile.TemporaryDirectory() as folder:
        result = measure(Path(folder), QUICK if options.quick else Plan(), options.peer)
    report("router_service", result, started, options.json)


if __name__ == "__main__":
    main()
