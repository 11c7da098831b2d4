"""``launch_cluster`` with real servers: ready means served, a death is reported, nothing stays."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import psutil
from integration.harness import generate, launch_cluster, wait_until


def gone(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def test_a_cluster_from_ready_to_killed(tiny_model: Path, tmp_path: Path) -> None:
    flags = ["--mempool-dram", "64MiB"]
    with launch_cluster(tiny_model, tmp_path, flags=flags) as cluster:
        assert generate(cluster.url, "ready means served " * 8, 4).meta["completion_tokens"] == 4
        everything = psutil.Process(cluster.pid).children(recursive=True)
        assert len(everything) > 6

        os.kill(cluster.one("prefill").pid, signal.SIGKILL)
        report = tmp_path / "cluster.log"
        wait_until(lambda: "prefill-0 died (signal 9)" in report.read_text(), 20, "the report")
        assert generate(cluster.url, "and the others go on " * 8, 4).meta["completion_tokens"] == 4

        os.kill(cluster.pid, signal.SIGKILL)
        deadline = time.monotonic() + 30
        for process in everything:
            while not gone(process.pid):
                assert time.monotonic() < deadline, f"{process} survived its launcher"
                time.sleep(0.1)
