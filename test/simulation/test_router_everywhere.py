"""What changes one instance changes all of them."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest
from sglang_memserve.protocol.access import needs_admin_key
from sglang_memserve.router.control.everywhere import PATHS
from sglang_memserve.types import Role
from simulation.router_machines import Asked, Handler, Line, Machine, router_over

LORA = "/load_lora_adapter"
BODY = {"lora_name": "l", "lora_path": "/adapters/l"}


def go(scenario: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(scenario, 60))


def saying(value: object, status: int = 200) -> Handler:
    async def answer(asked: Asked, line: Line) -> None:
        await line.answer(value, status)

    return answer


def test_all_are_asked_and_one_answer_tells_of_all() -> None:
    async def scenario() -> None:
        done = saying({"success": True, "loaded_adapters": {"l": "/adapters/l"}})
        p, d = Machine(Role.PREFILL, done), Machine(Role.DECODE, done)
        async with router_over(p, d) as router:
            response = await router.post(f"{LORA}?x=1", BODY)
            assert response.status == 200
            told = await response.json()
            assert told["success"] is True and told["loaded_adapters"] == {"l": "/adapters/l"}
            assert {url: one["status"] for url, one in told["instances"].items()} == {
                p.url: 200,
                d.url: 200,
            }
            for machine in (p, d):
                [asked] = machine.to(LORA)
                assert (asked.method, asked.path, asked.json) == ("POST", f"{LORA}?x=1", BODY)

    go(scenario())


@pytest.mark.parametrize("path", PATHS)
def test_without_a_body(path: str) -> None:
    async def scenario() -> None:
        p, d = Machine(Role.PREFILL, saying("x")), Machine(Role.BOTH, saying(b"", 204))
        async with router_over(p, d) as router:
            response = await router.get(path)
            assert response.status == 200, await response.text()
            assert len(p.to(path)) == len(d.to(path)) == 1

    go(scenario())


def test_what_one_refuses_is_no_success() -> None:
    async def scenario() -> None:
        p = Machine(Role.PREFILL, saying({"success": True}))
        d = Machine(Role.DECODE, saying({"success": False, "error_message": "no such file"}, 400))
        async with router_over(p, d) as router:
            response = await router.post(LORA, BODY)
            assert response.status == 502
            told = await response.json()
            assert told["success"] is False
            assert "1 of 2 instances" in told["message"] and d.url in told["message"]
            assert told["instances"][d.url]["answer"]["error_message"] == "no such file"

    go(scenario())


def test_what_all_refuse_has_their_status() -> None:
    async def scenario() -> None:
        refused = saying({"success": False}, 400)
        async with router_over(Machine(Role.PREFILL, refused), Machine(Role.BOTH, refused)) as r:
            response = await r.post(LORA, BODY)
            assert response.status == 400
            assert "2 of 2 instances" in (await response.json())["message"]

    go(scenario())


def test_one_that_is_gone_has_not_done_it() -> None:
    async def scenario() -> None:
        p, d = Machine(Role.PREFILL, saying({})), Machine(Role.DECODE, saying({}))
        async with router_over(p, d, heartbeat_s=5.0) as router:
            await p.stop()
            response = await router.post("/pause_generation", {"mode": "abort"})
            assert response.status == 502
            assert (await response.json())["instances"][p.url]["status"] == 0
            assert len(d.to("/pause_generation")) == 1

    go(scenario())


def test_nobody_is_asked_what_is_no_json() -> None:
    async def scenario() -> None:
        d = Machine(Role.BOTH, saying({}))
        async with router_over(d) as router:
            response = await router.http.post(f"{router.url}{LORA}", data=b"{")
            assert response.status == 400
            assert "no JSON" in await response.text()
            assert not d.to(LORA)

    go(scenario())


def test_without_an_instance_there_is_nobody_to_ask() -> None:
    async def scenario() -> None:
        async with router_over() as router:
            assert (await router.post(LORA, BODY)).status == 503

    go(scenario())


def test_only_the_operator_may() -> None:
    assert all(map(needs_admin_key, PATHS))

    async def scenario() -> None:
        d = Machine(Role.BOTH, saying({}))
        async with router_over(d, api_key="client", admin_key="admin") as router:
            refused = await router.post(LORA, BODY, headers={"Authorization": "Bearer client"})
            assert refused.status in (401, 403)
            assert not d.to(LORA)
            done = await router.post(LORA, BODY, headers={"Authorization": "Bearer admin"})
            assert done.status == 200
            assert d.to(LORA)[0].headers["authorization"] == "Bearer admin"

    go(scenario())
