"""The door: how many requests run at once, how many wait for that, and for how long.

First come, first served. A request that waits holds a place and its body, nothing else; a client
that leaves gives its place up. When the router drains nobody is let in any more, and who waits is
sent away, so that he can be served elsewhere.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from sglang_memserve.errors import LimitExceeded, ShuttingDown

from ..http.limits import Limits


class Admission:
    """Belongs to one event loop."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.running = 0
        self.draining = False
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @asynccontextmanager
    async def slot(self) -> AsyncIterator[None]:
        """Wait for one of the running places and hold it. Raises LimitExceeded when too many wait
        or it takes too long, ShuttingDown."""
        await self._enter()
        try:
            yield
        finally:
            self._leave()

    async def _enter(self) -> None:
        if self.draining:
            raise ShuttingDown("the router is shutting down")
        if self.running < self.limits.max_in_flight:
            self._take()
            return
        if len(self._waiting) >= self.limits.max_waiting:
            raise LimitExceeded(
                f"{self.limits.max_in_flight} requests run and {self.limits.max_waiting} wait"
            )
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        try:
            async with asyncio.timeout(self.limits.wait_s):
                await turn
        except BaseException as error:
            self._give_up(turn)
            if isinstance(error, TimeoutError):
                raise LimitExceeded(f"waited {self.limits.wait_s:g} s for its turn") from error
            raise

    def _give_up(self, turn: asyncio.Future[None]) -> None:
        if turn in self._waiting:
            self._waiting.remove(turn)
        elif turn.done() and not turn.cancelled() and turn.exception() is None:
            # The place came at the moment it was given up.
            self._leave()

    def _take(self) -> None:
        self.running += 1
        self._idle.clear()

    def _leave(self) -> None:
        self.running -= 1
        while self._waiting and self.running < self.limits.max_in_flight:
            turn = self._waiting.popleft()
            if not turn.done():
                self._take()
                turn.set_result(None)
        if not self.running:
            self._idle.set()

    def drain(self) -> None:
        """Let nobody in any more."""
        self.draining = True
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_exception(ShuttingDown("the router is shutting down"))

    async def until_idle(self, limit_s: float) -> bool:
        """Whether all that was running had ended in time."""
        try:
            async with asyncio.timeout(limit_s):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True

    def check(self) -> None:
        assert 0 <= self.running <= self.limits.max_in_flight, self.running
        assert len(self._waiting) <= self.limits.max_waiting, len(self._waiting)
        full = self.running == self.limits.max_in_flight
        assert full or not self._waiting, "somebody waits for nothing"
        assert self._idle.is_set() == (self.running == 0), self.running
        assert not (self.draining and self._waiting), len(self._waiting)
