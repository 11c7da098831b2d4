"""A server that ends well.

    SIGTERM, SIGHUP -> new requests 503 with Retry-After, not ready any more; what runs goes on
        -> nothing runs, or the time is over -> the listening socket is closed, connections end

A second signal ends the waiting, but for SIGHUP: service managers and terminals send that one
beside others. Who started under ``nohup`` never hears of it.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from enum import Enum
from types import FrameType

import uvicorn

from ..request.admission import Admission

logger = logging.getLogger(__name__)


class Obeyed(Enum):
    """Which signals a server listens to. TERM: whoever sends the others to all processes of a
    terminal sends them to the supervisor too, who says by SIGTERM what is to be done."""

    ALL = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGHUP})
    TERM = frozenset({signal.SIGTERM})


class DrainingServer(uvicorn.Server):
    """uvicorn's server, which goes on listening until ``admission`` is idle."""

    def __init__(
        self, config: uvicorn.Config, admission: Admission, drain_s: float, obeyed: Obeyed
    ) -> None:
        super().__init__(config)
        self._obeyed = obeyed
        self._admission = admission
        self._drain_s = drain_s
        self._draining: asyncio.Task[None] | None = None

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        with super().capture_signals(), _hangups(self.handle_exit):
            yield

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if sig not in self._obeyed.value:
            return
        if not self._admission.draining:
            self.drain()
        elif sig != signal.SIGHUP:
            super().handle_exit(sig, frame)

    def drain(self) -> None:
        """End when nothing runs any more. Again is fine."""
        if self._admission.draining:
            return
        logger.info(
            "draining for %g s at most: %d requests", self._drain_s, self._admission.running
        )
        self._admission.drain()
        self._draining = asyncio.get_running_loop().create_task(self._end_when_idle())

    async def _end_when_idle(self) -> None:
        if not await self._admission.until_idle(self._drain_s):
            logger.warning("%d requests are cut off", self._admission.running)
            self.force_exit = True
        self.should_exit = True


def is_hangup_heard() -> bool:
    """Whether SIGHUP was not ignored by whoever started this process."""
    return signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN


@contextmanager
def _hangups(handler: Callable[[int, FrameType | None], None]) -> Generator[None, None, None]:
    """As ``uvicorn.Server.capture_signals``, which leaves SIGHUP to kill."""
    if threading.current_thread() is not threading.main_thread() or not is_hangup_heard():
        yield
        return
    before = signal.signal(signal.SIGHUP, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGHUP, before)
