"""What the router makes of the tier that pages are in, and what it says of the event streams."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

from sglang_memserve.hashing import page_keys
from sglang_memserve.types import Role
from simulation.router_machines import PAGE, Machine, router_over

PROMPT = list(range(100, 100 + 4 * PAGE + 1))
KEYS = [key.hex() for key in page_keys(PROMPT[:-1], PAGE)]


def go(scenario: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(scenario, 60))


def test_a_fetch_leaves_out_what_decode_has_in_hbm_alone() -> None:
    """Perhaps nobody has those pages in DRAM: who waited for them would wait for nothing."""

    async def scenario() -> None:
        p = Machine(Role.PREFILL, holds=(PROMPT,))
        d = Machine(Role.DECODE, in_hbm=(PROMPT[: 2 * PAGE],))
        async with router_over(p, d) as router:
            response = await router.post("/generate", {"input_ids": PROMPT})
            assert response.headers["x-memserve-cached-tokens"] == str(4 * PAGE)
            [fetch] = d.to("/memserve/fetch")
            assert fetch.json["keys"] == KEYS[2:]
            assert p.to("/generate") == []

    go(scenario())


def test_a_fetch_asks_for_everything_where_decode_has_it_in_dram_too() -> None:
    async def scenario() -> None:
        head = PROMPT[: 2 * PAGE]
        p = Machine(Role.PREFILL, holds=(PROMPT,))
        d = Machine(Role.DECODE, holds=(head,), in_hbm=(head,))
        async with router_over(p, d) as router:
            await router.post("/generate", {"input_ids": PROMPT})
            assert d.to("/memserve/fetch")[0].json["keys"] == KEYS

    go(scenario())


def test_pages_in_hbm_alone_are_asked_of_nobody() -> None:
    async def scenario() -> None:
        p, d = Machine(Role.PREFILL, in_hbm=(PROMPT,)), Machine(Role.DECODE)
        async with router_over(p, d) as router:
            response = await router.post("/generate", {"input_ids": PROMPT})
            assert response.status == 200
            assert d.to("/memserve/fetch") == [] and p.to("/generate") == []
            text = await router.metrics_with(f'memserve_tree_blocks{{instance="{p.url}"')
            assert f'memserve_tree_blocks{{instance="{p.url}",tier="hbm"}} 4.0' in text
            assert f'memserve_tree_blocks{{instance="{p.url}",tier="dram"}} 0.0' in text

    go(scenario())


def test_the_event_streams_are_shown() -> None:
    async def scenario() -> None:
        d = Machine(Role.BOTH, holds=(PROMPT,))
        async with router_over(d) as router:
            [worker] = (await (await router.get("/workers")).json())["workers"]
            assert worker["source"] == worker["events"]["state"] == "exact"
            assert worker["events"]["snapshots"] == {"start": 1}
            text = await (await router.get("/metrics")).text()
            for line in (
                f'memserve_event_gap_total{{instance="{d.url}"}} 0.0',
                f'memserve_snapshot_total{{instance="{d.url}",reason="start"}} 1.0',
                f'memserve_event_lag_seconds{{instance="{d.url}"}} 0.0',
            ):
                assert line in text, line

    go(scenario())
