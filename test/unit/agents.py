"""Rank agents with pools of their own in one process, and a stranger that asks them anything."""

from __future__ import annotations

import ctypes
import hashlib
import secrets
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from multiprocessing.connection import Connection
from pathlib import Path

import zmq
from msgspec.structs import replace
from sglang_memserve.config import Limits
from sglang_memserve.mempool import MemPool
from sglang_memserve.protocol.control import (
    FetchReply,
    FetchRequest,
    Message,
    Source,
    StatsReply,
    StatsRequest,
    decode,
    encode,
)
from sglang_memserve.transfer.agent import RankAgent
from sglang_memserve.transfer.base import Transport
from sglang_memserve.transfer.nixl import NixlTransport
from sglang_memserve.transfer.offer import Offers
from sglang_memserve.transfer.port import FetchSettings
from sglang_memserve.types import Checksums, Namespace, PageKey

NAMESPACE = Namespace("m", "1", "float16", 16, 2, 2, 64, 64, 0, 1)
BLOCK = NAMESPACE.block_bytes
KEYS = [PageKey(hashlib.sha256(b"page %d" % index).digest()) for index in range(40)]
LIMIT_S = 20.0

MakeTransport = Callable[[str], Transport]


def content(key: bytes) -> bytes:
    return hashlib.shake_128(key).digest(BLOCK)


def put(pool: MemPool, keys: Sequence[PageKey]) -> None:
    with pool.prepare_store(keys) as store:
        for index, block in store.missing:
            ctypes.memmove(pool.address(block), content(keys[index]), BLOCK)
        store.commit(checksums=pool.compute_checksums([block for _, block in store.missing]))


def holds(pool: MemPool, keys: Sequence[PageKey]) -> bool:
    blocks = pool.match(keys)
    found = [ctypes.string_at(pool.address(block), BLOCK) for block in blocks]
    return found == [content(key) for key in keys]


def readable(pool: MemPool, pages: int) -> bool:
    return pool.readable_pages(KEYS) == pages


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)


class Rank:
    def __init__(
        self,
        folder: Path,
        make: MakeTransport,
        *,
        blocks: int = 64,
        namespace: Namespace = NAMESPACE,
        limits: Limits | None = None,
        settings: FetchSettings | None = None,
        checksums: Checksums = Checksums.OFF,
        offers: Offers = Offers.REFUSED,
    ) -> None:
        self.generation = f"g-{secrets.token_hex(6)}"
        self.path = folder / f"{self.generation}.sock"
        self.pool = MemPool(
            namespace,
            arena_bytes=blocks * namespace.block_bytes,
            generation=self.generation,
            checksums=checksums,
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
            settings=settings,
            limits=limits,
            offers=offers,
        )
        self.agent.start()

    def close(self) -> None:
        self.agent.close()
        self.pool.close()

    def start(
        self, other: Rank, keys: Sequence[bytes], wait_s: float = 0.0, deadline_s: float = 10.0
    ) -> Future[FetchReply]:
        address = other.agent.peer_address
        return self.agent.fetch(FetchRequest.of("peer", address, list(keys), wait_s, deadline_s))

    def fetch_and_hold(self, other: Rank, keys: Sequence[bytes], hold_s: float) -> FetchReply:
        wanted = FetchRequest.of("peer", other.agent.peer_address, list(keys), 0.0, 10.0)
        return self.agent.fetch(replace(wanted, hold_s=hold_s)).result(LIMIT_S)

    def fetch(
        self, other: Rank, keys: Sequence[bytes], wait_s: float = 0.0, deadline_s: float = 10.0
    ) -> FetchReply:
        return self.start(other, keys, wait_s, deadline_s).result(LIMIT_S)

    def source(self, first_page: int = 0, pages: int = 0) -> Source:
        return Source(self.generation, self.agent.peer_address, first_page, pages)

    def start_from(
        self, sources: Sequence[Source], wait_s: float = 0.0, deadline_s: float = 10.0
    ) -> Future[FetchReply]:
        """All of KEYS."""
        return self.agent.fetch(FetchRequest(list(sources), list(KEYS), wait_s, deadline_s))

    def fetch_from(
        self, sources: Sequence[Source], wait_s: float = 0.0, deadline_s: float = 10.0
    ) -> FetchReply:
        return self.start_from(sources, wait_s, deadline_s).result(LIMIT_S)

    def stats(self) -> dict[str, float]:
        reply = self.ask(StatsRequest())
        assert isinstance(reply, StatsReply)
        return reply.values

    def ask(self, message: Message) -> Message:
        with Asker(f"ipc://{self.path}") as asker:
            return asker.ask(message)


class Asker:
    """A stranger with a DEALER socket."""

    def __init__(self, address: str) -> None:
        self.context = zmq.Context()
        self.socket = self.context.socket(zmq.DEALER)
        self.socket.linger = 0
        self.socket.rcvtimeo = int(LIMIT_S * 1000)
        self.socket.connect(address)

    def __enter__(self) -> Asker:
        return self

    def __exit__(self, *_: object) -> None:
        self.context.destroy(0)

    def ask(self, message: Message) -> Message:
        request_id = secrets.token_bytes(8)
        self.socket.send_multipart([request_id, encode(message)])
        frames = self.socket.recv_multipart()
        assert frames[0] == request_id
        return decode(frames[1])

    def post(self, message: Message) -> None:
        """Ask without waiting for the answer."""
        self.socket.send_multipart([secrets.token_bytes(8), encode(message)])

    def drain(self, message: Message) -> None:
        """Read answers up to the one to ``message``, whatever it is."""
        request_id = b"the last"
        self.socket.send_multipart([request_id, encode(message)])
        while self.socket.recv_multipart()[0] != request_id:
            pass


def receive_offers(pipe: Connection) -> None:
    """A process of its own: takes one offer and says whether all its pages arrived."""
    with tempfile.TemporaryDirectory(prefix="ms-") as folder:
        rank = Rank(Path(folder), NixlTransport, offers=Offers.TAKEN)
        pipe.send(rank.agent.peer_address)
        if pipe.poll(LIMIT_S):
            pages = pipe.recv()
            pipe.send(holds(rank.pool, KEYS[:pages]))
            pipe.poll(LIMIT_S)
        rank.close()
