"""The thread that copies in the background: write-through, and the device verbs.

The scheduler thread hands a ``Job`` over and looks at its ``Copy`` later; it waits for nothing.
Jobs run one after another in the order they came. A job whose deadline passed while it waited is
given up unrun, so that neither queue nor locks held for it last for ever.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from ..memory.swap import DevicePool
from ..mempool import MemPool, PoolLease, PoolStore
from ..types import BlockId, PageKey

log = logging.getLogger(__name__)

# Between two pieces a copy looks whether it is still wanted.
PIECE_PAGES = 64


class Job(Protocol):
    def run(self, copy: Copy) -> bool:
        """Copy, off the scheduler thread; whether all of it landed."""
        ...

    def give_up(self) -> None:
        """It failed or was not begun: let go of what it holds."""
        ...


@dataclass(slots=True)
class Copy:
    """A job handed over and what became of it. ``landed`` counts once ``done`` is set."""

    job: Job | None
    deadline_s: float = 0.0
    called_off: bool = False
    done: bool = False
    landed: bool = False

    @classmethod
    def nothing(cls, *, landed: bool) -> Copy:
        """There was nothing to copy."""
        return cls(None, done=True, landed=landed)

    def call_off(self) -> None:
        """It ends soon, perhaps unrun. Its slots and blocks stay taken until ``done``."""
        self.called_off = True


@dataclass(frozen=True, slots=True)
class StoreJob:
    """Device pages into the blocks of a store, published at the end. ``pages[i]`` belongs to
    ``store.missing[i]``; landed when all of ``keys`` are readable."""

    pool: MemPool
    device: DevicePool
    keys: Sequence[PageKey]
    store: PoolStore
    pages: torch.Tensor
    ready: list[Any]

    def run(self, copy: Copy) -> bool:
        self.device.wait(self.ready)
        blocks = [block for _, block in self.store.missing]
        self.device.gather(self.pool.arena, blocks, self.pages)
        self.store.commit(checksums=self.pool.compute_checksums(blocks))
        # SGLang may call these pages stored; else it offers them again when they are next used.
        return self.pool.readable_pages(self.keys) == len(self.keys)

    def give_up(self) -> None:
        self.store.abort()


@dataclass(frozen=True, slots=True)
class FillJob:
    """Leased blocks into device pages."""

    pool: MemPool
    device: DevicePool
    blocks: Sequence[BlockId]
    pages: torch.Tensor
    lease: PoolLease
    ready: list[Any]

    def run(self, copy: Copy) -> bool:
        self.device.wait(self.ready)
        for start in range(0, len(self.blocks), PIECE_PAGES):
            if copy.called_off:
                return False
            end = start + PIECE_PAGES
            self.device.scatter(self.pool.arena, self.blocks[start:end], self.pages[start:end])
        valid = self.lease.valid()
        self.lease.release()
        return valid

    def give_up(self) -> None:
        self.lease.release()


@dataclass(slots=True)
class CopyThread:
    """``submit`` from the scheduler thread; ``progress`` is set whenever a copy has ended."""

    name: str
    progress: threading.Event = field(default_factory=threading.Event)
    _queue: queue.SimpleQueue[Copy | threading.Event | None] = field(
        default_factory=queue.SimpleQueue
    )
    _thread: threading.Thread = field(init=False)

    def __post_init__(self) -> None:
        self._thread = threading.Thread(target=self._run, name=self.name, daemon=True)
        self._thread.start()

    def submit(self, job: Job, limit_s: float) -> Copy:
        """``limit_s``: given up if it has not begun by then."""
        copy = Copy(job, time.monotonic() + limit_s)
        self._queue.put(copy)
        return copy

    def drain(self, limit_s: float) -> bool:
        """Whether all that was submitted before has ended within ``limit_s``."""
        drained = threading.Event()
        self._queue.put(drained)
        return drained.wait(limit_s)

    def close(self, limit_s: float) -> None:
        self._queue.put(None)
        self._thread.join(limit_s)

    def _run(self) -> None:
        torch.set_num_threads(1)
        while (item := self._queue.get()) is not None:
            if isinstance(item, threading.Event):
                item.set()
            else:
                self._perform(item)

    def _perform(self, copy: Copy) -> None:
        job = copy.job
        assert job is not None
        landed = False
        try:
            if time.monotonic() >= copy.deadline_s:
                copy.call_off()
            if not copy.called_off:
                landed = job.run(copy)
        except Exception:
            log.exception("%s: a copy failed", self.name)
        finally:
            if not landed:
                job.give_up()
            # The blocks and tensors are not held longer than needed.
            copy.job = None
            copy.landed = landed
            copy.done = True
            self.progress.set()
