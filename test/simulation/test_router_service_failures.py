"""The router in front of machines that are slow, lie, refuse or die: no request fails that another
machine could serve, and nothing goes on for a client that has gone."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Coroutine
from typing import Any

import aiohttp
import orjson
import pytest
from sglang_memserve.cluster.machine import free_ports
from sglang_memserve.protocol.http import FetchResult
from sglang_memserve.router.config import StaticInstance
from sglang_memserve.router.http.limits import StepDeadlines
from sglang_memserve.types import InstanceId, Role
from simulation.router_machines import (
    PAGE,
    WAIT_S,
    Asked,
    Handler,
    Line,
    Machine,
    Router,
    generated,
    router_over,
    well,
)

PROMPT = list(range(1, 4 * PAGE + 2))
BODY = {"input_ids": PROMPT}
SHORT = StepDeadlines(fetch_s=0.2, prefill_s=0.3, grace_s=0.2, least_grace_s=0.1)


def go(scenario: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(scenario, 60))


async def cut(asked: Asked, line: Line) -> None:
    line.cut()


async def hang(asked: Asked, line: Line) -> None:
    await line.until_closed()


async def fail(asked: Asked, line: Line) -> None:
    await line.answer({"error": {"message": "out of order"}}, 500)


async def lie(asked: Asked, line: Line) -> None:
    await line.answer({"surely": "you are joking"})


async def garbage(asked: Asked, line: Line) -> None:
    await line.send(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\n\xff\xfe{]")


async def served_by(router: Router, machine: Machine, body: object = BODY) -> dict[str, str]:
    response = await router.post("/generate", body)
    assert response.status == 200, await response.text()
    assert response.headers["x-memserve-decode"] == machine.url
    return dict(response.headers)


@pytest.mark.parametrize("handler", [cut, hang, fail, lie, garbage], ids=lambda h: h.__name__)
def test_whatever_p_does_d_answers(handler: Handler) -> None:
    async def scenario() -> None:
        p, d = Machine(Role.PREFILL, handler, fetch=hang), Machine(Role.DECODE, fetch=hang)
        async with router_over(p, d, deadlines=SHORT) as router:
            headers = await served_by(router, d)
            assert headers["x-memserve-prefill"] == d.url
            assert headers["x-memserve-cached-tokens"] == "0"
            assert "prefill failed" in headers["x-memserve-reason"]

    go(scenario())


def test_p_dying_halfway_is_not_waited_for() -> None:
    async def scenario() -> None:
        async def halfway(asked: Asked, line: Line) -> None:
            await line.send(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{")
            await d.wait_for("/memserve/fetch")
            line.cut()

        p, d = Machine(Role.PREFILL, halfway), Machine(Role.DECODE, fetch=hang)
        # With these deadlines a test that waits for them is a test that fails.
        patient = StepDeadlines(fetch_s=50, prefill_s=50, grace_s=50, least_grace_s=50)
        async with router_over(p, d, deadlines=patient) as router:
            await served_by(router, d)
            workers = (await (await router.get("/workers")).json())["workers"]
            errors = {one["url"]: one["last_error"] for one in workers}
            assert "prefill" in errors[p.url]

    go(scenario())


@pytest.mark.parametrize("handler", [cut, fail, lie, garbage], ids=lambda h: h.__name__)
def test_a_fetch_that_fails_frees_p_and_d_computes(handler: Handler) -> None:
    async def scenario() -> None:
        p = Machine(Role.PREFILL, hang)

        async def once_p_computes(asked: Asked, line: Line) -> None:
            await p.wait_for("/generate")
            await handler(asked, line)

        d = Machine(Role.DECODE, fetch=once_p_computes)
        patient = StepDeadlines(fetch_s=50, prefill_s=50, grace_s=50, least_grace_s=50)
        async with router_over(p, d, deadlines=patient) as router:
            headers = await served_by(router, d)
            assert headers["x-memserve-cached-tokens"] == "0"
            [told] = await p.wait_for("/abort_request")
            assert told.json["rid"] == p.to("/generate")[0].json["rid"]

    go(scenario())


def test_a_prefill_that_lasts_longer_than_a_fetch_may_takes_several() -> None:
    async def scenario() -> None:
        async def until_fetched(asked: Asked, line: Line) -> None:
            await d.wait_for("/memserve/fetch", 3)
            await line.answer(generated(asked))

        async def bit_by_bit(asked: Asked, line: Line) -> None:
            so_far = len(d.to("/memserve/fetch"))
            if so_far < 3:
                await asyncio.sleep(asked.json["wait_s"])
            outcome = "complete" if so_far == 3 else "deadline"
            await line.answer(FetchResult(4, so_far, so_far + 1, 1, 128, 0.1, outcome))

        p, d = Machine(Role.PREFILL, until_fetched), Machine(Role.DECODE, fetch=bit_by_bit)
        bounded = StepDeadlines(grace_s=0.1, most_fetch_s=0.3, least_grace_s=5.0)
        async with router_over(p, d, deadlines=bounded) as router:
            headers = await served_by(router, d)
            assert "fetched" not in headers["x-memserve-reason"], "not all pages came"
            asked = [fetch.json for fetch in d.to("/memserve/fetch")]
            assert [fetch["deadline_s"] for fetch in asked] == pytest.approx([0.3] * 3)
            text = await router.metrics_with("memserve_kv_transfer_bytes_total{")
            assert "384.0" in text

    go(scenario())


def test_a_late_fetch_is_left_behind() -> None:
    async def scenario() -> None:
        p, d = Machine(Role.PREFILL), Machine(Role.DECODE, fetch=hang)
        async with router_over(p, d, deadlines=SHORT) as router:
            headers = await served_by(router, d)
            assert "fetch failed: late" in headers["x-memserve-reason"]
            text = await router.metrics_with('memserve_fallbacks_total{reason="late",step="fetch"}')
            assert 'memserve_kv_transfer_failures_total{reason="late"} 1.0' in text

    go(scenario())


async def half_a_head(asked: Asked, line: Line) -> None:
    await line.send(b"HTTP/1.1 200 OK\r\nContent-")
    line.cut()


async def only_a_head(asked: Asked, line: Line) -> None:
    await line.start_stream()
    line.cut()


async def busy(asked: Asked, line: Line) -> None:
    await line.answer({"error": "starting"}, 503)


@pytest.mark.parametrize("handler", [cut, half_a_head, only_a_head, busy], ids=lambda h: h.__name__)
def test_d_failing_before_its_first_byte_is_replaced(handler: Handler) -> None:
    async def scenario() -> None:
        bad, good = Machine(Role.DECODE, handler), Machine(Role.DECODE)
        async with router_over(bad, good) as router:
            for _ in range(2):  # whichever of them has its turn
                await served_by(router, good)
            assert len(bad.to("/generate")) == 1
            text = await router.metrics_with("memserve_retries_total")
            assert 'memserve_retries_total{reason="PeerError"} 1.0' in text

    go(scenario())


def test_d_that_refuses_the_connection_is_replaced_and_then_left_alone() -> None:
    async def scenario() -> None:
        dead, good = Machine(Role.DECODE), Machine(Role.DECODE)
        async with router_over(dead, good, heartbeat_s=5.0) as router:
            await dead.stop()
            for _ in range(12):
                await served_by(router, good)
            workers = (await (await router.get("/workers")).json())["workers"]
            assert {w["url"]: w["breaker"] for w in workers}[dead.url] == "open"

    go(scenario())


def test_when_everybody_fails_the_reasons_are_told() -> None:
    async def scenario() -> None:
        one, other = Machine(Role.DECODE, cut), Machine(Role.BOTH, cut)
        async with router_over(one, other) as router:
            response = await router.post("/generate", BODY)
            assert response.status == 503
            told = {w["url"]: w["reason"] for w in (await response.json())["instances"]}
            assert set(told) == {one.url, other.url}
            assert all("connection broke" in reason for reason in told.values())

    go(scenario())


def test_a_lone_instance_whose_connection_broke_gets_a_second_chance() -> None:
    async def scenario() -> None:
        async def once(asked: Asked, line: Line) -> None:
            await (cut if len(d.to("/generate")) == 1 else well)(asked, line)

        d = Machine(Role.BOTH, once)
        async with router_over(d) as router:
            await served_by(router, d)
            first, second = d.to("/generate")
            assert first.json["rid"] != second.json["rid"]

    go(scenario())


def test_a_stream_that_breaks_ends_with_an_error_frame() -> None:
    async def scenario() -> None:
        async def breaks(asked: Asked, line: Line) -> None:
            await line.start_stream()
            await line.chunk(b'data: {"text": "a"}\n\ndata: {"te')
            line.cut()

        d = Machine(Role.BOTH, breaks)
        async with router_over(d) as router:
            response = await router.post("/generate", {**BODY, "stream": True})
            frames = (await response.read()).split(b"\n\n")
            assert frames[0] == b'data: {"text": "a"}'
            message = orjson.loads(frames[2][6:])["error"]["message"]
            named = response.headers["x-request-id"]
            why = "the instance broke off: connection broke in the middle of the answer"
            assert message == f"request {named}: {why}"
            assert frames[3:] == [b"data: [DONE]", b""]

    go(scenario())


def test_an_answer_that_breaks_is_not_passed_off_as_whole() -> None:
    async def scenario() -> None:
        async def breaks(asked: Asked, line: Line) -> None:
            await line.start_stream("application/json")
            await line.chunk(b'{"text": ')
            line.cut()

        d = Machine(Role.BOTH, breaks)
        async with router_over(d) as router:
            with pytest.raises(aiohttp.ClientError):
                await router.post("/generate", BODY)

    go(scenario())


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_client_that_leaves_while_d_works(stream: bool) -> None:
    async def scenario() -> None:
        closed = asyncio.Event()

        async def slow(asked: Asked, line: Line) -> None:
            if stream:
                await line.start_stream()
                await line.chunk(b"data: {}\n\n")
            await line.until_closed()
            closed.set()

        p, d = Machine(Role.PREFILL), Machine(Role.DECODE, slow)
        async with router_over(p, d) as router:
            body = {**BODY, "stream": stream, **({"rid": "r"} if stream else {})}
            work = asyncio.create_task(router.post("/generate", body))
            [asked] = await d.wait_for("/generate")
            work.cancel()
            await asyncio.wait_for(closed.wait(), WAIT_S)
            [told] = await d.wait_for("/abort_request")
            assert told.json == {"rid": asked.json["rid"]}
            assert p.to("/abort_request") == []
            await router.metrics_with("memserve_aborts_total 1.0")
            await router.metrics_with("memserve_requests_in_flight 0.0")

    go(scenario())


@pytest.mark.parametrize("batch", [False, True], ids=["single", "batch"])
def test_a_client_that_leaves_while_p_works(batch: bool) -> None:
    async def scenario() -> None:
        closed = asyncio.Event()

        async def slow(asked: Asked, line: Line) -> None:
            await line.until_closed()
            closed.set()

        p, d = Machine(Role.PREFILL, slow), Machine(Role.DECODE, fetch=hang)
        async with router_over(p, d) as router:
            body = {"input_ids": [PROMPT, PROMPT[:9]]} if batch else BODY
            work = asyncio.create_task(router.post("/generate", body))
            [asked] = await p.wait_for("/generate")
            work.cancel()
            await asyncio.wait_for(closed.wait(), WAIT_S)
            rid = asked.json["rid"]
            told = await p.wait_for("/abort_request", 2 if batch else 1)
            wanted = {f"{rid}_0", f"{rid}_1"} if batch else {rid}
            assert {one.json["rid"] for one in told} == wanted
            assert d.to("/generate") == []

    go(scenario())


def test_a_request_that_is_aborted_while_p_works_never_reaches_d() -> None:
    async def scenario() -> None:
        p, d = Machine(Role.PREFILL, hang), Machine(Role.DECODE, fetch=hang)
        async with router_over(p, d) as router:
            work = asyncio.create_task(router.post("/generate", {**BODY, "rid": "mine"}))
            await p.wait_for("/generate")
            assert (await router.post("/abort_request", {"rid": "mine"})).status == 200
            response = await work
            assert (response.status, (await response.json())["type"]) == (400, "abort")
            assert d.to("/generate") == []
            assert len(await p.wait_for("/abort_request", 2)) == 2

    go(scenario())


def test_a_flush_that_fails_somewhere_is_no_success() -> None:
    async def scenario() -> None:
        p, d = Machine(Role.PREFILL), Machine(Role.DECODE)
        async with router_over(p, d, heartbeat_s=5.0) as router:
            await p.stop()
            response = await router.post("/flush_cache", {})
            assert response.status == 502
            assert p.url in (await response.json())["message"]

    go(scenario())


def test_an_instance_that_hangs_does_not_hold_up_probes() -> None:
    async def scenario() -> None:
        d = Machine(Role.BOTH, hang)
        async with router_over(d) as router:
            work = asyncio.create_task(router.post("/generate", BODY))
            await d.wait_for("/generate")
            assert (await router.get("/health")).status == 200
            work.cancel()

    go(scenario())


def test_slow_machines_are_given_up_at_the_deadline() -> None:
    async def scenario() -> None:
        d = Machine(Role.BOTH, hang)
        async with router_over(d, request_timeout_s=0.5) as router:
            response = await router.post("/generate", BODY)
            assert response.status == 503
            assert "no answer in time" in (await response.json())["message"]

    go(scenario())


def free_port() -> int:
    (port,) = free_ports(1, taken=set())
    return port


def run_router(*flags: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "sglang_memserve.router", *flags]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env={**os.environ})


@pytest.mark.parametrize("flags", [["--port", "PORT"], ["--policy", "luck"], ["--nonsense"]])
def test_a_start_that_cannot_succeed_is_one_line_and_an_exit_code(flags: list[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        process = run_router(*(flag.replace("PORT", port) for flag in flags))
        _, error = process.communicate(timeout=WAIT_S)
    assert process.returncode == 2
    assert error.startswith("error: ")
    assert len(error.strip().splitlines()) == 1, error


def test_sigterm_lets_running_requests_finish_and_exits_with_0() -> None:
    async def scenario() -> None:
        release = asyncio.Event()

        async def slow(asked: Asked, line: Line) -> None:
            await asyncio.wait_for(release.wait(), WAIT_S)
            await line.answer(generated(asked))

        d = Machine(Role.BOTH, slow)
        await d.start()
        port = free_port()
        process = run_router("--port", str(port), "--instance", d.url, "--heartbeat-s", "0.2")
        try:
            assert process.stdout is not None
            line = await asyncio.to_thread(process.stdout.readline)
            assert line.startswith(f"router listening on http://127.0.0.1:{port}")
            async with aiohttp.ClientSession() as http:
                router = Router(f"http://127.0.0.1:{port}", http, None)
                await router.until_healthy()
                work = asyncio.create_task(router.post("/generate", BODY))
                await d.wait_for("/generate")
                process.send_signal(signal.SIGTERM)
                await asyncio.sleep(0.1)
                release.set()
                assert (await work).status == 200
            assert await asyncio.to_thread(process.wait, WAIT_S) == 0
        finally:
            process.kill()
            process.communicate()
            await d.stop()

    go(scenario())


def test_a_listed_url_that_is_not_there_does_not_keep_the_others_from_serving() -> None:
    async def scenario() -> None:
        d = Machine(Role.BOTH)
        gone = StaticInstance(InstanceId("http://127.0.0.1:9"))
        async with router_over(d, extra=(gone,)) as router:
            await served_by(router, d)

    go(scenario())
