"""The processes of a fleet: started together, one core each, and gone with the block."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import requests
from sglang_memserve.cluster import probe
from sglang_memserve.cluster.machine import free_ports
from sglang_memserve.cluster.process import Command, GuardedProcess
from sglang_memserve.errors import ConfigError, MemServeError
from sglang_memserve.types import Role

from benchmark import vllm_server

from .setups import DevicePool, Engine, Fleet

START_LIMIT_S = 420.0
_FLUSH_LIMIT_S = 30.0
_POLL_S = 0.3
# The smallest block of vLLM's attention on CPUs.
_VLLM_BLOCK = 32
_LOG_LINES = 200
# Of one token in SmolLM2-135M's KV cache, all layers.
TOKEN_BYTES = 30 * 2 * 3 * 64 * 2


@dataclass(frozen=True, slots=True)
class Sizes:
    """``hbm_tokens``: KV slots of an instance's device pool; ``dram_mib``: of its MemPool."""

    hbm_tokens: int = 8192
    dram_mib: int = 1024

    def device_tokens(self, pool: DevicePool) -> int:
        more = self.dram_mib * 2**20 // TOKEN_BYTES if pool is DevicePool.LARGE else 0
        return self.hbm_tokens + more


@dataclass(frozen=True, slots=True)
class Given:
    """What the operator named: the model, and interpreters of environments with the peers."""

    model: Path
    sizes: Sizes
    peer_router: str | None = None
    peer_vllm: str | None = None


@dataclass(frozen=True, slots=True)
class Instance:
    role: Role
    url: str
    core: int
    log: Path


@dataclass(frozen=True, slots=True)
class RunningFleet:
    """``front_port``: where MemServe's instances look for their router. ``environment``: for the
    front's process as well."""

    fleet: Fleet
    instances: tuple[Instance, ...]
    front_port: int
    environment: Mapping[str, str]
    folder: Path

    def urls(self, *roles: Role) -> list[str]:
        return [i.url for i in self.instances if not roles or i.role in roles]

    def flush(self) -> None:
        """Empty every cache. Raises MemServeError when an instance stays busy."""
        path = "/reset_prefix_cache" if self.fleet.engine is Engine.VLLM else "/flush_cache"
        for instance in self.instances:
            deadline = time.monotonic() + _FLUSH_LIMIT_S
            while requests.post(instance.url + path, timeout=_FLUSH_LIMIT_S).status_code != 200:
                if time.monotonic() > deadline:
                    raise MemServeError(f"{instance.url} does not empty its cache")
                time.sleep(_POLL_S)


def await_ready(process: GuardedProcess, ready: Callable[[], bool], limit_s: float) -> None:
    """Raises MemServeError with the end of the log."""
    deadline = time.monotonic() + limit_s
    while not ready():
        code = process.poll()
        if code is not None or time.monotonic() > deadline:
            state = "is not ready in time" if code is None else f"ended with status {code}"
            raise MemServeError(f"{process.name} {state}:\n{process.log_tail(_LOG_LINES)}")
        time.sleep(_POLL_S)


@contextmanager
def start(fleet: Fleet, given: Given, folder: Path) -> Iterator[RunningFleet]:
    """Instances share the cores in turn: with more instances than cores, some share one."""
    from integration.harness import process_environment

    cores = sorted(os.sched_getaffinity(0))
    count = len(fleet.roles)
    front_port, *others = free_ports(1 + 2 * count, taken=set())
    ports, side_ports = others[:count], others[count:]
    with ExitStack() as stack:
        environment = stack.enter_context(process_environment())
        processes, instances = [], []
        for index, (role, port) in enumerate(zip(fleet.roles, ports, strict=True)):
            core = cores[index % len(cores)]
            log = folder / f"{fleet.name}-{index}.log"
            argv = ("taskset", "-c", str(core), *_argv(fleet, role, port, front_port, given))
            is_vllm = fleet.engine is Engine.VLLM
            extra = _vllm_environment(core, side_ports[index]) if is_vllm else {}
            command = Command(f"{fleet.name}-{index}", argv, {**environment, **extra}, log)
            processes.append(stack.enter_context(GuardedProcess(command)))
            instances.append(Instance(role, f"http://127.0.0.1:{port}", core, log))
        for process, instance in zip(processes, instances, strict=True):
            await_ready(process, _is_up(instance.url), START_LIMIT_S)
        yield RunningFleet(fleet, tuple(instances), front_port, environment, folder)


def _is_up(url: str) -> Callable[[], bool]:
    return lambda: probe.instance_stage(url) is probe.Stage.UP


def _argv(fleet: Fleet, role: Role, port: int, front_port: int, given: Given) -> Sequence[str]:
    tokens = given.sizes.device_tokens(fleet.device_pool)
    if fleet.engine is Engine.VLLM:
        return _vllm(fleet, port, tokens, given)
    module = "sglang_memserve.launch_server"
    if role in fleet.forgetful:
        module = "benchmark.serving.forgetful"
    argv = [sys.executable, "-m", module]
    argv += ["--model-path", str(given.model), "--port", str(port), "--cpu-threads", "1"]
    argv += ["--max-total-tokens", str(tokens)]
    if fleet.engine is Engine.STOCK:
        return [*argv, "--no-mempool"]
    argv += ["--role", role.value, "--mempool-dram", f"{given.sizes.dram_mib}MiB"]
    return [*argv, "--router-url", f"http://127.0.0.1:{front_port}"]


def _vllm(fleet: Fleet, port: int, tokens: int, given: Given) -> Sequence[str]:
    if given.peer_vllm is None:
        raise ConfigError(f"set-up {fleet.name} needs --peer-vllm PYTHON")
    argv = [*vllm_server.arguments(given.peer_vllm, given.model, tokens), "--port", str(port)]
    argv += ["--enable-prompt-tokens-details"]
    # It keeps one block for itself.
    blocks = tokens // _VLLM_BLOCK + 1
    argv += ["--block-size", str(_VLLM_BLOCK), "--num-gpu-blocks-override", str(blocks)]
    if Role.BOTH not in fleet.roles:
        argv += ["--kv-transfer-config", '{"kv_connector":"NixlConnector","kv_role":"kv_both"}']
    return argv


def _vllm_environment(core: int, side_port: int) -> dict[str, str]:
    """``side_port``: fixed by default, so that two instances would collide."""
    return {
        **vllm_server.environment([core]),
        "VLLM_SERVER_DEV_MODE": "1",
        "VLLM_NIXL_SIDE_CHANNEL_PORT": str(side_port),
    }
