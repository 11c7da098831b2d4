"""One change of a pool's size, step by step.

The pool knows no network, and memory must be registered with it before it is used, and must not be
given back before that is undone. So a resize is a value that its owner walks through:

    grow     register ``adds``                                 then ``complete`` (or ``abort``)
    shrink   ``vacate`` until it says DONE, unregister ``removes``, then ``complete`` (or ``abort``)
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait

from ..memory.arena import Arena, Slab
from ..memory.attached import Attached
from ..types import BlockId, Progress, Region, ResizeOutcome, ResizeResult
from .ledger import Ledger
from .shrink import Blockers, Shrink

MOVE_BYTES = 16 << 20
_POLL_S = 0.005
_CALL_OFF_S = 10.0


class Resize:
    """Made by ``MemPool.prepare_resize``; must be ended by ``complete`` or ``abort``. Thread-safe
    towards the pool, but for one thread itself.

    ``adds`` and ``removes`` are the memory of whole slabs; both are empty where the size stays.
    """

    def __init__(
        self,
        lock: threading.Lock,
        ledger: Ledger,
        arena: Arena,
        target_blocks: int,
        *,
        on_evicted: Callable[[], None],
        on_end: Callable[[], None],
        attached: Attached,
    ) -> None:
        """The lock is held. Raises what ``Arena.grow`` raises."""
        self._lock = lock
        self._ledger = ledger
        self._arena = arena
        self._on_evicted = on_evicted
        self._on_end = on_end
        self._attached = attached
        self._ended = False
        self._before = ledger.total_blocks
        self._shrink: Shrink | None = None
        added: list[Slab] = []
        removed: list[Slab] = []
        if target_blocks > self._before:
            added = arena.grow(target_blocks)
        else:
            removed = arena.slabs_above(target_blocks)
        if removed:
            self._shrink = Shrink(ledger, removed[0].first)
        self.adds: list[Region] = [arena.region(slab) for slab in added]
        self.removes: list[Region] = [arena.region(slab) for slab in removed]

    @property
    def moving_blocks(self) -> list[BlockId]:
        """Blocks that are pinned because they are being copied."""
        return [] if self._shrink is None else [move.source for move in self._shrink.moves]

    def run(self, wait_s: float, stop: threading.Event) -> ResizeResult:
        """All of it on this thread, where nobody registers memory; ``stop`` calls it off."""
        # Not the pool's clock: that one times leases, and may be a test's.
        until_s = time.monotonic() + wait_s
        try:
            if wait_s == 0 and (obstacle := self.obstacle()):
                return self.abort(obstacle)
            while (progress := self.vacate()) is not Progress.DONE:
                if time.monotonic() >= until_s and progress is Progress.BLOCKED:
                    return self.abort(self.obstacle())
                if stop.is_set():
                    return self.abort("it was called off")
                if progress is Progress.BLOCKED:
                    stop.wait(_POLL_S)
            return self.complete()
        except BaseException:
            self.abort()
            raise

    def vacate(self) -> Progress:
        """A bounded piece of the work: DONE when nothing is in the way of ``complete``, BLOCKED
        when only others' leases and stores are."""
        shrink = self._shrink
        if shrink is None:
            return Progress.DONE
        with self._lock:
            if shrink.is_empty():
                return Progress.DONE
            evicted = shrink.evicted_pages
            moves = shrink.begin_moves(max(1, MOVE_BYTES // self._arena.block_bytes))
            blocks = self._arena.reserved
        for source, target in moves:
            blocks[target] = blocks[source]
        with self._lock:
            shrink.end_moves()
            if shrink.is_empty():
                progress = Progress.DONE
            else:
                progress = Progress.BLOCKED if shrink.round_over else Progress.WORKING
        if shrink.evicted_pages > evicted:
            self._on_evicted()
        return progress

    def blockers(self) -> Blockers:
        with self._lock:
            if self._shrink is None or self._ledger.closed:
                return Blockers(0, 0, 0, 0.0)
            return self._shrink.blockers()

    def obstacle(self) -> str:
        """What is in the way, in words; empty when nothing is."""
        blockers = self.blockers()
        return "" if blockers.none else str(blockers)

    def complete(self) -> ResizeResult:
        """The pool has its new size. After ``vacate`` said DONE."""
        # Nobody copies there: not yet, or not any more.
        for region in self.adds:
            self._attached.attach(*region)
        for region in self.removes:
            self._attached.detach(*region)
        gone = (0, 0)
        with self._lock:
            assert not self._ended, "the resize has ended"
            if not self._ledger.closed:
                if self._shrink is not None:
                    self._shrink.complete()
                    gone = self._arena.shrink(self._ledger.total_blocks)
                elif self.adds:
                    self._ledger.grow(self._arena.total_blocks)
            changed = bool(self.adds or self.removes)
            self._ledger.counts["resizes_total"] += changed
        # Not under the lock, for it takes long; nobody can grow the pool before the end.
        self._arena.give_back(*gone)
        with self._lock:
            self._end()
        return self._result(ResizeOutcome.RESIZED if changed else ResizeOutcome.UNCHANGED)

    def abort(self, reason: str = "") -> ResizeResult:
        """The pool keeps its size; pages that moved or went meanwhile do not come back.
        Idempotent, and nothing after ``complete``."""
        with self._lock:
            if not self._ended:
                if not self._ledger.closed:
                    if self._shrink is not None:
                        self._shrink.abort()
                    elif self.adds:
                        self._arena.shrink(self._before)
                self._ledger.counts["resizes_refused_total"] += 1
                self._end()
        return self._result(ResizeOutcome.REFUSED, reason)

    def _end(self) -> None:
        self._ended = True
        self._on_end()

    def _result(self, outcome: ResizeOutcome, reason: str = "") -> ResizeResult:
        total = self._ledger.total_blocks
        shrink = self._shrink
        return ResizeResult(
            outcome,
            total,
            total * self._arena.block_bytes,
            0 if shrink is None else shrink.moved_pages,
            0 if shrink is None else shrink.evicted_pages,
            reason,
        )


def on_a_thread(work: Callable[[threading.Event], ResizeResult]) -> ResizeResult:
    """What ``work`` returns or raises. A signal's handler raises in the main thread (Ctrl-C): that
    ends the waiting and calls ``work`` off, but does not break it off between any two lines."""
    stop = threading.Event()
    ended: Future[ResizeResult] = Future()

    def run() -> None:
        try:
            ended.set_result(work(stop))
        except BaseException as error:  # noqa: BLE001 - raised again where it is waited for
            ended.set_exception(error)

    try:
        threading.Thread(target=run, name="memserve-resize", daemon=True).start()
        return ended.result()
    except BaseException:
        stop.set()
        wait([ended], _CALL_OFF_S)
        raise
