"""SGLang's layer counter with an end: no forward waits for ever for a layer.

    update_producer --> complete(layer) ... --> end        (load thread)
                        wait_until(layer) ... --> finish   (scheduler thread)

A batch that is not there by its deadline is called off. The load thread looks before each layer,
so it stops within one; ``finish`` waits for that, because the slots go back to the engine when it
returns. A copy that does not even end then leaves memory that nobody may use: ``CopyStalled``.
"""

from __future__ import annotations

import contextlib
import threading
import time
from concurrent.futures import InvalidStateError
from dataclasses import dataclass, field

from sglang.srt.mem_cache.unified_cache.unified_cache_linker import LayerWiseLoadCounter

from ..errors import CopyStalled, TransferFailed
from ..memory.copies.base import Load
from .scheduler_clock import SchedulerClock


@dataclass(slots=True)
class _Ticket:
    deadline_s: float
    called_off: bool = False
    failed: bool = False
    load: Load | None = None
    ended: threading.Event = field(default_factory=threading.Event)

    def remaining_s(self) -> float:
        return max(0.0, self.deadline_s - time.monotonic())


class BoundedLoadCounter(LayerWiseLoadCounter):
    """``limit_s``: from the start of a batch to its last layer. ``grace_s``: for the layer that is
    being copied when a batch is called off."""

    def __init__(
        self, num_layers: int, clock: SchedulerClock, *, limit_s: float, grace_s: float
    ) -> None:
        super().__init__(num_layers)
        self._clock = clock
        self._limit_s = limit_s
        self._grace_s = grace_s
        self._tickets: dict[int, _Ticket] = {}

    # -- scheduler thread --

    def update_producer(self) -> int:
        index: int = super().update_producer()
        self._tickets[index] = _Ticket(time.monotonic() + self._limit_s)
        return index

    def wait_until(self, threshold: int) -> None:
        ticket = self._tickets.get(self.consumer_index)
        futures = self.futures.get(self.consumer_index)
        if ticket is None or futures is None:
            return
        with self._clock.waiting():
            try:
                # A failed layer is reported by finish(), as in SGLang's counter.
                failed = futures[threshold].exception(ticket.remaining_s()) is not None
            except TimeoutError:
                self._call_off(self.consumer_index, ticket)
                return
        if ticket.load is not None and not failed:
            # On an accelerator the layer is on its way: the forward's stream waits, not its thread.
            ticket.load.admit(threshold)

    def finish(self, index: int) -> bool:
        """Whether every layer landed; the load thread writes nothing of this batch any more.

        Raises CopyStalled."""
        ticket = self._tickets.get(index)
        futures = self.futures.get(index)
        if ticket is None or futures is None:
            return True
        with self._clock.waiting():
            if not ticket.ended.wait(ticket.remaining_s()):
                self._call_off(index, ticket)
            if not ticket.ended.wait(self._grace_s):
                raise CopyStalled(
                    f"a load of {self._limit_s:g} s was called off and did not stop within "
                    f"{self._grace_s:g} s: its device slots can be neither used nor given back"
                )
        landed = not ticket.failed and all(
            future.done() and future.exception() is None for future in futures
        )
        del self.futures[index], self._tickets[index]
        return landed

    def reset(self) -> None:
        super().reset()
        self._tickets.clear()

    def _call_off(self, index: int, ticket: _Ticket) -> None:
        ticket.called_off = True
        self.fail(index, TransferFailed(f"not loaded within {self._limit_s:g} s"))

    # -- load thread; fail() on both --

    def begin(self, index: int, load: Load) -> None:
        """``complete`` says from now on that a layer of ``load`` was started."""
        ticket = self._tickets.get(index)
        if ticket is not None:
            ticket.load = load

    def called_off(self, index: int) -> bool:
        ticket = self._tickets.get(index)
        return ticket is None or ticket.called_off

    def complete(self, index: int, layer: int) -> None:
        # A batch that was called off has failed futures.
        with contextlib.suppress(InvalidStateError):
            self.futures[index][layer].set_result(None)

    def fail(self, index: int, error: BaseException) -> None:
        ticket = self._tickets.get(index)
        if ticket is not None:
            # A copy can fail when each of its layers was started well.
            ticket.failed = True
        for future in self.futures.get(index, ()):
            with contextlib.suppress(InvalidStateError):
                future.set_exception(error)

    def end(self, index: int) -> None:
        """The load thread is through with this batch, whatever became of it."""
        ticket = self._tickets.get(index)
        if ticket is not None:
            ticket.ended.set()
