"""The reader's side of a rank: its fetches, and the reads that were given up.

Belongs to the agent's thread. ``Fetch`` decides; this file sends, reads and keeps count.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ..config import Limits
from ..errors import LimitExceeded, MemServeError, ProtocolError, TransferFailed
from ..protocol.control import (
    FetchReply,
    FetchRequest,
    Hello,
    HelloReply,
    LeaseReply,
    Message,
    ReleaseRequest,
)
from ..types import HoldOutcome, PageKey
from .base import Hold, Pool, ReadState, Store, Transport
from .grace import GracePins
from .outcome import Ending, Outcome, ending_of
from .peers import Link, Peer, PeerTable
from .port import FetchSettings, Greeting
from .state import Fetch
from .verify import Verifier

_ADDRESS = re.compile(r"tcp://[^\s/]+:[0-9]{1,5}")


@dataclass(slots=True)
class _Abandoned:
    peer: Peer
    store: Store


@dataclass(slots=True)
class _Active:
    fetch: Fetch
    peers: Sequence[Peer | None]
    done: Callable[[FetchReply], None]
    hold: Hold | None
    requests: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Reading:
    active: _Active
    peer: Peer
    blocks: int


@dataclass(frozen=True, slots=True)
class _Queued:
    request: FetchRequest
    arrived_s: float
    done: Callable[[FetchReply], None]
    hold: Hold | None

    @property
    def deadline_s(self) -> float:
        return self.arrived_s + self.request.deadline_s


@dataclass(slots=True)
class SessionCounts:
    fetches: int = 0
    complete: int = 0
    pages: int = 0
    bytes: int = 0
    refused: int = 0
    failed_reads: int = 0
    given_up_reads: int = 0
    damaged: int = 0


class Sessions:
    """``open_link`` raises ProtocolError for an address that is none."""

    def __init__(
        self,
        pool: Pool,
        transport: Transport,
        hello: Hello,
        open_link: Callable[[str], Link],
        *,
        verifier: Verifier,
        settings: FetchSettings,
        limits: Limits,
    ) -> None:
        self.counts = SessionCounts()
        self.limits = limits
        self._pool = pool
        self._transport = transport
        self._hello = hello
        self._settings = settings
        self.peers = PeerTable(transport, hello, open_link, limits, in_use=self._in_use)
        self._active: list[_Active] = []
        # Sources of the fetch that is being started, which is not active yet.
        self._starting: list[Peer] = []
        self._queue: deque[_Queued] = deque()
        self._requests: dict[int, tuple[_Active, int]] = {}
        self._reads: dict[int, _Reading] = {}
        self._abandoned: dict[int, _Abandoned] = {}
        self._grace = GracePins(limits)
        self._verifier = verifier
        self._tickets: dict[int, _Active] = {}
        self._next_ticket = 1

    # -- the agent's side --

    @property
    def reading(self) -> bool:
        return bool(self._reads)

    def peer(self, address: str) -> Peer | None:
        return self.peers.get(address)

    def submit(self, request: FetchRequest, now: float, done: Callable[[FetchReply], None]) -> None:
        """``done`` is called once, maybe before this returns.

        Raises LimitExceeded beyond a bound, ProtocolError for numbers or an address that make no
        sense."""
        self._require_sane(request)
        if len(self._active) >= self.limits.max_fetches:
            if len(self._queue) >= self.limits.max_queued_fetches:
                self.counts.refused += 1
                text = f"{len(self._queue)} fetches wait, max_queued_fetches is"
                raise LimitExceeded(f"{text} {self.limits.max_queued_fetches}")
            self._queue.append(_Queued(request, now, done, self._hold_for(request)))
            return
        self._start(_Queued(request, now, done, self._hold_for(request)), now)

    def on_message(self, peer: Peer, request_id: int, message: Message, now: float) -> None:
        peer.used_s = now
        active, source = self._requests.get(request_id, (None, 0))
        if active is not None and active.peers[source] is peer:
            known = active.fetch.on_reply(source, request_id, message, now)
            self._after(active, now)
            if known:
                return
        if isinstance(message, LeaseReply) and message.lease_id and peer.connected is not None:
            # Nobody waits for it any more, so nobody else will end this lease.
            release = ReleaseRequest(peer.connected.generation, message.lease_id)
            self.peers.send(peer, release)

    def on_pages_readable(self, now: float) -> None:
        for active in list(self._active):
            active.fetch.on_pages_readable(now)
            self._after(active, now)

    def poll_reads(self, now: float) -> None:
        for handle, reading in list(self._reads.items()):
            if handle not in self._reads:
                continue  # given up a moment ago: its fetch ended with another of these reads
            state = self._transport.poll(handle)
            if state is ReadState.RUNNING:
                continue
            del self._reads[handle]
            if state is ReadState.FAILED:
                self.counts.failed_reads += 1
            reading.active.fetch.on_read_ended(handle, state, now)
            self._after(reading.active, now)

    def take_verdicts(self, now: float) -> None:
        for ticket, damaged in self._verifier.take():
            active = self._tickets.pop(ticket, None)
            if active is not None:
                self.counts.damaged += damaged is not None
                active.fetch.on_verified(ticket, damaged, now)
                self._after(active, now)

    def on_time(self, now: float) -> None:
        for active in list(self._active):
            if now >= active.fetch.wake_s:
                active.fetch.on_time(now)
                self._after(active, now)
        for handle, abandoned in list(self._abandoned.items()):
            if self._transport.poll(handle) is not ReadState.RUNNING:
                del self._abandoned[handle]
                abandoned.store.abort()
        self._grace.on_time(now)
        self.peers.on_time(now)
        self._end_queued(now)
        self._start_queued(now)

    def wake_s(self, now: float) -> float:
        """When ``on_time`` has something to do, at the latest."""
        if self._queue and len(self._active) < self.limits.max_fetches:
            return now
        times = [self._grace.wake_s(), *(active.fetch.wake_s for active in self._active)]
        times.extend(queued.deadline_s for queued in self._queue)
        if self._abandoned:
            times.append(now + 0.02)
        return min(times)

    def close(self, now: float) -> None:
        """End all fetches. The blocks of running reads stay out of use until ``after_close``."""
        for queued in self._queue:
            _give_up(queued, Outcome.CLOSED, now)
        self._queue.clear()
        for active in list(self._active):
            active.fetch.cancel(Outcome.CLOSED, now)
            self._after(active, now)
        self._grace.release_all()
        self.peers.close()
        self._verifier.close()

    def after_close(self) -> None:
        """The transport is closed: no read runs any more."""
        for abandoned in self._abandoned.values():
            abandoned.store.abort()
        self._abandoned.clear()

    def stats(self) -> dict[str, float]:
        counts = self.counts
        return {
            "fetches_total": counts.fetches,
            "fetches_complete_total": counts.complete,
            "fetched_pages_total": counts.pages,
            "fetched_bytes_total": counts.bytes,
            "fetches_refused_total": counts.refused,
            "failed_reads_total": counts.failed_reads,
            "given_up_reads_total": counts.given_up_reads,
            "damaged_reads_total": counts.damaged,
            "fetches_active": len(self._active),
            "fetches_queued": len(self._queue),
            "quarantined_blocks": sum(len(a.store.missing) for a in self._abandoned.values()),
            **self.peers.stats(),
        }

    def check(self) -> None:
        assert len(self._active) <= self.limits.max_fetches
        assert len(self._queue) <= self.limits.max_queued_fetches
        self.peers.check()
        assert not self._reads.keys() & self._abandoned.keys()
        assert all(reading.active in self._active for reading in self._reads.values())
        assert all(active in self._active for active, _ in self._requests.values())
        assert all(active in self._active for active in self._tickets.values())
        self._grace.check()

    # -- running a fetch --

    def _start(self, queued: _Queued, now: float) -> None:
        ports: list[_FetchPort | Ending] = []
        for index, source in enumerate(queued.request.sources):
            try:
                peer = self.peers.obtain(source.peer_address, now)
            except MemServeError as error:
                ports.append(ending_of(error))
            else:
                ports.append(_FetchPort(self, peer, index))
                self._starting.append(peer)
        self._starting.clear()
        fetch = Fetch(
            queued.request,
            ports,
            arrived_s=queued.arrived_s,
            store=self._pool,
            hello=self._hello,
            settings=self._settings,
        )
        peers = [None if isinstance(port, Ending) else port.peer for port in ports]
        active = _Active(fetch, peers, queued.done, queued.hold)
        for port in ports:
            if isinstance(port, _FetchPort):
                port.active = active
        self.counts.fetches += 1
        self._active.append(active)
        fetch.start(now)
        self._after(active, now)

    def _end_queued(self, now: float) -> None:
        """Of those that wait for their turn, the ones whose time is over."""
        late = [queued for queued in self._queue if now >= queued.deadline_s]
        for queued in late:
            self._queue.remove(queued)
            _give_up(queued, Outcome.DEADLINE, now)

    def _start_queued(self, now: float) -> None:
        while self._queue and len(self._active) < self.limits.max_fetches:
            self._start(self._queue.popleft(), now)

    def _after(self, active: _Active, now: float) -> None:
        fetch = active.fetch
        if fetch.outcome is None or active not in self._active:
            return
        self._active.remove(active)
        for request_id in active.requests:
            self._requests.pop(request_id, None)
        for ticket in [t for t, other in self._tickets.items() if other is active]:
            del self._tickets[ticket]
        reply = fetch.reply()
        self.counts.complete += fetch.outcome is Outcome.COMPLETE
        self.counts.pages += reply.fetched_pages
        self.counts.bytes += reply.fetched_bytes
        held = active.hold is not None and self._keep(active.hold, fetch)
        if fetch.grace_lease is not None and held:
            fetch.grace_lease.release()
        elif fetch.grace_lease is not None:
            until_s = now + self._settings.grace_s
            self._grace.keep(fetch.grace_lease, until_s, self._pool.total_blocks)
        active.done(reply)

    def _hold_for(self, request: FetchRequest) -> Hold | None:
        if request.hold_s <= 0 or not request.keys:
            return None
        return self._pool.prepare_hold([PageKey(key) for key in request.keys])

    def _keep(self, hold: Hold, fetch: Fetch) -> bool:
        """Whether its pages stay for their request from now on."""
        if fetch.outcome is Outcome.CLOSED:
            hold.abort()
            return False
        ttl_s = min(fetch.request.hold_s, self.limits.max_hold_s)
        return hold.complete(ttl_s) is HoldOutcome.HELD

    def _require_sane(self, request: FetchRequest) -> None:
        limits = self.limits
        # Any length is fine, max_hold_s cuts it short; written so that NaN is refused too.
        if not request.hold_s >= 0:
            raise ProtocolError(f"fetch: hold {request.hold_s}")
        if not (0 <= request.wait_s < float("inf") and 0 <= request.deadline_s < float("inf")):
            raise ProtocolError(f"fetch: wait {request.wait_s}, deadline {request.deadline_s}")
        if request.deadline_s > limits.fetch_deadline_s:
            text = f"deadline of {request.deadline_s} s, fetch_deadline_s is"
            raise LimitExceeded(f"{text} {limits.fetch_deadline_s:g}")
        if len(request.keys) > limits.max_pages_per_request:
            text = f"fetch of {len(request.keys)} pages, max_pages_per_request is"
            raise LimitExceeded(f"{text} {limits.max_pages_per_request}")
        if len(request.sources) > limits.max_sources:
            text = f"fetch from {len(request.sources)} sources, max_sources is {limits.max_sources}"
            raise LimitExceeded(text)
        for source in request.sources:
            if not _ADDRESS.fullmatch(source.peer_address):
                text = f"peer address {source.peer_address!r} is not tcp://HOST:PORT"
                raise ProtocolError(text)
            if source.first_page < 0 or source.pages < 0:
                text = f"source of {source.pages} pages from page {source.first_page}"
                raise ProtocolError(text)

    # -- peers --

    def _in_use(self, peer: Peer) -> bool:
        return (
            self.stalled(peer)
            or any(peer is used for used in self._starting)
            or any(peer is used for active in self._active for used in active.peers)
        )

    def require_room(self, peer: Peer, blocks: int) -> None:
        """Raises LimitExceeded when too much is being read from ``peer`` already. One read may
        always run."""
        size, limit = self._pool.block_bytes, self.limits.max_reading_bytes_per_peer
        running = sum(r.blocks for r in self._reads.values() if r.peer is peer)
        if running and (running + blocks) * size > limit:
            text = f"{running * size} bytes are being read from {peer.address}"
            raise LimitExceeded(f"{text}, max_reading_bytes_per_peer is {limit}")

    def stalled(self, peer: Peer) -> bool:
        """Whether a read from it was given up and has not ended. Nothing more is read from such a
        peer, which bounds the blocks that are out of use."""
        return any(abandoned.peer is peer for abandoned in self._abandoned.values())


class _FetchPort:
    """``port.Port`` of one source of one fetch."""

    def __init__(self, sessions: Sessions, peer: Peer, source: int) -> None:
        self.peer = peer
        self._sessions = sessions
        self._source = source
        self.active: _Active | None = None

    def send(self, message: Message) -> int:
        assert self.active is not None
        request_id = self._sessions.peers.send(self.peer, message)
        # Kept after the answer, so that a second one still finds its fetch.
        self._sessions._requests[request_id] = (self.active, self._source)
        self.active.requests.append(request_id)
        return request_id

    def greeting(self) -> Greeting | None:
        return self.peer.greeting

    def greet(self, reply: HelloReply) -> Greeting:
        return self._sessions.peers.greet(self.peer, reply)

    def forget(self) -> None:
        self.peer.greeting = None

    def reconnect(self) -> None:
        self._sessions.peers.disconnect(self.peer)

    def read(self, name: str, remote: Sequence[int], local: Sequence[int]) -> int:
        sessions = self._sessions
        if sessions.stalled(self.peer):
            raise TransferFailed(f"a read from {self.peer.address} that was given up still runs")
        assert self.active is not None
        sessions.require_room(self.peer, len(local))
        handle = sessions._transport.read(name, remote, local, sessions._pool.block_bytes)
        sessions._reads[handle] = _Reading(self.active, self.peer, len(local))
        return handle

    def abandon(self, handle: int, store: Store) -> None:
        sessions = self._sessions
        sessions.counts.given_up_reads += 1
        del sessions._reads[handle]
        sessions._transport.cancel(handle)
        sessions._abandoned[handle] = _Abandoned(self.peer, store)

    def verify(self, local: Sequence[int], checksums: Sequence[int]) -> int:
        sessions = self._sessions
        assert self.active is not None
        ticket, sessions._next_ticket = sessions._next_ticket, sessions._next_ticket + 1
        sessions._tickets[ticket] = self.active
        sessions._verifier.submit(ticket, local, sessions._pool.block_bytes, checksums)
        return ticket


def _give_up(queued: _Queued, outcome: Outcome, now: float) -> None:
    """It was not started."""
    if queued.hold is not None:
        queued.hold.abort()
    queued.done(FetchReply(0, 0, 0, 0, now - queued.arrived_s, outcome.value))
