"""Ids that clients choose for their requests: whose request is stopped by them."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import aiohttp
import pytest
from sglang_memserve.types import Role
from simulation.router_machines import PAGE, WAIT_S, Asked, Line, Machine, generated, router_over

PROMPT = list(range(1, 4 * PAGE + 2))
BODY = {"input_ids": PROMPT, "rid": "victim"}
BATCH = {"input_ids": [PROMPT, PROMPT], "rid": "victim"}


def go(scenario: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(scenario, 60))


class Slow(Machine):
    """Answers when it is let."""

    def __init__(self) -> None:
        super().__init__(Role.BOTH, self._answer)
        self.let = asyncio.Event()

    async def _answer(self, asked: Asked, line: Line) -> None:
        await asyncio.wait_for(self.let.wait(), WAIT_S)
        await line.answer(generated(asked))


@pytest.mark.parametrize(
    ("first", "path", "second"),
    [
        (BODY, "/generate", BODY),
        (BODY, "/generate", {**BODY, "stream": True}),
        (BODY, "/v1/completions", {"model": "tiny", "prompt": PROMPT, "rid": "victim"}),
        (BATCH, "/generate", {**BODY, "rid": "victim_1"}),
        ({**BATCH, "rid": ["victim", "x"]}, "/generate", BODY),
    ],
    ids=["same", "stream", "completion", "part of a batch", "listed"],
)
def test_a_second_request_by_an_id_that_lives_is_refused_and_stops_nothing(
    first: dict[str, Any], path: str, second: dict[str, Any]
) -> None:
    async def scenario() -> None:
        machine = Slow()
        async with router_over(machine, api_key="api", admin_key="admin") as router:
            victim = asyncio.create_task(router.post("/generate", first))
            await machine.wait_for("/generate")
            for _ in range(2):
                refused = await router.post(path, second)
                assert refused.status == 400
                assert "Duplicate request ID" in (await refused.json())["message"]
            machine.let.set()
            assert (await victim).status == 200
            assert machine.to("/abort_request") == []
            # The id is free again.
            assert (await router.post(path, second)).status == 200

    go(scenario())


def test_who_hangs_up_stops_the_own_request_alone() -> None:
    async def scenario() -> None:
        machine = Slow()
        async with router_over(machine) as router:
            victim = asyncio.create_task(router.post("/generate", BODY))
            other = asyncio.create_task(router.post("/generate", {**BODY, "rid": "other"}))
            await machine.wait_for("/generate", 2)
            other.cancel()
            [told] = await machine.wait_for("/abort_request")
            assert told.json == {"rid": "other"}
            machine.let.set()
            assert (await victim).status == 200

    go(scenario())


def test_of_several_processes_none_aborts_by_an_id_that_another_may_serve() -> None:
    async def scenario() -> None:
        machine = Slow()
        async with router_over(machine, processes=2) as router:
            for more in ({}, {"rid": "chosen"}):
                body = {"input_ids": PROMPT, **more}
                with pytest.raises(asyncio.TimeoutError):
                    await router.post("/generate", body, timeout=aiohttp.ClientTimeout(0.3))
            await router.metrics_with("memserve_aborts_total 2.0")
            first, _ = machine.to("/generate")
            [told] = await machine.wait_for("/abort_request")
            assert told.json == {"rid": first.json["rid"]} != {"rid": "chosen"}

    go(scenario())
