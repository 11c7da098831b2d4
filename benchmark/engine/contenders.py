"""The servers that are compared: each a real process, bound to the same cores, asked the same way.

All speak ``/v1/completions`` with token ids and streams, so that one client measures all of them.
Only the one that is asked runs (``alone``): others go on polling for a while after an answer, vLLM
for a second, and would take half of the cores from the next one.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import requests
from sglang_memserve.cluster.machine import free_ports
from sglang_memserve.cluster.process import Command, GuardedProcess

from benchmark import vllm_server
from benchmark.harness import ROOT

START_LIMIT_S = 420.0
# For what is overdue after standing still: timers, health checks.
SETTLE_S = 0.3
MODEL_NAME = "model"
# llama.cpp divides its context among its slots.
LLAMA_SLOT_TOKENS = 5120


@dataclass(frozen=True, slots=True)
class Contender:
    """How to start one: ``argv`` without the port, which is added as ``--port N``."""

    name: str
    argv: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Running:
    name: str
    url: str
    pid: int


def parser(description: str | None, *, cores: str, new_tokens: int) -> argparse.ArgumentParser:
    """What every comparison of engines is told; the defaults of two differ."""
    made = argparse.ArgumentParser(description=description)
    add = made.add_argument
    add("--model", type=Path, default=ROOT / ".cache/models/SmolLM2-135M-Instruct")
    add("--cores", type=_numbers, default=cores, help="such as 0 or 0,1: a thread for each")
    add("--new-tokens", type=int, default=new_tokens)
    add("--seed", type=int, default=1)
    add("--json", type=Path)
    return made


def _numbers(text: str) -> list[int]:
    return [int(core) for core in text.split(",")]


def memserve(model: Path, threads: int, name: str = "memserve") -> Contender:
    """This project's engine: its platform, attention and native operations; no pool, no router."""
    return Contender(name, _sglang(model, threads))


def stock(model: Path, threads: int) -> Contender:
    """SGLang as it runs on this platform without anything of ours that computes."""
    return Contender(
        "stock",
        (*_sglang(model, threads), "--attention-backend", "torch_native"),
        {"MEMSERVE_NATIVE": "0"},
    )


def _sglang(model: Path, threads: int) -> tuple[str, ...]:
    return (
        *(sys.executable, "-m", "sglang_memserve.launch_server", "--model-path", str(model)),
        *("--served-model-name", MODEL_NAME, "--no-mempool", "--cpu-threads", str(threads)),
        *("--max-total-tokens", "60000"),
    )


def vllm(python: Path, model: Path, cores: Sequence[int]) -> Contender:
    """vLLM's CPU build in the environment of ``python``, with the caching it has by default."""
    return Contender(
        "vllm",
        (*vllm_server.arguments(python, model), "--served-model-name", MODEL_NAME),
        vllm_server.environment(cores),
    )


def llama(server: Path, model: Path, threads: int, slots: int) -> Contender:
    """llama.cpp's ``llama-server`` with a GGUF; caching as it is by default, and so are f16 keys
    and values. ``slots``: requests at once."""
    return Contender(
        "llama.cpp",
        (
            *(str(server), "--model", str(model), "--alias", MODEL_NAME, "--host", "127.0.0.1"),
            *("--threads", str(threads), "--threads-batch", str(threads), "--offline"),
            *("--parallel", str(slots), "--ctx-size", str(slots * LLAMA_SLOT_TOKENS)),
        ),
    )


@contextmanager
def running(
    contenders: Sequence[Contender], cores: Sequence[int], folder: Path
) -> Iterator[list[Running]]:
    """All of them at once, started one after the other, each bound to ``cores``."""
    from integration.harness import process_environment

    with ExitStack() as stack:
        environment = stack.enter_context(process_environment())
        servers = []
        for contender in contenders:
            (port,) = free_ports(1, taken=set())
            argv = ("taskset", "-c", ",".join(map(str, cores)), *contender.argv)
            command = Command(
                contender.name,
                (*argv, "--port", str(port)),
                {**environment, **contender.environment},
                folder / f"{contender.name}.log",
            )
            process = stack.enter_context(GuardedProcess(command))
            url = f"http://127.0.0.1:{port}"
            _await_health(process, url)
            servers.append(Running(contender.name, url, process.pid))
        yield servers


@contextmanager
def alone(server: Running, servers: Sequence[Running]) -> Iterator[None]:
    """While this lasts, all processes of the other servers stand still."""
    others = [
        process
        for other in servers
        if other is not server
        for process in _tree(psutil.Process(other.pid))
    ]
    try:
        for process in others:
            process.send_signal(signal.SIGSTOP)
        time.sleep(SETTLE_S)
        yield
    finally:
        for process in others:
            # One that has died must not leave the others standing; whoever asks it will be told.
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGCONT)


def _tree(process: psutil.Process) -> list[psutil.Process]:
    return [process, *process.children(recursive=True)]


def _await_health(process: GuardedProcess, url: str) -> None:
    deadline = time.monotonic() + START_LIMIT_S
    while True:
        if process.poll() is not None or time.monotonic() > deadline:
            raise SystemExit(f"{process.name} did not start:\n{process.log_tail(30)}")
        try:
            if requests.get(f"{url}/health", timeout=5).status_code == 200:
                return
        except requests.RequestException:
            pass  # not listening yet
        time.sleep(0.5)


def version_of(python: Path, package: str) -> str:
    """The version of ``package`` in another environment."""
    code = f"import importlib.metadata as m; print(m.version({package!r}))"
    done = subprocess.run(
        [str(python), "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    return done.stdout.strip()


def llama_version(server: Path) -> str:
    """What the binary says of itself, with llama.cpp's commit."""
    done = subprocess.run(
        [str(server), "--version"], capture_output=True, text=True, timeout=60, check=True
    )
    for line in (done.stdout + done.stderr).splitlines():
        if line.startswith("version: "):
            return line.removeprefix("version: ")
    raise SystemExit(f"{server} does not tell its version")
