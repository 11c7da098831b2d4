"""The engine's native ops against their reference."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

pytest.importorskip("sgl_kernel_ext")

from sgl_kernel_ext import ops

if ops.NATIVE:
    from sgl_kernel_ext import _native

needs_native = pytest.mark.skipif(not ops.NATIVE, reason=f"no native ops: {ops.WHY_NOT_NATIVE}")


@needs_native
@pytest.mark.parametrize("threads", [1, 2, 3, 8, 256])
def test_a_team_does_every_task_once(threads: int) -> None:
    for tasks in (0, 1, 2, 3, 7, 64, 1000):
        assert _native.count_tasks(threads, tasks, -1) == [1] * tasks


@needs_native
def test_a_team_survives_what_its_tasks_throw() -> None:
    for threads in (1, 2, 4):
        for failing in (0, 5, 99):
            with pytest.raises(RuntimeError, match=f"task {failing} failed as asked"):
                _native.count_tasks(threads, 100, failing)
        assert _native.count_tasks(threads, 100, -1) == [1] * 100


@needs_native
@pytest.mark.parametrize("threads", [0, 257])
def test_a_team_is_bounded(threads: int) -> None:
    with pytest.raises(ValueError, match="threads"):
        _native.count_tasks(threads, 1, -1)


@needs_native
def test_threads_that_share_a_team_each_get_their_tasks_done() -> None:
    def work() -> None:
        for turn in range(300):
            assert _native.count_tasks(3, turn % 40, -1) == [1] * (turn % 40)
            with pytest.raises(RuntimeError):
                _native.count_tasks(3, 20, turn % 20)

    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(work) for _ in range(4)]:
            done.result(60)


def probe(code: str) -> str:
    """What the code prints in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@needs_native
def test_a_forked_child_has_a_team_of_its_own() -> None:
    code = (
        "import os\n"
        "from sgl_kernel_ext import _native\n"
        "assert _native.team_helpers() == 0\n"
        "assert _native.count_tasks(3, 50, -1) == [1] * 50 and _native.team_helpers() == 2\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    before = _native.team_helpers()\n"
        "    fine = all(_native.count_tasks(2, 50, -1) == [1] * 50 for _ in range(100))\n"
        "    os._exit(0 if fine and before == 0 and _native.team_helpers() == 1 else 1)\n"
        "assert os.waitpid(child, 0)[1] == 0\n"
        "assert _native.count_tasks(3, 50, -1) == [1] * 50\n"
        "print('ended')\n"
    )
    assert probe(code) == "ended\n"


@needs_native
def test_an_idle_team_sleeps() -> None:
    code = (
        "import time\n"
        "from sgl_kernel_ext import _native\n"
        "_native.count_tasks(4, 50, -1)\n"
        "time.sleep(0.2)\n"
        "before = time.process_time()\n"
        "time.sleep(1)\n"
        "print(time.process_time() - before)\n"
    )
    assert float(probe(code)) < 0.2
