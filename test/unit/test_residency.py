"""An instance's residency over its ranks: real rank agents, and ranks that lose what they say."""

from __future__ import annotations

import asyncio
import ctypes
import functools
import hashlib
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ParamSpec

import pytest
import zmq
import zmq.asyncio
from sglang_memserve.config import InstanceConfig
from sglang_memserve.errors import PeerUnreachable
from sglang_memserve.hashing import short_key
from sglang_memserve.mempool import MemPool
from sglang_memserve.plugin import rank_feed
from sglang_memserve.plugin.residency import AllRanks, OneRank, residency_of
from sglang_memserve.protocol.control import (
    InfoReply,
    InfoRequest,
    Message,
    SnapshotReply,
    SnapshotRequest,
    StatsReply,
    decode,
    encode,
)
from sglang_memserve.protocol.events import (
    TOPIC,
    BlockRemoved,
    BlockStored,
    Event,
    EventBatch,
    Snapshot,
    decode_frames,
    decode_snapshot,
    encode_frames,
    encode_snapshot,
)
from sglang_memserve.transfer.agent import RankAgent
from sglang_memserve.transfer.client import LocalClient
from sglang_memserve.transfer.loopback import LoopbackTransport
from sglang_memserve.types import Generation, InstanceId, Namespace, PageKey, Role, Tier

P = ParamSpec("P")

LIMIT_S = 30.0
DRAM = Tier.DRAM.value
KEYS = [PageKey(hashlib.sha256(b"page %d" % index).digest()) for index in range(20)]


def namespace(rank: int, ranks: int) -> Namespace:
    return Namespace("m", "1", "float16", 16, 2, 2, 64, 64, rank, ranks)


@pytest.fixture
def config() -> Iterator[InstanceConfig]:
    # pytest's own folders are too deep for a socket's path.
    with tempfile.TemporaryDirectory() as folder:
        yield InstanceConfig(
            Role.BOTH, InstanceId("http://h:1"), Generation("g1"), "127.0.0.1", folder, 1
        )


def on_a_loop(test: Callable[P, Coroutine[Any, Any, None]]) -> Callable[P, None]:
    @functools.wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        asyncio.run(test(*args, **kwargs))

    return run


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(LIMIT_S):
        while not condition():  # noqa: ASYNC110 - any condition, of objects that know no events
            await asyncio.sleep(0.01)


class Mirror:
    """What a router that follows the instance believes."""

    def __init__(self, address: str) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.SUB)
        self._socket.subscribe(TOPIC)
        self._socket.connect(address)
        self.seqs: list[int] = []
        self.held: set[int] = set()

    def listen(self) -> None:
        while self._socket.poll(0):
            seq, batch = decode_frames(self._socket.recv_multipart())
            self.seqs.append(seq)
            self.held = replay(batch.events, self.held)

    def close(self) -> None:
        self._context.destroy(0)


def replay(events: Sequence[Event], held: set[int] | None = None) -> set[int]:
    now = set(held or ())
    for event in events:
        if isinstance(event, BlockStored):
            now.update(event.block_hashes)
        elif isinstance(event, BlockRemoved):
            now.difference_update(event.block_hashes)
        else:
            now.clear()
    return now


async def snapshot_of(residency: AllRanks | OneRank) -> set[int]:
    return replay(decode_snapshot(await residency.snapshot()).events)


async def until_snapshot(residency: AllRanks, expected: set[int]) -> None:
    async with asyncio.timeout(LIMIT_S):
        while await snapshot_of(residency) != expected:  # noqa: ASYNC110 - another thread's
            await asyncio.sleep(0.01)


def shorts(keys: Sequence[PageKey]) -> set[int]:
    return {int(short_key(key)) for key in keys}


@asynccontextmanager
async def followed(config: InstanceConfig, ranks: int) -> AsyncIterator[AllRanks]:
    residency = AllRanks(config, ranks)
    await residency.start()
    try:
        yield residency
    finally:
        await residency.stop()
        assert not residency._thread.is_alive()


# -- real ranks --


def put(pool: MemPool, keys: Sequence[PageKey]) -> None:
    with pool.prepare_store(keys) as store:
        for _, block in store.missing:
            ctypes.memset(pool.address(block), 7, 1)
        store.commit()


@pytest.fixture
def pools(config: InstanceConfig) -> Iterator[list[MemPool]]:
    """The pools of two ranks of one instance, each with its agent."""
    with ExitStack() as stack:
        made = []
        for rank in range(2):
            space = namespace(rank, 2)
            pool = MemPool(space, arena_bytes=16 * space.block_bytes, generation="g1")
            stack.callback(pool.close)
            agent = RankAgent(
                pool,
                LoopbackTransport(f"residency-{rank}"),
                namespace=space,
                instance_id=config.url,
                generation=config.generation,
                rank=rank,
                host="127.0.0.1",
                local_path=config.rank_socket(rank),
            )
            stack.enter_context(agent)
            made.append(pool)
        yield made


@on_a_loop
async def test_a_page_counts_when_every_rank_has_it(
    config: InstanceConfig, pools: list[MemPool]
) -> None:
    put(pools[0], KEYS[:3])
    async with followed(config, 2) as residency:
        mirror = Mirror(await residency.events_address())
        try:
            put(pools[1], KEYS[:2])
            await until_snapshot(residency, shorts(KEYS[:2]))
            # Subscribed by now or not, what comes later shows that it is.
            async with asyncio.timeout(LIMIT_S):
                while not mirror.seqs:
                    pools[1].delete(KEYS[1:2])
                    put(pools[1], KEYS[:2])
                    await asyncio.sleep(0.05)
                    mirror.listen()
            mirror.held = shorts(KEYS[:2])
            put(pools[1], KEYS[:4])
            await until_snapshot(residency, shorts(KEYS[:3]))
            pools[0].delete(KEYS[1:3])
            gone_on_one = shorts([KEYS[0]])
            await until_snapshot(residency, gone_on_one)

            def caught_up() -> bool:
                mirror.listen()
                return mirror.held == gone_on_one

            await until(caught_up)
            assert mirror.seqs == list(range(mirror.seqs[0], mirror.seqs[-1] + 1))
            assert await residency.last_seq() == mirror.seqs[-1]
            stats = await residency.stats()
            assert stats["residency_pages"] == 1
            assert stats["residency_gaps_total"] == stats["residency_failures_total"] == 0
        finally:
            mirror.close()
    with pytest.raises(PeerUnreachable):
        await residency.snapshot()


@on_a_loop
async def test_one_rank_speaks_for_itself(config: InstanceConfig, pools: list[MemPool]) -> None:
    client = LocalClient(config.rank_socket(0))
    try:
        alone = residency_of(config, [client])
        assert isinstance(alone, OneRank)
        await alone.start()
        put(pools[0], KEYS[:2])
        assert await snapshot_of(alone) == shorts(KEYS[:2])
        assert await alone.last_seq() == decode_snapshot(await alone.snapshot()).seq == 0
        assert (await alone.events_address()).startswith("tcp://127.0.0.1:")
        assert await alone.stats() == {}
        await alone.stop()
    finally:
        client.close()
    assert isinstance(residency_of(config, [client, client]), AllRanks)


# -- ranks that misbehave --


@dataclass
class LyingRank:
    """A rank as the HTTP process sees it, that loses and garbles what the test says."""

    rank: int
    generation: str = "g1"
    seq: int = -1
    held: list[Event] = field(default_factory=list)
    answers: bool = True
    snapshots: int = 0
    _context: zmq.asyncio.Context = field(default_factory=zmq.asyncio.Context)

    def __post_init__(self) -> None:
        self._pub = self._context.socket(zmq.PUB)
        self._port = self._pub.bind_to_random_port("tcp://127.0.0.1")
        self._router = self._context.socket(zmq.ROUTER)

    async def serve(self, path: Path) -> None:
        self._router.bind(f"ipc://{path}")
        while True:
            asker, request_id, data = await self._router.recv_multipart()
            if self.answers:
                await self._router.send_multipart(
                    [asker, request_id, encode(self.answer(decode(data)))]
                )

    def answer(self, asked: Message) -> Message:
        match asked:
            case InfoRequest():
                here = f"tcp://127.0.0.1:{self._port}"
                return InfoReply(self.rank, "g1", namespace(self.rank, 2), "", here, 16)
            case SnapshotRequest():
                self.snapshots += 1
                snapshot = Snapshot(self.generation, self.seq, self.held)
                return SnapshotReply(encode_snapshot(snapshot))
            case _:
                return StatsReply({"event_seq": float(self.seq)})

    async def store(self, *pages: int, lost: bool = False) -> None:
        event = BlockStored(list(pages), None, [], 16, medium=DRAM)
        self.seq += 1
        self.held.append(event)
        if not lost:
            await self._pub.send_multipart(
                encode_frames(self.seq, EventBatch(time.time(), [event]))
            )

    async def garble(self) -> None:
        self.seq += 1
        await self._pub.send_multipart([TOPIC, self.seq.to_bytes(8, "big"), b"\xc1"])

    def close(self) -> None:
        self._context.destroy(0)


@asynccontextmanager
async def two_ranks(config: InstanceConfig) -> AsyncIterator[tuple[LyingRank, LyingRank]]:
    pair = LyingRank(0), LyingRank(1)
    tasks = [asyncio.create_task(r.serve(config.rank_socket(r.rank))) for r in pair]
    try:
        yield pair
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for rank in pair:
            rank.close()


@on_a_loop
async def test_lost_batches_are_made_up_for(config: InstanceConfig) -> None:
    async with two_ranks(config) as (first, second), followed(config, 2) as residency:
        await until(lambda: first.snapshots > 0 < second.snapshots)
        await first.store(1, lost=True)
        await first.store(2)
        await second.store(1, 2)
        await until_snapshot(residency, {1, 2})
        # The last batch is lost: nothing on the stream will show it.
        await first.store(3)
        await second.store(3, lost=True)
        await until_snapshot(residency, {1, 2, 3})
        await first.garble()
        await first.store(4)
        await second.store(4)
        await until_snapshot(residency, {1, 2, 3, 4})
        stats = await residency.stats()
        assert stats["residency_failures_total"] >= 2
        assert stats["residency_gaps_total"] >= 1


@on_a_loop
async def test_a_rank_that_comes_late(config: InstanceConfig) -> None:
    async with followed(config, 2) as residency:
        assert await snapshot_of(residency) == set()
        async with two_ranks(config) as (first, second):
            await first.store(5)
            await second.store(5)
            await until_snapshot(residency, {5})


@on_a_loop
async def test_a_rank_that_falls_silent_is_believed_until_it_speaks(
    config: InstanceConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rank_feed, "CALL_S", 0.2)
    async with two_ranks(config) as (first, second), followed(config, 2) as residency:
        for rank in (first, second):
            await rank.store(5)
        await until_snapshot(residency, {5})
        second.answers = False
        for rank in (first, second):
            await rank.store(6, lost=True)
        await until_failures(residency, 1)
        assert await snapshot_of(residency) == {5}
        second.answers = True
        await until_snapshot(residency, {5, 6})


@on_a_loop
async def test_another_boot_behind_the_socket_is_not_believed(config: InstanceConfig) -> None:
    async with two_ranks(config) as (first, second), followed(config, 2) as residency:
        await first.store(5)
        second.generation = "other"
        await second.store(5)
        await until_failures(residency, 1)
        assert await snapshot_of(residency) == set()


async def until_failures(residency: AllRanks, count: int) -> None:
    async with asyncio.timeout(LIMIT_S):
        while (await residency.stats())["residency_failures_total"] < count:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
