"""Ending well: the router after a SIGTERM, and an instance that is to leave.

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
from sglang_memserve.types import Generation, InstanceId

from ..members.instances import Instances
from ..members.member import State
from ..request.admission import Admission

logger = logging.getLogger(__name__)

POLL_S = 0.1


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


class Leaving:
    """Instances that get nothing new and are removed when what they have is done."""

    def __init__(self, instances: Instances) -> None:
        self._instances = instances
        self._tasks: dict[InstanceId, asyncio.Task[None]] = {}

    def begin(self, instance: InstanceId, limit_s: float) -> None:
        """Again with another limit is fine. Raises ConfigError for an unknown instance."""
        generation = self._instances.drain(instance)
        if (before := self._tasks.pop(instance, None)) is not None:
            before.cancel()
        if not self._works(instance, generation):
            self._instances.dismiss(instance, generation)
            return
        task = asyncio.create_task(
            self._see_off(instance, generation, limit_s), name=f"draining {instance}"
        )
        self._tasks[instance] = task

    def _works(self, instance: InstanceId, generation: Generation) -> bool:
        """Whether this boot is still being drained and has something to do."""
        return any(
            member.id == instance
            and member.generation == generation
            and member.state is State.DRAINING
            and member.in_flight_requests > 0
            for member in self._instances.members()
        )

    async def _see_off(self, instance: InstanceId, generation: Generation, limit_s: float) -> None:
        until = asyncio.get_running_loop().time() + limit_s
        while asyncio.get_running_loop().time() < until:
            if not self._works(instance, generation):
                break
            await asyncio.sleep(POLL_S)
        self._instances.dismiss(instance, generation)
        if self._tasks.get(instance) is asyncio.current_task():
            del self._tasks[instance]

    async def close(self) -> None:
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
