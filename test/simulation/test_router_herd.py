"""Requests with one new prefix that arrive together, at a real router."""

from __future__ import annotations

import asyncio

from sglang_memserve.types import Role
from simulation.router_machines import PAGE, Asked, Line, Machine, generated, router_over

SHARED = list(range(1000, 1000 + 400 * PAGE))


def test_a_herd_waits_for_the_one_that_computes_its_prefix() -> None:
    async def scenario() -> None:
        async def slowly(asked: Asked, line: Line) -> None:
            await asyncio.sleep(0.3)
            await line.answer(generated(asked))

        ps = [Machine(Role.PREFILL, slowly) for _ in range(3)]
        ds = [Machine(Role.DECODE) for _ in range(2)]
        async with router_over(*ps, *ds, policy="cost", bypass_tokens=None) as router:
            bodies = [{"input_ids": [*SHARED, *([7 + n] * 9)]} for n in range(6)]
            answers = await asyncio.gather(*(router.post("/generate", body) for body in bodies))
            assert [answer.status for answer in answers] == [200] * 6
            # One prefill instance computed the prefix; nobody else was asked for it.
            assert sorted(bool(p.to("/generate")) for p in ps) == [False, False, True]
            reasons = [answer.headers["x-memserve-reason"] for answer in answers]
            waited = [why for why in reasons if "once its prefix has come" in why]
            assert waited, reasons
            # Whoever fetches what is not there yet waits, and for no page beyond it.
            fetches = [asked.json for d in ds for asked in d.to("/memserve/fetch")]
            assert any(body["wait_s"] > 0 and len(body["keys"]) == 400 for body in fetches)
            explained = await (await router.post("/memserve/explain", bodies[0])).json()
            for view in explained["instances"].values():
                assert view["coming_pages"] == view["queue_s"] == view["running_requests"] == 0

    asyncio.run(asyncio.wait_for(scenario(), 60))
