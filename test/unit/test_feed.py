"""The feed against a publisher that the test makes lose, repeat and break what it likes.

Real sockets on 127.0.0.1; conditions are awaited with a deadline, nothing is timed.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import aiohttp
import msgspec
import pytest
import zmq
import zmq.asyncio
from aiohttp import web
from sglang_memserve.protocol import PROTOCOL_VERSION
from sglang_memserve.protocol.events import (
    BlockRemoved,
    BlockStored,
    Event,
    EventBatch,
    Snapshot,
    encode_frames,
    encode_snapshot,
)
from sglang_memserve.protocol.handshake import layout_hash
from sglang_memserve.protocol.http import InstanceInfo, Load, RankInfo
from sglang_memserve.router.members.instances import Instances
from sglang_memserve.router.members.member import State
from sglang_memserve.router.members.polling import Poller
from sglang_memserve.router.tree.feed import Feed, SourceState, SourceStatus
from sglang_memserve.router.tree.metrics import SourceCollector, described
from sglang_memserve.router.tree.reference import GlobalTree
from sglang_memserve.router.tree.source import FULL_S, STALE_S, SnapshotReason
from sglang_memserve.router.tree.trust import TrustedTree
from sglang_memserve.router.values import Match
from sglang_memserve.types import Generation, InstanceId, Namespace, Role, ShortKey

NAMESPACE = Namespace("model", "1", "bfloat16", 16, 30, 3, 64, 64, 0, 1)
DEADLINE_S = 20.0
MOST_PAGES = 50


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not condition():  # noqa: ASYNC110 - any condition, of objects that know no events
            await asyncio.sleep(0.01)


class Clock:
    """The machine's, and what the test adds."""

    ahead_s = 0.0

    def __call__(self) -> float:
        return time.monotonic() + self.ahead_s


@dataclass
class FakeInstance:
    """Publishes events and serves what the router asks of an instance."""

    socket: zmq.asyncio.Socket
    generation: str = "g1"
    memserve: bool = True
    healthy: bool = True
    url: InstanceId = field(default=InstanceId(""))
    events_address: str = ""
    seq: int = -1
    events: list[Event] = field(default_factory=list)
    snapshots: int = 0
    headers: list[str | None] = field(default_factory=list)

    @property
    def info(self) -> InstanceInfo:
        return InstanceInfo(
            protocol=PROTOCOL_VERSION,
            url=self.url,
            generation=self.generation,
            role="both",
            model_path="/models/model",
            served_model_name="model",
            layout_hash=layout_hash(NAMESPACE),
            namespace=NAMESPACE,
            page_size=16,
            context_length=8192,
            max_total_tokens=20000,
            events_address=self.events_address,
            ranks=[RankInfo(0, "tcp://127.0.0.1:1", self.events_address, 100, 1)],
        )

    async def publish(self, *events: Event, send: bool = True) -> None:
        self.seq += 1
        self.events.extend(events)
        if send:
            batch = EventBatch(time.time(), list(events))
            await self.socket.send_multipart(encode_frames(self.seq, batch))

    async def store(
        self,
        *pages: int,
        parent: int | None = None,
        send: bool = True,
        medium: str = "CPU_PINNED",
    ) -> None:
        event = BlockStored(list(pages), parent, [], 16, medium=medium)
        await self.publish(event, send=send)

    async def handle(self, request: web.Request) -> web.StreamResponse:
        self.headers.append(request.headers.get("Authorization"))
        if not self.healthy:
            return web.Response(status=503)
        path = request.path
        if path == "/v1/loads":
            load = {
                "num_running_reqs": 1,
                "num_waiting_reqs": 2,
                "num_used_tokens": 30,
                "max_total_num_tokens": 100,
            }
            return web.json_response({"loads": [load, load]})
        if path == "/get_model_info":
            return web.json_response({"model_path": "/m", "served_model_name": "model"})
        if not self.memserve:
            return web.Response(status=404)
        if path == "/memserve/snapshot":
            self.snapshots += 1
            body = encode_snapshot(Snapshot(self.generation, self.seq, self.events))
            return web.Response(body=body, content_type="application/msgpack")
        if path == "/memserve/info":
            return web.Response(body=msgspec.json.encode(self.info))
        if path == "/memserve/stats":
            return web.json_response({"event_seq": self.seq, "instance": {}, "ranks": [{}]})
        return web.Response(status=404)


@asynccontextmanager
async def fake_instance() -> AsyncIterator[FakeInstance]:
    context = zmq.asyncio.Context()
    socket = context.socket(zmq.PUB)
    socket.setsockopt(zmq.LINGER, 0)
    port = socket.bind_to_random_port("tcp://127.0.0.1")
    fake = FakeInstance(socket, events_address=f"tcp://127.0.0.1:{port}")
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", fake.handle)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    fake.url = InstanceId(f"http://127.0.0.1:{runner.addresses[0][1]}")
    try:
        yield fake
    finally:
        await runner.cleanup()
        socket.close(linger=0)
        context.term()


@dataclass
class Rig:
    fake: FakeInstance
    tree: GlobalTree
    feed: Feed
    session: aiohttp.ClientSession
    states: list[SourceStatus]
    clock: Clock

    @property
    def status(self) -> SourceStatus:
        return next(s for s in self.feed.status() if s.instance == self.fake.url)

    def pages(self, *keys: int) -> int:
        self.tree.check()
        match = self.tree.match([ShortKey(key) for key in keys]).get(self.fake.url)
        return 0 if match is None else match.pages

    def exact(self) -> bool:
        return self.status.state is SourceState.EXACT

    async def connected(self) -> None:
        """Publish until a batch arrives: a subscription takes a moment to reach the publisher."""
        self.feed.joined(self.fake.info)
        async with asyncio.timeout(DEADLINE_S):
            while not self.status.batches:
                await self.fake.publish()
                await asyncio.sleep(0.02)
        await until(lambda: self.exact() and self.status.seq == self.fake.seq)


def with_rig(test: Callable[[Rig], Awaitable[None]]) -> Callable[[], None]:
    async def run() -> None:
        states: list[SourceStatus] = []
        tree, clock = GlobalTree(), Clock()
        async with fake_instance() as fake, aiohttp.ClientSession() as session:
            feed = Feed(
                tree,
                session,
                clock=clock,
                wall_clock=time.time,
                headers={"Authorization": "Bearer key"},
                on_state=states.append,
                most_pages=MOST_PAGES,
            )
            try:
                await test(Rig(fake, tree, feed, session, states, clock))
            finally:
                await feed.close()
        left = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        assert not left, left

    def wrapped() -> None:
        asyncio.run(run())

    wrapped.__name__ = test.__name__
    wrapped.__doc__ = test.__doc__
    return wrapped


@with_rig
async def test_what_was_there_before_and_what_comes_after(rig: Rig) -> None:
    await rig.fake.store(1, 2)
    await rig.connected()
    assert rig.pages(1, 2, 3) == 2
    await rig.fake.store(3, parent=2)
    await until(lambda: rig.pages(1, 2, 3) == 3)
    await rig.fake.publish(BlockRemoved([3], "CPU_PINNED"))
    await until(lambda: rig.pages(1, 2, 3) == 2)
    assert set(rig.fake.headers) == {"Bearer key"}
    assert rig.status.gaps == len([s for s in rig.states if s.state is SourceState.DEGRADED])


@with_rig
async def test_a_gap_is_mended_by_a_snapshot(rig: Rig) -> None:
    await rig.connected()
    gaps = rig.status.gaps
    await rig.fake.store(1, 2, send=False)
    await rig.fake.store(3, parent=2)
    await until(lambda: rig.pages(1, 2, 3) == 3 and rig.exact())
    assert rig.status.gaps == gaps + 1
    assert rig.status.reasons[SnapshotReason.GAP] >= 1
    assert sum(rig.status.reasons.values()) == rig.status.snapshots


@with_rig
async def test_a_smaller_number_is_mended_by_a_snapshot(rig: Rig) -> None:
    await rig.connected()
    gaps = rig.status.gaps
    await rig.fake.publish()
    await until(lambda: rig.status.seq == rig.fake.seq)
    await rig.fake.socket.send_multipart(encode_frames(0, EventBatch(0.0, [])))
    await until(lambda: rig.status.gaps == gaps + 1 and rig.exact())


@with_rig
async def test_an_undecodable_batch_is_mended_by_a_snapshot(rig: Rig) -> None:
    await rig.connected()
    gaps = rig.status.gaps
    frames = encode_frames(rig.fake.seq + 1, EventBatch(0.0, []))
    await rig.fake.socket.send_multipart([*frames[:2], b"\xc1"])
    await until(lambda: rig.status.gaps == gaps + 1 and rig.exact())


@with_rig
async def test_a_lost_last_batch_is_noticed_by_the_heartbeat(rig: Rig) -> None:
    await rig.connected()
    await rig.fake.store(1, 2, send=False)
    rig.feed.beat(rig.fake.url, Generation("another"), rig.fake.seq)
    assert rig.status.known_seq < rig.fake.seq
    rig.feed.beat(rig.fake.url, Generation("g1"), rig.fake.seq)
    await until(lambda: rig.pages(1, 2) == 2 and rig.exact())


@with_rig
async def test_a_failing_snapshot_is_tried_again_and_old_pages_stay(rig: Rig) -> None:
    await rig.connected()
    await rig.fake.store(1, 2)
    await until(lambda: rig.pages(1, 2) == 2)
    rig.fake.healthy = False
    await rig.fake.store(5, send=False)
    await rig.fake.store(6)
    await until(lambda: rig.status.failures >= 2)
    assert rig.status.state is SourceState.DEGRADED
    assert "answered 503" in rig.status.last_error
    assert rig.pages(1, 2) == 2
    rig.fake.healthy = True
    await until(lambda: rig.exact() and rig.pages(5) == 1)


@with_rig
async def test_what_cannot_be_mended_becomes_stale_and_counts_for_nothing(rig: Rig) -> None:
    keys = [ShortKey(key) for key in range(8)]
    trusted = TrustedTree(rig.tree, rig.feed.doubts)
    await rig.connected()
    await rig.fake.store(*range(8))
    await until(lambda: rig.pages(*range(8)) == 8)
    assert trusted.match(keys) == rig.tree.match(keys)
    rig.fake.healthy = False
    await rig.fake.publish(send=False)
    await rig.fake.publish()
    await until(lambda: rig.status.state is SourceState.DEGRADED)
    assert trusted.match(keys)[rig.fake.url].pages == 6
    rig.clock.ahead_s += STALE_S + 1
    await until(lambda: rig.status.state is SourceState.STALE)
    assert trusted.match(keys) == {} and rig.pages(*range(8)) == 8
    rig.fake.healthy = True
    await until(rig.exact)
    assert trusted.match(keys)[rig.fake.url].pages == 8


@with_rig
async def test_no_instance_fills_the_tree(rig: Rig) -> None:
    """What does not fit is left out, whole events of it; what is there stays right."""
    await rig.connected()
    await rig.fake.store(*range(40))
    await rig.fake.store(*range(40, 60), parent=39)
    await rig.fake.store(*range(100, 105), medium="GPU")
    await until(lambda: rig.status.seq == rig.fake.seq)
    assert rig.status.state is SourceState.DEGRADED
    assert rig.status.refused_pages == 20 and "left out" in rig.status.last_error
    assert rig.pages(*range(60)) == 40 and rig.pages(*range(100, 105)) == 5
    assert rig.feed.doubts() == {}, "what is there is so"
    await rig.fake.publish(BlockRemoved(list(range(20, 40)), "CPU_PINNED"))
    await rig.fake.store(*range(200, 205), parent=199)
    await until(lambda: rig.pages(*range(200, 205)) == 5)
    assert rig.pages(*range(60)) == 20 and rig.status.state is SourceState.DEGRADED
    gaps = rig.status.gaps
    rig.clock.ahead_s += FULL_S + 1
    rig.fake.events = [BlockStored(list(range(20)), None, [], 16, medium="CPU_PINNED")]
    await until(rig.exact)
    assert rig.status.reasons[SnapshotReason.FULL] == 1 and rig.status.gaps == gaps
    assert rig.pages(*range(60)) == 20 and rig.pages(*range(100, 105)) == 0


@with_rig
async def test_tiers_come_and_go_by_themselves(rig: Rig) -> None:
    await rig.connected()
    await rig.fake.store(1, 2, 3)
    await rig.fake.store(1, 2, 3, medium="GPU")
    await rig.fake.publish(BlockRemoved([3, 2], "GPU"))
    await until(lambda: rig.status.seq == rig.fake.seq)
    assert rig.tree.match([ShortKey(1), ShortKey(2)])[rig.fake.url] == Match(2, 1, 0)
    await rig.fake.publish(BlockRemoved([3, 2, 1], "CPU_PINNED"))
    await until(lambda: rig.pages(1, 2) == 1)
    assert rig.tree.match([ShortKey(1)])[rig.fake.url] == Match(1, 1, 1)


@with_rig
async def test_the_streams_in_numbers(rig: Rig) -> None:
    await rig.connected()
    await rig.fake.publish(send=False)
    await rig.fake.publish()
    await until(lambda: rig.status.reasons.get(SnapshotReason.GAP, 0) > 0 and rig.exact())
    status = rig.status
    samples = {
        (sample.name, sample.labels.get("reason")): sample.value
        for metric in SourceCollector(rig.feed.status).collect()
        for sample in metric.samples
    }
    assert samples["memserve_event_gap_total", None] == status.gaps
    assert samples["memserve_snapshot_total", "gap"] == status.reasons[SnapshotReason.GAP]
    assert samples["memserve_snapshot_total", "start"] == 1
    assert samples["memserve_event_lag_seconds", None] == status.lag_s
    assert samples["memserve_refused_pages_total", None] == 0
    told = described(status)
    assert told["state"] == "exact" and told["gaps"] == status.gaps
    rig.feed.left(rig.fake.url)
    assert not any(metric.samples for metric in SourceCollector(rig.feed.status).collect())


@with_rig
async def test_another_boot_drops_the_pages_of_the_old_one(rig: Rig) -> None:
    await rig.connected()
    await rig.fake.store(1, 2)
    await until(lambda: rig.pages(1, 2) == 2)
    rig.fake.generation, rig.fake.events, rig.fake.seq = "g2", [], -1
    await rig.fake.store(7)
    await until(lambda: "another boot" in rig.status.last_error)
    assert rig.pages(1, 2) == 0
    rig.feed.joined(rig.fake.info)
    await until(lambda: rig.exact() and rig.pages(7) == 1)
    assert [s.generation for s in rig.feed.status()] == ["g2"]


@with_rig
async def test_leaving_ends_the_source_and_leaves_the_others(rig: Rig) -> None:
    async with fake_instance() as other:
        await other.store(1)
        rig.feed.joined(other.info)
        await rig.connected()
        await rig.fake.store(1)
        await until(lambda: len(rig.tree.match([ShortKey(1)])) == 2)
        rig.feed.left(rig.fake.url)
        rig.feed.left(rig.fake.url)
        assert list(rig.tree.match([ShortKey(1)])) == [other.url]
        await rig.fake.store(2)
        await other.store(3)
        await until(lambda: len(rig.tree.match([ShortKey(3)])) == 1)
        assert rig.tree.match([ShortKey(2)]) == {}


@with_rig
async def test_a_malformed_address_degrades_only_its_source(rig: Rig) -> None:
    rig.fake.events_address = "nonsense"
    rig.feed.joined(rig.fake.info)
    await until(lambda: rig.status.state is SourceState.DEGRADED)
    assert "nonsense" in rig.status.last_error


@with_rig
async def test_listed_urls_are_polled_into_members(rig: Rig) -> None:
    async with fake_instance() as plain:
        plain.memserve = False
        rig.fake.healthy = False
        await rig.fake.store(1, 2)
        instances = Instances(time.monotonic, [rig.feed])
        instances.add_static(rig.fake.url, Role.PREFILL)
        instances.add_static(plain.url)
        polling = asyncio.create_task(Poller(instances, rig.session, interval_s=0.05).run())

        def states() -> list[State]:
            instances.check()
            return [member.state for member in instances.members()]

        await until(lambda: states() == [State.STARTING, State.READY])
        assert "answered 503" in instances.members()[0].last_error
        rig.fake.healthy = True
        await until(lambda: states() == [State.READY, State.READY])
        ours, theirs = instances.members()
        assert ours.role is Role.PREFILL and ours.has_mempool
        assert theirs.role is Role.BOTH and not theirs.has_mempool
        await until(lambda: instances.members()[0].load == Load(2, 4, 60, 200))
        assert instances.members()[1].load == Load(2, 4, 60, 200)
        await until(lambda: rig.pages(1, 2) == 2)
        # The last batch is lost; the polled number tells.
        await until(rig.exact)
        await rig.fake.store(3, parent=2, send=False)
        await until(lambda: rig.pages(1, 2, 3) == 3)
        rig.fake.healthy = False
        await until(lambda: states()[0] is State.UNHEALTHY)
        assert rig.pages(1, 2, 3) == 3
        polling.cancel()
        with pytest.raises(asyncio.CancelledError):
            await polling
