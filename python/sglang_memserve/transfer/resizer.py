"""Changes of the pool's size on the agent's thread: memory is registered before it is used, and
unregistered before it is gone. One change at a time, in small pieces between other work.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..errors import LimitExceeded, TransferFailed
from ..protocol.control import ResizeReply, ResizeRequest
from ..types import Progress, Region, ResizeResult
from .base import Pool, Resize, Transport

MAX_WAIT_S = 600.0
_RETRY_S = 0.005


@dataclass(frozen=True, slots=True)
class _Waiting:
    change: Resize
    until_s: float
    answer: Callable[[ResizeReply], None]


class Resizer:
    """``on_changed`` is called after the memory that is registered has changed."""

    def __init__(self, pool: Pool, transport: Transport, on_changed: Callable[[], None]) -> None:
        self._pool = pool
        self._transport = transport
        self._on_changed = on_changed
        self._waiting: _Waiting | None = None
        self._next_try_s = float("inf")

    def submit(
        self, request: ResizeRequest, now: float, answer: Callable[[ResizeReply], None]
    ) -> None:
        """``answer`` is called once, maybe before this returns; a size that cannot be had now is
        an answer. Raises ConfigError for one that can never be, LimitExceeded for too much
        patience and while another change is under way."""
        # Written so that NaN is refused too.
        if not 0 <= request.wait_s <= MAX_WAIT_S:
            raise LimitExceeded(f"wait of {request.wait_s} s, allowed are 0 to {MAX_WAIT_S:g} s")
        change = self._pool.prepare_resize(request.total_bytes)
        if not change.removes:
            answer(self._finish(change))
        elif request.wait_s == 0 and (obstacle := change.obstacle()):
            answer(_reply(change.abort(obstacle)))
        else:
            self._waiting = _Waiting(change, now + request.wait_s, answer)
            self._next_try_s = now

    def on_time(self, now: float) -> None:
        waiting = self._waiting
        if waiting is None or now < self._next_try_s:
            return
        progress = waiting.change.vacate()
        if progress is Progress.DONE:
            reply = self._finish(waiting.change)
        elif progress is Progress.BLOCKED and now >= waiting.until_s:
            reply = _reply(waiting.change.abort(waiting.change.obstacle()))
        else:
            self._next_try_s = now + _RETRY_S if progress is Progress.BLOCKED else now
            return
        self._end()
        waiting.answer(reply)

    def wake_s(self) -> float:
        """When ``on_time`` has something to do, at the latest."""
        return self._next_try_s

    def close(self) -> None:
        waiting = self._waiting
        self._end()
        if waiting is not None:
            waiting.answer(_reply(waiting.change.abort("the rank is shutting down")))

    def _end(self) -> None:
        self._waiting = None
        self._next_try_s = float("inf")

    def _finish(self, change: Resize) -> ResizeReply:
        """Nothing is in the way any more. All of the memory changes, or none."""
        register, unregister = self._transport.register, self._transport.unregister
        try:
            _each(change.removes, unregister, register)
            _each(change.adds, register, unregister)
        except TransferFailed as error:
            return _reply(change.abort(str(error)))
        result = change.complete()
        if change.adds or change.removes:
            self._on_changed()
        return _reply(result)


def _each(
    regions: Sequence[Region], do: Callable[[int, int], None], undo: Callable[[int, int], None]
) -> None:
    """``do`` to all regions, or to none. Raises what ``do`` raises."""
    for done, region in enumerate(regions):
        try:
            do(*region)
        except TransferFailed:
            for earlier in regions[:done]:
                undo(*earlier)
            raise


def _reply(result: ResizeResult) -> ResizeReply:
    return ResizeReply(
        outcome=result.outcome.value,
        total_blocks=result.total_blocks,
        total_bytes=result.total_bytes,
        moved_pages=result.moved_pages,
        evicted_pages=result.evicted_pages,
        reason=result.reason,
    )
