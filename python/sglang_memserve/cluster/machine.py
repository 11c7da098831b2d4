"""What this machine has to share out."""

from __future__ import annotations

import os
import random
import socket
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import psutil

from ..errors import ConfigError

_NVIDIA = Path("/proc/driver/nvidia/gpus")
_OUTGOING_PORTS = Path("/proc/sys/net/ipv4/ip_local_port_range")
# Where the system does not say: Linux's default and IANA's dynamic ports lie in this.
_USUAL_OUTGOING = (32_768, 65_535)
# Smaller ones are those that people and well-known services choose.
_LEAST_PORT, _END_PORT = 10_000, 65_536
_ENOUGH_PORTS = 1_000


@dataclass(frozen=True, slots=True)
class Machine:
    """``cores``: those this process may use. ``accelerators``: visible ones, 0 without any."""

    cores: int
    available_bytes: int
    accelerators: int


def this_machine() -> Machine:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        accelerators = len([part for part in visible.split(",") if part.strip() not in ("", "-1")])
    else:
        accelerators = len(list(_NVIDIA.iterdir())) if _NVIDIA.is_dir() else 0
    return Machine(
        cores=len(os.sched_getaffinity(0)),
        available_bytes=psutil.virtual_memory().available,
        accelerators=accelerators,
    )


def server_ports(setting: Path = _OUTGOING_PORTS) -> range:
    """Ports that the system gives to no outgoing connection: an instance listens a minute after it
    was told its port, and one of those may have an owner by then. All ports where ``setting``
    (first and last port for connections) leaves too few."""
    try:
        first, last = map(int, setting.read_text().split())
    except (OSError, ValueError):
        first, last = _USUAL_OUTGOING
    for ports in (range(_LEAST_PORT, first), range(last + 1, _END_PORT)):
        if len(ports) >= _ENOUGH_PORTS:
            return ports
    return range(_LEAST_PORT, _END_PORT)


def free_ports(count: int, taken: Collection[int], among: range | None = None) -> list[int]:
    """Ports of 127.0.0.1 that are free now, none of them in ``taken``.

    They are looked for in ``among`` (by default ``server_ports()``), from a random one on, so that
    clusters that start at once rarely meet. Raises ConfigError where there are not so many."""
    among = server_ports() if among is None else among
    # Not the shared generator: a program that seeds it would get the same ports every time.
    start = random.SystemRandom().randrange(max(len(among), 1))
    ports: list[int] = []
    for port in (*among[start:], *among[:start]):
        if len(ports) == count:
            break
        if port not in taken and _is_free(port):
            ports.append(port)
    if len(ports) < count:
        raise ConfigError(
            f"{count} free ports are needed, and 127.0.0.1 has {len(ports)} of the {len(among)} "
            f"from {among.start} on"
        )
    return ports


def _is_free(port: int) -> bool:
    with socket.socket(socket.AF_INET) as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
