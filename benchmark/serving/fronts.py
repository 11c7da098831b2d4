"""What stands before a fleet. Each is a context that gives the URL to send requests to."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from sglang_memserve.cluster import probe
from sglang_memserve.cluster.machine import free_ports
from sglang_memserve.cluster.process import Command, GuardedProcess
from sglang_memserve.errors import ConfigError

from .servers import Given, RunningFleet, await_ready
from .setups import Engine, Front, FrontKind

_START_LIMIT_S = 90.0


@contextmanager
def start(front: Front, fleet: RunningFleet, given: Given) -> Iterator[str]:
    """Raises MemServeError when it does not come up, ConfigError when it is not installed."""
    url = f"http://127.0.0.1:{fleet.front_port}"
    if front.kind is FrontKind.ROUTER:
        argv = _router(front, fleet)
    elif front.kind is FrontKind.PEER_ROUTER:
        argv = _peer_router(front, fleet, given)
    else:
        argv = _proxy(fleet)
    command = Command("front", tuple(argv), fleet.environment, fleet.folder / "front.log")
    with GuardedProcess(command) as process:
        await_ready(process, lambda: _serves(front, fleet, url), _START_LIMIT_S)
        yield url


def _router(front: Front, fleet: RunningFleet) -> Sequence[str]:
    argv = [sys.executable, "-m", "sglang_memserve.router", "--port", str(fleet.front_port)]
    if fleet.fleet.engine is Engine.STOCK:
        # They do not know of routers: these are listed.
        argv += ["--worker-urls", *fleet.urls()]
    return [*argv, "--log-level", "warning", *front.arguments]


def _peer_router(front: Front, fleet: RunningFleet, given: Given) -> Sequence[str]:
    if given.peer_router is None:
        raise ConfigError("this set-up needs --peer-router PYTHON, with sglang-router installed")
    (metrics_port,) = free_ports(1, taken={fleet.front_port})
    argv = [given.peer_router, "-m", "sglang_router.launch_router"]
    argv += ["--worker-urls", *fleet.urls(), "--host", "127.0.0.1"]
    argv += ["--port", str(fleet.front_port), "--prometheus-port", str(metrics_port)]
    return [*argv, "--log-level", "warn", *front.arguments]


def _proxy(fleet: RunningFleet) -> Sequence[str]:
    argv = [sys.executable, "-m", "benchmark.serving.proxy", "--port", str(fleet.front_port)]
    for instance in fleet.instances:
        argv += [f"--{instance.role.value}", instance.url]
    return argv


def _serves(front: Front, fleet: RunningFleet, url: str) -> bool:
    if front.kind is FrontKind.ROUTER:
        return probe.ready_workers(url) >= set(fleet.urls()) and probe.router_ready(url)
    # sglang-router says so only when its workers have answered it.
    return probe.get(f"{url}/readiness")[0] == 200
