"""A thread that compares blocks that were read with their checksums, beside the agent's."""

from __future__ import annotations

import logging
import queue
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from ..checksums import first_damaged

log = logging.getLogger(__name__)

_CLOSE_S = 10.0


class Verdict(NamedTuple):
    """``damaged``: index of the first block with another checksum, None when all are right."""

    ticket: int
    damaged: int | None


class Verifier(Protocol):
    def submit(
        self, ticket: int, local: Sequence[int], block_bytes: int, checksums: Sequence[int]
    ) -> None:
        """Never waits for the network; when too much is queued, it compares on the spot."""
        ...

    def take(self) -> Sequence[Verdict]:
        """What has been compared since the last call."""
        ...

    def close(self) -> None:
        """Afterwards no block is read any more; memory may be unmapped."""
        ...


class InlineVerifier:
    """Compares in ``submit``: for tests, and where a second thread is not worth it."""

    def __init__(self) -> None:
        self._done: list[Verdict] = []

    def submit(
        self, ticket: int, local: Sequence[int], block_bytes: int, checksums: Sequence[int]
    ) -> None:
        self._done.append(Verdict(ticket, first_damaged(local, block_bytes, checksums)))

    def take(self) -> Sequence[Verdict]:
        done, self._done = self._done, []
        return done

    def close(self) -> None:
        self._done.clear()


class _Job(NamedTuple):
    ticket: int
    local: Sequence[int]
    block_bytes: int
    checksums: Sequence[int]


class ThreadVerifier:
    """``on_done`` is called on its thread after each verdict. The thread starts when first used."""

    def __init__(self, on_done: Callable[[], None], queued: int = 64) -> None:
        self._on_done = on_done
        self._jobs: queue.Queue[_Job | None] = queue.Queue(queued)
        self._done: deque[Verdict] = deque()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def submit(
        self, ticket: int, local: Sequence[int], block_bytes: int, checksums: Sequence[int]
    ) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="memserve-verify", daemon=True)
            self._thread.start()
        job = _Job(ticket, local, block_bytes, checksums)
        try:
            self._jobs.put_nowait(job)
        except queue.Full:
            self._verify(job)

    def take(self) -> Sequence[Verdict]:
        return [self._done.popleft() for _ in range(len(self._done))]

    def close(self) -> None:
        self._stop.set()
        if self._thread is None:
            return
        try:
            self._jobs.put_nowait(None)
        except queue.Full:
            log.debug("the verifier finds the stop flag behind %d jobs", self._jobs.qsize())
        self._thread.join(_CLOSE_S)
        if self._thread.is_alive():
            log.error("the verifier did not end in %g s", _CLOSE_S)

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None and not self._stop.is_set():
            self._verify(job)

    def _verify(self, job: _Job) -> None:
        damaged: int | None = None
        for index, address in enumerate(job.local):
            if self._stop.is_set():
                return
            if first_damaged([address], job.block_bytes, [job.checksums[index]]) is not None:
                damaged = index
                break
        self._done.append(Verdict(job.ticket, damaged))
        self._on_done()
