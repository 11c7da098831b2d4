"""The queue in front, draining the router and its workers, roles changed by the operator."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import orjson
import pytest
from sglang_memserve.router.http.limits import Limits
from sglang_memserve.router.request.live import ABORT_S
from sglang_memserve.types import Role
from simulation.router_machines import PAGE, WAIT_S, Asked, Line, Machine, Router, router_over
from simulation.test_router_service_failures import BODY, free_port, generated, run_router
from simulation.toy_instances import ToyInstance


def go(scenario: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(scenario, 60))


class Held:
    """An inference handler that answers when it is let."""

    def __init__(self) -> None:
        self.release = asyncio.Event()

    async def __call__(self, asked: Asked, line: Line) -> None:
        await asyncio.wait_for(self.release.wait(), WAIT_S)
        await line.answer(generated(asked))


async def state_of(router: Router, url: str) -> Any:
    workers = (await (await router.get("/workers")).json())["workers"]
    return next((one for one in workers if one["url"] == url), None)


async def until(what: Any) -> None:
    async with asyncio.timeout(WAIT_S):
        while not await what():  # noqa: ASYNC110 - the other side is a socket
            await asyncio.sleep(0.01)


def test_what_comes_beyond_waits_for_its_turn() -> None:
    async def scenario() -> None:
        held = Held()
        d = Machine(Role.BOTH, held)
        async with router_over(d, limits=Limits(max_in_flight=1, max_waiting=1)) as router:
            first = asyncio.create_task(router.post("/generate", BODY))
            await d.wait_for("/generate")
            second = asyncio.create_task(router.post("/generate", BODY))

            async def queued() -> bool:
                return bool((await (await router.get("/readiness")).json())["waiting"] == 1)

            await until(queued)
            third = await router.post("/v1/embeddings", {"input": "x"})
            assert (third.status, third.headers["retry-after"]) == (429, "1")
            held.release.set()
            assert [(await first).status, (await second).status] == [200, 200]

    go(scenario())


def test_who_waits_too_long_gets_a_429_and_who_leaves_frees_the_place() -> None:
    async def scenario() -> None:
        held = Held()
        d = Machine(Role.BOTH, held)
        limits = Limits(max_in_flight=1, max_waiting=1, wait_s=0.5)
        async with router_over(d, limits=limits) as router:
            first = asyncio.create_task(router.post("/generate", BODY))
            await d.wait_for("/generate")
            late = await router.post("/generate", BODY)
            assert late.status == 429
            assert "waited 0.5 s" in (await late.json())["message"]
            first.cancel()
            held.release.set()
            assert (await router.post("/generate", BODY)).status == 200

    go(scenario())


def test_a_frozen_instance_that_is_owed_an_abort_does_not_hold_up_the_end() -> None:
    async def scenario() -> None:
        toy = ToyInstance(role=Role.BOTH)
        async with router_over(toy) as router:
            toy.freeze()
            request = asyncio.create_task(router.post("/generate", BODY))
            await toy.wait_for("/generate")
            request.cancel()
            await toy.wait_for("/abort_request")
            started = time.monotonic()
        assert time.monotonic() - started < ABORT_S - 1
        await toy.kill()

    go(scenario())


@asynccontextmanager
async def router_process(
    machine: Machine, *flags: str
) -> AsyncIterator[tuple[subprocess.Popen[str], Router]]:
    """A router of its own process over one machine, healthy."""
    await machine.start()
    port = free_port()
    process = run_router("--port", str(port), "--instance", machine.url, *flags)
    try:
        assert process.stdout is not None
        await asyncio.to_thread(process.stdout.readline)
        async with aiohttp.ClientSession() as http:
            router = Router(f"http://127.0.0.1:{port}", http, None)
            await router.until_healthy()
            yield process, router
    finally:
        process.kill()
        process.communicate()
        await machine.stop()


@pytest.mark.parametrize(
    "signals",
    [
        (signal.SIGTERM,),
        (signal.SIGINT,),
        (signal.SIGHUP, signal.SIGHUP),
        (signal.SIGTERM, signal.SIGHUP),
    ],
)
def test_a_signal_refuses_what_is_new_and_finishes_what_runs(
    signals: tuple[signal.Signals, ...],
) -> None:
    async def scenario() -> None:
        held = Held()
        d = Machine(Role.BOTH, held)
        flags = ("--heartbeat-s", "0.2", "--max-concurrent-requests", "1", "--queue-size", "5")
        async with router_process(d, *flags) as (process, router):
            running = asyncio.create_task(router.post("/generate", BODY))
            await d.wait_for("/generate")
            waiting = asyncio.create_task(router.post("/generate", BODY))

            async def queued() -> bool:
                return bool((await (await router.get("/readiness")).json())["waiting"])

            await until(queued)
            process.send_signal(signals[0])
            sent_away = await waiting
            for further in signals[1:]:
                process.send_signal(further)
            refused = await router.post("/generate", BODY)
            for response in (sent_away, refused):
                assert (response.status, response.headers["retry-after"]) == (503, "5")
                assert "shutting down" in (await response.json())["message"]
            assert (await router.get("/health")).status == 503
            assert (await router.get("/readiness")).status == 503
            assert (await router.get("/liveness")).status == 200
            held.release.set()
            assert (await running).status == 200
            async with asyncio.timeout(WAIT_S):
                while process.poll() is None:
                    for further in signals[1:]:
                        process.send_signal(further)
                    await asyncio.sleep(0.005)
            assert process.returncode == 0

    go(scenario())


def test_who_ignored_hangups_at_the_start_goes_on_doing_so() -> None:
    async def scenario() -> None:
        port = free_port()
        before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
        try:
            process = run_router("--port", str(port))
        finally:
            signal.signal(signal.SIGHUP, before)
        try:
            assert process.stdout is not None
            await asyncio.to_thread(process.stdout.readline)
            process.send_signal(signal.SIGHUP)
            async with aiohttp.ClientSession() as http:
                router = Router(f"http://127.0.0.1:{port}", http, None)
                for _ in range(5):
                    assert not (await (await router.get("/readiness")).json())["draining"]
                    await asyncio.sleep(0.05)
        finally:
            process.kill()
            process.communicate()

    go(scenario())


@pytest.mark.parametrize("twice", [False, True], ids=["deadline", "second signal"])
def test_a_drain_that_lasts_too_long_is_ended(twice: bool) -> None:
    async def scenario() -> None:
        d = Machine(Role.BOTH, Held())
        limit = "600" if twice else "0.3"
        flags = ("--heartbeat-s", "0.2", "--drain-timeout-s", limit)
        async with router_process(d, *flags) as (process, router):
            running = asyncio.create_task(router.post("/generate", BODY))
            await d.wait_for("/generate")
            process.send_signal(signal.SIGTERM)

            async def draining() -> bool:
                try:
                    return (await router.get("/readiness")).status == 503
                except aiohttp.ClientError:
                    return True

            await until(draining)
            if twice:
                process.send_signal(signal.SIGTERM)
            assert await asyncio.to_thread(process.wait, WAIT_S) == 0
            await asyncio.gather(running, return_exceptions=True)

    go(scenario())


def test_a_worker_is_drained_and_stays_away_until_it_is_started_again() -> None:
    async def scenario() -> None:
        held = Held()
        stays, leaves = ToyInstance(), ToyInstance()
        async with router_over(stays, expire_s=1.0) as router:
            await leaves.start()
            leaves.inference = held
            leaves.register_with(router.url)

            async def joined() -> bool:
                return bool(((await state_of(router, leaves.url)) or {}).get("state") == "ready")

            await until(joined)
            work = [asyncio.create_task(router.post("/generate", BODY)) for _ in range(2)]
            await leaves.wait_for("/generate")
            removal = f"{router.url}/workers/{leaves.url}?drain=true"
            async with router.http.delete(removal) as response:
                assert response.status == 202
            assert (await state_of(router, leaves.url))["state"] == "draining"
            for _ in range(3):
                assert (await router.post("/generate", BODY)).status == 200
            assert len(leaves.to("/generate")) == 1
            held.release.set()
            assert [(await one).status for one in work] == [200, 200]

            async def gone() -> bool:
                return (await state_of(router, leaves.url)) is None

            await until(gone)
            await asyncio.sleep(0.5)  # some heartbeats
            assert await gone()
            await leaves.kill()
            await leaves.start()
            leaves.register_with(router.url)
            await until(joined)
            await leaves.kill()

    go(scenario())


def test_a_drain_has_an_end_and_an_operator_may_change_his_mind() -> None:
    async def scenario() -> None:
        stays, busy = ToyInstance(), Machine(Role.BOTH, Held())
        async with router_over(stays, busy) as router:
            work = [asyncio.create_task(router.post("/generate", BODY)) for _ in range(2)]
            await busy.wait_for("/generate")
            url = f"{router.url}/workers/{busy.url}"
            async with router.http.delete(f"{url}?drain=true&timeout_s=0.2") as response:
                assert response.status == 202

            async def gone() -> bool:
                return (await state_of(router, busy.url)) is None

            await until(gone)
            busy.inference = generated_at_once
            await router.post("/workers", {"url": busy.url})

            async def back() -> bool:
                return bool((await state_of(router, busy.url))["state"] == "ready")

            await until(back)
            for one in work:
                one.cancel()
            for bad in ("drain=maybe", "drain=true&timeout_s=x", "drain=true&timeout_s=-1"):
                async with router.http.delete(f"{url}?{bad}") as response:
                    assert response.status == 400
            async with router.http.delete(f"{router.url}/workers/http://no:1") as response:
                assert response.status == 404

    go(scenario())


async def generated_at_once(asked: Asked, line: Line) -> None:
    await line.answer(generated(asked))


def test_a_role_is_changed_on_the_instance_and_here() -> None:
    async def scenario() -> None:
        roles: list[Any] = []

        async def role(asked: Asked, line: Line) -> None:
            if asked.path != "/memserve/role":
                await generated_at_once(asked, line)
                return
            roles.append(asked.json)
            d.role = Role(asked.json["role"])
            await line.answer(d.info())

        p, d = Machine(Role.PREFILL), Machine(Role.DECODE, role)
        async with router_over(p, d) as router:

            async def patch(url: str, body: object) -> int:
                path = f"{router.url}/workers/{url}"
                async with router.http.patch(path, data=orjson.dumps(body)) as response:
                    return response.status

            assert await patch(d.url, {"role": "both"}) == 200
            assert roles == [{"role": "both"}]
            assert (await state_of(router, d.url))["role"] == "both"
            await asyncio.sleep(0.5)  # asked again a few times
            assert (await state_of(router, d.url))["role"] == "both"
            assert await patch(d.url, {"role": "king"}) == 400
            assert await patch(d.url, {"roles": "both"}) == 400
            assert await patch("http://127.0.0.1:1", {"role": "both"}) == 404
            await d.stop()
            assert await patch(d.url, {"role": "decode"}) == 502

    go(scenario())


def test_a_role_change_and_a_drain_leave_the_others_pages_alone() -> None:
    async def scenario() -> None:
        ids = list(range(1, 5 * PAGE + 1))
        a, b = Machine(Role.BOTH, holds=(ids,)), Machine(Role.BOTH, holds=(ids,))
        async with router_over(a, b) as router:

            async def held() -> Any:
                tree = await (await router.get("/memserve/tree")).json()
                return {url: tiers["dram"] for url, tiers in tree["held"].items()}

            assert await held() == {a.url: 5, b.url: 5}
            async with router.http.delete(f"{router.url}/workers/{a.url}?drain=true"):
                pass

            async def gone() -> bool:
                return (await state_of(router, a.url)) is None

            await until(gone)
            assert await held() == {b.url: 5}

    go(scenario())
