"""One rank as a process of its own: a MemPool and an agent over NIXL, told what to do over a pipe.

``main`` runs in the child. A command is a pair (name, arguments); the answer is ("ok", value) or
("error", text). It ends when the pipe does, so it never outlives the test.
"""

from __future__ import annotations

import asyncio
import ctypes
import hashlib
import os
import tempfile
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from numpy.typing import NDArray
from sglang_memserve.config import Limits
from sglang_memserve.mempool import MemPool, PoolLease
from sglang_memserve.protocol.control import (
    FetchReply,
    FetchRequest,
    Source,
    StatsReply,
    StatsRequest,
)
from sglang_memserve.transfer.agent import RankAgent
from sglang_memserve.transfer.base import Transport
from sglang_memserve.transfer.client import LocalClient
from sglang_memserve.transfer.faulty import Faults, FaultyTransport
from sglang_memserve.transfer.nixl import NixlTransport
from sglang_memserve.transfer.port import FetchSettings
from sglang_memserve.types import Checksums, Namespace, PageKey

# SmolLM2-135M in bf16: 368,640 bytes a page, so that a read of some hundred lasts a while.
NAMESPACE = Namespace("faults", "1", "bfloat16", 16, 30, 3, 64, 64, 0, 1)
_COMMAND_LIMIT_S = 120.0


@dataclass(frozen=True, slots=True)
class Setup:
    """``environment`` is set before NIXL is imported: it picks UCX's transports."""

    name: str
    generation: str
    blocks: int
    environment: Mapping[str, str]
    peer_port: int = 0
    faults: Faults | None = None
    checksums: Checksums = Checksums.OFF
    reply_timeout_s: float = 5.0
    lease_ttl_s: float = 30.0


def page_keys(chain: str, pages: int) -> list[PageKey]:
    return [PageKey(hashlib.sha256(f"{chain}/{page}".encode()).digest()) for page in range(pages)]


def page_bytes(key: PageKey) -> NDArray[np.uint64]:
    """What the page named ``key`` holds, the same in every process."""
    words = np.arange(NAMESPACE.block_bytes // 8, dtype=np.uint64)
    return words + np.uint64(int.from_bytes(key[:7], "little"))


class Rank:
    def __init__(self, setup: Setup, folder: Path) -> None:
        self.pool = MemPool(
            NAMESPACE,
            arena_bytes=setup.blocks * NAMESPACE.block_bytes,
            generation=setup.generation,
            checksums=setup.checksums,
        )
        limits = Limits(
            lease_ttl_s=setup.lease_ttl_s,
            connect_timeout_s=setup.reply_timeout_s,
            # Links to peers that are not used go soon, so that a test can see whether all went.
            peer_idle_s=0.5,
        )
        transport: Transport = NixlTransport(setup.generation)
        if setup.faults is not None:
            transport = FaultyTransport(transport, setup.faults, seed=0)
        self._local_path = folder / "rank.sock"
        self.agent = RankAgent(
            self.pool,
            transport,
            namespace=NAMESPACE,
            instance_id=f"http://{setup.name}",
            generation=setup.generation,
            rank=0,
            host="127.0.0.1",
            peer_port=setup.peer_port,
            local_path=self._local_path,
            settings=replace(FetchSettings.of(limits), grace_s=0.05),
            limits=limits,
        )
        self._fetch: Future[FetchReply] | None = None
        self._leases: list[PoolLease] = []
        self.agent.start()

    def address(self) -> str:
        return self.agent.peer_address

    def fill(self, chain: str, pages: int, first: int = 0) -> int:
        """Pages ``first`` to ``pages - 1`` of a chain, with their own bytes; how many were new."""
        keys = page_keys(chain, pages)
        parent = keys[first - 1] if first else None
        with self.pool.prepare_store(keys[first:], parent=parent) as store:
            for index, block in store.missing:
                self._words(block)[:] = page_bytes(keys[first + index])
            store.commit(checksums=self.pool.compute_checksums([b for _, b in store.missing]))
            return len(store.missing)

    def begin_fetch(
        self, peers: Sequence[str], chain: str, pages: int, wait_s: float, deadline_s: float
    ) -> None:
        keys = [bytes(key) for key in page_keys(chain, pages)]
        sources = [Source(f"http://{peer}", peer) for peer in peers]
        request = FetchRequest(sources, keys, wait_s, deadline_s)
        self._fetch = self.agent.fetch(request)

    def end_fetch(self, limit_s: float) -> dict[str, Any]:
        assert self._fetch is not None
        reply = self._fetch.result(limit_s)
        return {
            "outcome": reply.outcome,
            "readable": reply.readable_pages,
            "fetched": reply.fetched_pages,
            "seconds": reply.seconds,
        }

    def wrong_pages(self, chain: str, pages: int) -> list[int]:
        """Readable pages whose bytes are not their own. None, whatever happened before."""
        keys = page_keys(chain, pages)
        wrong = []
        for page, key in enumerate(keys):
            lease = self.pool.acquire([key], owner="test", ttl_s=30.0)
            for block in lease.blocks:
                if not np.array_equal(self._words(block), page_bytes(key)):
                    wrong.append(page)
            lease.release()
        return wrong

    def readable(self, chain: str, pages: int) -> int:
        return self.pool.readable_pages(page_keys(chain, pages))

    def flip_a_byte(self, chain: str, page: int) -> None:
        """As memory that fails would: nothing is told of it."""
        (block,) = self.pool.match([page_keys(chain, page + 1)[page]])
        byte = ctypes.c_uint8.from_address(self.pool.address(block) + 12_345)
        byte.value ^= 0x10

    def pin(self, chain: str, pages: int) -> int:
        lease = self.pool.acquire(page_keys(chain, pages), owner="test", ttl_s=60.0)
        self._leases.append(lease)
        return len(lease.blocks)

    def unpin(self) -> None:
        while self._leases:
            self._leases.pop().release()

    def clear(self) -> None:
        self.pool.clear()

    def state(self) -> dict[str, float]:
        """Raises AssertionError where an invariant of the pool does not hold."""
        self.pool.check()
        # Counted before the agent is asked, which takes sockets that end a little later.
        sockets = len(self.sockets())
        return {
            **asyncio.run(self._stats()),
            "threads": len(os.listdir("/proc/self/task")),
            "sockets": sockets,
            "alive": float(self.agent.alive),
        }

    def sockets(self) -> list[str]:
        return sorted(map(str, psutil.Process().net_connections("all")))

    async def _stats(self) -> dict[str, float]:
        client = LocalClient(self._local_path)
        try:
            reply = await client.call(StatsRequest(), 10.0)
        finally:
            client.close()
        assert isinstance(reply, StatsReply), reply
        return reply.values

    def close(self) -> None:
        self.unpin()
        self.agent.close()
        self.pool.close()

    def _words(self, block: int) -> NDArray[np.uint64]:
        words: NDArray[np.uint64] = self.pool.arena.view[block].view(np.uint64)
        return words


def main(setup: Setup, pipe: Connection) -> None:
    os.environ.update(setup.environment)
    with tempfile.TemporaryDirectory(prefix="memserve-") as folder:
        rank = Rank(setup, Path(folder))
        pipe.send(("ok", None))
        try:
            _serve(rank, pipe)
        finally:
            rank.close()
    assert threading.active_count() == 1, threading.enumerate()


def _serve(rank: Rank, pipe: Connection) -> None:
    while pipe.poll(_COMMAND_LIMIT_S):
        try:
            name, arguments = pipe.recv()
        except EOFError:
            return
        if name == "quit":
            return
        try:
            pipe.send(("ok", getattr(rank, name)(**arguments)))
        except Exception as error:  # noqa: BLE001 - the test shall see it
            pipe.send(("error", f"{type(error).__name__}: {error}"))
