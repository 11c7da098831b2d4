"""What a rank agent refuses before it runs, and what it leaves behind when it does not."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import secrets
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from sglang_memserve.errors import ConfigError, LimitExceeded
from sglang_memserve.mempool import MAX_SUBSCRIBERS, MemPool
from sglang_memserve.protocol.control import FetchRequest, InfoReply, InfoRequest
from sglang_memserve.transfer.agent import RankAgent
from sglang_memserve.transfer.client import LocalClient
from sglang_memserve.transfer.loopback import LoopbackTransport
from unit.agents import BLOCK, KEYS, LIMIT_S, NAMESPACE, put

Make = Callable[..., RankAgent]


@pytest.fixture
def pool() -> MemPool:
    return MemPool(NAMESPACE, arena_bytes=8 * BLOCK, generation="g")


@pytest.fixture
def make(pool: MemPool, folder: Path) -> Make:
    def agent(**changes: object) -> RankAgent:
        options: dict[str, object] = {
            "pool": pool,
            "transport": LoopbackTransport(secrets.token_hex(6)),
            "namespace": NAMESPACE,
            "instance_id": "i",
            "generation": "g",
            "rank": 0,
            "host": "127.0.0.1",
            "local_path": folder / "s",
            **changes,
        }
        return RankAgent(**options)  # type: ignore[arg-type]

    return agent


@pytest.mark.parametrize("port", [-1, 65_536, 70_000])
def test_ports_that_are_none(make: Make, port: int) -> None:
    with pytest.raises(ConfigError, match=f"peer_port {port}"):
        make(peer_port=port)


def test_a_namespace_other_than_the_pools(make: Make) -> None:
    other = dataclasses.replace(NAMESPACE, num_layers=NAMESPACE.num_layers + 1)
    with pytest.raises(ConfigError, match="the pool holds pages of"):
        make(namespace=other)


def test_the_socket_of_an_agent_that_runs(make: Make, folder: Path) -> None:
    other_pool = MemPool(NAMESPACE, arena_bytes=BLOCK, generation="h")
    with make() as running:
        second = make(pool=other_pool, generation="h")
        with pytest.raises(ConfigError, match="another process listens"):
            second.start()

        async def ask() -> object:
            client = LocalClient(folder / "s")
            try:
                return await client.call(InfoRequest(), LIMIT_S)
            finally:
                client.close()

        info = asyncio.run(ask())
        assert isinstance(info, InfoReply) and info.generation == "g" and running.alive


def test_the_socket_of_a_process_that_is_gone(make: Make, folder: Path) -> None:
    left = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    left.bind(os.fspath(folder / "s"))
    left.close()
    with make() as running:
        assert running.alive


def test_whatever_else_lies_there(make: Make, folder: Path) -> None:
    (folder / "s").write_text("precious")
    with pytest.raises(ConfigError, match="no socket"):
        make().start()
    assert (folder / "s").read_text() == "precious"
    with pytest.raises(ConfigError, match="no folder"):
        make(local_path=folder / "none" / "none" / "s").start()
    assert not (folder / "none").exists()
    with make(local_path=folder / "one" / "s") as running:
        assert running.alive


def test_a_start_that_fails_leaves_nothing(make: Make, pool: MemPool, folder: Path) -> None:
    class Broken(LoopbackTransport):
        def metadata(self) -> bytes:
            raise RuntimeError("a bug")

    def open_files() -> int:
        return len(os.listdir("/proc/self/fd"))

    cases: list[tuple[type[LoopbackTransport], str]]
    cases = [(Broken, "127.0.0.1"), (LoopbackTransport, "192.0.2.1")]
    for transport, host in cases:
        before = open_files()
        agent = make(transport=transport("t"), host=host)
        with pytest.raises(ConfigError):
            agent.start()
        del agent
        assert open_files() == before
    assert not (folder / "s").exists()
    assert pool.resize(16 * BLOCK).total_blocks == 16


def test_a_pool_that_takes_no_more_subscribers(make: Make, pool: MemPool, folder: Path) -> None:
    for _ in range(MAX_SUBSCRIBERS):
        pool.subscribe(lambda: None)
    with pytest.raises(LimitExceeded):
        make().start()
    assert not (folder / "s").exists()
    assert pool.resize(16 * BLOCK).total_blocks == 16


def test_any_number_of_agents_one_after_the_other(make: Make, pool: MemPool) -> None:
    for _ in range(MAX_SUBSCRIBERS + 1):
        with make() as running:
            assert running.alive
    assert pool.resize(16 * BLOCK).total_blocks == 16


def test_ranks_on_ipv6(make: Make, pool: MemPool, folder: Path) -> None:
    other_pool = MemPool(NAMESPACE, arena_bytes=8 * BLOCK, generation="h")
    put(pool, KEYS[:2])
    with (
        make(host="::1") as holder,
        make(host="::1", pool=other_pool, generation="h", local_path=folder / "t") as reader,
    ):
        assert holder.peer_address.startswith("tcp://[::1]:")
        request = FetchRequest.of("i", holder.peer_address, list(KEYS[:2]), 0.0, LIMIT_S)
        assert reader.fetch(request).result(LIMIT_S).outcome == "complete"
