"""What one instance still has to compute, in seconds. Pure; the caller says what time it is.

Work is done in the order it was sent. The first piece has been at work since the one before it
ended, so what is left of it is what was predicted less that time. A piece that lasts longer than
predicted is expected to last as long again as it is late: an instance that froze looks slower by
the second, long before a deadline says so, and stops looking slow when it answers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum


class Ending(Enum):
    """SEEN: the caller will notice the end and say so. ASSUMED: an answer comes only when
    everything is generated, so the computing counts as done when its time is over."""

    SEEN = "seen"
    ASSUMED = "assumed"


@dataclass(frozen=True, slots=True, eq=False)
class Work:
    seconds: float
    ending: Ending


class Backlog:
    """Of one instance."""

    def __init__(self) -> None:
        self._works: dict[Work, None] = {}
        self._total_s = 0.0
        self._since = 0.0

    def __len__(self) -> int:
        return len(self._works)

    def add(self, seconds: float, now: float, ending: Ending = Ending.SEEN) -> Work:
        self._pass(now)
        if not self._works:
            self._since, self._total_s = now, 0.0
        work = Work(max(seconds, 0.0), ending)
        self._works[work] = None
        self._total_s += work.seconds
        return work

    def end(self, work: Work, now: float) -> None:
        """It is done, or will not be. Ending twice, or after its time was over, is fine."""
        self._pass(now)
        if work not in self._works:
            return
        if work is next(iter(self._works)):
            self._since = now
        del self._works[work]
        self._total_s -= work.seconds

    def remaining_s(self, now: float) -> float:
        """Until all of it is computed."""
        self._pass(now)
        if not self._works:
            return 0.0
        first = next(iter(self._works))
        spent = now - self._since
        left = first.seconds - spent if spent <= first.seconds else spent - first.seconds
        return max(self._total_s - first.seconds, 0.0) + left

    def _pass(self, now: float) -> None:
        """Let go of work whose end nobody sees and whose time is over."""
        while self._works:
            first = next(iter(self._works))
            if first.ending is Ending.SEEN or now - self._since < first.seconds:
                return
            self._since += first.seconds
            del self._works[first]
            self._total_s -= first.seconds

    def works(self) -> Iterator[Work]:
        yield from self._works

    def check(self) -> None:
        assert abs(self._total_s - sum(work.seconds for work in self._works)) < 1e-6 or not self
