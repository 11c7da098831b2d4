"""Requests that live, by the ids that clients chose."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import cast

import pytest
from sglang_memserve.errors import LimitExceeded
from sglang_memserve.router.http.proxy import Upstream
from sglang_memserve.router.request.live import DuplicateRid, LiveRequests
from sglang_memserve.types import InstanceId

AT = InstanceId("http://a:1")


class Told:
    """An upstream that remembers whom it was asked to abort."""

    def __init__(self) -> None:
        self.rids: list[object] = []

    @asynccontextmanager
    async def exchange(
        self, method: str, url: str, body: dict[str, object], *, deadline_s: float
    ) -> AsyncIterator[Told]:
        self.rids.append(body["rid"])
        yield self

    async def read(self) -> bytes:
        return b""


def broken(requests: LiveRequests, *rids: str) -> None:
    """A request by ``rids`` that is stopped while an instance works on it."""
    with pytest.raises(InterruptedError), requests.enter(rids) as live, live.at(AT, rids):
        raise InterruptedError


def test_an_id_is_taken_as_long_as_its_request_lives() -> None:
    requests = LiveRequests(cast(Upstream, Told()), 2)
    with requests.enter(["a", "b", "a"]):
        with pytest.raises(DuplicateRid, match="b"), requests.enter(["c", "b"]):
            pass
        assert len(requests) == 1
        with requests.enter(["c"]), pytest.raises(LimitExceeded), requests.enter(["d"]):
            pass
    with requests.enter(["a", "b", "c"]):
        assert len(requests) == 1


def test_who_has_the_answer_may_ask_again_while_the_first_request_still_ends() -> None:
    requests = LiveRequests(cast(Upstream, Told()), 10)
    over: list[bool] = []
    with requests.enter(["a"], lambda: bool(over)):
        with pytest.raises(DuplicateRid), requests.enter(["a"]):
            pass
        over.append(True)
        second = requests.enter(["a"])
        second.__enter__()
    with pytest.raises(DuplicateRid), requests.enter(["a"]):
        pass
    second.__exit__(None, None, None)
    with requests.enter(["a"]):
        assert len(requests) == 1


def test_who_asks_again_by_the_same_id_is_not_aborted_for_the_first_time() -> None:
    async def scenario() -> None:
        told = Told()
        requests = LiveRequests(cast(Upstream, told), 10)
        broken(requests, "again", "over")
        with requests.enter(["again"]):
            await requests.close()
        assert told.rids == ["over"]
        broken(requests, "again")
        await requests.close()
        assert told.rids == ["over", "again"]

    asyncio.run(scenario())
