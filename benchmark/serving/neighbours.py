"""How much of the machine other work took while something was measured."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

import psutil


@dataclass(frozen=True, slots=True)
class Used:
    """Processor seconds since the machine and the processes began."""

    at_s: float
    machine_s: float
    ours_s: float


def used() -> Used:
    """Ours: this process and all below it that still run."""
    times = psutil.cpu_times()
    machine_s = sum(times) - times.idle - times.iowait
    ours_s = 0.0
    me = psutil.Process(os.getpid())
    for process in (me, *me.children(recursive=True)):
        try:
            own = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        ours_s += own.user + own.system
    return Used(time.monotonic(), machine_s, ours_s)


def others_cores(before: Used, after: Used) -> float:
    """Cores that others kept busy on average. Guest time that the kernel counts twice is small."""
    others_s = (after.machine_s - before.machine_s) - (after.ours_s - before.ours_s)
    return round(max(others_s, 0.0) / max(after.at_s - before.at_s, 1e-9), 2)
