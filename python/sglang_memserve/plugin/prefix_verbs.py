"""The device verbs of one rank: ``match``, ``swap_out``, ``swap_in``.

    submit    a request has come
    advance   in every round of the scheduler: requests begin, which takes what they need and hands
              copies over; those whose copies have ended finish
    abandon   before SGLang drops its cache: all of them end

Everything runs on the scheduler thread between two steps, and waits for no copy and no network.
Ranks get the same requests in the same round. How long copies take differs between ranks, so ranks
compare that in ``advance``, and finish alike.
"""

from __future__ import annotations

import logging
import threading
import time
from array import array
from collections.abc import Callable
from dataclasses import dataclass

from ..types import PageKey
from .copies import Copy
from .device_tree import DeviceTree, Prefix
from .engine_messages import Outcome, PrefixVerbReqInput, PrefixVerbReqOutput, Verb
from .swaps import Ports, Swap, start_swap_in, start_swap_out

log = logging.getLogger(__name__)

MAX_TASKS = 16
# A flush waits this long for copies that were called off.
ABANDON_LIMIT_S = 10.0


@dataclass(slots=True)
class _Task:
    """``swap`` is None until it has begun. ``deferred``: it waits for pages in use."""

    request: PrefixVerbReqInput
    prefix: Prefix
    deadline_s: float
    swap: Swap | None = None
    deferred: bool = False

    @property
    def copies(self) -> list[Copy]:
        return [] if self.swap is None else self.swap.copies


Answer = tuple[PrefixVerbReqInput, PrefixVerbReqOutput]


class PrefixVerbs:
    """``clock`` gives seconds and times the deadlines."""

    def __init__(self, ports: Ports, clock: Callable[[], float] = time.monotonic) -> None:
        self._ports = ports
        self._clock = clock
        self._tree: DeviceTree = ports.tree
        self._tasks: list[_Task] = []

    @property
    def busy(self) -> bool:
        return bool(self._tasks)

    def submit(self, request: PrefixVerbReqInput) -> PrefixVerbReqOutput | None:
        """An answer if it is refused; else it comes from ``advance``."""
        if len(self._tasks) >= MAX_TASKS:
            return _bare(request, Outcome.LIMIT_EXCEEDED)
        if not self._tree.supported:
            return _bare(request, Outcome.UNSUPPORTED)
        keys = tuple(PageKey(key) for key in request.keys)
        tokens = array("q", request.tokens)
        prefix = Prefix(tokens, keys, request.extra_key, request.cache_salt)
        self._tasks.append(_Task(request, prefix, self._clock() + request.deadline_s))
        return None

    def advance(self) -> list[Answer]:
        """Answers of the verbs that have finished, with their requests. On every rank at the same
        point of the same round."""
        if not self._tasks:
            return []
        with self._ports.clock.working():
            now = self._clock()
            on_time = self._vote([now < task.deadline_s for task in self._tasks])
            answers = []
            for task, timely in zip(list(self._tasks), on_time, strict=True):
                if not timely:
                    for copy in task.copies:
                        copy.call_off()
                if task.swap is None and (answer := self._guarded(self._begin, task, timely)):
                    answers.append(self._end(task, answer))
            running = [task for task in self._tasks if task.swap is not None]
            if not running:
                return answers
            done = self._vote([all(copy.done for copy in task.copies) for task in running])
            landed = self._vote([all(copy.landed for copy in task.copies) for task in running])
            for task, ended, arrived in zip(running, done, landed, strict=True):
                if ended and (answer := self._guarded(self._finish, task, arrived)):
                    answers.append(self._end(task, answer))
            return answers

    def _vote(self, votes: list[bool]) -> list[bool]:
        """Whether every rank says so, of each."""
        return [bool(vote) for vote in self._ports.ranks.least([int(vote) for vote in votes])]

    def _end(self, task: _Task, answer: PrefixVerbReqOutput) -> Answer:
        self._tasks.remove(task)
        return task.request, answer

    def _guarded(
        self, step: Callable[[_Task, bool], PrefixVerbReqOutput | None], task: _Task, vote: bool
    ) -> PrefixVerbReqOutput | None:
        try:
            return step(task, vote)
        except Exception:
            # The scheduler must outlive a verb; SGLang would end the whole server.
            log.exception("%s failed", task.request.verb)
            return _bare(task.request, Outcome.INTERNAL_ERROR)

    def _begin(self, task: _Task, timely: bool) -> PrefixVerbReqOutput | None:
        verb = Verb(task.request.verb)
        if verb is Verb.MATCH:
            return self._answer(task, Outcome.COMPLETE)
        if not timely:
            return self._answer(task, Outcome.IN_USE if task.deferred else Outcome.DEADLINE)
        start = start_swap_out if verb is Verb.SWAP_OUT else start_swap_in
        begun = start(self._ports, task.prefix, task.request.deadline_s)
        if not isinstance(begun, Outcome):
            task.swap = begun
            return None
        if begun is Outcome.IN_USE and self._tree.storing:
            # Pages that were just computed; the next round looks again.
            task.deferred = True
            return None
        return self._answer(task, begun)

    def pause(self, limit_s: float) -> None:
        """For a scheduler that has nothing else to do: until a copy ends, at most ``limit_s``."""
        progress: threading.Event = self._ports.copies.progress
        progress.wait(limit_s)
        progress.clear()

    def abandon(self) -> list[Answer]:
        """The tree is about to be emptied: everything taken from it goes back first."""
        for task in self._tasks:
            for copy in task.copies:
                copy.call_off()
        if self._tasks and not self._ports.copies.drain(ABANDON_LIMIT_S):
            log.error("copies did not end within %g s", ABANDON_LIMIT_S)
        answers = []
        for task in self._tasks:
            if task.swap is not None:
                task.swap.undo()
            answers.append((task.request, _bare(task.request, Outcome.FLUSHED)))
        self._tasks.clear()
        return answers

    def _finish(self, task: _Task, landed: bool) -> PrefixVerbReqOutput:
        assert task.swap is not None
        if landed:
            return self._answer(task, task.swap.apply())
        task.swap.undo()
        late = any(copy.called_off for copy in task.copies)
        return self._answer(task, Outcome.DEADLINE if late else task.swap.not_landed)

    def _answer(self, task: _Task, outcome: Outcome) -> PrefixVerbReqOutput:
        prefix, pool, swap = task.prefix, self._ports.pool, task.swap
        hbm = self._tree.match(prefix)
        dram, tail, stored = self._ports.ranks.least(
            [
                pool.readable_pages(prefix.keys),
                pool.readable_pages(prefix.keys[hbm:]),
                swap.stored_pages if swap is not None else 0,
            ]
        )
        return PrefixVerbReqOutput(
            call_id=task.request.call_id,
            outcome=outcome.value,
            hbm_pages=hbm,
            dram_pages=dram,
            reusable_pages=hbm + tail,
            moved_pages=swap.moved_pages if swap is not None else 0,
            stored_pages=stored,
            continued_pages=swap.continued_pages if swap is not None else 0,
        )


def _bare(request: PrefixVerbReqInput, outcome: Outcome) -> PrefixVerbReqOutput:
    return PrefixVerbReqOutput(call_id=request.call_id, outcome=outcome.value)
