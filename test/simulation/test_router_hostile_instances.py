"""Instances that answer nonsense: clients get a clear error or another instance's answer, and the
router stays up, small and right about the others."""

from __future__ import annotations

import asyncio
import itertools
import tracemalloc
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any

import orjson
import pytest
from sglang_memserve.router.request import patience
from sglang_memserve.types import Role
from simulation.router_machines import (
    PAGE,
    WAIT_S,
    Asked,
    Handler,
    Line,
    Machine,
    Router,
    router_over,
    well,
)

PROMPT = list(range(1, 4 * PAGE + 2))
BODY = {"input_ids": PROMPT}
FLOOD = b"X-Flood: " + b"f" * 8000 + b"\r\n"


@pytest.fixture(autouse=True)
def little_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many attempts as ever, ten times as quickly: nobody here gets better by waiting."""
    quick = tuple(pause_s / 10 for pause_s in patience.PAUSES_S)
    monkeypatch.setattr(patience, "PAUSES_S", quick)


def go(scenario: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(scenario, 60))


async def hang(asked: Asked, line: Line) -> None:
    await line.until_closed()


def says(*parts: bytes) -> Handler:
    """Writes ``parts`` and closes the connection."""

    async def handler(asked: Asked, line: Line) -> None:
        for part in parts:
            await line.send(part)
        line.writer.close()

    return handler


async def endless_head(asked: Asked, line: Line) -> None:
    await line.send(b"HTTP/1.1 200 OK\r\n")
    while True:
        await line.send(FLOOD)


async def endless_continue(asked: Asked, line: Line) -> None:
    while True:
        await line.send(b"HTTP/1.1 100 Continue\r\n\r\n" * 1000)


NONSENSE = {
    "noise": says(bytes(range(256)) * 4),
    "nothing": says(b""),
    "another protocol": says(b"SSH-2.0-OpenSSH_9.6\r\n"),
    "status 999": says(b"HTTP/1.1 999 X\r\nContent-Length: 0\r\n\r\n"),
    "status 600": says(b"HTTP/1.1 600 X\r\nContent-Length: 0\r\n\r\n"),
    "status 099": says(b"HTTP/1.1 099 X\r\nContent-Length: 0\r\n\r\n"),
    "no status": says(b"HTTP/1.1 OK\r\n\r\n"),
    "a huge header": says(b"HTTP/1.1 200 OK\r\nX: " + b"a" * 1_000_000 + b"\r\n\r\n"),
    "a header that is none": says(b"HTTP/1.1 200 OK\r\nno colon here\r\n\r\n"),
    "control characters": says(b"HTTP/1.1 200 OK\r\nX: a\x01b\r\nContent-Length: 0\r\n\r\n"),
    "an odd name": says(b"HTTP/1.1 200 OK\r\nX Y(): a\r\nContent-Length: 0\r\n\r\n"),
    "two lengths": says(b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab"),
    "a length that is none": says(b"HTTP/1.1 200 OK\r\nContent-Length: many\r\n\r\nab"),
    "endless headers": endless_head,
    "endless continues": endless_continue,
}


async def served_by_the_other(router: Router, bad: Machine, good: Machine) -> None:
    for _ in range(2):  # whichever of them has its turn
        async with asyncio.timeout(WAIT_S):
            response = await router.post("/generate", BODY)
        assert response.status == 200, await response.text()
        assert response.headers["x-memserve-decode"] == good.url
    assert bad.to("/generate")


@pytest.mark.parametrize("handler", NONSENSE.values(), ids=NONSENSE.keys())
def test_nonsense_instead_of_an_answer_is_asked_of_another(handler: Handler) -> None:
    async def scenario() -> None:
        bad, good = Machine(Role.DECODE, handler), Machine(Role.DECODE)
        async with router_over(bad, good, request_timeout_s=2.0) as router:
            await served_by_the_other(router, bad, good)
            # The same for what is passed through.
            for _ in range(2):
                assert (await router.post("/v1/rerank", {})).status == 200

    go(scenario())


@pytest.mark.parametrize("handler", NONSENSE.values(), ids=NONSENSE.keys())
def test_nonsense_from_the_only_one_is_a_503_that_says_so(handler: Handler) -> None:
    async def scenario() -> None:
        bad = Machine(Role.BOTH, handler)
        async with router_over(bad, request_timeout_s=0.5) as router:
            for path in ("/generate", "/v1/rerank"):
                async with asyncio.timeout(WAIT_S):
                    response = await router.post(path, BODY)
                assert response.status == 503, path
                assert bad.url in (await response.json())["message"]

    go(scenario())


STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n"
FRAME = b'd\r\ndata: {"a":1}\r\n' + b"2\r\n\n\n\r\n"
BROKEN_STREAMS = {
    "a chunk of no size": says(STREAM + b"\r\n" + FRAME, b"zz\r\nnonsense"),
    "a chunk that lies": says(STREAM + b"\r\n" + FRAME, b"ff\r\nshort"),
    "an endless size": says(STREAM + b"\r\n" + FRAME, b"f" * 100_000),
    "a length and chunks": says(STREAM + b"Content-Length: 5\r\n\r\n" + FRAME + b"0\r\n\r\n"),
    "an early end": says(STREAM + b"\r\n" + FRAME),
}


@pytest.mark.parametrize("handler", BROKEN_STREAMS.values(), ids=BROKEN_STREAMS.keys())
def test_a_stream_that_turns_to_nonsense_is_ended_properly(handler: Handler) -> None:
    async def scenario() -> None:
        bad = Machine(Role.BOTH, handler)
        async with (
            router_over(bad, request_timeout_s=1.0) as router,
            router.http.post(f"{router.url}/generate", json={**BODY, "stream": True}) as response,
        ):
            text = await response.read()
            if response.status == 200:
                assert text.endswith(b"data: [DONE]\n\n"), text
                last = text.removesuffix(b"\n\ndata: [DONE]\n\n").split(b"data: ")[-1]
                assert orjson.loads(last)["error"]["message"]
            else:  # it was nonsense from the first byte on
                assert response.status == 503

    go(scenario())


def test_a_stream_that_stalls_is_ended_at_the_deadline() -> None:
    async def scenario() -> None:
        async def stalls(asked: Asked, line: Line) -> None:
            await line.start_stream()
            await line.chunk(b'data: {"a":1}\n\n')
            await hang(asked, line)

        d = Machine(Role.BOTH, stalls)
        async with router_over(d, request_timeout_s=0.5) as router:
            response = await router.post("/generate", {**BODY, "stream": True})
            text = await response.text()
            assert "no answer in time" in text and text.endswith("data: [DONE]\n\n")
            await router.metrics_with("memserve_requests_in_flight 0.0")

    go(scenario())


ODD_ANSWERS: dict[str, object] = {
    "no JSON": b"{",
    "a number": 5,
    "null": None,
    "lists": {"loads": [[], "x", None]},
    "strings": {"loads": [{"num_running_reqs": "many"}], "event_seq": "one"},
    "huge": {"loads": [{"num_running_reqs": 10**30}], "event_seq": 2**80},
    "negative": {"loads": [{"num_running_reqs": -7, "max_total_num_tokens": -1}]},
}


@dataclass
class Liar(Machine):
    """Answers what the router itself asks with whatever ``lie`` is."""

    lie: object = None
    endless: bool = False

    async def _route(self, asked: Asked, line: Line) -> None:
        path = asked.path.split("?")[0]
        if path in ("/generate", "/v1/rerank") or not self.asked_of(path):
            await super()._route(asked, line)
        elif self.endless:
            await line.start_stream("application/json")
            for _ in itertools.count():
                await line.chunk(b" " * 2**20)
        else:
            await line.answer(self.lie)

    def asked_of(self, path: str) -> bool:
        # It joined like any other; from then on it lies.
        return len(self.to(path)) > 1


@pytest.mark.parametrize("lie", ODD_ANSWERS.values(), ids=ODD_ANSWERS.keys())
def test_lies_to_the_routers_own_questions_harm_nobody_else(lie: object) -> None:
    async def scenario() -> None:
        liar, good = Liar(Role.DECODE, lie=lie), Machine(Role.DECODE)
        async with router_over(liar, good) as router:
            await liar.wait_for("/memserve/info", 3)
            for path in ("/workers", "/readiness", "/v1/loads", "/server_info", "/get_loads"):
                status = (await router.get(path)).status
                assert status in (200, 503), path
            for _ in range(4):
                assert (await router.post("/generate", BODY)).status == 200
            metrics = await router.get("/metrics")
            assert metrics.status == 200

    go(scenario())


def test_endless_answers_to_the_routers_own_questions_are_cut_short() -> None:
    async def scenario() -> None:
        liar, good = Liar(Role.DECODE, endless=True), Machine(Role.DECODE)
        async with router_over(liar, good) as router:
            tracemalloc.start()
            try:
                await liar.wait_for("/memserve/info", 4)
                for _ in range(3):
                    assert (await router.post("/generate", BODY)).status == 200
                assert (await router.get("/server_info")).status in (200, 503)
                _, most = tracemalloc.get_traced_memory()
            finally:
                tracemalloc.stop()
            assert most < 100 * 2**20, most

    go(scenario())


def test_an_answer_of_p_that_does_not_end_is_left_behind() -> None:
    async def scenario() -> None:
        async def endless(asked: Asked, line: Line) -> None:
            await line.start_stream("application/json")
            while True:
                await line.chunk(b" " * 2**20)

        p, d = Machine(Role.PREFILL, endless), Machine(Role.DECODE)
        async with router_over(p, d) as router:
            response = await router.post("/generate", BODY)
            assert response.status == 200
            assert response.headers["x-memserve-decode"] == d.url
            assert "prefill" in response.headers["x-memserve-reason"]

    go(scenario())


def test_what_is_well_is_still_well() -> None:
    """The cases above fail for their nonsense, not for how the machine talks."""

    async def scenario() -> None:
        fine = says(b"HTTP/1.1 200 OK\r\nX-Odd:   spaced  \r\nContent-Length: 2\r\n\r\n{}")
        for handler in (fine, well):
            async with router_over(Machine(Role.BOTH, handler)) as router:
                assert (await router.post("/generate", BODY)).status == 200

    go(scenario())
