"""Residency events into the global tree: one source for each instance.

    connect (SUB) -> snapshot (GET) -> batches with seq > snapshot.seq, in order
          ^                |
          +-- gap, smaller number, undecodable batch, or silence although the instance says that it
              has published more: snapshot again, with growing pauses when that fails

The subscription comes first, so that batches published while the snapshot is made wait in the
socket. PUB may lose the last batch with no later one to show the gap: the instance's heartbeat
carries its last number, and a source that stays behind it for ``LAG_S`` takes the snapshot.

States: SYNCING until the first snapshot is applied, EXACT while nothing is missing, DEGRADED while
something is (what the tree holds of the instance is then old but not dropped: a stale match costs
a fetch that finds less, never a wrong answer).

An instance speaks with one voice, however many ranks it has: where there are several it merges
their streams itself, and a page counts as held when every rank holds it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from enum import Enum

import aiohttp
import zmq
import zmq.asyncio
from sglang_memserve.errors import LimitExceeded, MemServeError, PeerError, PeerUnreachable
from sglang_memserve.protocol.events import (
    TOPIC,
    EventBatch,
    Snapshot,
    decode_frames,
    decode_snapshot,
)
from sglang_memserve.protocol.http import InstanceInfo
from sglang_memserve.protocol.position import Position, Step
from sglang_memserve.types import Generation, InstanceId

from .merged_tree import MergedTree

log = logging.getLogger(__name__)

SNAPSHOT_S = 10.0
LAG_S = 1.0
POLL_S = 0.2
RETRY_FIRST_S = 0.1
RETRY_MOST_S = 5.0
_MAX_MESSAGE_BYTES = 64 * 2**20
_MAX_SNAPSHOT_BYTES = 512 * 2**20
_QUEUED_BATCHES = 10_000
# Batches between two turns of the event loop: requests are not kept waiting by a burst of events.
_BATCHES_PER_TURN = 32


class SourceState(Enum):
    SYNCING = "syncing"
    EXACT = "exact"
    DEGRADED = "degraded"


@dataclass(frozen=True, slots=True)
class SourceStatus:
    """``seq``: last batch applied; ``known_seq``: last the instance has told of; ``lag_s``: age of
    the last batch by the sender's clock, when it arrived."""

    instance: InstanceId
    generation: Generation
    state: SourceState
    seq: int
    known_seq: int
    batches: int
    gaps: int
    snapshots: int
    failures: int
    lag_s: float
    last_error: str


class _OutOfStep(Exception):
    """The stream and the tree have parted; a snapshot mends it."""


class Source:
    """Follows one boot of one instance. ``run`` goes on until cancelled."""

    def __init__(
        self,
        info: InstanceInfo,
        tree: MergedTree,
        fetch_snapshot: Callable[[InstanceId], Awaitable[Snapshot]],
        *,
        clock: Callable[[], float],
        wall_clock: Callable[[], float],
        on_state: Callable[[SourceStatus], None] | None = None,
    ) -> None:
        self.instance = InstanceId(info.url)
        self.generation = Generation(info.generation)
        self._address = info.events_address
        self._tree = tree
        self._fetch_snapshot = fetch_snapshot
        self._clock = clock
        self._wall_clock = wall_clock
        self._on_state = on_state
        self._state = SourceState.SYNCING
        self._position = Position()
        self._batches = self._gaps = self._snapshots = self._failures = 0
        self._lag_s = 0.0
        self._last_error = ""

    def status(self) -> SourceStatus:
        return SourceStatus(
            instance=self.instance,
            generation=self.generation,
            state=self._state,
            seq=self._position.seq,
            known_seq=self._position.known_seq,
            batches=self._batches,
            gaps=self._gaps,
            snapshots=self._snapshots,
            failures=self._failures,
            lag_s=self._lag_s,
            last_error=self._last_error,
        )

    def told_of(self, seq: int) -> None:
        """The instance says that it has published ``seq``."""
        self._position.told_of(seq)

    async def run(self, context: zmq.asyncio.Context) -> None:
        socket = context.socket(zmq.SUB)
        pause_s = RETRY_FIRST_S
        try:
            socket.setsockopt(zmq.LINGER, 0)
            socket.setsockopt(zmq.RCVHWM, _QUEUED_BATCHES)
            socket.setsockopt(zmq.MAXMSGSIZE, _MAX_MESSAGE_BYTES)
            socket.subscribe(TOPIC)
            socket.connect(self._address)
            while True:
                await self._synchronise()
                began = self._clock()
                try:
                    await self._follow(socket)
                except (_OutOfStep, MemServeError) as error:
                    self._gaps += 1
                    self._become(SourceState.DEGRADED, str(error))
                # A stream that is broken for good must not become a stream of snapshots.
                calm = self._clock() - began > RETRY_MOST_S
                pause_s = RETRY_FIRST_S if calm else min(2 * pause_s, RETRY_MOST_S)
                await asyncio.sleep(pause_s)
        except zmq.ZMQError as error:
            # A malformed address: registering again with a good one is the way out.
            self._become(SourceState.DEGRADED, f"{self._address}: {error}")
        finally:
            socket.close(linger=0)

    async def _synchronise(self) -> None:
        """Take the snapshot, again and again until one could be applied."""
        pause_s = RETRY_FIRST_S
        while True:
            try:
                snapshot = await self._fetch_snapshot(self.instance)
                self._take(snapshot)
                return
            except MemServeError as error:
                self._failures += 1
                self._become(SourceState.DEGRADED, f"snapshot: {error}")
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, RETRY_MOST_S)

    def _take(self, snapshot: Snapshot) -> None:
        if snapshot.generation != self.generation:
            # It will register again, and another source will follow that boot.
            self._tree.drop(self.instance)
            raise PeerError(f"another boot answers ({snapshot.generation})")
        self._tree.replace(self.instance, snapshot.events)
        self._position.restart(snapshot.seq)
        self._snapshots += 1
        self._become(SourceState.EXACT, "")

    async def _follow(self, socket: zmq.asyncio.Socket) -> None:
        """Apply batches until one is missing. Raises _OutOfStep or MemServeError."""
        while True:
            if not await socket.poll(int(POLL_S * 1000)):
                self._require_progress()
                continue
            for _ in range(_BATCHES_PER_TURN):
                try:
                    frames = await socket.recv_multipart(zmq.NOBLOCK)
                except zmq.Again:
                    break
                self._apply(*decode_frames(frames))
            self._require_progress()
            await asyncio.sleep(0)

    def _apply(self, seq: int, batch: EventBatch) -> None:
        match self._position.judge(seq):
            case Step.STALE:
                return
            case Step.GAP:
                raise _OutOfStep(f"batch {seq} after {self._position.seq}")
        for event in batch.events:
            self._tree.apply(self.instance, event)
        self._position.taken()
        self._batches += 1
        self._lag_s = max(self._wall_clock() - batch.ts, 0.0)

    def _require_progress(self) -> None:
        """Raises _OutOfStep when the instance has been ahead of us for too long."""
        at = self._position
        if at.lags(self._clock(), LAG_S):
            raise _OutOfStep(f"at batch {at.seq}, the instance at {at.known_seq}")

    def _become(self, state: SourceState, error: str) -> None:
        changed = state is not self._state
        self._state = state
        self._last_error = error
        if changed:
            level = logging.INFO if state is SourceState.EXACT else logging.WARNING
            log.log(level, "events of %s: %s %s", self.instance, state.value, error)
            if self._on_state is not None:
                self._on_state(self.status())


class Feed:
    """All sources. A ``instances.Listener``: membership tells it whom to follow.

    Its methods must be called in a running event loop; ``close`` ends every task and socket.
    ``headers`` go with every request to an instance (its API key).
    """

    def __init__(
        self,
        tree: MergedTree,
        session: aiohttp.ClientSession,
        *,
        clock: Callable[[], float],
        wall_clock: Callable[[], float],
        headers: Mapping[str, str] | None = None,
        on_state: Callable[[SourceStatus], None] | None = None,
    ) -> None:
        self._tree = tree
        self._session = session
        self._clock = clock
        self._wall_clock = wall_clock
        self._headers = dict(headers or {})
        self._on_state = on_state
        self._context = zmq.asyncio.Context()
        self._sources: dict[InstanceId, tuple[Source, asyncio.Task[None]]] = {}
        self._ending: set[asyncio.Task[None]] = set()

    # -- instances.Listener --

    def joined(self, info: InstanceInfo) -> None:
        """Follow it; a source of another boot of the same URL is ended and its pages dropped."""
        instance = InstanceId(info.url)
        if instance in self._sources:
            if self._sources[instance][0].generation == info.generation:
                return
            self.left(instance)
        source = Source(
            info,
            self._tree,
            self.fetch_snapshot,
            clock=self._clock,
            wall_clock=self._wall_clock,
            on_state=self._on_state,
        )
        task = asyncio.create_task(source.run(self._context), name=f"events of {instance}")
        task.add_done_callback(_report)
        self._sources[instance] = (source, task)

    def left(self, instance: InstanceId) -> None:
        """Stop following it and drop its pages."""
        entry = self._sources.pop(instance, None)
        if entry is not None:
            task = entry[1]
            task.cancel()
            self._ending.add(task)
            task.add_done_callback(self._ending.discard)
        self._tree.drop(instance)

    def beat(self, instance: InstanceId, generation: Generation, event_seq: int) -> None:
        """What a heartbeat says of the last event batch."""
        entry = self._sources.get(instance)
        if entry is not None and entry[0].generation == generation:
            entry[0].told_of(event_seq)

    # -- the rest --

    def status(self) -> list[SourceStatus]:
        return [source.status() for source, _ in self._sources.values()]

    async def fetch_snapshot(self, instance: InstanceId) -> Snapshot:
        """GET the instance's snapshot within SNAPSHOT_S. Raises PeerError, ProtocolError and
        LimitExceeded."""
        url = f"{instance}/memserve/snapshot"
        timeout = aiohttp.ClientTimeout(total=SNAPSHOT_S)
        body = bytearray()
        try:
            async with self._session.get(url, headers=self._headers, timeout=timeout) as response:
                if response.status != 200:
                    raise PeerError(f"{url} answered {response.status}")
                async for chunk in response.content.iter_any():
                    body += chunk
                    if len(body) > _MAX_SNAPSHOT_BYTES:
                        raise LimitExceeded(f"{url}: more than {_MAX_SNAPSHOT_BYTES} bytes")
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise PeerUnreachable(f"{url}: {error or type(error).__name__}") from error
        return decode_snapshot(bytes(body))

    async def close(self) -> None:
        """End all tasks and sockets. The tree keeps what it has."""
        tasks = [task for _, task in self._sources.values()] + list(self._ending)
        self._sources.clear()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._context.term()


def _report(task: asyncio.Task[None]) -> None:
    """A source never ends by itself: say so loudly if it does."""
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("%s stopped", task.get_name(), exc_info=error)
