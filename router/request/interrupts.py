"""Giving up waiting for an instance that was lost while it worked on a request."""

from __future__ import annotations

import asyncio
from types import TracebackType

from sglang_memserve.errors import PeerUnreachable

from ..members.member import InFlight


class Interruptible:
    """A block of the current task that ends with PeerUnreachable when ``flight`` is lost.

    As ``asyncio.timeout`` does it: the task is cancelled, and the block makes an error of that.
    """

    def __init__(self, flight: InFlight) -> None:
        self._flight = flight
        self._why = ""
        self._task: asyncio.Task[object] | None = None
        self._cancelling = 0

    def _interrupt(self, why: str) -> None:
        if self._task is not None and not self._why:
            self._why = why
            self._task.cancel()

    def __enter__(self) -> None:
        self._task = asyncio.current_task()
        assert self._task is not None
        self._cancelling = self._task.cancelling()
        self._flight.on_lost(self._interrupt)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._flight.on_lost(None)
        task, self._task = self._task, None
        if not self._why or task is None:
            return
        ours_alone = task.uncancel() <= self._cancelling
        if ours_alone and kind is not None and issubclass(kind, asyncio.CancelledError):
            raise PeerUnreachable(self._why) from error
