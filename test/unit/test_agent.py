"""What a rank agent says of itself, its own faults, and the client of its local socket."""

from __future__ import annotations

import asyncio
import re
import secrets
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
import zmq
from sglang_memserve.errors import ConfigError, LimitExceeded, PeerUnreachable, ProtocolError
from sglang_memserve.mempool import MemPool
from sglang_memserve.protocol import events
from sglang_memserve.protocol.control import (
    ErrorReply,
    FetchReply,
    FetchRequest,
    InfoReply,
    InfoRequest,
    ReleaseReply,
    SnapshotReply,
    SnapshotRequest,
)
from sglang_memserve.transfer.agent import RankAgent
from sglang_memserve.transfer.client import LocalClient
from sglang_memserve.transfer.loopback import LoopbackTransport
from unit.agents import (
    BLOCK,
    KEYS,
    LIMIT_S,
    NAMESPACE,
    Rank,
    put,
    until,
)

# -- what the HTTP process asks, and the events --


def test_info_stats_and_socket_permissions(ranks: Callable[..., Rank]) -> None:
    rank = ranks()
    info = rank.ask(InfoRequest())
    assert info == InfoReply(
        0, rank.generation, NAMESPACE, rank.agent.peer_address, rank.agent.events_address, 64
    )
    assert stat.S_IMODE(rank.path.stat().st_mode) == 0o600
    values = rank.stats()
    assert values["total_blocks"] == 64 and values["transfer_fetches_total"] == 0
    assert all(isinstance(value, int | float) for value in values.values())
    rank.agent.close()
    assert not rank.path.exists() and not rank.agent.alive
    rank.agent.close()


def test_events_and_the_snapshot_agree(ranks: Callable[..., Rank]) -> None:
    rank = ranks()
    context = zmq.Context()
    sub = context.socket(zmq.SUB)
    try:
        sub.rcvtimeo = int(LIMIT_S * 1000)
        sub.setsockopt(zmq.SUBSCRIBE, b"")
        sub.connect(rank.agent.events_address)

        def subscribed() -> bool:
            # Each try writes an event, until the subscription is known at the other end.
            rank.pool.clear()
            return bool(sub.poll(50))

        until(subscribed)
        put(rank.pool, KEYS[:4])
        rank.pool.delete(KEYS[3:4])
        reply = rank.ask(SnapshotRequest())
        assert isinstance(reply, SnapshotReply)
        snapshot = events.decode_snapshot(reply.snapshot)
        assert snapshot.generation == rank.generation
        seen: list[int] = []
        stored: list[int] = []
        while not seen or seen[-1] < snapshot.seq:
            seq, batch = events.decode_frames(sub.recv_multipart())
            seen.append(seq)
            for event in batch.events:
                match event:
                    case events.BlockStored():
                        stored.extend(event.block_hashes)
                    case events.BlockRemoved():
                        stored = [short for short in stored if short not in event.block_hashes]
                    case events.AllBlocksCleared():
                        stored.clear()
        assert seen == list(range(seen[0], snapshot.seq + 1))
        held = [
            short
            for event in snapshot.events
            if isinstance(event, events.BlockStored)
            for short in event.block_hashes
        ]
        assert sorted(stored) == sorted(held) and len(held) == 3
    finally:
        context.destroy(0)


# -- faults of our own --


def test_an_error_in_the_pool_is_answered_and_survived(
    ranks: Callable[..., Rank], monkeypatch: pytest.MonkeyPatch
) -> None:
    rank = ranks()

    def broken() -> object:
        raise RuntimeError("a bug")

    monkeypatch.setattr(rank.pool, "snapshot", broken)
    reply = rank.ask(SnapshotRequest())
    assert isinstance(reply, ErrorReply) and "RuntimeError: a bug" in reply.message
    assert rank.agent.alive and rank.stats()["transfer_internal_errors_total"] == 1


def test_an_agent_that_fails_for_ever_gives_up(
    ranks: Callable[..., Rank], monkeypatch: pytest.MonkeyPatch
) -> None:
    rank = ranks()

    def broken() -> int:
        raise RuntimeError("a bug")

    monkeypatch.setattr(rank.pool, "expire", broken)
    until(lambda: not rank.agent.alive)
    with pytest.raises(PeerUnreachable):
        rank.agent.fetch(FetchRequest.of("p", "tcp://127.0.0.1:1", [], 0.0, 1.0)).result(LIMIT_S)


def test_what_cannot_start_says_so(folder: Path) -> None:
    pool = MemPool(NAMESPACE, arena_bytes=BLOCK, generation="g")

    def agent(**changes: object) -> RankAgent:
        options: dict[str, object] = {"host": "127.0.0.1", "local_path": folder / "s", **changes}
        return RankAgent(
            pool,
            LoopbackTransport(secrets.token_hex(6)),
            namespace=NAMESPACE,
            instance_id="i",
            generation="g",
            rank=0,
            **options,  # type: ignore[arg-type]
        )

    for changes in (
        {"host": "192.0.2.1"},
        {"host": "no.such.host.invalid"},
        {"local_path": folder / ("x" * 120)},
    ):
        failing = agent(**changes)
        with pytest.raises(ConfigError):
            failing.start()
        assert not failing.alive
        failing.close()
    with pytest.raises(ConfigError, match="advertise"):
        agent(host="0.0.0.0")
    with agent(host="localhost") as running:
        # Others are told the address: nobody has to look a name up.
        assert re.match(r"tcp://(127\.0\.0\.1|\[::1\]):", running.peer_address)
    pool.close()


# -- the client --


def test_the_client_calls_concurrently_and_raises_typed_errors(two: tuple[Rank, Rank]) -> None:
    holder, reader = two
    put(holder.pool, KEYS)
    address = holder.agent.peer_address

    async def talk() -> None:
        client = LocalClient(reader.path)
        try:
            waiting = asyncio.create_task(
                client.call(FetchRequest.of("p", address, [bytes(32)], 0.5, 5.0), LIMIT_S)
            )
            complete = await client.call(
                FetchRequest.of("p", address, list(KEYS), 0.0, 5.0), LIMIT_S
            )
            assert isinstance(complete, FetchReply) and complete.outcome == "complete"
            assert isinstance(await client.call(InfoRequest(), LIMIT_S), InfoReply)
            assert not waiting.done()
            missed = await waiting
            assert isinstance(missed, FetchReply) and missed.outcome == "miss"
            with pytest.raises(ProtocolError, match="not for a local socket"):
                await client.call(ReleaseReply(True), LIMIT_S)
            with pytest.raises(LimitExceeded):
                await client.call(FetchRequest.of("p", address, [], 0.0, 1e6), LIMIT_S)
            with pytest.raises(ProtocolError):
                await client.call(InfoRequest(), float("inf"))
        finally:
            client.close()
            client.close()

    asyncio.run(talk())


def test_the_client_gives_up_and_returns_with_the_rank(folder: Path) -> None:
    async def talk() -> None:
        client = LocalClient(folder / "absent.sock")
        with pytest.raises(PeerUnreachable):
            await client.call(InfoRequest(), 0.1)
        hanging = asyncio.create_task(client.call(InfoRequest(), LIMIT_S))
        await asyncio.sleep(0.05)
        client.close()
        with pytest.raises(PeerUnreachable):
            await hanging

    asyncio.run(talk())
