"""Several router processes behind one port, as real processes: they know and say the same.

Starting a pair is most of what these tests cost, so those that leave it whole share one (``pair``),
and waits that have nothing to do with each other are waited for at the same time.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import aiohttp
import msgspec
import psutil
import pytest
from sglang_memserve.cluster.machine import free_ports
from sglang_memserve.protocol.http import Heartbeat, Load, Registration
from sglang_memserve.router.processes.place import VARIABLE
from sglang_memserve.router.processes.serving import CLOSE_S
from sglang_memserve.types import Role
from simulation.router_machines import Asked, Line, Machine, generated

START_S = 60.0
POLL_S = 0.05
ENOUGH = 40  # fresh connections: that all of them meet the same of two processes is never seen
# Listed, removed before the first test that shares the pair, and not to come back with a process.
LISTED = "http://127.0.0.1:9"
BODY = {"input_ids": list(range(1, 10))}
PROGRAM = """
import logging, sys
from sglang_memserve.router.config import parse_args
from sglang_memserve.router.processes.supervisor import Patience, supervise
logging.basicConfig(level="INFO")
patience = Patience(silent_s=6.0, least_backoff_s=0.1)
sys.exit(supervise(parse_args(sys.argv[1:]), sys.argv[1:], patience))
"""


@dataclass
class Pair:
    """Two processes and who started them."""

    url: str
    process: subprocess.Popen[str]

    @property
    def pids(self) -> list[int]:
        return [child.pid for child in psutil.Process(self.process.pid).children()]


@dataclass
class Routers:
    """``http`` opens a connection for every request, so that any process may get it."""

    url: str
    http: aiohttp.ClientSession
    process: subprocess.Popen[str]
    pids: list[int]

    async def ask(self, method: str, path: str, body: object = None) -> tuple[int, Any]:
        data = None if body is None else msgspec.json.encode(body)
        async with self.http.request(method, self.url + path, data=data) as response:
            text = await response.text()
            is_json = response.content_type == "application/json"
            return response.status, msgspec.json.decode(text) if is_json else text

    async def workers(self) -> list[dict[str, Any]]:
        status, body = await self.ask("GET", "/workers")
        assert (status, body["processes"]) == (200, 2), body
        found: list[dict[str, Any]] = body["workers"]
        return found

    async def everybody_knows(self, *urls: str) -> None:
        for _ in range(ENOUGH):
            assert [worker["url"] for worker in await self.workers()] == list(urls)

    async def until_whole_again(self) -> None:
        """Two processes answer again, after one has gone."""
        async with asyncio.timeout(START_S):
            while True:
                try:
                    status, body = await self.ask("GET", "/workers")
                    if status == 200 and body["processes"] == 2:
                        return
                except aiohttp.ClientError:
                    pass
                await asyncio.sleep(POLL_S)

    async def forget(self, *machines: Machine) -> None:
        for machine in machines:
            status, _ = await self.ask("DELETE", f"/workers/{quote(machine.url, '')}")
            assert status in (200, 404)
        assert await self.workers() == []

    async def both_serve(self) -> None:
        """Many requests are answered, by both, and counted as one."""
        before = await self._served()
        answers = [await self.ask("POST", "/generate", BODY) for _ in range(ENOUGH)]
        assert {status for status, _ in answers} == {200}
        added: dict[str, float] = {}
        # A request is counted just after its answer has gone out.
        async with asyncio.timeout(START_S):
            while sum(added.values()) != ENOUGH:
                now = await self._served()
                added = {who: count - before.get(who, 0.0) for who, count in now.items()}
        assert len(added) == 2 and all(added.values()), added

    async def replaced_after(self, number: signal.Signals) -> None:
        """One of the processes gets ``number``, and another is there for it."""
        victim = psutil.Process(self.pids[0])
        victim.send_signal(number)
        await asyncio.to_thread(victim.wait, START_S)
        await self.until_whole_again()

    async def _served(self) -> dict[str, float]:
        _, text = await self.ask("GET", "/metrics")
        lines = re.findall(r"^memserve_requests_total\{(.*)\} (\S+)$", text, re.MULTILINE)
        labels = [(dict(re.findall(r'(\w+)="([^"]*)"', found)), value) for found, value in lines]
        return {one["process"]: float(value) for one, value in labels if one["code"] == "200"}


def start(*arguments: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )


@contextmanager
def two_processes(*arguments: str) -> Iterator[Pair]:
    (port,) = free_ports(1, taken=set())
    process = start("--port", str(port), "--processes", "2", "--expire-s", "600", *arguments)
    drained = None
    # A start that hangs is ended, and so ends the line that is read.
    late = threading.Timer(START_S, process.kill)
    late.start()
    try:
        assert process.stdout is not None and process.stderr is not None
        line = process.stdout.readline()
        assert "2 processes" in line, process.communicate(timeout=START_S)
        late.cancel()
        drained = threading.Thread(target=process.stderr.read)
        drained.start()
        pair = Pair(f"http://127.0.0.1:{port}", process)
        assert len(pair.pids) == 2
        yield pair
    finally:
        late.cancel()
        process.terminate()
        try:
            process.wait(START_S)
        finally:
            process.kill()
            if drained is not None:
                drained.join(START_S)
            process.communicate()


@asynccontextmanager
async def asked(pair: Pair) -> AsyncIterator[Routers]:
    connector = aiohttp.TCPConnector(force_close=True)
    async with aiohttp.ClientSession(connector=connector) as http:
        yield Routers(pair.url, http, pair.process, pair.pids)


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    """Two processes that know of nobody. Leave them so, and whole."""
    with two_processes("--instance", LISTED) as pair:

        async def empty() -> None:
            async with asked(pair) as routers:
                status, _ = await routers.ask("DELETE", f"/workers/{quote(LISTED, '')}")
                assert status == 200

        go(empty())
        yield pair
    assert pair.process.returncode == 0


def go(scenario: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(scenario, 180))


def beat_of(machine: Machine) -> Heartbeat:
    info = machine.info()
    return Heartbeat(info.url, info.generation, info.role, Load(0, 0, 0, 100))


def test_all_processes_know_who_is_there_and_count_as_one(pair: Pair) -> None:
    async def scenario() -> None:
        one, two = Machine(Role.BOTH), Machine(Role.BOTH)
        await one.start()
        await two.start()
        async with asked(pair) as routers:
            assert (await routers.ask("POST", "/memserve/heartbeat", beat_of(one)))[1] == {
                "known": False
            }
            status, _ = await routers.ask("POST", "/memserve/register", Registration(one.info()))
            assert status == 200
            await routers.everybody_knows(one.url)
            assert (await routers.ask("POST", "/memserve/heartbeat", beat_of(one)))[1] == {
                "known": True
            }
            await routers.both_serve()
            assert (await routers.ask("POST", "/workers", {"url": two.url}))[0] == 202
            await routers.everybody_knows(one.url, two.url)
            assert (await routers.ask("DELETE", f"/workers/{quote(one.url, '')}"))[0] == 200
            await routers.everybody_knows(two.url)
            assert (await routers.ask("DELETE", f"/workers/{quote(one.url, '')}"))[0] == 404
            large = {"url": "http://127.0.0.1:9", "role": "x" * 100_000}
            assert (await routers.ask("POST", "/workers", large))[0] == 413
            await routers.forget(two)
        await one.stop()
        await two.stop()

    go(scenario())


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM])
def test_a_process_that_dies_or_hangs_is_replaced_and_learns(
    pair: Pair, number: signal.Signals
) -> None:
    async def scenario() -> None:
        machine = Machine(Role.BOTH)
        await machine.start()
        async with asked(pair) as routers:
            await routers.ask("POST", "/memserve/register", Registration(machine.info()))
            await routers.replaced_after(number)
            await routers.everybody_knows(machine.url)
            await routers.both_serve()
            await routers.forget(machine)
        await machine.stop()

    go(scenario())


def test_a_process_that_starts_again_learns_which_boot_was_drained(pair: Pair) -> None:
    async def scenario() -> None:
        upgraded, drained = Machine(Role.BOTH), Machine(Role.BOTH)
        await upgraded.start()
        await drained.start()
        async with asked(pair) as routers:

            async def register(machine: Machine, boot: str) -> None:
                info = msgspec.structs.replace(machine.info(), generation=boot)
                status, _ = await routers.ask("POST", "/memserve/register", Registration(info))
                assert status == 200

            async def drain(machine: Machine) -> None:
                path = f"/workers/{quote(machine.url, '')}?drain=true"
                assert (await routers.ask("DELETE", path))[0] == 202

            await register(upgraded, "A")
            await drain(upgraded)
            await register(upgraded, "B")
            await register(drained, "A")
            await drain(drained)
            # As it does when one process was away for a moment and did not know it.
            await register(drained, "A")
            await routers.everybody_knows(upgraded.url)
            await routers.replaced_after(signal.SIGKILL)
            for _ in range(ENOUGH):
                states = [(one["url"], one["state"]) for one in await routers.workers()]
                assert states == [(upgraded.url, "ready")]
            await routers.both_serve()
            assert not drained.to("/generate")
            await routers.forget(upgraded)
        await upgraded.stop()
        await drained.stop()

    go(scenario())


SIGNALS = [
    (signal.SIGTERM, "one"),
    (signal.SIGHUP, "one"),
    (signal.SIGHUP, "all"),
    (signal.SIGINT, "all"),
]


def test_a_signal_lets_the_requests_of_all_processes_finish() -> None:
    """``all``: as a terminal does it. Requests last longer than what is left when a process closes;
    the four pairs wait for that together."""

    async def scenario() -> None:
        with ExitStack() as stack:
            pairs = [stack.enter_context(two_processes()) for _ in SIGNALS]
            async with asyncio.TaskGroup() as group:
                for pair, (number, sent_to) in zip(pairs, SIGNALS, strict=True):
                    name = f"{number.name} to {sent_to}"
                    group.create_task(lets_finish(pair, number, sent_to), name=name)

    go(scenario())


async def lets_finish(pair: Pair, number: signal.Signals, sent_to: str) -> None:
    release = asyncio.Event()

    async def slow(request: Asked, line: Line) -> None:
        await asyncio.wait_for(release.wait(), START_S)
        await line.answer(generated(request))

    machine = Machine(Role.BOTH, slow)
    await machine.start()
    async with asked(pair) as routers:
        await routers.ask("POST", "/memserve/register", Registration(machine.info()))
        asking = routers.ask
        work = [asyncio.create_task(asking("POST", "/generate", BODY)) for _ in range(12)]
        await machine.wait_for("/generate", 12)
        assert (await routers.workers())[0]["in_flight_requests"] == 12
        for pid in routers.pids if sent_to == "all" else ():
            os.kill(pid, number)
        routers.process.send_signal(number)
        await asyncio.sleep(CLOSE_S + 1.5)
        release.set()
        what = f"{number.name} to {sent_to}"
        assert {status for status, _ in await asyncio.gather(*work)} == {200}, what
        assert await asyncio.to_thread(routers.process.wait, START_S) == 0, what
        assert not any(psutil.pid_exists(pid) for pid in routers.pids), what
    await machine.stop()


def test_a_second_signal_ends_all_processes_at_once() -> None:
    async def scenario() -> None:
        async def never(request: Asked, line: Line) -> None:
            await line.until_closed()

        machine = Machine(Role.BOTH, never)
        await machine.start()
        with two_processes("--drain-timeout-s", "600") as pair:
            async with asked(pair) as routers:
                await routers.ask("POST", "/memserve/register", Registration(machine.info()))
                asking = routers.ask
                work = [asyncio.create_task(asking("POST", "/generate", BODY)) for _ in range(6)]
                await machine.wait_for("/generate", 6)
                for _ in range(2):
                    routers.process.send_signal(signal.SIGTERM)
                    await asyncio.sleep(0.3)
                assert await asyncio.to_thread(routers.process.wait, START_S) == 0
                assert not any(psutil.pid_exists(pid) for pid in routers.pids)
                await asyncio.gather(*work, return_exceptions=True)
        await machine.stop()

    go(scenario())


def test_processes_end_when_who_started_them_is_killed() -> None:
    with two_processes() as pair:
        children = [psutil.Process(pid) for pid in pair.pids]
        pair.process.kill()
        gone, alive = psutil.wait_procs(children, START_S)
        assert len(gone) == 2 and not alive


def test_a_taken_port_is_one_line_and_an_exit_code() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        arguments = ["--port", str(taken.getsockname()[1]), "--processes", "2"]
        done = subprocess.run(
            [sys.executable, "-m", "sglang_memserve.router", *arguments],
            capture_output=True,
            text=True,
            timeout=START_S,
        )
    assert done.returncode == 2
    assert "cannot listen" in done.stderr and len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    "place", ["", "{}", '{"index":2,"count":2,"folder":"/tmp","lifeline":3}', "no JSON"]
)
def test_a_malformed_place_is_one_line_and_an_exit_code(place: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "sglang_memserve.router"],
        capture_output=True,
        text=True,
        timeout=START_S,
        env={**os.environ, VARIABLE: place},
    )
    assert done.returncode == 2 and VARIABLE in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_processes_that_never_serve_end_the_whole() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    # Not the sockets' file system: the processes cannot meet there.
    program = PROGRAM.replace("sys.exit(", "import tempfile\ntempfile.mkdtemp = BAD\nsys.exit(")
    program = program.replace("BAD", "lambda prefix: '/proc/' + prefix")
    done = subprocess.run(
        [sys.executable, "-c", program, "--port", port, "--processes", "2"],
        capture_output=True,
        text=True,
        timeout=START_S,
    )
    assert done.returncode == 1, done.stderr
