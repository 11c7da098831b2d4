"""Control routes by their other names."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

from sglang_memserve.types import Role
from simulation.router_machines import WAIT_S, Asked, Line, Machine, router_over


def go(scenario: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(scenario, 60))


def test_workers_by_sglang_routers_names() -> None:
    async def scenario() -> None:
        p, d = Machine(Role.PREFILL), Machine(Role.DECODE)
        await d.start()
        async with router_over(p) as router:
            added = await router.post(f"/add_worker?url={d.url}/&role=decode", None)
            assert added.status == 200 and d.url in (await added.json())["message"]
            async with asyncio.timeout(WAIT_S):
                while not (await (await router.get("/readiness")).json())["can_decode"]:  # noqa: ASYNC110
                    await asyncio.sleep(0.02)  # another server says so
            urls = await (await router.get("/list_workers")).json()
            assert urls == {"urls": [p.url, d.url]}
            loads = (await (await router.get("/get_loads")).json())["workers"]
            assert [(one["worker"], one["worker_type"]) for one in loads] == [
                (p.url, "prefill"),
                (d.url, "decode"),
            ]
            assert all(one["load"] == 0 for one in loads)
            ranks = (await (await router.get("/v1/loads?include=core")).json())["loads"]
            assert [rank["url"] for rank in ranks] == [p.url, d.url]
            assert {"num_running_reqs", "num_used_tokens", "token_usage"} <= ranks[0].keys()
            removed = await router.post("/remove_worker", {"url": d.url})
            assert removed.status == 200
            assert (await router.post(f"/remove_worker?url={d.url}", None)).status == 404
            urls = await (await router.get("/list_workers")).json()
            assert urls == {"urls": [p.url]}
        await d.stop()

    go(scenario())


def test_workers_that_are_none() -> None:
    async def scenario() -> None:
        async with router_over(Machine(Role.BOTH)) as router:
            for path in ("/add_worker", "/remove_worker", "/add_worker?url=", "/add_worker?url=x"):
                assert (await router.post(path, {})).status in (400, 404), path
            role = await router.post("/add_worker?url=http://127.0.0.1:9&role=king", {})
            assert role.status == 400 and "king" in (await role.json())["message"]
            wrong: list[object] = [5, [], {}]
            for role_ in wrong:
                odd = {"url": "http://127.0.0.1:9", "role": role_}
                for path in ("/add_worker", "/workers"):
                    assert (await router.post(path, odd)).status == 400, role_
            assert (await router.post("/add_worker", [1])).status == 400

    go(scenario())


def test_a_response_is_found_where_it_was_made() -> None:
    async def scenario() -> None:
        async def made(asked: Asked, line: Line) -> None:
            await line.answer({"id": "resp_1"})

        async def unknown(asked: Asked, line: Line) -> None:
            await line.answer({"error": "unknown"}, 404)

        here, there = Machine(Role.DECODE, made), Machine(Role.BOTH, unknown)
        async with router_over(here, there) as router:
            for _ in range(4):  # whichever of them has its turn
                assert (await router.get("/v1/responses/resp_1")).status == 200
            body = {"previous_response_id": "resp_1", "input": "more"}
            for _ in range(2):
                assert (await router.post("/v1/responses", body)).status == 200
        nowhere = Machine(Role.DECODE, unknown), Machine(Role.BOTH, unknown)
        async with router_over(*nowhere) as router:
            assert (await router.get("/v1/responses/resp_2")).status == 404
            assert all(machine.to("/v1/responses/resp_2") for machine in nowhere)
            # Elsewhere a 404 is the answer.
            assert (await router.post("/v1/rerank", {})).status == 404

    go(scenario())
