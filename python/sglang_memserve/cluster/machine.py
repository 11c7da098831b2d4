"""What this machine has to share out."""

from __future__ import annotations

import os
import socket
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import psutil

_NVIDIA = Path("/proc/driver/nvidia/gpus")


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


def free_ports(count: int, taken: set[int]) -> list[int]:
    """Ports of 127.0.0.1 that are free now, none of them in ``taken``."""
    ports: list[int] = []
    with ExitStack() as held:
        # Hold all until the last is known, or the system may give the same one twice.
        for _ in range(count + len(taken)):
            probe = held.enter_context(socket.socket(socket.AF_INET))
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
            if port not in taken and len(ports) < count:
                ports.append(port)
    return ports
