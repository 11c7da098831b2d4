"""Runs one command and sees to it that nothing of it outlives whoever started it.

A script of the standard library alone, started as ``python -I -S guard.py LIFELINE STATUS GRACE_S
COMMAND...`` in a session of its own. ``LIFELINE`` is the read end of a pipe whose write end only
the parent holds: when the parent goes, however it goes, the pipe closes. Then, or on SIGTERM, the
command gets SIGTERM, and after ``GRACE_S`` seconds SIGKILL. When the command has ended, everything
it left behind is killed: the guard is the "subreaper" of its tree, so orphans come to it. Should
the guard itself be killed, the kernel kills the command (parent-death signal).

The command's process id is written to the pipe ``STATUS``. Exit status: the command's, or 128 plus
the signal that ended it. Linux only.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


def _descendants(root: int) -> list[int]:
    """Process ids below ``root``, zombies left out."""
    children: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        try:
            with open(f"/proc/{name}/stat") as stat:
                # The command name may hold spaces and brackets; what follows it does not.
                state, parent = stat.read().rpartition(")")[2].split()[:2]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if state != "Z":
            children.setdefault(int(parent), []).append(int(name))
    found, queue = [], [root]
    while queue:
        below = children.get(queue.pop(), [])
        found += below
        queue += below
    return found


def _reap(child: int) -> int | None:
    """Collect every child that has ended; the exit status of ``child`` if it was among them."""
    status: int | None = None
    while True:
        try:
            pid, raw = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return status
        if pid == 0:
            return status
        if pid == child:
            code = os.waitstatus_to_exitcode(raw)
            status = 128 - code if code < 0 else code


def _sweep() -> None:
    """Kill what is left below us. New orphans may appear meanwhile, so look again."""
    for _ in range(100):
        left = _descendants(os.getpid())
        if not left:
            return
        for pid in left:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.02)
        _reap(-1)


def _die_with(parent: int, prctl: Callable[[int, int], int]) -> None:
    prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _watch(child: int, lifeline: int, wake: int, asked: list[int], grace_s: float) -> int:
    """Until the command has ended; its exit status."""
    poller = select.poll()
    poller.register(wake, select.POLLIN)
    poller.register(lifeline, select.POLLIN | select.POLLHUP)
    deadline: float | None = None
    while True:
        status = _reap(child)
        if status is not None:
            return status
        if deadline is not None and time.monotonic() >= deadline:
            os.kill(child, signal.SIGKILL)
        for ready, _ in poller.poll(1000 if deadline is None else 100):
            if ready == lifeline:
                asked.append(signal.SIGTERM)
                poller.unregister(lifeline)
            else:
                os.read(wake, 4096)
        if asked and deadline is None:
            deadline = time.monotonic() + grace_s
            os.kill(child, signal.SIGTERM)


def main(arguments: list[str]) -> int:
    lifeline, status_fd, grace_s = int(arguments[0]), int(arguments[1]), float(arguments[2])
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    prctl(_PR_SET_CHILD_SUBREAPER, 1)
    # Signals only wake the loop; SIGCHLD too, so that an ended command is seen at once.
    wake, wake_in = os.pipe()
    os.set_blocking(wake_in, False)
    signal.set_wakeup_fd(wake_in, warn_on_full_buffer=False)
    asked: list[int] = []
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda number, frame: asked.append(number))
    me = os.getpid()
    try:
        # One thread only, so code between fork and exec is safe here.
        child = subprocess.Popen(arguments[3:], preexec_fn=lambda: _die_with(me, prctl))
    except OSError as error:
        print(f"cannot start {arguments[3]}: {error}", file=sys.stderr)
        return 127
    os.write(status_fd, f"{child.pid}\n".encode())
    os.close(status_fd)
    try:
        return _watch(child.pid, lifeline, wake, asked, grace_s)
    finally:
        _sweep()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
