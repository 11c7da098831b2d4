"""Numbers that no instance has: refused where they come in, by name, and nobody else suffers."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any

import msgspec
import pytest
from sglang_memserve.protocol.http import Heartbeat, Load
from sglang_memserve.types import Role
from simulation.router_machines import Asked, Line, Machine, Router, router_over

BODY = {"input_ids": list(range(1, 10))}
LOOKS = ("/workers", "/metrics", "/dashboard/state", "/v1/loads", "/get_loads", "/readiness")


def go(scenario: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(scenario, 60))


def shortly(value: object) -> str:
    """An id of a case: not all digits."""
    return str(value)[:12]


async def all_is_well(router: Router) -> None:
    for _ in range(6):
        response = await router.post("/generate", BODY)
        assert response.status == 200, await response.text()
    for path in LOOKS:
        assert (await router.get(path)).status == 200, path


def with_number(value: object, place: str, number: int) -> bytes:
    """``value`` as JSON, with ``number`` at ``place`` (dots between names and indices)."""
    made = msgspec.to_builtins(value)
    inner = made
    *path, last = place.split(".")
    for name in path:
        inner = inner[int(name)] if name.isdigit() else inner[name]
    inner[last] = "NUMBER"
    # The encoder knows no integers of more than 64 bits.
    return msgspec.json.encode(made).replace(b'"NUMBER"', str(number).encode())


@pytest.mark.parametrize("number", [-1, -(10**400), 2**53 + 1, 2**64, 10**400], ids=shortly)
@pytest.mark.parametrize(
    "name", ["running_requests", "waiting_requests", "used_tokens", "total_tokens"]
)
def test_a_heartbeat_of_an_impossible_load_is_refused(name: str, number: int) -> None:
    async def scenario() -> None:
        one, other = Machine(Role.BOTH), Machine(Role.BOTH)
        async with router_over(one, other, policy="cost", bypass_tokens=None) as router:
            beat = Heartbeat(one.url, one.info().generation, "both", Load(0, 0, 0, 1000))
            body = with_number(beat, f"load.{name}", number)
            response = await router.http.post(f"{router.url}/memserve/heartbeat", data=body)
            assert response.status == 400
            assert f"$.load.{name}" in await response.text()
            await all_is_well(router)

    go(scenario())


@pytest.mark.parametrize("number", [-2, 10**400], ids=shortly)
def test_a_heartbeat_of_an_impossible_batch_is_refused(number: int) -> None:
    async def scenario() -> None:
        one = Machine(Role.BOTH)
        async with router_over(one) as router:
            beat = Heartbeat(one.url, one.info().generation, "both", Load(0, 0, 0, 1000))
            body = with_number(beat, "event_seq", number)
            response = await router.http.post(f"{router.url}/memserve/heartbeat", data=body)
            assert response.status == 400 and "$.event_seq" in await response.text()
            await all_is_well(router)

    go(scenario())


@pytest.mark.parametrize(
    ("place", "number"),
    [
        ("context_length", -1),
        ("context_length", 0),
        ("context_length", 10**400),
        ("page_size", 0),
        ("page_size", 10**400),
        ("max_total_tokens", -1),
        ("ranks.0.rank", -1),
        ("ranks.0.total_blocks", -1),
        ("ranks.0.block_bytes", 10**400),
        ("namespace.num_layers", 0),
        ("namespace.num_kv_heads", -1),
        ("namespace.head_dim", 10**400),
    ],
    ids=shortly,
)
def test_a_registration_with_an_impossible_number_is_refused(place: str, number: int) -> None:
    async def scenario() -> None:
        first = Machine(Role.BOTH)
        await first.start()
        async with router_over() as router:
            body = with_number({"info": first.info()}, f"info.{place}", number)
            response = await router.http.post(f"{router.url}/memserve/register", data=body)
            text = await response.text()
            # The namespace is not the wire's own: it is looked at when the message is read.
            named = place if place.startswith("namespace") else place.replace(".0.", "[0].")
            assert response.status == 400 and named in text, text
            assert (await (await router.get("/workers")).json())["total"] == 0
        await first.stop()

    go(scenario())


def test_a_short_context_of_one_decides_for_nobody_else() -> None:
    async def scenario() -> None:
        short = Machine(Role.DECODE, context_length=1)
        long = Machine(Role.DECODE, context_length=2000)
        async with router_over(short, long) as router:
            for _ in range(2):
                response = await router.post("/generate", {"text": "word " * 1000})
                assert response.status == 200, await response.text()
            too_long = {"text": "w" * (128 * long.context_length + 1)}
            response = await router.post("/generate", too_long)
            assert response.status == 400 and "context length" in await response.text()

    go(scenario())


def test_pages_of_an_unknown_kind_are_refused() -> None:
    async def scenario() -> None:
        first = Machine(Role.BOTH)
        await first.start()
        async with router_over() as router:
            info = msgspec.to_builtins(first.info())
            info["namespace"]["kv_dtype"] = "float3"
            response = await router.post("/memserve/register", {"info": info})
            assert response.status == 400 and "kv_dtype" in await response.text()
        await first.stop()

    go(scenario())


@dataclass
class Odd(Machine):
    """Answers ``/v1/loads`` with ``loads``; ``plain``: a server without MemServe."""

    loads: bytes = b""
    plain: bool = False

    async def _route(self, asked: Asked, line: Line) -> None:
        path = asked.path.split("?")[0]
        if path == "/v1/loads":
            await line.answer(self.loads)
        elif self.plain and path.startswith("/memserve/"):
            await line.answer({}, 404)
        elif self.plain and path == "/get_model_info":
            await line.answer({"served_model_name": self.model})
        else:
            await super()._route(asked, line)


@pytest.mark.parametrize("plain", [False, True], ids=["ours", "plain"])
@pytest.mark.parametrize(
    "figure", [b"-1", b"-1e300", b"1e300", b"1e309", b"1" + b"0" * 400, b'"' + b"9" * 5000 + b'"']
)
def test_impossible_loads_of_a_listed_instance_harm_nobody(figure: bytes, plain: bool) -> None:
    async def scenario() -> None:
        loads = b'{"loads":[{"num_waiting_reqs":%b,"num_used_tokens":%b}]}' % (figure, figure)
        good, odd = Machine(Role.BOTH), Odd(Role.BOTH, loads=loads, plain=plain)
        await odd.start()
        async with router_over(good, policy="cost", bypass_tokens=None) as router:
            await router.post("/workers", {"url": odd.url})
            await odd.wait_for("/v1/loads", 3)
            before = len(good.to("/v1/loads"))
            await all_is_well(router)
            await good.wait_for("/v1/loads", before + 2)
        await odd.stop()

    go(scenario())


def test_an_engine_that_miscounts_for_a_moment_says_what_can_be() -> None:
    assert Load.counted(-1, 2, 10**400, 4) == Load(0, 2, 2**53, 4)
