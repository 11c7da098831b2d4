"""The router tells each instance who the others are: when it changes, and until it is heard."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import msgspec
import pytest
from sglang_memserve.protocol.http import PeersBody
from sglang_memserve.router.members import introductions
from sglang_memserve.router.members.introductions import peers_of
from sglang_memserve.types import Role
from simulation.router_machines import WAIT_S, Machine, router_over


def go(scenario: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(scenario, 60))


async def told(machine: Machine, *others: Machine) -> None:
    """``machine`` was told of ``others`` and nobody else, last."""
    wanted = {other.url: ["tcp://127.0.0.1:9"] for other in others}
    async with asyncio.timeout(WAIT_S):
        while True:
            asked = machine.to("/memserve/peers")
            if asked:
                body = msgspec.json.decode(asked[-1].body, type=PeersBody)
                if {peer.url: peer.ranks for peer in body.peers} == wanted:
                    return
            await asyncio.sleep(0.01)


def test_everyone_learns_of_everyone_else_and_of_those_who_leave() -> None:
    async def scenario() -> None:
        a, b, c = Machine(Role.PREFILL), Machine(Role.DECODE), Machine(Role.BOTH)
        async with router_over(a, b) as router:
            await told(a, b)
            await told(b, a)
            await c.start()
            await router.post("/workers", {"url": c.url})
            await told(a, b, c)
            await told(b, a, c)
            await told(c, a, b)
            await router.http.delete(f"{router.url}/workers/{b.url}")
            await told(a, c)
            await told(c, a)
            await c.stop()

    go(scenario())


def test_it_is_said_again_until_it_is_heard_and_not_to_one_who_refuses(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(introductions, "RETRY_FIRST_S", 0.01)
    monkeypatch.setattr(introductions, "GATHER_S", 0.0)

    async def scenario() -> None:
        deaf = Machine(Role.PREFILL, peers_status=503)
        old = Machine(Role.DECODE, peers_status=404)
        async with router_over(deaf, old):
            await deaf.wait_for("/memserve/peers", 4)
            deaf.peers_status = 200
            heard = len(await deaf.wait_for("/memserve/peers", 5))
            await asyncio.sleep(0.3)
            # The answer that was on its way may still have been a refusal.
            assert len(deaf.to("/memserve/peers")) <= heard + 1
            # Once for each change of membership.
            assert len(old.to("/memserve/peers")) <= 2

    go(scenario())


def test_it_is_said_again_from_time_to_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(introductions, "REFRESH_S", 0.02)

    async def scenario() -> None:
        a = Machine(Role.BOTH)
        async with router_over(a):
            await a.wait_for("/memserve/peers", 4)

    go(scenario())


def test_who_has_other_pages_is_no_peer() -> None:
    me, twin = Machine(Role.BOTH, url="http://a:1").info(), Machine(Role.BOTH, url="http://b:1")
    split = msgspec.structs.replace(twin.info(), url="http://c:1", ranks=twin.info().ranks * 2)
    other = msgspec.structs.replace(twin.info(), url="http://d:1", layout_hash="0" * 16)
    assert [peer.url for peer in peers_of(me, [split, twin.info(), me, other])] == ["http://b:1"]
