"""The cluster's life, with small HTTP servers in the place of router and instances."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from rich.console import Console
from sglang_memserve.cluster.machine import free_ports
from sglang_memserve.cluster.plan import ClusterPlan, InstancePlan
from sglang_memserve.cluster.process import Command
from sglang_memserve.cluster.supervisor import Cluster, StartFailed, StopAsked
from sglang_memserve.cluster.table import Progress
from sglang_memserve.types import Role

LIMIT_S = 30.0

# A router lists the workers named after its port; an instance answers everything with 200.
STAND_IN = """
import json, sys
from http.server import BaseHTTPRequestHandler, HTTPServer
port, workers = int(sys.argv[1]), sys.argv[2:]
class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        body = {"workers": [{"url": url, "state": "ready"} for url in workers]}
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())
    def log_message(self, *arguments):
        pass
HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


class Stage:
    """A plan of stand-ins; ``dead`` instances write a line and exit with 3."""

    def __init__(self, folder: Path, dead: int = 0, listed: bool = True) -> None:
        self.output = io.StringIO()
        self.progress = Progress(Console(file=self.output, width=200))
        router_port, *ports = free_ports(3, taken=set())
        urls = [f"http://127.0.0.1:{port}" for port in ports]
        instances = []
        for index, (role, port) in enumerate(zip((Role.PREFILL, Role.DECODE), ports, strict=True)):
            code = STAND_IN if index >= dead else "print('no such model'); raise SystemExit(3)"
            command = self._command(folder, f"{role.value}-0", code, str(port))
            instances.append(InstancePlan(role, urls[index], command))
        router = self._command(
            folder, "router", STAND_IN, str(router_port), *(urls if listed else [])
        )
        self.plan = ClusterPlan(f"http://127.0.0.1:{router_port}", router, tuple(instances))

    @staticmethod
    def _command(folder: Path, name: str, code: str, *arguments: str) -> Command:
        argv = (sys.executable, "-c", code, *arguments)
        return Command(name, argv, dict(os.environ), folder / f"{name}.log")

    def cluster(self, stop: bool = False) -> Cluster:
        return Cluster(self.plan, self.progress, lambda: stop)


def test_ready_when_the_router_lists_every_instance(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    with stage.cluster() as cluster:
        cluster.start(LIMIT_S)
        shown = cluster.describe()
    assert shown["url"] == stage.plan.router_url
    instances = shown["instances"]
    assert isinstance(instances, list)
    assert [item["name"] for item in instances] == ["prefill-0", "decode-0"]
    assert all(not psutil.pid_exists(item["pid"]) for item in instances)
    assert "decode-0" in stage.output.getvalue() and "ready" in stage.output.getvalue()
    cluster.release()


def test_a_death_while_starting_fails_the_start_with_the_end_of_the_log(tmp_path: Path) -> None:
    with Stage(tmp_path, dead=1).cluster() as cluster, pytest.raises(StartFailed) as failure:
        cluster.start(LIMIT_S)
    assert "prefill-0 died (exit status 3)" in str(failure.value)
    assert "no such model" in str(failure.value)


def test_not_ready_in_time_says_who_is_late(tmp_path: Path) -> None:
    late = r"not ready within 2 s: .*decode-0 is up"
    with (
        Stage(tmp_path, listed=False).cluster() as cluster,
        pytest.raises(StartFailed, match=late),
    ):
        cluster.start(2.0)


def test_a_stop_while_starting_is_obeyed(tmp_path: Path) -> None:
    with Stage(tmp_path, listed=False).cluster(stop=True) as cluster, pytest.raises(StopAsked):
        cluster.start(LIMIT_S)


def test_supervision_goes_on_until_the_last_instance_is_gone(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    with stage.cluster() as cluster:
        cluster.start(LIMIT_S)
        shown = cluster.describe()
        instances = shown["instances"]
        assert isinstance(instances, list)
        for item in instances:
            os.kill(item["pid"], signal.SIGKILL)
        assert cluster.supervise() == 1
    assert "decode-0 died (signal 9)" in stage.output.getvalue()
    assert "no instance is left" in stage.output.getvalue()


def launch(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "sglang_memserve.launch_cluster", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_a_wrong_model_folder_is_one_line(tmp_path: Path) -> None:
    result = launch("--model-path", str(tmp_path / "absent"))
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1


def test_a_port_in_use_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({}))
    server = subprocess.Popen(
        [sys.executable, "-c", STAND_IN, str(port := free_ports(1, taken=set())[0])]
    )
    try:
        deadline = time.monotonic() + LIMIT_S
        while not any(c.laddr.port == port for c in psutil.Process(server.pid).net_connections()):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        result = launch("--model-path", str(tmp_path), "--port", str(port))
    finally:
        server.kill()
        server.wait(LIMIT_S)
    assert (result.returncode, result.stdout) == (2, "")
    assert f"127.0.0.1:{port}" in result.stderr and result.stderr.count("\n") == 1
