"""Real clusters and servers for tests, and what one asks of them.

``with launch_cluster(model, folder) as cluster`` runs ``python -m sglang_memserve.launch_cluster``
and gives its URLs and process ids; ``launch_server`` runs one instance. Both wait with a limit,
fail with the end of the logs, and take everything down when the block or the test process ends.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests
from sglang_memserve.cluster import probe
from sglang_memserve.cluster.machine import free_ports
from sglang_memserve.cluster.process import Command, GuardedProcess
from sglang_memserve.protocol.events import BlockStored, decode_snapshot
from sglang_memserve.types import Tier

# Half a minute on an idle machine; less than the limit of a test in pyproject.toml.
START_LIMIT_S = 420.0
REQUEST_LIMIT_S = 120.0
# More than a cluster needs to end by itself.
_END_LIMIT_S = 20.0


@dataclass(frozen=True, slots=True)
class Server:
    """``pid`` is the server's own; killing it takes its schedulers along."""

    name: str
    role: str
    url: str
    pid: int
    log: Path


@dataclass(frozen=True, slots=True)
class RunningCluster:
    """``url`` is the router's."""

    url: str
    pid: int
    router: Server
    instances: tuple[Server, ...]

    def all(self, role: str) -> list[Server]:
        return [server for server in self.instances if server.role == role]

    def one(self, role: str) -> Server:
        (server,) = self.all(role)
        return server


@contextmanager
def process_environment() -> Iterator[dict[str, str]]:
    """Of processes that end with the block: what they leave in their temporary folder goes too.

    SGLang leaves its sockets' files there, however it ends. The folder's path is short, as the
    kernel bounds that of a socket."""
    with tempfile.TemporaryDirectory(prefix="memserve-test-", ignore_cleanup_errors=True) as name:
        # A failing import in a child should not wait for a hub.
        yield {**os.environ, "HF_HUB_OFFLINE": "1", "TMPDIR": name}


def module_command(name: str, *arguments: str) -> tuple[str, ...]:
    return (sys.executable, "-m", f"sglang_memserve.{name}", *arguments)


def wait_until(
    condition: Callable[[], bool], limit_s: float, what: str, poll_s: float = 0.1
) -> None:
    """Fails the test, naming ``what``, when ``condition`` is not true in time."""
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {limit_s:g} s: {what}"
        time.sleep(poll_s)


def _await_ready(process: GuardedProcess, ready: Callable[[], bool]) -> None:
    def ready_or_dead() -> bool:
        code = process.poll()
        assert code is None, f"{process.name} died ({code}):\n{process.log_tail(40)}"
        return ready()

    try:
        wait_until(ready_or_dead, START_LIMIT_S, f"{process.name} is ready", poll_s=0.2)
    except AssertionError as error:
        raise AssertionError(f"{error}\n{process.log_tail(40)}") from error


@contextmanager
def launch_cluster(
    model: Path,
    folder: Path,
    *,
    prefill: int = 1,
    decode: int = 1,
    both: int = 0,
    flags: Sequence[str] = (),
) -> Iterator[RunningCluster]:
    """A router and instances on free ports. ``flags`` as on the command line: those of
    ``launch_cluster`` (``--router-arg=...``) and of every instance. Logs go to ``folder``."""
    (port,) = free_ports(1, taken=set())
    told = folder / "ready.json"
    argv = module_command(
        "launch_cluster",
        *("--model-path", str(model), "--port", str(port)),
        *("--prefill", str(prefill), "--decode", str(decode), "--both", str(both)),
        *("--log-dir", str(folder), "--json-ready", str(told)),
        *("--startup-timeout", str(START_LIMIT_S - 10), *flags),
    )
    with (
        process_environment() as environment,
        GuardedProcess(
            Command("cluster", argv, environment, folder / "cluster.log"), grace_s=_END_LIMIT_S
        ) as process,
    ):
        _await_ready(process, told.exists)
        value = json.loads(told.read_text())
        yield RunningCluster(
            url=value["url"],
            pid=value["pid"],
            router=_server(value["router"]),
            instances=tuple(_server(item) for item in value["instances"]),
        )


def _server(item: Mapping[str, Any]) -> Server:
    return Server(item["name"], item["role"], item["url"], item["pid"], Path(item["log"]))


@contextmanager
def launch_server(
    model: Path,
    folder: Path,
    *,
    name: str = "server",
    role: str = "both",
    flags: Sequence[str] = (),
) -> Iterator[Server]:
    """One instance without a router, unless ``flags`` name one (``--router-url``).

    ``flags=["--no-mempool"]`` is stock SGLang with the same defaults: what outputs are compared
    with."""
    (port,) = free_ports(1, taken=set())
    log = folder / f"{name}.log"
    argv = module_command(
        "launch_server",
        *("--model-path", str(model), "--role", role, "--port", str(port), *flags),
    )
    url = f"http://127.0.0.1:{port}"
    with (
        process_environment() as environment,
        GuardedProcess(Command(name, argv, environment, log)) as process,
    ):
        _await_ready(process, lambda: probe.instance_stage(url) is probe.Stage.UP)
        yield Server(name, role, url, process.pid, log)


@contextmanager
def launch_router(
    folder: Path, *, name: str = "router", flags: Sequence[str] = ()
) -> Iterator[Server]:
    (port,) = free_ports(1, taken=set())
    log = folder / f"{name}.log"
    url = f"http://127.0.0.1:{port}"
    argv = module_command("router", "--port", str(port), *flags)
    with (
        process_environment() as environment,
        GuardedProcess(Command(name, argv, environment, log)) as process,
    ):
        _await_ready(process, lambda: probe.router_answers(url))
        yield Server(name, "router", url, process.pid, log)


@dataclass(frozen=True, slots=True)
class Answer:
    """One ``/generate`` answer. ``headers`` have lower-case names."""

    text: str
    output_ids: list[int]
    meta: dict[str, Any]
    headers: dict[str, str]

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens that the engine which answered did not compute itself."""
        return int(self.meta["cached_tokens"])


def generate(
    url: str, prompt: str | Sequence[int], max_new_tokens: int = 16, **fields: Any
) -> Answer:
    """Greedy and to the full length. ``fields`` are further body fields (``cache_salt``, ...)."""
    key = "text" if isinstance(prompt, str) else "input_ids"
    body = {
        key: prompt if isinstance(prompt, str) else list(prompt),
        "sampling_params": {
            "temperature": 0,
            "max_new_tokens": max_new_tokens,
            "ignore_eos": True,
        },
        **fields,
    }
    response = requests.post(f"{url}/generate", json=body, timeout=REQUEST_LIMIT_S)
    assert response.status_code == 200, f"{response.status_code}: {response.text}"
    value = response.json()
    headers = {name.lower(): text for name, text in response.headers.items()}
    return Answer(value["text"], value["output_ids"], value["meta_info"], headers)


def stats(server: Server) -> dict[str, float]:
    """``/memserve/stats``, summed over the ranks."""
    return stats_of(server.url)


def stats_of(url: str) -> dict[str, float]:
    response = requests.get(f"{url}/memserve/stats", timeout=10)
    response.raise_for_status()
    total: dict[str, float] = {}
    for rank in response.json()["ranks"]:
        for name, value in rank.items():
            total[name] = total.get(name, 0.0) + value
    return total


def held_pages(url: str) -> dict[Tier, set[int]]:
    """Short keys of the pages that an instance says it holds; over several ranks, those that every
    rank holds."""
    response = requests.get(f"{url}/memserve/snapshot", timeout=10)
    response.raise_for_status()
    held: dict[Tier, set[int]] = {tier: set() for tier in Tier}
    for event in decode_snapshot(response.content).events:
        assert isinstance(event, BlockStored)
        held[Tier(event.medium)].update(event.block_hashes)
    return held


def believed_pages(router: str, instance: str) -> dict[Tier, set[int]]:
    """Short keys of the pages that a router's tree has an instance hold."""
    response = requests.get(f"{router}/memserve/tree", timeout=10)
    response.raise_for_status()
    tree = response.json()
    assert not tree["truncated"]
    known: dict[Tier, set[int]] = {tier: set() for tier in Tier}
    for node in tree["nodes"]:
        for tier in node["holders"].get(instance, ()):
            known[Tier[tier.upper()]].update(map(int, node["keys"]))
    return known


def await_agreement(router: str, instances: Iterable[str], limit_s: float) -> None:
    """Until the router's tree is the union of the instances' snapshots, tier by tier."""
    for url in instances:
        wait_until(
            lambda url=url: held_pages(url) == believed_pages(router, url),  # type: ignore[misc]
            limit_s,
            f"the tree of {router} agrees with {url}",
        )


def flush(url: str) -> None:
    """Empty the caches of the instance, or of all instances behind a router."""
    requests.post(f"{url}/flush_cache", timeout=REQUEST_LIMIT_S).raise_for_status()
