"""Virtual time: what is to happen, in the order of when."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from math import inf

Action = Callable[[], None]


class Alarm:
    """Something that will happen, unless it is cancelled."""

    __slots__ = ("_do",)

    def __init__(self, do: Action) -> None:
        self._do: Action | None = do

    def cancel(self) -> None:
        self._do = None

    def ring(self) -> None:
        do, self._do = self._do, None
        if do is not None:
            do()


class Agenda:
    """``now``: seconds since the beginning. What is due at one time happens in the order in which
    it was put down, so that a run depends on nothing but its input."""

    def __init__(self) -> None:
        self.now = 0.0
        self._due: list[tuple[float, int, Alarm]] = []
        self._count = 0

    def at(self, when: float, do: Action) -> Alarm:
        """At once, after what is due already, where ``when`` has passed."""
        alarm = Alarm(do)
        self._count += 1
        heapq.heappush(self._due, (max(when, self.now), self._count, alarm))
        return alarm

    def after(self, seconds: float, do: Action) -> Alarm:
        return self.at(self.now + seconds, do)

    def run(self, until: float = inf) -> None:
        """Until nothing is left to happen before ``until``."""
        while self._due and self._due[0][0] <= until:
            self.now, _, alarm = heapq.heappop(self._due)
            alarm.ring()
