"""Any order of arrivals, departures, losses of patience and a shutdown, at the router's door."""

from __future__ import annotations

import asyncio

from hypothesis import given, settings
from hypothesis import strategies as st
from sglang_memserve.errors import LimitExceeded, ShuttingDown
from sglang_memserve.router.http.limits import Limits
from sglang_memserve.router.request.admission import Admission

MOVE = st.sampled_from(["come", "come", "come", "finish", "leave", "drain"])
MOVES = st.lists(st.tuples(MOVE, st.integers(0, 100)), max_size=60)


class Guests:
    """Requests at the door; an order of arrival is kept beside it as the oracle."""

    def __init__(self, running: int, waiting: int) -> None:
        self.admission = Admission(Limits(max_in_flight=running, max_waiting=waiting, wait_s=1e6))
        self.tasks: dict[int, asyncio.Task[str]] = {}
        self.ends: dict[int, asyncio.Event] = {}
        self.inside: list[int] = []
        self.queue: list[int] = []
        self.outcomes: dict[int, str] = {}

    async def stay(self, name: int) -> str:
        try:
            async with self.admission.slot():
                self.inside.append(name)
                await self.ends[name].wait()
        except LimitExceeded:
            return "full"
        except ShuttingDown:
            return "closed"
        finally:
            if name in self.inside:
                self.inside.remove(name)
        return "served"

    async def come(self) -> None:
        name = len(self.ends)
        self.ends[name] = asyncio.Event()
        limits = self.admission.limits
        full = len(self.inside) >= limits.max_in_flight
        if self.admission.draining:
            self.outcomes[name] = "closed"
        elif full and len(self.queue) >= limits.max_waiting:
            self.outcomes[name] = "full"
        elif full:
            self.queue.append(name)
        self.tasks[name] = asyncio.create_task(self.stay(name))
        await settle()

    async def finish(self, pick: int) -> None:
        if self.inside:
            name = self.inside[pick % len(self.inside)]
            expected = self.queue.pop(0) if self.queue else None
            self.outcomes[name] = "served"
            self.ends[name].set()
            await settle()
            assert expected is None or expected in self.inside, "first come, first served"

    async def leave(self, pick: int) -> None:
        here = [*self.inside, *self.queue]
        if here:
            name = here[pick % len(here)]
            if name in self.queue:
                self.queue.remove(name)
            elif self.queue:
                self.queue.pop(0)
            self.tasks[name].cancel()
            await settle()
            assert self.tasks[name].cancelled()
            del self.tasks[name]

    async def drain(self) -> None:
        self.admission.drain()
        self.outcomes.update(dict.fromkeys(self.queue, "closed"))
        self.queue.clear()
        await settle()

    def check(self) -> None:
        self.admission.check()
        assert self.admission.running == len(self.inside)
        assert self.admission.waiting == len(self.queue)
        for name, task in self.tasks.items():
            assert task.done() == (name in self.outcomes), name
            assert not task.done() or task.result() == self.outcomes[name]


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 3), st.integers(0, 3), MOVES)
def test_the_door_keeps_its_promises(running: int, waiting: int, moves: list) -> None:
    async def scenario() -> None:
        guests = Guests(running, waiting)
        for move, pick in moves:
            if move == "come":
                await guests.come()
            elif move == "finish":
                await guests.finish(pick)
            elif move == "leave":
                await guests.leave(pick)
            else:
                await guests.drain()
            guests.check()
        guests.admission.drain()
        for end in guests.ends.values():
            end.set()
        await asyncio.gather(*guests.tasks.values(), return_exceptions=True)
        assert await guests.admission.until_idle(1.0)
        guests.queue.clear()
        guests.admission.check()

    asyncio.run(scenario())


def test_who_waits_too_long_is_told() -> None:
    async def scenario() -> None:
        admission = Admission(Limits(max_in_flight=1, max_waiting=5, wait_s=0.01))
        async with admission.slot():
            try:
                async with admission.slot():
                    raise AssertionError("two were let in")
            except LimitExceeded as error:
                assert "waited 0.01 s" in str(error)
            assert not await admission.until_idle(0.01)
            admission.check()
        async with admission.slot():
            pass
        assert await admission.until_idle(0.01)

    asyncio.run(scenario())
