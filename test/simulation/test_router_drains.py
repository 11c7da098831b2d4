"""A drain is of one boot: it ends with it, or when the operator says so, and takes no other."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import msgspec
from sglang_memserve.router.control.drain import POLL_S
from sglang_memserve.types import Role
from simulation.router_machines import Machine, Router, router_over
from simulation.test_router_service_failures import BODY
from simulation.test_router_staying_up import Held, generated_at_once, state_of

SOME_POLLS_S = 5 * POLL_S


def go(scenario: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(scenario, 60))


async def register(router: Router, machine: Machine, generation: str) -> None:
    info = msgspec.structs.replace(machine.info(), generation=generation)
    body = {"info": msgspec.to_builtins(info)}
    assert (await router.post("/memserve/register", body)).status == 200


async def drain(router: Router, machine: Machine) -> None:
    async with router.http.delete(f"{router.url}/workers/{machine.url}?drain=true") as response:
        assert response.status == 202


def test_a_boot_that_comes_during_the_drain_of_the_last_one_is_used() -> None:
    async def scenario() -> None:
        held = Held()
        machine = Machine(Role.BOTH, held)
        await machine.start()
        async with router_over() as router:
            await register(router, machine, "A")
            work = asyncio.create_task(router.post("/generate", BODY))
            await machine.wait_for("/generate")
            await drain(router, machine)
            assert (await state_of(router, machine.url))["state"] == "draining"
            await register(router, machine, "B")
            machine.inference = generated_at_once
            assert (await router.post("/generate", BODY)).status == 200
            held.release.set()
            assert (await work).status == 200
            await asyncio.sleep(SOME_POLLS_S)
            now = await state_of(router, machine.url)
            assert (now["generation"], now["state"]) == ("B", "ready")
            assert (await router.post("/generate", BODY)).status == 200
        await machine.stop()

    go(scenario())


def test_added_by_hand_during_its_drain_an_instance_stays() -> None:
    async def scenario() -> None:
        held = Held()
        machine = Machine(Role.BOTH, held)
        async with router_over(machine) as router:
            work = asyncio.create_task(router.post("/generate", BODY))
            await machine.wait_for("/generate")
            await drain(router, machine)
            assert (await router.post("/workers", {"url": machine.url})).status == 202
            assert (await state_of(router, machine.url))["state"] == "ready"
            held.release.set()
            assert (await work).status == 200
            await asyncio.sleep(SOME_POLLS_S)
            assert (await state_of(router, machine.url))["state"] == "ready"
            assert (await router.post("/generate", BODY)).status == 200

    go(scenario())


def test_a_boot_that_comes_just_after_the_drain_of_an_idle_one_is_used() -> None:

    async def scenario() -> None:
        machine = Machine(Role.BOTH)
        await machine.start()
        async with router_over() as router:
            await register(router, machine, "A")
            await drain(router, machine)
            await register(router, machine, "B")
            await asyncio.sleep(SOME_POLLS_S)
            assert (await state_of(router, machine.url))["state"] == "ready"
            assert (await router.post("/generate", BODY)).status == 200
        await machine.stop()

    go(scenario())
