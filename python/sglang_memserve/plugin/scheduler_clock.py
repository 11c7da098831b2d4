"""How long the scheduler thread is in MemPool: what the engine pays for it between two steps."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class SchedulerClock:
    """Written by the scheduler thread alone; read by any, for statistics.

    ``scheduler_seconds_total``: in MemPool's code. ``scheduler_wait_seconds_total``: the forward
    or its end waiting for layers that the load thread is still copying.
    """

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._inside = False
        self._seconds = 0.0
        self._calls = 0
        self._wait_seconds = 0.0

    @contextmanager
    def working(self) -> Iterator[None]:
        """A call by the scheduler. Calls within calls are counted once."""
        if self._inside:
            yield
            return
        self._inside = True
        start = time.perf_counter()
        try:
            yield
        finally:
            self._seconds += time.perf_counter() - start
            self._calls += 1
            self._inside = False

    @contextmanager
    def waiting(self) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self._wait_seconds += time.perf_counter() - start

    def stats(self) -> dict[str, float]:
        return {
            "uptime_seconds": time.perf_counter() - self._started,
            "scheduler_seconds_total": self._seconds,
            "scheduler_calls_total": float(self._calls),
            "scheduler_wait_seconds_total": self._wait_seconds,
        }
