"""What a client is told while no instance is there."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest
from sglang_memserve.types import Role
from simulation.router_machines import Machine, router_over

PATHS = ("/generate", "/tokenize", "/memserve/explain", "/pause_generation", "/flush_cache")
WHAT_TO_DO = "start instances with --router-url, or add running ones with POST /workers"


def go(scenario: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(scenario, 60))


@pytest.mark.parametrize("path", PATHS)
def test_without_instances_the_answer_says_what_to_do(path: str) -> None:
    async def scenario() -> None:
        async with router_over() as router:
            answer = await router.post(path, {"input_ids": [1, 2, 3]})
            assert answer.status == 503
            body = await answer.json()
            assert "none is known" in body["message"] and WHAT_TO_DO in body["message"]
            assert body["instances"] == []

    go(scenario())


@pytest.mark.parametrize("path", PATHS)
def test_those_that_were_there_are_named(path: str) -> None:
    async def scenario() -> None:
        machine = Machine(Role.BOTH)
        async with router_over(machine) as router:
            await router.http.delete(f"{router.url}/workers/{machine.url}")
            answer = await router.post(path, {"input_ids": [1, 2, 3]})
            body = await answer.json()
            assert answer.status == 503 and WHAT_TO_DO in body["message"]
            assert body["instances"] == [{"url": machine.url, "reason": "left: was removed"}]

    go(scenario())


def test_one_that_is_there_and_fails_needs_no_other() -> None:
    async def scenario() -> None:
        machine = Machine(Role.BOTH)
        async with router_over(machine) as router:
            await machine.stop()
            answer = await router.post("/generate", {"input_ids": [1, 2, 3]})
            assert answer.status == 503 and WHAT_TO_DO not in await answer.text()

    go(scenario())
