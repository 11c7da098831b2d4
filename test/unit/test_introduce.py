"""An instance that is told of its peers passes it on to its ranks, and asks them for nothing."""

from __future__ import annotations

import asyncio
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import pytest
from sglang_memserve.config import InstanceConfig
from sglang_memserve.errors import PeerUnreachable, ProtocolError
from sglang_memserve.mempool import MemPool
from sglang_memserve.plugin.agent import EngineFacts, InstanceAgent
from sglang_memserve.plugin.sources import Sources
from sglang_memserve.protocol.http import FetchBody, Load, PeerInfo, PeersBody, PeersResult
from sglang_memserve.transfer.agent import RankAgent
from sglang_memserve.transfer.loopback import LoopbackTransport
from sglang_memserve.types import Generation, InstanceId, Namespace, PageKey, Role

NAMESPACE = Namespace("m", "1", "float16", 16, 2, 2, 64, 64, 0, 1)
KEYS = [PageKey(bytes([index]) * 32) for index in range(4)]
LIMIT_S = 20.0


class OneRankEngine:
    async def load(self) -> Load:
        return Load(0, 0, 0, 0)

    def describe(self) -> EngineFacts:
        return EngineFacts("/nowhere", "m", 4096, 4096, tp_size=1)


class Instance:
    """One rank and its part of the HTTP process. Nothing listens at ``url``."""

    def __init__(self, folder: Path) -> None:
        self.generation = f"g-{secrets.token_hex(6)}"
        self.url = f"http://127.0.0.1:1/{self.generation}"
        self.config = InstanceConfig(
            role=Role.BOTH,
            url=InstanceId(self.url),
            generation=Generation(self.generation),
            peer_host="127.0.0.1",
            runtime_dir=str(folder / self.generation),
            mempool_dram_bytes=16 * NAMESPACE.block_bytes,
        )
        self.pool = MemPool(
            NAMESPACE,
            arena_bytes=self.config.mempool_dram_bytes,
            generation=self.generation,
        )
        self.rank = RankAgent(
            self.pool,
            LoopbackTransport(self.generation),
            namespace=NAMESPACE,
            instance_id=self.url,
            generation=self.generation,
            rank=0,
            host="127.0.0.1",
            local_path=self.config.rank_socket(0),
        )
        self.rank.start()

    def agent(self) -> InstanceAgent:
        return InstanceAgent(self.config, OneRankEngine(), on_refused=pytest.fail)

    def peer(self) -> PeerInfo:
        return PeerInfo(self.url, self.generation, [self.rank.peer_address])

    def close(self) -> None:
        self.rank.close()
        self.pool.close()


@pytest.fixture
def pair() -> Iterator[tuple[Instance, Instance]]:
    folder = Path(tempfile.mkdtemp(prefix="ms-"))
    two = Instance(folder), Instance(folder)
    yield two
    for instance in two:
        instance.close()
    shutil.rmtree(folder)


def test_ranks_get_connected_and_a_fetch_by_url_asks_nobody_for_addresses(
    pair: tuple[Instance, Instance],
) -> None:
    me, other = pair
    with other.pool.prepare_store(KEYS) as store:
        store.commit()
    split = PeerInfo("http://split", "g", ["tcp://127.0.0.1:1", "tcp://127.0.0.1:2"])

    async def scenario() -> None:
        agent = me.agent()
        await agent.start()
        try:
            body = PeersBody([other.peer(), split], 60.0)
            async with asyncio.timeout(LIMIT_S):
                while (await agent.introduce(body)) != PeersResult(members=1, connected=1):  # noqa: ASYNC110 - asked of ranks
                    await asyncio.sleep(0.01)
            keys = [key.hex() for key in KEYS]
            fetched = await agent.fetch(FetchBody(keys, source=other.url, hold_s=60.0))
            assert (fetched.outcome, fetched.fetched_pages) == ("complete", 4)
            assert me.pool.stats()["held_blocks"] == 4
            with pytest.raises(ProtocolError, match="valid for 0"):
                await agent.introduce(PeersBody([], 0.0))
        finally:
            await agent.stop()

    asyncio.run(scenario())


def test_addresses_are_bounded_and_forgotten_when_they_are_wrong() -> None:
    async def scenario() -> None:
        async with aiohttp.ClientSession() as session:
            sources = Sources(session)
            url = "http://127.0.0.1:1"
            sources.learn([PeerInfo(url, "g", ["tcp://h:1"])])
            assert await sources.resolve(url) == ["tcp://h:1"]
            sources.forget(url)
            with pytest.raises(PeerUnreachable, match=r"127\.0\.0\.1"):
                await sources.resolve(url)
            sources.learn([PeerInfo(url, "g", ["tcp://h:1"])])
            sources.learn([PeerInfo(f"http://x:{n}", "g", ["tcp://h:1"]) for n in range(1, 1000)])
            with pytest.raises(PeerUnreachable):
                await sources.resolve(url)

    asyncio.run(scenario())
