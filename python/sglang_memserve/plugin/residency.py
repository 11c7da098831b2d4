"""What this instance holds, as routers see it: one stream of events and one snapshot.

With one rank that is the rank's own stream. With several it is their intersection: a thread of the
HTTP process follows every rank, merges what they say (``index.intersection``) and publishes it.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Coroutine, Sequence
from concurrent.futures import Future
from typing import Any, Protocol, TypeVar

import zmq
import zmq.asyncio

from ..config import InstanceConfig
from ..errors import MemServeError, PeerUnreachable
from ..index.intersection import Intersection, Merged
from ..protocol import control
from ..protocol.events import EventBatch, Snapshot, encode_frames, encode_snapshot
from ..transfer.client import LocalClient
from ..transfer.sockets import Publisher
from .rank_feed import RankFeed

log = logging.getLogger(__name__)

CALL_S = 5.0
SNAPSHOT_S = 10.0
_START_S = 10.0
_STOP_S = 5.0

T = TypeVar("T")


class Residency(Protocol):
    """Belongs to the HTTP process's event loop. All methods raise PeerUnreachable when a rank
    does not answer in time."""

    async def start(self) -> None: ...

    async def events_address(self) -> str:
        """Where batches are published."""

    async def last_seq(self) -> int:
        """Number of the last batch, -1 before the first."""

    async def snapshot(self) -> bytes:
        """An encoded ``events.Snapshot``, true right after one of the batches."""

    async def stats(self) -> dict[str, float]: ...

    async def stop(self) -> None: ...


def residency_of(config: InstanceConfig, ranks: Sequence[LocalClient]) -> Residency:
    """``ranks``: clients of all ranks, by number, on the HTTP process's event loop."""
    return OneRank(ranks[0]) if len(ranks) == 1 else AllRanks(config, len(ranks))


class OneRank:
    """The rank speaks for itself."""

    def __init__(self, rank: LocalClient) -> None:
        self._rank = rank

    async def start(self) -> None:
        return

    async def events_address(self) -> str:
        reply = await self._rank.call(control.InfoRequest(), CALL_S)
        assert isinstance(reply, control.InfoReply), reply
        return reply.events_address

    async def last_seq(self) -> int:
        reply = await self._rank.call(control.StatsRequest(), CALL_S)
        assert isinstance(reply, control.StatsReply), reply
        return int(reply.values["event_seq"])

    async def snapshot(self) -> bytes:
        reply = await self._rank.call(control.SnapshotRequest(), CALL_S)
        assert isinstance(reply, control.SnapshotReply), reply
        return reply.snapshot

    async def stats(self) -> dict[str, float]:
        return {}

    async def stop(self) -> None:
        return


class AllRanks:
    """The intersection over ``ranks`` ranks. A thread with an event loop of its own merges: a
    burst of events, or the snapshot of a large pool, must not hold up requests."""

    def __init__(self, config: InstanceConfig, ranks: int) -> None:
        self._config = config
        self._intersection = Intersection(ranks)
        self._clients = [LocalClient(config.rank_socket(rank)) for rank in range(ranks)]
        self._feeds = [
            RankFeed(
                rank,
                client,
                self._intersection,
                self._publish,
                generation=config.generation,
                clock=time.monotonic,
            )
            for rank, client in enumerate(self._clients)
        ]
        self._publisher: Publisher | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopping: asyncio.Event | None = None
        self._started: Future[str] = Future()
        self._thread = threading.Thread(target=self._main, name="memserve-residency", daemon=True)

    async def start(self) -> None:
        """Raises ConfigError when there is nothing to listen on."""
        self._thread.start()
        await asyncio.wait_for(asyncio.wrap_future(self._started), _START_S)

    async def events_address(self) -> str:
        return self._started.result(0)

    async def last_seq(self) -> int:
        return self._intersection.last_seq

    async def snapshot(self) -> bytes:
        return await self._on_thread(self._snapshot(), SNAPSHOT_S)

    async def stats(self) -> dict[str, float]:
        return await self._on_thread(self._stats(), CALL_S)

    async def stop(self) -> None:
        if self._loop is None or self._stopping is None or not self._thread.is_alive():
            return
        self._loop.call_soon_threadsafe(self._stopping.set)
        await asyncio.to_thread(self._thread.join, _STOP_S)
        if self._thread.is_alive():
            log.error("the thread that merges the ranks did not end in %g s", _STOP_S)

    async def _on_thread(self, work: Coroutine[Any, Any, T], limit_s: float) -> T:
        if self._loop is None or not self._thread.is_alive():
            work.close()
            raise PeerUnreachable("the ranks are not followed")
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return await asyncio.wait_for(asyncio.wrap_future(future), limit_s)
        except TimeoutError as error:
            raise PeerUnreachable(f"merging the ranks took more than {limit_s:g} s") from error

    # -- on the thread --

    def _main(self) -> None:
        try:
            asyncio.run(self._serve())
        except MemServeError as error:
            if not self._started.done():
                self._started.set_exception(error)
                return
            raise

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stopping = asyncio.Event()
        own: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        theirs = zmq.asyncio.Context()
        tasks: list[asyncio.Task[None]] = []
        try:
            self._publisher = Publisher(own, self._config.peer_host)
            self._started.set_result(self._publisher.address(self._config.peer_host))
            for number, feed in enumerate(self._feeds):
                tasks.append(asyncio.create_task(feed.run(theirs), name=f"events of rank {number}"))
            await self._stopping.wait()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for client in self._clients:
                client.close()
            theirs.destroy(0)
            own.destroy(0)

    def _publish(self, merged: Merged | None) -> None:
        if merged is not None and self._publisher is not None:
            batch = EventBatch(ts=time.time(), events=merged.events)
            self._publisher.send(encode_frames(merged.seq, batch))

    async def _snapshot(self) -> bytes:
        seq, events = self._intersection.snapshot()
        return encode_snapshot(Snapshot(self._config.generation, seq, events))

    async def _stats(self) -> dict[str, float]:
        return {
            **self._intersection.stats(),
            "residency_gaps_total": sum(feed.gaps for feed in self._feeds),
            "residency_snapshots_total": sum(feed.snapshots for feed in self._feeds),
            "residency_failures_total": sum(feed.failures for feed in self._feeds),
        }
