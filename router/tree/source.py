"""One instance's residency events into the global tree.

    connect (SUB) -> snapshot (GET) -> batches with seq > snapshot.seq, in order
          ^                |
          +-- gap, smaller number, undecodable batch, or silence although the instance says that it
              has published more: snapshot again, with growing pauses when that fails

The subscription comes first, so that batches published while the snapshot is made wait in the
socket. PUB may lose the last batch with no later one to show the gap: the instance's heartbeat
carries its last number, and a source that stays behind it for ``LAG_S`` takes the snapshot.

States: SYNCING until the first snapshot is applied, EXACT while nothing is missing, DEGRADED while
something is, STALE when that could not be mended for ``STALE_S``. What the tree holds of the
instance is then old but not dropped: a stale match costs a fetch that finds less, never a wrong
answer, and decisions discount it (``router.tree.trust``).

No instance may fill the tree: of one that says it holds more than ``most_pages`` (a page in two
tiers counts twice), the rest is left out. What is in the tree is right then, and not all; the
source says DEGRADED and takes a snapshot every ``FULL_S`` until everything fits.

An instance speaks with one voice, however many ranks it has: where there are several it merges
their streams itself, and a page counts as held when every rank holds it.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum

import zmq
import zmq.asyncio
from sglang_memserve.errors import LimitExceeded, MemServeError, PeerError
from sglang_memserve.protocol.events import (
    TOPIC,
    BlockStored,
    Event,
    EventBatch,
    Snapshot,
    decode_frames,
)
from sglang_memserve.protocol.http import InstanceInfo
from sglang_memserve.protocol.position import Position, Step
from sglang_memserve.types import Generation, InstanceId

from .merged import MergedTree
from .reference import DEFAULT_MAX_PAGES

log = logging.getLogger(__name__)

LAG_S = 1.0
POLL_S = 0.2
RETRY_FIRST_S = 0.1
RETRY_MOST_S = 5.0
STALE_S = 10.0
FULL_S = 60.0
MOST_PAGES = DEFAULT_MAX_PAGES // 2
_MAX_MESSAGE_BYTES = 64 * 2**20
_QUEUED_BATCHES = 10_000
# Batches between two turns of the event loop: requests are not kept waiting by a burst of events.
_BATCHES_PER_TURN = 32


class SourceState(Enum):
    SYNCING = "syncing"
    EXACT = "exact"
    DEGRADED = "degraded"
    STALE = "stale"


class SnapshotReason(Enum):
    """Why a snapshot was taken. SILENCE: the instance had published more than came."""

    START = "start"
    GAP = "gap"
    MALFORMED = "malformed"
    SILENCE = "silence"
    FULL = "full"


@dataclass(frozen=True, slots=True)
class SourceStatus:
    """``seq``: last batch applied; ``known_seq``: last the instance has told of; ``lag_s``: age of
    the last batch by the sender's clock, when it arrived. Counts are since the source began:
    ``gaps`` of breaks in the stream, ``snapshots`` of those applied, ``reasons`` of the same by
    reason, ``failures`` of tries to take one, ``refused_pages`` of what did not fit.
    """

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
    refused_pages: int = 0
    reasons: Mapping[SnapshotReason, int] = field(default_factory=dict)


class _OutOfStep(Exception):
    """The stream and the tree have parted; a snapshot mends it."""

    def __init__(self, reason: SnapshotReason, text: str) -> None:
        super().__init__(text)
        self.reason = reason


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
        most_pages: int = MOST_PAGES,
    ) -> None:
        self.instance = InstanceId(info.url)
        self.generation = Generation(info.generation)
        self._address = info.events_address
        self._tree = tree
        self._fetch_snapshot = fetch_snapshot
        self._clock = clock
        self._wall_clock = wall_clock
        self._on_state = on_state
        self._most_pages = most_pages
        self._state = SourceState.SYNCING
        self._doubtful_since = clock()
        self._full_since: float | None = None
        self._position = Position()
        self._batches = self._gaps = self._failures = self._refused_pages = 0
        self._snapshots: Counter[SnapshotReason] = Counter()
        self._lag_s = 0.0
        self._last_error = ""

    @property
    def state(self) -> SourceState:
        if self.doubtful and self._clock() - self._doubtful_since > STALE_S:
            return SourceState.STALE
        return self._state

    @property
    def doubtful(self) -> bool:
        """Whether the tree may hold what is not so. Of a source that is only full it does not."""
        return self._state is SourceState.DEGRADED and self._full_since is None

    def status(self) -> SourceStatus:
        return SourceStatus(
            instance=self.instance,
            generation=self.generation,
            state=self.state,
            seq=self._position.seq,
            known_seq=self._position.known_seq,
            batches=self._batches,
            gaps=self._gaps,
            snapshots=self._snapshots.total(),
            failures=self._failures,
            lag_s=self._lag_s,
            last_error=self._last_error,
            refused_pages=self._refused_pages,
            reasons=dict(self._snapshots),
        )

    def told_of(self, seq: int) -> None:
        """The instance says that it has published ``seq``."""
        self._position.told_of(seq)

    async def run(self, context: zmq.asyncio.Context) -> None:
        socket = context.socket(zmq.SUB)
        pause_s = RETRY_FIRST_S
        reason = SnapshotReason.START
        try:
            socket.setsockopt(zmq.LINGER, 0)
            socket.setsockopt(zmq.RCVHWM, _QUEUED_BATCHES)
            socket.setsockopt(zmq.MAXMSGSIZE, _MAX_MESSAGE_BYTES)
            socket.subscribe(TOPIC)
            socket.connect(self._address)
            while True:
                await self._synchronise(reason)
                began = self._clock()
                try:
                    await self._follow(socket)
                except _OutOfStep as error:
                    reason = error.reason
                    self._parted(reason, str(error))
                except MemServeError as error:
                    reason = SnapshotReason.MALFORMED
                    self._parted(reason, str(error))
                # A stream that is broken for good must not become a stream of snapshots.
                calm = self._clock() - began > RETRY_MOST_S
                pause_s = RETRY_FIRST_S if calm else min(2 * pause_s, RETRY_MOST_S)
                await asyncio.sleep(pause_s)
        except zmq.ZMQError as error:
            # A malformed address: registering again with a good one is the way out.
            self._doubt(f"{self._address}: {error}")
        finally:
            socket.close(linger=0)

    def _parted(self, reason: SnapshotReason, error: str) -> None:
        if reason is not SnapshotReason.FULL:
            self._gaps += 1
            self._doubt(error)

    async def _synchronise(self, reason: SnapshotReason) -> None:
        """Take the snapshot, again and again until one could be applied."""
        pause_s = RETRY_FIRST_S
        while True:
            try:
                snapshot = await self._fetch_snapshot(self.instance)
                self._take(snapshot)
                self._snapshots[reason] += 1
                return
            except MemServeError as error:
                self._failures += 1
                self._doubt(f"snapshot: {error}")
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, RETRY_MOST_S)

    def _take(self, snapshot: Snapshot) -> None:
        if snapshot.generation != self.generation:
            # It will register again, and another source will follow that boot.
            self._tree.drop(self.instance)
            raise PeerError(f"another boot answers ({snapshot.generation})")
        self._tree.replace(self.instance, ())
        self._full_since = None
        self._enter(snapshot.events)
        self._position.restart(snapshot.seq)
        if self._full_since is None:
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
                text = f"batch {seq} after {self._position.seq}"
                raise _OutOfStep(SnapshotReason.GAP, text)
        self._enter(batch.events)
        self._position.taken()
        self._batches += 1
        self._lag_s = max(self._wall_clock() - batch.ts, 0.0)

    def _require_progress(self) -> None:
        """Raises _OutOfStep when the instance has been ahead of us for too long."""
        at = self._position
        if at.lags(self._clock(), LAG_S):
            text = f"at batch {at.seq}, the instance at {at.known_seq}"
            raise _OutOfStep(SnapshotReason.SILENCE, text)
        if self._full_since is not None and self._clock() - self._full_since > FULL_S:
            raise _OutOfStep(SnapshotReason.FULL, "perhaps everything fits now")

    def _enter(self, events: Iterable[Event]) -> None:
        """Into the tree, as far as there is room."""
        for event in events:
            pages = len(event.block_hashes) if isinstance(event, BlockStored) else 0
            try:
                if pages and self._tree.held(self.instance) + pages > self._most_pages:
                    raise LimitExceeded(f"{self.instance} has more than {self._most_pages} pages")
                self._tree.apply(self.instance, event)
            except LimitExceeded as error:
                self._refused_pages += pages
                if self._full_since is None:
                    self._full_since = self._clock()
                    self._become(SourceState.DEGRADED, f"{error}; what does not fit is left out")

    def _doubt(self, error: str) -> None:
        if not self.doubtful:
            self._doubtful_since = self._clock()
        self._full_since = None
        self._become(SourceState.DEGRADED, error)

    def _become(self, state: SourceState, error: str) -> None:
        changed = state is not self._state
        self._state = state
        self._last_error = error
        if changed:
            level = logging.INFO if state is SourceState.EXACT else logging.WARNING
            log.log(level, "events of %s: %s %s", self.instance, state.value, error)
            if self._on_state is not None:
                self._on_state(self.status())
