"""Instances that would make the router say or do what it should not: quote prompts, send it
elsewhere, give numbers that cannot be."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any

import orjson
import pytest
from sglang_memserve.protocol.http import FetchResult
from sglang_memserve.types import Role
from simulation.router_machines import (
    PAGE,
    Asked,
    Handler,
    Line,
    Machine,
    generated,
    router_over,
)

PROMPT = list(range(1, 4 * PAGE + 2))
SALT = "saltysecret"
BODY = {"input_ids": PROMPT, "cache_salt": SALT}


def go(scenario: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(scenario, 60))


@pytest.mark.parametrize("status", [400, 422, 500])
def test_what_an_engine_quotes_of_a_prompt_is_not_said_again(
    status: int, caplog: pytest.LogCaptureFixture
) -> None:
    async def quotes(asked: Asked, line: Line) -> None:
        await line.answer({"message": f"cannot read {asked.body.decode()}"}, status)

    async def scenario() -> None:
        caplog.set_level(logging.DEBUG)
        p, d = Machine(Role.PREFILL, quotes), Machine(Role.DECODE)
        async with router_over(p, d) as router:
            for _ in range(6):
                assert (await router.post("/generate", BODY)).status == 200
            assert p.to("/generate")
            for path in ("/readiness", "/workers", "/dashboard/state", "/metrics"):
                assert SALT not in await (await router.get(path)).text(), path
        assert SALT not in caplog.text
        assert "answered" in caplog.text, "why it failed is said all the same"

    go(scenario())


def elsewhere(place: str) -> Handler:
    async def handler(asked: Asked, line: Line) -> None:
        head = f"HTTP/1.1 307 X\r\nLocation: {place}/stolen\r\nContent-Length: 0\r\n\r\n"
        await line.send(head.encode())

    return handler


def test_the_routers_own_questions_follow_nobody_elsewhere() -> None:
    async def scenario() -> None:
        thief = Machine(Role.BOTH)
        await thief.start()
        p = Machine(Role.PREFILL, elsewhere(thief.url), fetch=elsewhere(thief.url))
        d = Machine(Role.DECODE, fetch=elsewhere(thief.url))
        async with router_over(p, d) as router:
            response = await router.post("/generate", BODY)
            assert response.status == 200
            assert p.to("/generate") and d.to("/generate")
            await router.post("/server_info", {})
            await router.post("/pause_generation", {})
            assert not thief.asked
        await thief.stop()

    go(scenario())


def cached(tokens: object) -> Handler:
    async def handler(asked: Asked, line: Line) -> None:
        answer: Any = generated(asked)
        answer["meta_info"]["cached_tokens"] = tokens
        await line.answer(answer)

    return handler


@pytest.mark.parametrize("tokens", [-5, -(10**30), "many", None, 1.5])
def test_a_prefill_that_counts_below_zero_fails_no_request(tokens: object) -> None:
    async def scenario() -> None:
        async with router_over(Machine(Role.PREFILL, cached(tokens)), Machine(Role.DECODE)) as r:
            response = await r.post("/generate", BODY)
            assert response.status == 200, await response.text()
            assert "prefill failed" in response.headers["x-memserve-reason"]

    go(scenario())


WELL = FetchResult(4, 0, 4, 4, 512, 0.01, "complete")


@pytest.mark.parametrize(
    "odd",
    [
        {"fetched_bytes": -1},
        {"fetched_pages": -1},
        {"readable_pages": -(10**30)},
        {"requested_pages": 10**400},
        {"seconds": -1.0},
        {"seconds": 1e300},
    ],
    ids=str,
)
def test_a_fetch_that_counts_below_zero_fails_no_request(odd: dict[str, Any]) -> None:
    async def fetch(asked: Asked, line: Line) -> None:
        value = {name: getattr(WELL, name) for name in WELL.__struct_fields__} | odd
        value["sources"] = []
        # orjson writes no numbers of more than 64 bits.
        text = ", ".join(
            f'"{k}": {v if isinstance(v, int) else orjson.dumps(v).decode()}'
            for k, v in value.items()
        )
        await line.answer(b"{" + text.encode() + b"}")

    async def scenario() -> None:
        async with router_over(Machine(Role.PREFILL), Machine(Role.DECODE, fetch=fetch)) as router:
            response = await router.post("/generate", BODY)
            assert response.status == 200, await response.text()
            assert "fetch failed" in response.headers["x-memserve-reason"]

    go(scenario())


def test_an_id_that_a_client_chose_writes_no_lines_of_its_own(
    caplog: pytest.LogCaptureFixture,
) -> None:
    forged = "x\n2026-01-01 00:00:00,000 ERROR root: forged"

    async def scenario() -> None:
        caplog.set_level(logging.DEBUG)

        class Deaf(Machine):
            async def _route(self, asked: Asked, line: Line) -> None:
                if asked.path == "/abort_request":
                    line.cut()
                else:
                    await super()._route(asked, line)

        async def hang(asked: Asked, line: Line) -> None:
            await line.until_closed()

        d = Deaf(Role.BOTH, hang)
        async with router_over(d) as router:
            work = asyncio.create_task(router.post("/generate", {**BODY, "rid": forged}))
            await d.wait_for("/generate")
            work.cancel()
            await d.wait_for("/abort_request")
        assert "could not be told to abort" in caplog.text
        assert "\n2026-01-01" not in caplog.text

    go(scenario())
