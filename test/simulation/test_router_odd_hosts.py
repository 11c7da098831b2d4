"""URLs whose host nobody can look up: refused at the door, and harmless to the others inside."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any

import aiohttp
import msgspec
import pytest
from sglang_memserve.errors import PeerUnreachable
from sglang_memserve.protocol.http import InstanceInfo
from sglang_memserve.router.config import StaticInstance
from sglang_memserve.router.http.proxy import Deadlines, Upstream
from sglang_memserve.router.members import instances as membership
from sglang_memserve.router.members.polling import Poller
from sglang_memserve.router.tree.feed import Feed
from sglang_memserve.router.tree.merged import merged_tree
from sglang_memserve.types import InstanceId, Role
from simulation.router_machines import POLL_S, WAIT_S, Machine, Router, router_over

NO_HOSTS = {
    "an empty label": "http://a..b:80",
    "a long label": f"http://{'a' * 64}.example:80",
    "characters of no host": "http://a,b\\c",
    "not ASCII": "http://\u00e9\u2603.example:1",
    "an unfinished address": "http://[::1",
}
BODY = {"input_ids": list(range(1, 10))}


def go(scenario: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(scenario, 60))


async def worker(router: Router, url: str) -> dict[str, Any]:
    found = (await (await router.get("/workers")).json())["workers"]
    return next(one for one in found if one["url"] == url)


@pytest.mark.parametrize("url", NO_HOSTS.values(), ids=NO_HOSTS.keys())
def test_a_host_that_cannot_be_is_refused_at_the_door(url: str) -> None:
    async def scenario() -> None:
        good = Machine(Role.BOTH)
        async with router_over(good) as router:
            info = msgspec.structs.replace(good.info(), url=url, generation="other")
            for path, body in (
                ("/workers", {"url": url}),
                ("/memserve/register", {"info": msgspec.to_builtins(info)}),
            ):
                response = await router.post(path, body)
                assert response.status == 400
                assert "malformed URL" in await response.text()
            assert (await (await router.get("/workers")).json())["total"] == 1

    go(scenario())


@pytest.mark.parametrize("url", ["http://a..b:80", "http://a,b\\c"])
def test_one_that_came_in_all_the_same_harms_nobody(
    url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What no check at the door foresees: a host that fails when it is looked up."""
    monkeypatch.setattr(membership, "parse_url", lambda text: text.rstrip("/"))
    caplog.set_level(logging.ERROR)

    async def scenario() -> None:
        good = Machine(Role.BOTH)
        odd = InstanceId(url)
        async with router_over(good, extra=(StaticInstance(odd),)) as router:
            # Registered as well, it is ready: requests, snapshots and introductions go there.
            info = msgspec.structs.replace(good.info(), url=url, generation="other")
            body = {"info": msgspec.to_builtins(info)}
            assert (await router.post("/memserve/register", body)).status == 200
            for path in ("/generate", "/v1/rerank"):
                for _ in range(4):
                    response = await router.post(path, BODY)
                    assert response.status == 200, await response.text()
            for path in ("/server_info", "/engine_metrics", "/health_generate", "/metrics"):
                assert (await router.get(path)).status == 200, path
            assert (await router.post("/abort_request", {"rid": "x"})).status == 502
            await good.wait_for("/memserve/info", len(good.to("/memserve/info")) + 3)
            async with asyncio.timeout(WAIT_S):
                while (await worker(router, url))["state"] != "unhealthy":  # noqa: ASYNC110
                    await asyncio.sleep(POLL_S)
            assert (await worker(router, url))["last_error"]
            assert (await worker(router, good.url))["state"] == "ready"

    go(scenario())
    assert not [record for record in caplog.records if "stopped" in record.getMessage()]


def test_a_mistake_about_one_url_leaves_the_others_asked(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ask = Poller._ask_ours

    async def scenario() -> None:
        good, odd = Machine(Role.BOTH), Machine(Role.BOTH)
        async with router_over(good, odd) as router:

            async def fails(poller: Poller, listed: InstanceId, info: InstanceInfo) -> None:
                if listed == odd.url:
                    raise RuntimeError("our own mistake")
                await ask(poller, listed, info)

            monkeypatch.setattr(Poller, "_ask_ours", fails)
            await good.wait_for("/memserve/info", len(good.to("/memserve/info")) + 4)
            assert (await worker(router, odd.url))["last_error"] == "RuntimeError: our own mistake"
            assert (await worker(router, good.url))["state"] == "ready"

    go(scenario())
    assert "our own mistake" in caplog.text


@pytest.mark.parametrize("url", NO_HOSTS.values(), ids=NO_HOSTS.keys())
def test_who_asks_such_a_host_gets_the_error_of_a_peer(url: str) -> None:
    async def scenario() -> None:
        upstream = Upstream(Deadlines(connect_s=1.0, total_s=2.0))
        try:
            with pytest.raises(PeerUnreachable):
                await upstream.open("POST", f"{url}/generate", [], b"{}")
            with pytest.raises(PeerUnreachable):
                await upstream.call("GET", f"{url}/memserve/info", deadline_s=2.0)
        finally:
            await upstream.close()
        async with aiohttp.ClientSession() as session:
            feed = Feed(merged_tree(), session, clock=lambda: 0.0, wall_clock=lambda: 0.0)
            try:
                with pytest.raises(PeerUnreachable):
                    await feed.fetch_snapshot(InstanceId(url))
            finally:
                await feed.close()

    go(scenario())
