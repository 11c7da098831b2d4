"""Follows what one rank of this instance holds, into the intersection over all ranks.

As the router follows an instance (``router.tree.feed``), over local sockets: subscribe, take the
rank's snapshot, apply what comes after; on a hole, or when the rank says that it has published more
than came, take the snapshot again. What is known of a rank stays in force until then.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import NoReturn

import zmq
import zmq.asyncio

from ..errors import MemServeError, PeerError
from ..index.intersection import Intersection, Merged
from ..protocol import control
from ..protocol.events import TOPIC, decode_frames, decode_snapshot
from ..protocol.position import Position, Step
from ..transfer.client import LocalClient

log = logging.getLogger(__name__)

CALL_S = 10.0
LAG_S = 1.0
POLL_S = 0.2
ASK_EVERY_S = 1.0
RETRY_FIRST_S = 0.1
RETRY_MOST_S = 5.0
_MAX_MESSAGE_BYTES = 64 * 2**20
_QUEUED_BATCHES = 10_000
# Between two turns of the event loop: the other ranks' batches are taken in between.
_BATCHES_PER_TURN = 32


class RankFeed:
    """``publish`` is called with every batch that the intersection makes. ``run`` goes on until
    cancelled; it and everything it is given belong to one event loop."""

    def __init__(
        self,
        rank: int,
        client: LocalClient,
        intersection: Intersection,
        publish: Callable[[Merged | None], None],
        *,
        generation: str,
        clock: Callable[[], float],
    ) -> None:
        self.gaps = self.snapshots = self.failures = 0
        self._rank = rank
        self._client = client
        self._intersection = intersection
        self._publish = publish
        self._generation = generation
        self._clock = clock
        self._position = Position()
        self._ask_at = 0.0
        self._troubled = False

    async def run(self, context: zmq.asyncio.Context) -> None:
        socket = context.socket(zmq.SUB)
        pause_s = RETRY_FIRST_S
        try:
            socket.setsockopt(zmq.LINGER, 0)
            socket.setsockopt(zmq.RCVHWM, _QUEUED_BATCHES)
            socket.setsockopt(zmq.MAXMSGSIZE, _MAX_MESSAGE_BYTES)
            socket.subscribe(TOPIC)
            connected = False
            while True:
                began = self._clock()
                try:
                    # Once is enough: a rank keeps its address for as long as the instance lives.
                    if not connected:
                        socket.connect(await self._events_address())
                        connected = True
                    await self._synchronise()
                    await self._follow(socket)
                except MemServeError as error:
                    self._trouble(str(error))
                except Exception as error:
                    # A bug of ours must not leave routers with what was true once.
                    log.exception("rank %d: following its events failed", self._rank)
                    self._trouble(f"internal error: {error!r}")
                calm = self._clock() - began > RETRY_MOST_S
                pause_s = RETRY_FIRST_S if calm else min(2 * pause_s, RETRY_MOST_S)
                await asyncio.sleep(pause_s)
        finally:
            socket.close(linger=0)

    async def _events_address(self) -> str:
        info = await self._client.call(control.InfoRequest(), CALL_S)
        assert isinstance(info, control.InfoReply), info
        return info.events_address

    async def _synchronise(self) -> None:
        reply = await self._client.call(control.SnapshotRequest(), CALL_S)
        assert isinstance(reply, control.SnapshotReply), reply
        snapshot = decode_snapshot(reply.snapshot)
        if snapshot.generation != self._generation:
            raise PeerError(f"its socket is another boot's ({snapshot.generation})")
        self._publish(self._intersection.replace(self._rank, snapshot.events))
        self._position.restart(snapshot.seq)
        self.snapshots += 1
        if self._troubled:
            log.info("rank %d: events are complete again", self._rank)
            self._troubled = False

    async def _follow(self, socket: zmq.asyncio.Socket) -> NoReturn:
        """Apply batches until one is missing, which raises a MemServeError."""
        while True:
            if await socket.poll(int(POLL_S * 1000)):
                for _ in range(_BATCHES_PER_TURN):
                    try:
                        frames = await socket.recv_multipart(zmq.NOBLOCK)
                    except zmq.Again:
                        break
                    self._take(frames)
                await asyncio.sleep(0)
            await self._require_progress()

    def _take(self, frames: list[bytes]) -> None:
        seq, batch = decode_frames(frames)
        match self._position.judge(seq):
            case Step.STALE:
                return
            case Step.GAP:
                self.gaps += 1
                raise PeerError(f"batch {seq} after {self._position.seq}")
        self._publish(self._intersection.apply(self._rank, batch.events))
        self._position.taken()

    async def _require_progress(self) -> None:
        now = self._clock()
        if now >= self._ask_at:
            self._ask_at = now + ASK_EVERY_S
            reply = await self._client.call(control.StatsRequest(), CALL_S)
            assert isinstance(reply, control.StatsReply), reply
            self._position.told_of(int(reply.values["event_seq"]))
        if self._position.lags(self._clock(), LAG_S):
            self.gaps += 1
            at = self._position
            raise PeerError(f"events stop at batch {at.seq}, the rank is at {at.known_seq}")

    def _trouble(self, reason: str) -> None:
        """Logged once a trouble, not once a try."""
        self.failures += 1
        if not self._troubled:
            log.warning("rank %d: %s; taking its snapshot", self._rank, reason)
        self._troubled = True
