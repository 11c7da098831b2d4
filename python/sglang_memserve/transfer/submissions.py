"""What other threads of this process ask of the agent: the one thing they share with its thread."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import NamedTuple, TypeVar

from ..errors import LimitExceeded, PeerUnreachable
from ..protocol.control import FetchReply, FetchRequest, ResizeReply, ResizeRequest

_MAX_WAITING = 256
_Reply = TypeVar("_Reply", FetchReply, ResizeReply)


class FetchSubmission(NamedTuple):
    request: FetchRequest
    future: Future[FetchReply]


class ResizeSubmission(NamedTuple):
    request: ResizeRequest
    future: Future[ResizeReply]


Submission = FetchSubmission | ResizeSubmission


class Submissions:
    """Every future that was put here ends, at the latest when this is closed. Closed until it is
    opened; ``wake`` is called after each ``put``."""

    def __init__(self, wake: Callable[[], None]) -> None:
        self._wake = wake
        self._lock = threading.Lock()
        self._open = False
        self._waiting: list[Submission] = []
        self._running: list[Submission] = []

    def __len__(self) -> int:
        """How many wait to be taken."""
        return len(self._waiting)

    def open(self) -> None:
        with self._lock:
            self._open = True

    def put(self, submission: Submission) -> None:
        """On any thread. Raises LimitExceeded; while closed, the future raises PeerUnreachable."""
        with self._lock:
            if self._open:
                if len(self._waiting) >= _MAX_WAITING:
                    raise LimitExceeded(f"{len(self._waiting)} requests wait to be looked at")
                self._waiting.append(submission)
                self._wake()
                return
        _end(submission)

    def take(self) -> list[Submission]:
        """Those that were put since, less the cancelled ones."""
        with self._lock:
            waiting, self._waiting = self._waiting, []
        taken = [one for one in waiting if one.future.set_running_or_notify_cancel()]
        self._running = [one for one in self._running if not one.future.done()] + taken
        return taken

    def close(self) -> None:
        """End what has not ended. Idempotent."""
        with self._lock:
            self._open = False
        for submission in (*self.take(), *self._running):
            _end(submission)
        self._running.clear()


def settle(future: Future[_Reply], reply: _Reply) -> None:
    """``reply`` unless the future has ended otherwise."""
    if not future.done():
        future.set_result(reply)


def _end(submission: Submission) -> None:
    if not submission.future.done():
        submission.future.set_exception(PeerUnreachable("the agent is not running"))
