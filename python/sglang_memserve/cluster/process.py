"""One process of the cluster, run under ``guard`` so that its tree ends with it or with us."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from ..errors import MemServeError

GRACE_S = 6.0
_GUARD = Path(__file__).with_name("guard.py")
_START_LIMIT_S = 30.0
_TAIL_BYTES = 64 * 1024
_LINE_CHARS = 300


@dataclass(frozen=True, slots=True)
class Command:
    """What to run. ``env`` is the whole environment; output of both kinds goes to ``log``."""

    name: str
    argv: tuple[str, ...]
    env: Mapping[str, str]
    log: Path


class GuardedProcess:
    """A running command: ``pid`` is the command's own. Ends with this process, whatever happens.

    ``release()`` (or leaving the context) ends it and is idempotent.
    """

    def __init__(
        self, command: Command, *, grace_s: float = GRACE_S, stdout: int | None = None
    ) -> None:
        """``stdout``: a file descriptor that takes the place of the log for standard output.

        Raises MemServeError when the command cannot be started."""
        self.command = command
        self._grace_s = grace_s
        held, self._lifeline = os.pipe()
        status, told = os.pipe()
        guard = [sys.executable, "-I", "-S", str(_GUARD), str(held), str(told), str(grace_s)]
        try:
            with open(command.log, "ab") as log:
                self._guard = subprocess.Popen(
                    [*guard, *command.argv],
                    env=dict(command.env),
                    stdin=subprocess.DEVNULL,
                    stdout=log if stdout is None else stdout,
                    stderr=log,
                    start_new_session=True,
                    pass_fds=(held, told),
                )
        finally:
            os.close(held)
            os.close(told)
        try:
            self.pid = self._read_pid(status)
        except MemServeError:
            self.release()
            raise
        finally:
            os.close(status)

    def _read_pid(self, status: int) -> int:
        readable, _, _ = select.select([status], [], [], _START_LIMIT_S)
        text = os.read(status, 64).decode() if readable else ""
        if not text.strip().isdigit():
            raise MemServeError(f"cannot start {self.command.name}: {self.log_tail(3).strip()}")
        return int(text)

    @property
    def name(self) -> str:
        return self.command.name

    def poll(self) -> int | None:
        """Exit status once it has ended: the command's, or 128 plus a signal's number."""
        return self._guard.poll()

    def wait(self, timeout_s: float) -> int | None:
        """As ``poll``, after at most ``timeout_s``."""
        try:
            return self._guard.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return None

    def terminate(self) -> None:
        """Ask it to end; the guard kills what has not ended after the grace time."""
        if self._guard.poll() is None:
            self._guard.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """End it now. The guard stays, to sweep the rest of the tree."""
        if self._guard.poll() is None:
            try:
                os.kill(self.pid, signal.SIGKILL)
            except ProcessLookupError:
                return

    def release(self) -> None:
        """End it, by force after the grace time; returns when the tree is gone."""
        if self._lifeline < 0:
            return
        os.close(self._lifeline)
        self._lifeline = -1
        if self.wait(self._grace_s + 3) is None:
            # The guard is stuck (stopped, say): its group and session go as one.
            os.killpg(self._guard.pid, signal.SIGKILL)
            self._guard.wait(10)

    def log_tail(self, lines: int) -> str:
        """The last lines of the log, each cut to a readable length: SGLang prints all its settings
        as one."""
        try:
            with open(self.command.log, "rb") as log:
                size = log.seek(0, os.SEEK_END)
                log.seek(max(0, size - _TAIL_BYTES))
                text = log.read().decode(errors="replace")
        except FileNotFoundError:
            return ""
        kept = text.splitlines()[-lines:]
        return "\n".join(line[:_LINE_CHARS] + "..." * (len(line) > _LINE_CHARS) for line in kept)

    def __enter__(self) -> GuardedProcess:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()


def end_all(processes: list[GuardedProcess], grace_s: float = GRACE_S) -> None:
    """Ask all at once, wait together, then make sure. Takes little more than ``grace_s``."""
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + grace_s
    for process in processes:
        process.wait(max(0.0, deadline - time.monotonic()))
    for process in processes:
        process.kill()
    for process in processes:
        process.release()
