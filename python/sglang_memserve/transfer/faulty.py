"""A transport that fails on purpose: a decorator over any other."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from ..errors import TransferFailed
from .base import ReadState, Transport


@dataclass(frozen=True, slots=True)
class Faults:
    """Probabilities, each of one call; ``max_delay_polls``: how long an ended read looks running.

    ``midway``: only a part of the blocks is read, then the read ends as FAILED. ``truncate``: the
    same, but it ends as DONE, a lie that only checksums can tell. ``blocks_per_s``: reads are
    submitted block by block and take their time (0: at once). ``killed_by_read``: the number of the
    read whose submission kills this process, from 1 (0: none).
    """

    connect: float = 0.0
    read: float = 0.0
    midway: float = 0.0
    truncate: float = 0.0
    delay: float = 0.0
    max_delay_polls: int = 20
    blocks_per_s: float = 0.0
    killed_by_read: int = 0


@dataclass(slots=True)
class _Read:
    """``inner`` is None between two parts. ``ended`` is what it will be reported as."""

    peer: str
    parts: Iterator[tuple[Sequence[int], Sequence[int]]]
    block_bytes: int
    due_s: float
    delay_polls: int
    outcome: ReadState
    inner: int | None = None
    ended: bool = False


class FaultyTransport:
    """Draws from ``seed``, so that a failing run can be repeated. ``clock`` gives seconds."""

    def __init__(
        self,
        inner: Transport,
        faults: Faults,
        seed: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._inner = inner
        self._faults = faults
        self._random = random.Random(seed)
        self._clock = clock
        self._reads: dict[int, _Read] = {}
        self._next = 1
        self._submitted = 0

    def register(self, base: int, length: int) -> None:
        self._inner.register(base, length)

    def unregister(self, base: int, length: int) -> None:
        self._inner.unregister(base, length)

    def metadata(self) -> bytes:
        return self._inner.metadata()

    def name_in(self, metadata: bytes) -> str:
        return self._inner.name_in(metadata)

    def connect(self, metadata: bytes) -> str:
        if self._happens(self._faults.connect):
            raise TransferFailed("injected: connect")
        return self._inner.connect(metadata)

    def disconnect(self, peer: str) -> None:
        self._inner.disconnect(peer)

    def read(self, peer: str, remote: Sequence[int], local: Sequence[int], block_bytes: int) -> int:
        faults = self._faults
        self._submitted += 1
        if self._happens(faults.read):
            raise TransferFailed("injected: read")
        fails = self._happens(faults.midway)
        count = len(remote)
        if fails or self._happens(faults.truncate):
            count = self._random.randint(1, count)
        remote, local = remote[:count], local[:count]
        delay = self._random.randint(1, faults.max_delay_polls)
        at_once = 1 if faults.blocks_per_s else max(1, count)
        starts = range(0, count, at_once)
        read = _Read(
            peer,
            iter([(remote[i : i + at_once], local[i : i + at_once]) for i in starts]),
            block_bytes,
            self._clock(),
            delay if self._happens(faults.delay) else 0,
            ReadState.FAILED if fails else ReadState.DONE,
        )
        self._submit(read)
        handle = self._next
        self._next += 1
        self._reads[handle] = read
        if self._submitted == faults.killed_by_read:
            os.kill(os.getpid(), signal.SIGKILL)
        return handle

    def poll(self, handle: int) -> ReadState:
        read = self._reads[handle]
        if not read.ended:
            self._move_on(read)
        if not read.ended:
            return ReadState.RUNNING
        if read.delay_polls > 0:
            read.delay_polls -= 1
            return ReadState.RUNNING
        del self._reads[handle]
        return read.outcome

    def cancel(self, handle: int) -> None:
        read = self._reads.get(handle)
        if read is None:
            return
        read.outcome = ReadState.FAILED
        read.parts = iter(())
        if read.inner is not None:
            self._inner.cancel(read.inner)

    def close(self) -> None:
        self._inner.close()

    def _move_on(self, read: _Read) -> None:
        if read.inner is not None:
            state = self._inner.poll(read.inner)
            if state is ReadState.RUNNING:
                return
            read.inner = None
            if state is ReadState.FAILED:
                read.outcome = state
                read.ended = True
                return
        if self._clock() < read.due_s and read.outcome is not ReadState.FAILED:
            return
        try:
            self._submit(read)
        except TransferFailed:
            read.outcome = ReadState.FAILED
            read.ended = True

    def _submit(self, read: _Read) -> None:
        part = next(read.parts, None)
        if part is None:
            read.ended = True
            return
        if self._faults.blocks_per_s:
            read.due_s += len(part[0]) / self._faults.blocks_per_s
        read.inner = self._inner.read(read.peer, *part, read.block_bytes)

    def _happens(self, probability: float) -> bool:
        return self._random.random() < probability
