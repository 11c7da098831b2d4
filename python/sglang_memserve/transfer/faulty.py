"""A transport that fails on purpose: a decorator over any other."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import TransferFailed
from .base import ReadState, Transport


@dataclass(frozen=True, slots=True)
class Faults:
    """Probabilities, each of one call; ``max_delay_polls``: how long an ended read looks running.

    ``midway``: only a part of the blocks is read, then the read ends as FAILED.
    """

    connect: float = 0.0
    read: float = 0.0
    midway: float = 0.0
    delay: float = 0.0
    max_delay_polls: int = 20


@dataclass(slots=True)
class _Read:
    inner: int
    fails: bool
    delay_polls: int
    ended: ReadState | None = None


class FaultyTransport:
    """Draws from ``seed``, so that a failing run can be repeated."""

    def __init__(self, inner: Transport, faults: Faults, seed: int) -> None:
        self._inner = inner
        self._faults = faults
        self._random = random.Random(seed)
        self._reads: dict[int, _Read] = {}

    def register(self, base: int, length: int) -> None:
        self._inner.register(base, length)

    def unregister(self, base: int, length: int) -> None:
        self._inner.unregister(base, length)

    def metadata(self) -> bytes:
        return self._inner.metadata()

    def connect(self, metadata: bytes) -> str:
        if self._happens(self._faults.connect):
            raise TransferFailed("injected: connect")
        return self._inner.connect(metadata)

    def disconnect(self, peer: str) -> None:
        self._inner.disconnect(peer)

    def read(self, peer: str, remote: Sequence[int], local: Sequence[int], block_bytes: int) -> int:
        if self._happens(self._faults.read):
            raise TransferFailed("injected: read")
        fails = self._happens(self._faults.midway)
        count = self._random.randint(1, len(remote)) if fails else len(remote)
        delay = self._random.randint(1, self._faults.max_delay_polls)
        polls = delay if self._happens(self._faults.delay) else 0
        handle = self._inner.read(peer, remote[:count], local[:count], block_bytes)
        self._reads[handle] = _Read(handle, fails, polls)
        return handle

    def poll(self, handle: int) -> ReadState:
        read = self._reads[handle]
        if read.ended is None:
            state = self._inner.poll(read.inner)
            if state is ReadState.RUNNING:
                return state
            read.ended = ReadState.FAILED if read.fails else state
        if read.delay_polls > 0:
            read.delay_polls -= 1
            return ReadState.RUNNING
        del self._reads[handle]
        return read.ended

    def cancel(self, handle: int) -> None:
        read = self._reads.get(handle)
        if read is None:
            return
        read.fails = True
        if read.ended is None:
            self._inner.cancel(read.inner)
        else:
            read.ended = ReadState.FAILED

    def close(self) -> None:
        self._inner.close()

    def _happens(self, probability: float) -> bool:
        return self._random.random() < probability
