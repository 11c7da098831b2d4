"""Methods that the router's own paths do not have, and the entry of one worker."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any
from urllib.parse import quote

import pytest
from sglang_memserve.types import Role
from simulation.router_machines import Machine, router_over


def go(scenario: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(scenario, 60))


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", "/memserve/explain", "POST"),
        ("POST", "/memserve/tree", "GET"),
        ("PUT", "/workers/http://127.0.0.1:9", "DELETE, GET, PATCH"),
        ("PUT", "/workers", "GET, POST"),
        ("DELETE", "/workers", "GET, POST"),
        ("POST", "/metrics", "GET"),
        ("POST", "/dashboard/state", "GET"),
        ("GET", "/add_worker", "POST"),
        ("GET", "/generate", "POST, PUT"),
        ("DELETE", "/flush_cache", "GET, POST"),
    ],
)
def test_another_method_is_refused_and_no_instance_asked(
    method: str, path: str, allowed: str
) -> None:
    async def scenario() -> None:
        machine = Machine(Role.BOTH)
        async with router_over(machine) as router:
            before = len(machine.to(path))
            response = await router.http.request(method, router.url + path)
            assert response.status == 405
            assert response.headers["allow"] == allowed
            said = (await response.json())["message"]
            assert said == f"{path} takes {allowed}, not {method}"
            assert len(machine.to(path)) == before

    go(scenario())


def test_a_worker_has_an_entry_of_its_own() -> None:
    async def scenario() -> None:
        p, d = Machine(Role.PREFILL), Machine(Role.DECODE)
        async with router_over(p, d) as router:
            listed = (await (await router.get("/workers")).json())["workers"]
            for spelled in (quote(d.url, safe=""), d.url, f"{d.url}/"):
                answer = await router.get(f"/workers/{spelled}")
                assert answer.status == 200
                entry = await answer.json()
                assert entry.keys() == listed[1].keys()
                assert (entry["url"], entry["role"]) == (d.url, "decode")
            unknown = await router.get("/workers/http://127.0.0.1:9")
            assert unknown.status == 404
            assert (await unknown.json())["message"] == "unknown worker http://127.0.0.1:9"

    go(scenario())
