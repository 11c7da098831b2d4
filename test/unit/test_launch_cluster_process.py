"""Guarded processes: nothing outlives its parent, and ends are reported as they were."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from sglang_memserve.cluster.process import Command, GuardedProcess, end_all
from sglang_memserve.errors import MemServeError

LIMIT_S = 20.0


def command(tmp_path: Path, code: str, name: str = "child") -> Command:
    return Command(name, (sys.executable, "-c", code), dict(os.environ), tmp_path / f"{name}.log")


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.05)


def gone(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


# Ignores SIGTERM and leaves a grandchild in a session of its own that does as well.
STUBBORN = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
child = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
print(child.pid, flush=True)
{rest}
"""


def grandchild_pid(process: GuardedProcess) -> int:
    wait_until(lambda: process.log_tail(1).strip().isdigit())
    return int(process.log_tail(1))


def test_exit_status_and_output_are_the_commands_own(tmp_path: Path) -> None:
    code = "import sys; print('out'); print('err', file=sys.stderr); sys.exit(7)"
    with GuardedProcess(command(tmp_path, code)) as process:
        assert process.wait(LIMIT_S) == 7
        assert sorted(process.log_tail(5).split()) == ["err", "out"]
        assert process.log_tail(1).count("\n") == 0


def test_death_by_signal_is_told_apart(tmp_path: Path) -> None:
    with GuardedProcess(command(tmp_path, "import time; time.sleep(600)")) as process:
        assert process.poll() is None
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait(LIMIT_S) == 128 + signal.SIGKILL


def test_a_command_that_does_not_exist_is_an_error_at_once(tmp_path: Path) -> None:
    absent = Command("absent", ("/no/such/program",), dict(os.environ), tmp_path / "absent.log")
    with pytest.raises(MemServeError, match=r"cannot start absent.*no/such/program"):
        GuardedProcess(absent)


def test_orphans_end_with_their_command(tmp_path: Path) -> None:
    with GuardedProcess(command(tmp_path, STUBBORN.format(rest=""))) as process:
        orphan = grandchild_pid(process)
        assert process.wait(LIMIT_S) == 0
        assert gone(orphan)


def test_release_ends_a_tree_that_ignores_sigterm_and_is_idempotent(tmp_path: Path) -> None:
    code = STUBBORN.format(rest="time.sleep(600)")
    process = GuardedProcess(command(tmp_path, code), grace_s=0.3)
    orphan = grandchild_pid(process)
    process.release()
    assert process.poll() == 128 + signal.SIGKILL
    assert gone(process.pid) and gone(orphan)
    process.release()


def test_end_all_lets_commands_end_by_themselves(tmp_path: Path) -> None:
    code = (
        "import signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(3))\n"
        "print('waiting', flush=True)\n"
        "time.sleep(600)"
    )
    processes = [GuardedProcess(command(tmp_path, code, f"child{i}")) for i in range(2)]
    for process in processes:
        wait_until(lambda process=process: "waiting" in process.log_tail(1))  # type: ignore[misc]
    end_all(processes)
    assert [process.poll() for process in processes] == [3, 3]


PARENT = """
import os, sys, time
from pathlib import Path
from sglang_memserve.cluster.process import Command, GuardedProcess
code, log = sys.argv[1:]
command = Command("child", (sys.executable, "-c", code), dict(os.environ), Path(log))
process = GuardedProcess(command, grace_s=0.3)
print(process.pid, flush=True)
time.sleep(600)
"""


def test_nothing_survives_a_parent_that_is_killed(tmp_path: Path) -> None:
    log = tmp_path / "child.log"
    code = STUBBORN.format(rest="time.sleep(600)")
    arguments = [sys.executable, "-c", PARENT, code, str(log)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as parent:
        try:
            assert parent.stdout is not None
            child = int(parent.stdout.readline())
            wait_until(lambda: log.read_text().strip().isdigit())
            orphan = int(log.read_text())
        finally:
            parent.kill()
        parent.wait(LIMIT_S)
    wait_until(lambda: gone(child) and gone(orphan))


def test_the_command_dies_with_its_guard(tmp_path: Path) -> None:
    with GuardedProcess(command(tmp_path, "import time; time.sleep(600)")) as process:
        guard = psutil.Process(process.pid).parent()
        assert guard is not None
        guard.kill()
        assert process.wait(LIMIT_S) is not None
        wait_until(lambda: gone(process.pid))
