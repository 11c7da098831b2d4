"""Instances that lie about what they hold: the tree stays whole, and right about the others."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import msgspec
import pytest
import zmq
from sglang_memserve.hashing import page_keys, short_key
from sglang_memserve.protocol.events import TOPIC, Snapshot, encode_snapshot
from sglang_memserve.protocol.http import InstanceInfo
from sglang_memserve.types import Role
from simulation.router_machines import PAGE, WAIT_S, Asked, Line, Machine, Router, router_over

PROMPT = list(range(1, 4 * PAGE + 2))
KEYS = [int(short_key(key)) for key in page_keys(PROMPT, PAGE)]


def go(scenario: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(scenario, 60))


@dataclass
class Liar(Machine):
    """Publishes what it is told to. Its snapshot is empty, or ``snapshot`` as it is."""

    snapshot: bytes | None = None
    seq: int = -1
    address: str = ""
    socket: Any = field(default=None)

    def bind(self, context: zmq.Context[Any]) -> None:
        self.socket = context.socket(zmq.XPUB)
        self.socket.linger = 0
        port = self.socket.bind_to_random_port("tcp://127.0.0.1")
        self.address = f"tcp://127.0.0.1:{port}"

    def info(self) -> InstanceInfo:
        return replace_address(super().info(), self.address)

    async def _route(self, asked: Asked, line: Line) -> None:
        path = asked.path.split("?")[0]
        if path == "/memserve/stats":
            await line.answer({"event_seq": self.seq, "instance": {}, "ranks": [{}]})
        elif path == "/memserve/snapshot" and self.snapshot is not None:
            await line.answer(self.snapshot, kind="application/msgpack")
        elif path == "/memserve/snapshot":
            empty = Snapshot(self.info().generation, self.seq, [])
            await line.answer(encode_snapshot(empty), kind="application/msgpack")
        else:
            await super()._route(asked, line)

    async def followed(self) -> None:
        """What is published before somebody subscribes is lost."""
        async with asyncio.timeout(WAIT_S):
            while not self.socket.poll(0):  # noqa: ASYNC110 - the other side is a socket
                await asyncio.sleep(0.01)

    def publish(self, *events: object, seq: int | None = None, ts: float | None = None) -> None:
        self.seq += 1
        batch = msgspec.msgpack.encode([time.time() if ts is None else ts, list(events)])
        self.send((self.seq if seq is None else seq).to_bytes(8, "big"), batch)

    def send(self, *frames: bytes) -> None:
        self.socket.send_multipart([TOPIC, *frames])


def replace_address(info: InstanceInfo, address: str) -> InstanceInfo:
    return msgspec.structs.replace(info, events_address=address)


def stored(keys: list[Any], **fields: Any) -> dict[str, Any]:
    event = {
        "type": "BlockStored",
        "block_hashes": keys,
        "parent_block_hash": None,
        "token_ids": [],
        "block_size": PAGE,
        "medium": "CPU_PINNED",
    }
    return {**event, **fields}


@asynccontextmanager
async def fleet(liar: Liar) -> AsyncIterator[tuple[Router, Machine]]:
    """A router over the liar and an honest instance that holds ``PROMPT``."""
    honest = Machine(Role.DECODE, holds=(PROMPT,))
    context: zmq.Context[Any] = zmq.Context()
    liar.bind(context)
    try:
        async with router_over(liar, honest) as router:
            await liar.followed()
            yield router, honest
    finally:
        context.destroy(linger=0)


async def tree(router: Router) -> Any:
    return await (await router.get("/memserve/tree")).json()


async def until(router: Router, condition: Any, what: str) -> Any:
    async with asyncio.timeout(WAIT_S):
        while True:
            dumped = await tree(router)
            if condition(dumped):
                return dumped
            await asyncio.sleep(0.02)
    raise AssertionError(what)


async def still_right(router: Router, honest: Machine) -> None:
    """The honest one's pages are there and found, and requests are served."""
    dumped = await tree(router)
    assert dumped["sources"][honest.url] == "exact"
    assert dumped["held"][honest.url]["dram"] == 4
    response = await router.post("/generate", {"input_ids": PROMPT})
    assert response.status == 200
    assert (await router.get("/metrics")).status == 200


def heard(liar: Liar, snapshots: int) -> Coroutine[Any, Any, list[Asked]]:
    return liar.wait_for("/memserve/snapshot", snapshots)


UNREADABLE = {
    "bytes for keys": [stored([b"x" * 32])],
    "words for keys": [stored(["a1b2"])],
    "fractions for keys": [stored([1.5])],
    "no keys": [{"type": "BlockStored"}],
    "an unknown event": [{"type": "BlockMoved", "block_hashes": [1]}],
    "no events": ["x", 5, None],
    "a page twice": [stored([7, 8, 7])],
    "below itself": [stored([7, 8], parent_block_hash=8)],
}


@pytest.mark.parametrize("events", UNREADABLE.values(), ids=UNREADABLE.keys())
def test_what_cannot_be_true_is_mended_by_a_snapshot(events: list[object]) -> None:
    async def scenario() -> None:
        liar = Liar(Role.DECODE)
        async with fleet(liar) as (router, honest):
            liar.publish(stored([1, 2, 3]))
            await until(router, lambda t: t["held"].get(liar.url, {}).get("dram") == 3, "followed")
            before = len(liar.to("/memserve/snapshot"))
            liar.publish(*events)
            await heard(liar, before + 1)
            # Its snapshot says that it holds nothing.
            await until(router, lambda t: not t["held"].get(liar.url, {}).get("dram"), "mended")
            await still_right(router, honest)

    go(scenario())


ODD = {
    "an unknown medium": [stored([5], medium="TAPE")],
    "keys beyond 63 bits": [stored([2**64 - 1, 2**63])],
    "odd sizes": [stored([5], block_size=-1), stored([6], block_size=2**62)],
    "tokens": [stored([5], token_ids=list(range(10_000)))],
    "no pages": [stored([])],
    "the honest one's pages": [stored(KEYS)],
    "the honest one's pages, gone": [{"type": "BlockRemoved", "block_hashes": KEYS}],
    "the honest one's pages, upside down": [stored(list(reversed(KEYS)))],
    "unknown pages, gone": [{"type": "BlockRemoved", "block_hashes": [1, 1, 2]}],
    "a ring": [stored([5, 6], parent_block_hash=8), stored([7, 8], parent_block_hash=6)],
    "everything, gone": [{"type": "AllBlocksCleared"}],
}


@pytest.mark.parametrize("events", ODD.values(), ids=ODD.keys())
def test_odd_events_do_not_touch_the_others(events: list[object]) -> None:
    async def scenario() -> None:
        liar = Liar(Role.DECODE)
        async with fleet(liar) as (router, honest):
            liar.publish(*events)
            liar.publish(stored([99]))
            await until(router, lambda t: t["sources"][liar.url] in ("exact", "degraded"), "heard")
            await still_right(router, honest)
            # Whatever was made of it, it can be forgotten.
            await router.http.delete(f"{router.url}/workers/{liar.url.replace('/', '%2F')}")
            dumped = await until(router, lambda t: liar.url not in t["held"], "forgotten")
            assert dumped["total_pages"] == 4
            await still_right(router, honest)

    go(scenario())


def test_a_million_fake_pages_do_not_touch_the_others() -> None:
    async def scenario() -> None:
        liar = Liar(Role.DECODE)
        async with fleet(liar) as (router, honest):
            for start in range(0, 1_000_000, 250_000):
                liar.publish(stored(list(range(start, start + 250_000))))
            await until(router, lambda t: t["total_pages"] == 1_000_004, "followed")
            dumped = await router.get("/memserve/tree")
            assert (await dumped.json())["truncated"]
            assert len(await dumped.read()) < 16 * 2**20
            await still_right(router, honest)

    go(scenario())


NUMBERS = {"backwards": 0, "ahead": 10, "the last there is": 2**64 - 1}


@pytest.mark.parametrize("seq", NUMBERS.values(), ids=NUMBERS.keys())
def test_numbers_that_jump_are_mended_by_a_snapshot(seq: int) -> None:
    async def scenario() -> None:
        liar = Liar(Role.DECODE)
        async with fleet(liar) as (router, honest):
            liar.publish(stored([1]))
            liar.publish(stored([2]))
            await until(router, lambda t: t["held"].get(liar.url, {}).get("dram") == 2, "followed")
            before = len(liar.to("/memserve/snapshot"))
            liar.publish(stored([3]), seq=seq)
            await heard(liar, before + 1)
            await until(router, lambda t: t["sources"][liar.url] == "exact", "mended")
            await still_right(router, honest)

    go(scenario())


@pytest.mark.parametrize("ts", [math.nan, math.inf, -1e300, 1e300], ids=str)
def test_clocks_that_are_none_do_not_spoil_the_metrics(ts: float) -> None:
    async def scenario() -> None:
        liar = Liar(Role.DECODE)
        async with fleet(liar) as (router, honest):
            liar.publish(stored([1]), ts=ts)
            await until(router, lambda t: t["held"].get(liar.url, {}).get("dram") == 1, "followed")
            await still_right(router, honest)

    go(scenario())


FRAMES = {
    "one": (b"x",),
    "three": (b"\0" * 8, b"x", b"y"),
    "a short number": (b"\0", b"x"),
    "no msgpack": (b"\0" * 8, b"\xc1" * 100),
    "deep": (b"\0" * 8, b"\x91" * 100_000),
    "a long list that is not there": (b"\0" * 8, b"\x92\xcb" + b"\0" * 8 + b"\xdd\xff\xff\xff\xff"),
}


@pytest.mark.parametrize("frames", FRAMES.values(), ids=FRAMES.keys())
def test_frames_that_are_no_batch(frames: tuple[bytes, ...]) -> None:
    async def scenario() -> None:
        liar = Liar(Role.DECODE)
        async with fleet(liar) as (router, honest):
            liar.publish(stored([1]))
            await until(router, lambda t: t["held"].get(liar.url, {}).get("dram") == 1, "followed")
            before = len(liar.to("/memserve/snapshot"))
            liar.send(*frames)
            await heard(liar, before + 1)
            await until(router, lambda t: t["sources"][liar.url] == "exact", "mended")
            await still_right(router, honest)

    go(scenario())


SNAPSHOTS = {
    "nothing": b"",
    "no msgpack": b"\xc1",
    "an array": msgspec.msgpack.encode([1, 2]),
    "another boot's": encode_snapshot(Snapshot("other", 0, [])),
    "odd numbers": msgspec.msgpack.encode({"generation": "g", "seq": "x", "events": []}),
}


@pytest.mark.parametrize("snapshot", SNAPSHOTS.values(), ids=SNAPSHOTS.keys())
def test_a_snapshot_that_is_none_leaves_the_source_degraded(snapshot: bytes) -> None:
    async def scenario() -> None:
        liar = Liar(Role.DECODE)
        async with fleet(liar) as (router, honest):
            liar.snapshot = snapshot
            liar.publish(stored([1]), seq=50)
            await until(router, lambda t: t["sources"][liar.url] == "degraded", "noticed")
            await still_right(router, honest)

    go(scenario())
