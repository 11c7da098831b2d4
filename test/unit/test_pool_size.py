"""``/memserve/pool`` over real ranks and pools, without an engine."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from sglang_memserve.config import InstanceConfig
from sglang_memserve.errors import TransferFailed
from sglang_memserve.mempool import MemPool
from sglang_memserve.plugin.agent import EngineFacts, InstanceAgent
from sglang_memserve.plugin.pool_size import pool_routes
from sglang_memserve.protocol.http import Load
from sglang_memserve.transfer.agent import RankAgent
from sglang_memserve.transfer.loopback import LoopbackTransport
from sglang_memserve.types import Generation, InstanceId, Namespace, PageKey, Role

NAMESPACE = Namespace("m", "1", "float16", 16, 2, 2, 64, 64, 0, 2)
BLOCK = NAMESPACE.block_bytes
RANKS = 2
START = 16  # blocks a rank
KEYS = [PageKey(bytes([index]) * 32) for index in range(1, 41)]


class PickyTransport(LoopbackTransport):
    """Registers no more than ``most`` ranges."""

    most = 100

    def register(self, base: int, length: int) -> None:
        if len(list(self._regions)) >= self.most:
            raise TransferFailed("no more memory can be registered")
        super().register(base, length)


class Instance:
    def __init__(self, folder: Path, stack: ExitStack) -> None:
        generation = secrets.token_hex(6)
        self.config = InstanceConfig(
            role=Role.BOTH,
            url=InstanceId("http://127.0.0.1:1"),
            generation=Generation(generation),
            peer_host="127.0.0.1",
            runtime_dir=str(folder),
            mempool_dram_bytes=RANKS * START * BLOCK,
        )
        self.pools: list[MemPool] = []
        self.transports: list[PickyTransport] = []
        for rank in range(RANKS):
            pool = MemPool(
                replace(NAMESPACE, tp_rank=rank),
                arena_bytes=self.config.rank_dram_bytes(RANKS),
                generation=generation,
            )
            stack.callback(pool.close)
            transport = PickyTransport(f"{generation}-{rank}")
            agent = RankAgent(
                pool,
                transport,
                namespace=pool.namespace,
                instance_id=self.config.url,
                generation=generation,
                rank=rank,
                host="127.0.0.1",
                local_path=self.config.rank_socket(rank),
            )
            agent.start()
            stack.callback(agent.close)
            self.pools.append(pool)
            self.transports.append(transport)

    async def load(self) -> Load:
        return Load(0, 0, 0, 0)

    def describe(self) -> EngineFacts:
        return EngineFacts("/nowhere", "m", 4096, 4096, tp_size=RANKS)

    def totals(self) -> list[int]:
        return [pool.total_blocks for pool in self.pools]

    async def told(self) -> list[int]:
        """What ``/memserve/info`` says."""
        return [rank.total_blocks for rank in (await self.agent.info()).ranks]

    def talk(self, conversation: Callable[[httpx.AsyncClient], Awaitable[None]]) -> None:
        asyncio.run(self._talk(conversation))

    async def _talk(self, conversation: Callable[[httpx.AsyncClient], Awaitable[None]]) -> None:
        self.agent = agent = InstanceAgent(self.config, self, on_refused=pytest.fail)
        app = FastAPI()
        app.include_router(pool_routes(agent))
        await agent.start()
        try:
            async with asyncio.timeout(60):
                transport = httpx.ASGITransport(app)
                async with httpx.AsyncClient(transport=transport, base_url="http://i") as client:
                    await conversation(client)
        finally:
            await agent.stop()


@pytest.fixture
def instance(folder: Path) -> Iterator[Instance]:
    with ExitStack() as stack:
        yield Instance(folder, stack)


async def post(client: httpx.AsyncClient, **body: object) -> tuple[int, Any]:
    response = await client.post("/memserve/pool", json=body)
    return response.status_code, response.json()


def test_all_ranks_grow_and_shrink_and_everybody_can_see_it(instance: Instance) -> None:
    async def conversation(client: httpx.AsyncClient) -> None:
        before = (await client.get("/memserve/pool")).json()
        assert before["dram_bytes"] == RANKS * START * BLOCK
        assert [rank["total_blocks"] for rank in before["ranks"]] == [START] * RANKS
        assert await instance.told() == [START] * RANKS

        status, grown = await post(client, dram=f"{RANKS * 3 * START * BLOCK // 1024}KiB")
        assert (status, grown["outcome"]) == (200, "resized")
        assert instance.totals() == [3 * START] * RANKS
        assert grown["dram_bytes"] == RANKS * 3 * START * BLOCK
        assert grown["ranks"] == (await client.get("/memserve/pool")).json()["ranks"]
        assert await instance.told() == [3 * START] * RANKS

        for pool in instance.pools:
            pool.prepare_store(KEYS).commit()
        status, shrunk = await post(client, dram_bytes=RANKS * START * BLOCK, wait_s=0)
        assert (status, shrunk["outcome"]) == (200, "resized")
        assert [step["evicted_pages"] for step in shrunk["steps"]] == [40 - START] * RANKS
        assert instance.totals() == [START] * RANKS
        status, same = await post(client, dram_bytes=RANKS * START * BLOCK)
        assert (status, same["outcome"]) == (200, "unchanged")

    instance.talk(conversation)


def test_when_one_rank_refuses_to_shrink_the_others_go_back(instance: Instance) -> None:
    async def conversation(client: httpx.AsyncClient) -> None:
        await post(client, dram_bytes=RANKS * 3 * START * BLOCK)
        taken = instance.pools[1].alloc_mem(3 * START)
        status, refused = await post(client, dram_bytes=RANKS * START * BLOCK, wait_s=0.05)
        assert (status, refused["outcome"]) == (409, "refused")
        assert refused["reason"] == "rank 1: blocks in the way: 32 being filled"
        assert [step["outcome"] for step in refused["steps"]] == ["resized", "refused"]
        assert instance.totals() == [3 * START] * RANKS
        instance.pools[1].free_mem(taken)
        assert (await post(client, dram_bytes=RANKS * START * BLOCK))[0] == 200

    instance.talk(conversation)


def test_when_one_rank_refuses_to_grow_the_others_go_back_if_they_can(instance: Instance) -> None:
    async def conversation(client: httpx.AsyncClient) -> None:
        instance.transports[0].most = 1
        status, refused = await post(client, dram_bytes=RANKS * 3 * START * BLOCK)
        assert (status, refused["outcome"]) == (409, "refused")
        assert refused["reason"] == "rank 0: no more memory can be registered"
        assert instance.totals() == [START] * RANKS

        instance.pools[0].alloc_mem(START)
        grow = instance.pools[1]._ledger.grow

        def grow_and_take(total_blocks: int) -> None:
            grow(total_blocks)
            blocks, _ = instance.pools[1]._ledger.allocate(total_blocks)
            assert blocks is not None

        instance.pools[1]._ledger.grow = grow_and_take  # type: ignore[method-assign]
        status, uneven = await post(client, dram_bytes=RANKS * 3 * START * BLOCK)
        assert (status, uneven["outcome"]) == (409, "uneven")
        assert "could not take back the change of rank 1" in uneven["reason"]
        assert instance.totals() == [START, 3 * START]
        assert [rank["total_blocks"] for rank in uneven["ranks"]] == [START, 3 * START]

    instance.talk(conversation)


def test_what_makes_no_sense_is_refused_and_says_why(instance: Instance) -> None:
    async def conversation(client: httpx.AsyncClient) -> None:
        for body, status, text in (
            ({}, 400, "say either"),
            ({"dram": "1GiB", "dram_bytes": 5}, 400, "say either"),
            ({"dram": "many"}, 400, "malformed size"),
            ({"dram": "0GiB"}, 400, "must be positive"),
            ({"dram": "9000TiB"}, 400, "more than this machine's memory"),
            ({"dram_bytes": -1}, 400, "malformed size"),
            ({"dram_bytes": 1}, 400, "holds no block"),
            ({"dram_bytes": BLOCK * RANKS, "wait_s": -1}, 400, "got -1"),
            ({"dram_bytes": BLOCK * RANKS, "wait_s": 700}, 400, "must be in 0..600"),
            ({"dramm": "1GiB"}, 400, "unknown field `dramm`"),
            ({"dram": 5}, 400, "Expected `str | null`"),
        ):
            answered, reply = await post(client, **body)
            assert (answered, text in reply["error"]["message"]) == (status, True), (body, reply)
        reply = await client.post("/memserve/pool", content=b"[" * 100_000)
        assert reply.status_code == 400
        assert instance.totals() == [START] * RANKS

    instance.talk(conversation)


def test_two_changes_at_the_same_time_are_one_too_many(instance: Instance) -> None:
    async def conversation(client: httpx.AsyncClient) -> None:
        await post(client, dram_bytes=RANKS * 3 * START * BLOCK)
        taken = [pool.alloc_mem(3 * START) for pool in instance.pools]
        first = asyncio.create_task(post(client, dram_bytes=RANKS * START * BLOCK, wait_s=30))
        for _ in range(1000):
            if all(pool._resize for pool in instance.pools):
                break
            await asyncio.sleep(0.01)
        status, reply = await post(client, dram_bytes=RANKS * START * BLOCK)
        assert (status, reply["error"]["type"]) == (429, "LimitExceeded")
        for pool, blocks in zip(instance.pools, taken, strict=True):
            pool.free_mem(blocks)
        status, reply = await first
        assert (status, reply["outcome"]) == (200, "resized")

    instance.talk(conversation)
