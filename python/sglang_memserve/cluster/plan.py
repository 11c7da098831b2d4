"""From the command line and the machine to one command line a process. Pure.

Sharing: cores and DRAM are divided evenly. With enough accelerators every instance gets its own
(``--base-gpu-id``); with fewer they share, each with its part of the memory. Whatever the operator
says himself in the instance flags wins.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import ConfigError
from ..types import Role
from .machine import Machine
from .process import Command

# Running requests may end after Ctrl-C, but not for long: see ``process.GRACE_S``.
DRAIN_S = 3.0

_MIB = 2**20
_GIB = 2**30
# Set per instance by us, so a value from the operator could only be wrong.
_OURS = ("--role", "--router-url")
_TP_FLAGS = ("--tp", "--tp-size", "--tensor-parallel-size")


@dataclass(frozen=True, slots=True)
class Options:
    """The command line. ``instance_args`` go to every ``launch_server`` untouched."""

    model_path: str
    prefill: int
    decode: int
    both: int
    host: str
    port: int
    startup_timeout_s: float
    log_dir: Path | None = None
    json_ready: Path | None = None
    router_args: tuple[str, ...] = ()
    instance_args: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if min(self.prefill, self.decode, self.both) < 0:
            raise ConfigError("--prefill, --decode and --both must not be negative")
        if not (self.prefill or self.both) or not (self.decode or self.both):
            raise ConfigError(
                "a cluster needs an instance that can prefill and one that can decode: "
                f"got --prefill {self.prefill} --decode {self.decode} --both {self.both}"
            )
        if not 0 < self.port < 65536:
            raise ConfigError(f"--port {self.port} is not a port")
        for flag in _OURS:
            if flag_value(self.instance_args, (flag,)) is not None:
                raise ConfigError(f"{flag} is set for each instance by launch_cluster")

    @property
    def roles(self) -> list[Role]:
        return [Role.PREFILL] * self.prefill + [Role.DECODE] * self.decode + [Role.BOTH] * self.both

    @property
    def url(self) -> str:
        reached_at = "127.0.0.1" if self.host in ("0.0.0.0", "::") else self.host
        return f"http://{f'[{reached_at}]' if ':' in reached_at else reached_at}:{self.port}"


@dataclass(frozen=True, slots=True)
class InstancePlan:
    role: Role
    url: str
    command: Command


@dataclass(frozen=True, slots=True)
class ClusterPlan:
    router_url: str
    router: Command
    instances: tuple[InstancePlan, ...]


def flag_value(args: Sequence[str], names: Sequence[str]) -> str | None:
    """Value of the last of these flags in ``args`` (``--flag value`` or ``--flag=value``); the
    empty text for a flag without a value, None when it is not there."""
    found: str | None = None
    for index, arg in enumerate(args):
        flag, equals, value = arg.partition("=")
        if flag not in names:
            continue
        following = args[index + 1] if index + 1 < len(args) else "--"
        found = value if equals else ("" if following.startswith("--") else following)
    return found


def dram_bytes(machine: Machine, instances: int) -> int:
    """Each instance's MemPool DRAM: a quarter of what is free, divided, in whole 64 MiB.

    The rest is for weights, the engines' own pools and the page cache.
    """
    most = 64 * _GIB if machine.accelerators else 2 * _GIB
    share = min(most, machine.available_bytes // 4 // instances)
    return max(64 * _MIB, share // (64 * _MIB) * 64 * _MIB)


def _sharing_args(options: Options, machine: Machine, index: int) -> list[str]:
    """Flags that divide the machine, less those the operator gave."""
    count = len(options.roles)
    args: list[str] = []

    def unless_given(flag: str, value: str) -> None:
        if flag_value(options.instance_args, (flag,)) is None:
            args.extend((flag, value))

    unless_given("--mempool-dram", f"{dram_bytes(machine, count) // _MIB}MiB")
    unless_given("--drain-timeout", f"{DRAIN_S:g}")
    if not machine.accelerators:
        unless_given("--cpu-threads", str(max(1, machine.cores // count)))
    else:
        tp = int(flag_value(options.instance_args, _TP_FLAGS) or 1)
        places = max(1, machine.accelerators // tp)
        unless_given("--base-gpu-id", str(index % places * tp))
        sharers = -(-count // places)
        if sharers > 1:
            unless_given("--mem-fraction-static", f"{0.8 / sharers:.2f}")
    return args


def make_plan(
    options: Options,
    machine: Machine,
    ports: Sequence[int],
    env: Mapping[str, str],
    log_dir: Path,
) -> ClusterPlan:
    """``ports``: a free one for each instance, in the order of ``options.roles``."""
    assert len(ports) == len(options.roles), (len(ports), options.roles)
    python = sys.executable
    router = Command(
        name="router",
        argv=(
            *(python, "-m", "sglang_memserve.router"),
            *("--host", options.host, "--port", str(options.port)),
            *options.router_args,
        ),
        env=dict(env),
        log=log_dir / "router.log",
    )
    instances = []
    seen: dict[Role, int] = {}
    for index, (role, port) in enumerate(zip(options.roles, ports, strict=True)):
        name = f"{role.value}-{seen.get(role, 0)}"
        seen[role] = seen.get(role, 0) + 1
        argv = (
            *(python, "-m", "sglang_memserve.launch_server"),
            *("--model-path", options.model_path, "--role", role.value),
            *("--host", "127.0.0.1", "--port", str(port), "--router-url", options.url),
            *_sharing_args(options, machine, index),
            *options.instance_args,
        )
        command = Command(name, argv, dict(env), log_dir / f"{name}.log")
        instances.append(InstancePlan(role, f"http://127.0.0.1:{port}", command))
    return ClusterPlan(options.url, router, tuple(instances))
