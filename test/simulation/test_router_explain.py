"""Asking why: the same words as a real request gets, and nothing runs."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Coroutine
from typing import Any

import pytest
from sglang_memserve.types import Role
from simulation.router_machines import PAGE, Asked, Line, Machine, generated, router_over

PROMPT = list(range(1000, 1000 + 40 * PAGE + 1))


def go(scenario: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(scenario, 60))


def test_an_explanation_runs_nothing_and_is_what_then_happens() -> None:
    async def scenario() -> None:
        p, d = Machine(Role.PREFILL, holds=(PROMPT[: 8 * PAGE],)), Machine(Role.DECODE)
        async with router_over(p, d, policy="cost", bypass_tokens=None) as router:
            told = await (await router.post("/memserve/explain", {"input_ids": PROMPT})).json()
            assert p.to("/generate") == d.to("/generate") == d.to("/memserve/fetch") == []
            assert told["policy"] == "cost"
            assert told["prompt"] == {"prompts": 1, "tokens": 161, "pages": 40, "page_size": PAGE}
            assert told["instances"][p.url]["held_pages"] == 8
            assert told["instances"][d.url]["held_pages"] == 0
            best = told["candidates"][0]["seconds"]["total"]
            assert best == min(one["seconds"]["total"] for one in told["candidates"])
            assert told["choice"] in told["candidates"]
            # Those within a tenth are equal, and it is the next one's turn.
            assert told["choice"]["seconds"]["total"] <= 1.1 * best + 0.001
            for one in told["candidates"]:
                assert {"queue", "fetch", "compute", "load", "room"} <= one["seconds"].keys()
            answer = await router.post("/generate", {"input_ids": PROMPT})
            assert answer.headers["x-memserve-reason"].startswith(told["choice"]["reason"])

    go(scenario())


@pytest.mark.parametrize("policy", ["prefix", "session", "least-load", "round-robin"])
def test_policies_that_predict_nothing_say_what_they_choose(policy: str) -> None:
    async def scenario() -> None:
        p, d = Machine(Role.PREFILL), Machine(Role.DECODE)
        async with router_over(p, d, policy=policy) as router:
            told = await (await router.post("/memserve/explain", {"input_ids": PROMPT})).json()
            assert told["candidates"] == [told["choice"]]
            assert (told["choice"]["prefill"], told["choice"]["decode"]) == (p.url, d.url)
            assert told["choice"]["seconds"] == {}

    go(scenario())


def test_a_prompt_the_router_cannot_read_goes_to_the_idlest() -> None:
    async def scenario() -> None:
        d = Machine(Role.DECODE)
        async with router_over(d) as router:
            # The machines have no tokenizer.
            bodies: list[dict[str, object]] = [
                {"text": "hello"},
                {"prompt": "hello"},
                {"messages": [{"role": "user", "content": "hello"}]},
            ]
            for body in bodies:
                told = await (await router.post("/memserve/explain", body)).json()
                assert told["prompt"]["tokens"] is None
                assert told["choice"]["decode"] == d.url
                assert told["choice"]["reason"].startswith("direct: ")
                assert "hello" not in json.dumps(told)

    go(scenario())


def test_no_token_id_is_shown() -> None:
    async def scenario() -> None:
        ids = [777_777_001 + n for n in range(9)]
        p, d = Machine(Role.PREFILL), Machine(Role.DECODE)
        async with router_over(p, d, policy="cost") as router:
            body = {"input_ids": ids, "cache_salt": "a-secret"}
            text = await (await router.post("/memserve/explain", body)).text()
            assert "7777" not in text and "a-secret" not in text

    go(scenario())


@pytest.mark.parametrize("data", [b"", b"[]", b"{", b'{"input_ids": [1], "rid": 5}'])
def test_what_is_no_request_is_refused(data: bytes) -> None:
    async def scenario() -> None:
        async with router_over(Machine(Role.BOTH)) as router:
            answer = await router.http.post(f"{router.url}/memserve/explain", data=data)
            assert answer.status == 400

    go(scenario())


def test_nobody_to_serve_is_said_with_the_reasons() -> None:
    async def scenario() -> None:
        async with router_over() as router:
            answer = await router.post("/memserve/explain", {"input_ids": PROMPT})
            assert answer.status == 503

    go(scenario())


def test_fits_can_be_seen() -> None:
    async def scenario() -> None:
        async def slowly(asked: Asked, line: Line) -> None:
            await asyncio.sleep(0.05)
            await line.answer(generated(asked))

        p, d = Machine(Role.PREFILL, slowly), Machine(Role.DECODE)
        async with router_over(p, d, policy="cost", bypass_tokens=0) as router:
            before = await (await router.get("/memserve/models")).json()
            assert before["prefill"]["instances"] == {}
            assert before["prefill"]["fleet"]["s_per_token"] == pytest.approx(8e-4)
            await router.post("/generate", {"input_ids": PROMPT})
            told = await (await router.get("/memserve/models")).json()
            assert told["prefill"]["instances"][p.url]["observations"] == 1
            assert told["transfer"]["flows"] == 0
            explained = await (await router.post("/memserve/explain", {"input_ids": PROMPT})).json()
            for view in explained["instances"].values():
                assert view["queue_s"] == view["coming_pages"] == view["running_requests"] == 0

    go(scenario())
