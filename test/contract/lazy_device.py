"""A device whose streams run when and in whatever order their events allow.

Work that is queued here runs later, on the seed's whim, so that a copy that forgot to wait for an
event goes wrong in some seed. ``LazyStreams`` implements ``memory.copies.streams.Streams`` over
host memory.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Sequence
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from sglang_memserve.memory.copies.streams import Event, Stream


class LazyEvent:
    def __init__(self, device: LazyStreams) -> None:
        self._device = device
        self.reached = False

    def query(self) -> bool:
        self._device.run_some()
        return self.reached


class LazyStream:
    def __init__(self, device: LazyStreams) -> None:
        self._device = device
        self._queue: deque[Callable[[], bool]] = deque()

    def run(self, work: Callable[[], None]) -> None:
        def done() -> bool:
            work()
            return True

        self._queue.append(done)

    def record(self) -> Event:
        event = LazyEvent(self._device)

        def reach() -> None:
            event.reached = True

        self.run(reach)
        return event

    def wait(self, event: Event) -> None:
        self._queue.append(lambda: cast(LazyEvent, event).reached)

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        return garbage(shape, dtype)

    def upload(self, values: NDArray[np.int64]) -> torch.Tensor:
        source = torch.from_numpy(values.copy())
        result = garbage(source.shape, source.dtype)
        self.run(lambda: cast(None, result.copy_(source)))
        return result

    def step(self) -> bool:
        """Whether the head of the queue could run."""
        if self._queue and self._queue[0]():
            self._queue.popleft()
            return True
        return False


class LazyStreams:
    """``forward`` is the stream that loads are admitted to."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._streams: list[LazyStream] = []
        self.forward = self.stream()

    def stream(self) -> LazyStream:
        self._streams.append(LazyStream(self))
        return self._streams[-1]

    def staging(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        return garbage(shape, dtype)

    def admit(self, event: Event) -> None:
        self.forward.wait(event)

    def run_some(self) -> None:
        for _ in range(self._random.randint(1, 4)):
            stuck = self._random.sample(self._streams, len(self._streams))
            if not any(stream.step() for stream in stuck):
                return

    def run_all(self) -> None:
        while any(stream.step() for stream in self._random.sample(self._streams, 1)) or any(
            stream.step() for stream in self._streams
        ):
            pass


def garbage(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """What memory holds before anybody writes it; numbers that are no addresses."""
    return torch.full(tuple(shape), 0x5A, dtype=torch.uint8 if dtype == torch.uint8 else dtype)


def check_protocols(streams: LazyStreams) -> Stream:
    """For the type checker: this is what copies are given."""
    return streams.stream()
