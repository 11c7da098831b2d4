"""Metrics, engine metrics and the dashboard's data over a real socket."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import orjson
import pytest
from prometheus_client.parser import text_string_to_metric_families
from sglang_memserve.router.dashboard import routes
from sglang_memserve.types import Role
from simulation.router_machines import (
    PAGE,
    POLL_S,
    WAIT_S,
    Asked,
    Line,
    Machine,
    Router,
    router_over,
)

PROMPT = list(range(1, 4 * PAGE + 2))
SECRET = {"input_ids": PROMPT, "cache_salt": "salt"}


def go(scenario: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(scenario, 60))


async def streaming(asked: Asked, line: Line) -> None:
    """An engine that streams three tokens, and has metrics of its own."""
    if asked.path == "/metrics":
        await line.answer(b"# TYPE own gauge\nown 7\n", kind="text/plain")
        return
    await line.start_stream()
    for _ in range(3):
        await line.chunk(b'data: {"text": "x"}\n\n')
        await asyncio.sleep(0.02)
    await line.chunk(b"data: [DONE]\n\n")
    await line.end_stream()


async def state(router: Router, ended: int, **more: Any) -> Any:
    """The dashboard's, once so many requests are booked as ended: a moment after their answer."""
    async with asyncio.timeout(WAIT_S):
        while True:
            seen = await (await router.get("/dashboard/state", **more)).json()
            if len(seen["ended"]) >= ended:
                return seen
            await asyncio.sleep(POLL_S)


def test_metrics_of_members_pools_and_streams() -> None:
    async def scenario() -> None:
        both = Machine(Role.BOTH, streaming)
        async with router_over(both) as router:
            body = {"input_ids": PROMPT, "stream": True}
            assert (await router.post("/generate", body)).status == 200
            line = 'memserve_tpot_seconds_count{route="/generate"} 1.0'
            text = await router.metrics_with(line)
            for words in (
                'memserve_members{role="both",state="ready"} 1.0',
                f'memserve_breaker_state{{instance="{both.url}",state="closed"}} 1.0',
                f'memserve_pool_blocks{{instance="{both.url}",state="ready",tier="dram"}}',
                f'memserve_evicted_blocks_total{{instance="{both.url}",reason="room",tier="dram"}}',
                f'memserve_instance_requests{{instance="{both.url}",kind="running"}}',
            ):
                assert words in text, words
            list(text_string_to_metric_families(text))
            engines = await (await router.get("/engine_metrics")).text()
            assert f'own{{instance="{both.url}"}} 7' in engines

    go(scenario())


def test_engine_metrics_do_not_wait_for_the_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sglang_memserve.router.metrics.engine.ASK_S", 0.3)

    async def stalls(asked: Asked, line: Line) -> None:
        if asked.path == "/metrics":
            await line.until_closed()

    async def scenario() -> None:
        well, dead = Machine(Role.BOTH, streaming), Machine(Role.BOTH, stalls)
        async with router_over(well, dead) as router:
            texts = await asyncio.gather(*(_text(router, "/engine_metrics") for _ in range(5)))
            for text in texts:
                assert f'memserve_engine_up{{instance="{well.url}"}} 1' in text
                assert f'memserve_engine_up{{instance="{dead.url}"}} 0' in text
            # They shared one round.
            assert len(well.to("/metrics")) == 1

    go(scenario())


async def _text(router: Router, path: str) -> str:
    return await (await router.get(path)).text()


def test_the_state_tells_requests_decisions_and_transfers() -> None:
    async def scenario() -> None:
        held = asyncio.Event()

        async def waits(asked: Asked, line: Line) -> None:
            if asked.json.get("stream"):
                await held.wait()
            await streaming(asked, line)

        p, d = Machine(Role.PREFILL, holds=(PROMPT,)), Machine(Role.DECODE, waits)
        async with router_over(p, d, policy="prefix") as router:
            await router.post("/generate", SECRET)
            living = asyncio.create_task(
                router.post("/generate", {"input_ids": PROMPT, "stream": True})
            )
            await d.wait_for("/generate", 2)
            seen = await state(router, ended=1)
            assert {m["url"]: m["role"] for m in seen["members"]} == {
                p.url: "prefill",
                d.url: "decode",
            }
            [live] = seen["living"]
            assert live["decode"] == d.url
            assert live["reason"]
            [ended] = seen["ended"]
            assert (ended["status"], ended["prompt_tokens"]) == (200, len(PROMPT))
            assert ended["excerpt"] is None
            assert {(pair["source"], pair["target"]) for pair in seen["pairs"]} == {(p.url, d.url)}
            held.set()
            assert (await living).status == 200
            tree = await (await router.get("/dashboard/tree")).json()
            column = tree["columns"].index
            [node] = [row for row in tree["nodes"] if row[column("hits")]]
            assert node[column("pages")] == 4
            assert [tree["members"][who] for who, _ in node[column("holders")]] == [p.url]

    go(scenario())


def test_the_page_is_strict_about_what_it_loads() -> None:
    async def scenario() -> None:
        async with router_over(Machine(Role.BOTH), api_key="k") as router:
            for path in ("/dashboard", "/dashboard/", "/dashboard/app.js", "/dashboard/style.css"):
                answer = await router.http.get(
                    f"{router.url}{path}", headers={"Authorization": "none"}, allow_redirects=False
                )
                assert answer.status == 200, path
                policy = answer.headers["content-security-policy"]
                assert "default-src 'none'" in policy
                assert "unsafe" not in policy
            assert (await router.get("/dashboard/view.py")).status == 404
            refused = await router.http.get(
                f"{router.url}/dashboard/events", headers={"Authorization": "none"}
            )
            assert refused.status == 401

    go(scenario())


def test_streams_of_events_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routes, "MOST_STREAMS", 2)
    monkeypatch.setattr(routes, "INTERVAL_S", 0.05)
    monkeypatch.setattr(routes, "STREAM_S", 0.5)

    async def scenario() -> None:
        async with router_over(Machine(Role.BOTH, holds=(PROMPT,))) as router:
            url = f"{router.url}/dashboard/events"
            one, two = await router.http.get(url), await router.http.get(url)
            for open_stream in (one, two):
                assert (await open_stream.content.readline()) == b"event: state\n"
            third = await router.http.get(url)
            assert third.status == 503
            assert third.headers["retry-after"]
            # A stream ends by itself, in whole frames, with the drawing among them.
            frames = (await asyncio.wait_for(one.read(), WAIT_S)).split(b"\n\n")
            assert frames[-1] == b""
            assert any(frame.startswith(b"event: tree\n") for frame in frames)
            orjson.loads(frames[-2].partition(b"data: ")[2])
            # One that is closed early gives its place back.
            two.close()
            async with asyncio.timeout(WAIT_S):
                while (await router.http.get(url)).status != 200:  # noqa: ASYNC110
                    await asyncio.sleep(0.02)

    go(scenario())


def test_only_the_admin_key_shows_beginnings_of_prompts() -> None:
    async def scenario() -> None:
        async with router_over(Machine(Role.BOTH), api_key="api", admin_key="admin") as router:
            await router.post("/generate", SECRET)
            admin = {"Authorization": "Bearer admin"}
            for headers, shown in (({}, None), (admin, str(PROMPT))):
                seen = await state(router, ended=1, headers=headers)
                assert seen["ended"][0]["excerpt"] == shown
                assert "salt" not in str(seen)

    go(scenario())
