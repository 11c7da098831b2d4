"""A circuit breaker: after failures in a row an instance is left alone for a while.

    CLOSED --(failures in a row)--> OPEN --(pause over)--> HALF_OPEN --(trial succeeds)--> CLOSED
                                     ^                         |
                                     +---(the trial fails)-----+     each time with twice the pause

Pure: the time is an argument.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class BreakerState(Enum):
    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half-open"


@dataclass(frozen=True, slots=True)
class BreakerSettings:
    """``failures`` in a row open it for ``pause_s``, doubled at each failed trial up to
    ``longest_pause_s``."""

    failures: int = 3
    pause_s: float = 2.0
    longest_pause_s: float = 60.0


class Breaker:
    def __init__(self, settings: BreakerSettings) -> None:
        self._settings = settings
        self._failures = 0
        self._pause_s = settings.pause_s
        self._open_until: float | None = None
        self._trial = False

    def state(self, now: float) -> BreakerState:
        if self._open_until is None:
            return BreakerState.CLOSED
        return BreakerState.OPEN if now < self._open_until else BreakerState.HALF_OPEN

    def allows(self, now: float) -> bool:
        """Whether a request may be sent: in the half-open state, one at a time."""
        state = self.state(now)
        return state is BreakerState.CLOSED or (state is BreakerState.HALF_OPEN and not self._trial)

    def started(self, now: float) -> None:
        """A request is sent (also where none was allowed: nothing else may have been left)."""
        if self.state(now) is BreakerState.HALF_OPEN:
            self._trial = True

    def succeeded(self) -> None:
        self._failures = 0
        self._pause_s = self._settings.pause_s
        self._open_until = None
        self._trial = False

    def failed(self, now: float) -> None:
        state = self.state(now)
        self._failures += 1
        self._trial = False
        if state is BreakerState.HALF_OPEN:
            self._pause_s = min(2 * self._pause_s, self._settings.longest_pause_s)
            self._open_until = now + self._pause_s
        elif state is BreakerState.CLOSED and self._failures >= self._settings.failures:
            self._open_until = now + self._pause_s

    def abandoned(self) -> None:
        """A request ended without saying anything about the instance (the client went away)."""
        self._trial = False

    def reason(self, now: float) -> str:
        """Why it does not allow a request."""
        if self._open_until is None:
            return ""
        wait_s = self._open_until - now
        if wait_s > 0:
            return f"{self._failures} failures in a row, tried again in {wait_s:.1f} s"
        return f"{self._failures} failures in a row, one request is trying it now"

    def check(self) -> None:
        assert self._failures >= 0
        assert self._settings.pause_s <= self._pause_s <= self._settings.longest_pause_s
        assert self._open_until is not None or self._failures < self._settings.failures
        assert not (self._trial and self._open_until is None)
