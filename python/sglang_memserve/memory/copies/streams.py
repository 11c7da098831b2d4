"""Queues of device work, as far as copies need them. ``TorchStreams`` is a real device's.

Work on one stream runs in order; streams wait for each other by events; the host waits for an event
by asking again and again, because the runtime's own waits have no deadline.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from ...errors import CopyStalled

DEVICE_TIMEOUT_S = 60.0
_FIRST_PAUSE_S = 20e-6
_LAST_PAUSE_S = 500e-6


class Event(Protocol):
    """``torch.cuda.Event`` and its like: a point in a stream."""

    def query(self) -> bool:
        """Whether the device has got there."""


class Stream(Protocol):
    def run(self, work: Callable[[], None]) -> None:
        """Queue what ``work`` does on the device behind everything queued so far.

        ``work`` may run at once and only queue, so host memory it reads must not change until an
        event recorded after it has come."""

    def record(self) -> Event: ...

    def wait(self, event: Event) -> None:
        """What is queued from now on runs after ``event``."""

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Device memory. Whoever uses it on other streams too lets it go only when they are done
        with it."""

    def upload(self, values: NDArray[np.int64]) -> torch.Tensor:
        """The same numbers on the device, for work queued on this stream from now on."""


class Streams(Protocol):
    def stream(self) -> Stream: ...

    def staging(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Host memory that the device copies from and to without help of the CPU."""

    def admit(self, event: Event) -> None:
        """The calling thread's current stream waits for ``event``; the thread does not."""


def wait(events: Sequence[Event], timeout_s: float = DEVICE_TIMEOUT_S) -> None:
    """Until all of ``events`` have come. Raises CopyStalled after ``timeout_s``."""
    until = time.monotonic() + timeout_s
    for number, event in enumerate(events):
        pause_s = _FIRST_PAUSE_S
        while not event.query():
            if time.monotonic() >= until:
                raise CopyStalled(
                    f"the device did not finish a copy within {timeout_s:g} s "
                    f"({number} of {len(events)} steps done)"
                )
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, _LAST_PAUSE_S)


class TorchStream:
    """A side stream of an accelerator that torch knows, of the highest priority it has."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._module: Any = torch.get_device_module(device)
        # Copies are short and others wait for them; -1 is "high" for CUDA and for HIP.
        self._stream: Any = self._module.Stream(device, priority=-1)

    def run(self, work: Callable[[], None]) -> None:
        # Also makes the stream's device the thread's current one, which new threads lack.
        with self._module.stream(self._stream):
            work()

    def record(self) -> Event:
        with self._module.stream(self._stream):
            event: Event = self._stream.record_event()
        return event

    def wait(self, event: Event) -> None:
        self._stream.wait_event(event)

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        # torch keeps freed memory by stream: memory of another stream could still be in use there.
        with self._module.stream(self._stream):
            return torch.empty(tuple(shape), dtype=dtype, device=self._device)

    def upload(self, values: NDArray[np.int64]) -> torch.Tensor:
        with self._module.stream(self._stream):
            pinned = torch.from_numpy(values).pin_memory()
            return pinned.to(self._device, non_blocking=True)


class TorchStreams:
    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._module: Any = torch.get_device_module(device)

    def stream(self) -> Stream:
        return TorchStream(self._device)

    def staging(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        # torch keeps freed pinned memory and does not hand it out again while a copy uses it.
        return torch.empty(tuple(shape), dtype=dtype, pin_memory=True)

    def admit(self, event: Event) -> None:
        self._module.current_stream(self._device).wait_event(event)
