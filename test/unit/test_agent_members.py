"""Agents that are told of each other: connected before the first fetch, over each transport."""

from __future__ import annotations

import asyncio
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sglang_memserve.errors import ProtocolError
from sglang_memserve.mempool import MemPool
from sglang_memserve.protocol.control import (
    FetchRequest,
    Message,
    PeerEntry,
    PeersReply,
    PeersRequest,
    StatsReply,
    StatsRequest,
)
from sglang_memserve.transfer.agent import RankAgent
from sglang_memserve.transfer.base import Transport
from sglang_memserve.transfer.client import LocalClient
from sglang_memserve.transfer.loopback import LoopbackTransport
from sglang_memserve.transfer.members import MembershipLimits
from sglang_memserve.transfer.nixl import NixlTransport
from sglang_memserve.types import Namespace, PageKey

NAMESPACE = Namespace("m", "1", "float16", 16, 2, 2, 64, 64, 0, 1)
KEYS = [PageKey(bytes([index]) * 32) for index in range(8)]
LIMITS = MembershipLimits(retry_first_s=0.1, leave_s=0.2)
LIMIT_S = 20.0


class Rank:
    def __init__(
        self, folder: Path, make: Callable[[str], Transport], namespace: Namespace = NAMESPACE
    ) -> None:
        self.generation = f"g-{secrets.token_hex(6)}"
        self.path = folder / f"{self.generation}.sock"
        self.pool = MemPool(
            namespace, arena_bytes=16 * namespace.block_bytes, generation=self.generation
        )
        self.agent = RankAgent(
            self.pool,
            make(self.generation),
            namespace=namespace,
            instance_id=f"http://{self.generation}",
            generation=self.generation,
            rank=0,
            host="127.0.0.1",
            local_path=self.path,
            membership_limits=LIMITS,
        )
        self.agent.start()

    def ask(self, message: Message) -> Message:
        async def call() -> Message:
            client = LocalClient(self.path)
            try:
                return await client.call(message, LIMIT_S)
            finally:
                client.close()

        return asyncio.run(call())

    def introduce(self, *others: Rank, valid_s: float = 60.0) -> PeersReply:
        entries = [
            PeerEntry(f"http://{other.generation}", other.generation, other.agent.peer_address)
            for other in others
        ]
        reply = self.ask(PeersRequest(entries, valid_s))
        assert isinstance(reply, PeersReply)
        return reply

    def until(self, name: str, value: float) -> None:
        end = time.monotonic() + LIMIT_S
        while (found := self.stat(name)) != value:
            assert time.monotonic() < end, (name, found)
            time.sleep(0.01)

    def stat(self, name: str) -> float:
        reply = self.ask(StatsRequest())
        assert isinstance(reply, StatsReply)
        return reply.values[f"transfer_{name}"]

    def close(self) -> None:
        self.agent.close()
        self.pool.close()


@pytest.fixture(params=[LoopbackTransport, NixlTransport], ids=["loopback", "nixl"])
def ranks(request: pytest.FixtureRequest) -> Iterator[list[Rank]]:
    folder = Path(tempfile.mkdtemp(prefix="ms-"))
    started = [Rank(folder, request.param) for _ in range(3)]
    yield started
    for rank in started:
        rank.close()
    shutil.rmtree(folder)


def test_members_are_connected_before_anything_is_fetched(ranks: list[Rank]) -> None:
    a, b, c = ranks
    with b.pool.prepare_store(KEYS) as store:
        store.commit()
    assert a.introduce(a, b, c) == PeersReply(members=2, connected=0)
    a.until("members_connected", 2)
    assert a.introduce(b, c) == PeersReply(members=2, connected=2)
    assert a.stat("member_connects_total") == 2 and a.stat("fetches_total") == 0
    assert a.pool.stats()["filling_blocks"] == 0
    request = FetchRequest.of("b", b.agent.peer_address, list(KEYS), 0.0, 10.0)
    reply = a.agent.fetch(request).result(LIMIT_S)
    assert (reply.outcome, reply.fetched_pages) == ("complete", 8)


def test_one_that_left_is_forgotten_and_one_that_came_back_is_met_again(ranks: list[Rank]) -> None:
    a, b, c = ranks
    a.introduce(b, c)
    a.until("members_connected", 2)
    a.introduce(c)
    a.until("peers", 1)
    assert a.stat("members") == 1
    a.introduce(b, c)
    a.until("members_connected", 2)
    assert a.stat("member_connects_total") == 3


def test_one_that_does_not_answer_does_not_keep_us_from_the_others(ranks: list[Rank]) -> None:
    a, b, c = ranks
    b.agent.close()
    a.introduce(b, c)
    a.until("members_connected", 1)
    a.until("member_failures_silent_total", 1)
    assert a.stat("internal_errors_total") == 0


def test_nonsense_is_refused(ranks: list[Rank]) -> None:
    with pytest.raises(ProtocolError, match="valid for -1"):
        ranks[0].introduce(valid_s=-1.0)


@pytest.mark.parametrize("make", [LoopbackTransport, NixlTransport], ids=["loopback", "nixl"])
def test_the_first_read_is_not_larger_than_a_block(make: Callable[[str], Transport]) -> None:
    tiny = Namespace("m", "1", "float16", 1, 1, 1, 8, 8, 0, 1)
    assert tiny.block_bytes < 64
    with tempfile.TemporaryDirectory(prefix="ms-") as folder:
        holder, reader = (Rank(Path(folder), make, tiny) for _ in range(2))
        try:
            holder.pool.arena.view[:] = 0xAA
            # The first block is free when the member is read from, and those behind it are not.
            first = reader.pool.prepare_store([PageKey(b"f" * 32)])
            with reader.pool.prepare_store(KEYS) as store:
                for index, block in store.missing:
                    reader.pool.arena.view[block] = index
                store.commit()
            first.abort()
            reader.introduce(holder)
            reader.until("members_connected", 1)
            found = [reader.pool.arena.view[block] for block in reader.pool.match(KEYS)]
            assert len(found) == len(KEYS)
            assert all((page == index).all() for index, page in enumerate(found))
        finally:
            holder.close()
            reader.close()
