"""What the agent's thread does, turn by turn. Everything here belongs to that one thread."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import zmq

from ..config import Limits
from ..errors import MemServeError, ProtocolError
from ..protocol import PROTOCOL_VERSION, events
from ..protocol.control import (
    ErrorReply,
    FetchRequest,
    Hello,
    HelloReply,
    InfoReply,
    InfoRequest,
    Message,
    OfferRequest,
    PeersRequest,
    ResizeRequest,
    SnapshotReply,
    SnapshotRequest,
    StatsReply,
    StatsRequest,
)
from ..types import Namespace, Region
from .base import Pool, Transport
from .members import Membership, MembershipLimits
from .offer import Offers
from .port import FetchSettings
from .resizer import Resizer
from .serve import LeaseServer, error_reply
from .session import Sessions
from .sockets import Dialer, MalformedFrames, Publisher, Route, Server, Wake
from .submissions import FetchSubmission, ResizeSubmission, Submission, Submissions, settle
from .verify import ThreadVerifier

log = logging.getLogger(__name__)

_HOUSEKEEPING_S = 0.1
_MESSAGES_A_TURN = 64
_READ_SLEEP_S = 0.0001
_PUBLISH_S = 0.05
# An error of ours is logged and survived, but not for ever.
_MAX_FAILURES_IN_A_ROW = 20
_FAILURE_PAUSE_S = 0.05
_LAST_WORDS_MS = 200


@dataclass(frozen=True, slots=True)
class AgentConfig:
    """Who a rank is and where it listens; ``advertise`` is how others name ``host``."""

    namespace: Namespace
    instance_id: str
    generation: str
    rank: int
    host: str
    advertise: str
    peer_port: int
    local_path: Path
    fetch: FetchSettings
    limits: Limits
    members: MembershipLimits
    more_stats: Callable[[], Mapping[str, float]] = dict
    offers: Offers = Offers.REFUSED


@dataclass(slots=True)
class _Counts:
    malformed: int = 0
    dropped_answers: int = 0
    internal_errors: int = 0


class AgentLoop:
    """Raises ConfigError or TransferFailed when it cannot be set up, and leaves nothing open."""

    def __init__(
        self,
        config: AgentConfig,
        pool: Pool,
        transport: Transport,
        wake: Wake,
        submissions: Submissions,
    ) -> None:
        self._config = config
        self._pool = pool
        self._transport = transport
        self._wake = wake
        self._submissions = submissions
        self._counts = _Counts()
        self._dialers: dict[str, Dialer] = {}
        self._pages_changed = threading.Event()
        self._events_waiting = threading.Event()
        self._housekeeping_s = 0.0
        self._published_s = 0.0
        self._due_s = 0.0
        self._poller = zmq.Poller()
        with ExitStack() as undo:
            self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
            undo.callback(self._context.destroy, 0)
            undo.callback(transport.close)
            self._bind(config)
            undo.callback(config.local_path.unlink, missing_ok=True)
            for region in pool.regions():
                transport.register(*region)
            self._make_parts(config)
            self._attachment = undo.enter_context(self._attached(pool))
            undo.pop_all()

    def _attached(self, pool: Pool) -> ExitStack:
        with ExitStack() as attachment:
            attachment.callback(pool.subscribe(partial(self._notice, self._pages_changed)))
            attachment.callback(pool.own_resizing, None)
            pool.own_resizing(f"the agent of rank {self._config.rank}")
            attachment.callback(pool.set_event_wake, None)
            pool.set_event_wake(partial(self._notice, self._events_waiting))
            return attachment.pop_all()

    def _bind(self, config: AgentConfig) -> None:
        self._peer_server = Server(self._context)
        self._local_server = Server(self._context)
        self.peer_address = self._peer_server.bind_tcp(
            config.host, config.advertise, config.peer_port
        )
        self._publisher = Publisher(self._context, config.host)
        self.events_address = self._publisher.address(config.advertise)
        self._local_server.bind_ipc(config.local_path)
        self._poller.register(self._wake.fileno(), zmq.POLLIN)
        self._poller.register(self._peer_server.socket, zmq.POLLIN)
        self._poller.register(self._local_server.socket, zmq.POLLIN)

    def _make_parts(self, config: AgentConfig) -> None:
        who = (PROTOCOL_VERSION, config.instance_id, config.generation, config.namespace)
        hello = HelloReply(*who, self._transport.metadata(), self._memory())
        self.server = LeaseServer(self._pool, hello, config.limits)
        self.resizer = Resizer(self._pool, self._transport, self._tell_memory)
        self.sessions = Sessions(
            self._pool,
            self._transport,
            Hello(*who),
            self._dial,
            verifier=ThreadVerifier(self._wake.set),
            settings=config.fetch,
            limits=config.limits,
        )
        self.members = Membership(
            self.sessions.peers, self._pool, self._transport, Hello(*who), config.members
        )

    def _memory(self) -> list[Region]:
        return [(self._pool.arena_base, self._pool.arena_bytes)]

    def _tell_memory(self) -> None:
        self.server.memory_changed(self._transport.metadata(), self._memory())

    def _notice(self, flag: threading.Event) -> None:
        """On any thread, often the engine's: one system call, and none when one is pending."""
        if not flag.is_set():
            flag.set()
            self._wake.set()

    def run(self, stop: threading.Event) -> None:
        failures = 0
        while not stop.is_set():
            try:
                self._turn()
                failures = 0
            except Exception:
                failures += 1
                self._counts.internal_errors += 1
                log.exception("agent of rank %d, failure %d in a row", self._config.rank, failures)
                if failures >= _MAX_FAILURES_IN_A_ROW:
                    log.critical("agent of rank %d gives up", self._config.rank)
                    return
                time.sleep(_FAILURE_PAUSE_S)

    def close(self) -> None:
        now = time.monotonic()
        try:
            self.resizer.close()
            self.server.close()
            self.members.close()
            self.sessions.close(now)
        finally:
            self._transport.close()
            # Only now: the pool may be closed already, and keeps its memory mapped until this.
            self._attachment.close()
            self.sessions.after_close()
            self.members.after_close()
            self._context.destroy(_LAST_WORDS_MS)
            self._config.local_path.unlink(missing_ok=True)

    # -- a turn --

    def _turn(self) -> None:
        before = time.monotonic()
        # What was due in an earlier turn stays due, until it was seen to.
        wakes = (self.server.wake_s(), self.sessions.wake_s(before))
        self._due_s = min(self._due_s, *wakes)
        ready = dict(self._poller.poll(self._timeout_ms(before)))
        now = time.monotonic()
        if self._wake.fileno() in ready:
            self._wake.clear()
        self._take_submissions(now)
        if self._peer_server.socket in ready:
            for item in self._peer_server.receive(_MESSAGES_A_TURN):
                self._on_request(self._peer_server, item, now)
        if self._local_server.socket in ready:
            for item in self._local_server.receive(_MESSAGES_A_TURN):
                self._on_request(self._local_server, item, now)
        for address in [a for a, dialer in self._dialers.items() if dialer.socket in ready]:
            self._on_answers(address, now)
        if self._pages_changed.is_set():
            self._pages_changed.clear()
            self.server.on_pages_readable(now)
            self.sessions.on_pages_readable(now)
        # While bytes are to be moved, events wait a little: many pages, one batch.
        if self._events_waiting.is_set() and (
            not self.sessions.reading or now >= self._published_s + _PUBLISH_S
        ):
            self._publish()
        if self._reading:
            self._read_on()
        self.sessions.take_verdicts(time.monotonic())
        self._on_time(time.monotonic())

    @property
    def _reading(self) -> bool:
        return self.sessions.reading or self.members.reading

    def _read_on(self) -> None:
        before = time.monotonic()
        self.sessions.poll_reads(before)
        self.members.poll_reads(before)
        # A poll that took long has copied bytes itself; one that did not is waiting for others.
        if self._reading and time.monotonic() - before < 2 * _READ_SLEEP_S:
            time.sleep(_READ_SLEEP_S)

    def _on_time(self, now: float) -> None:
        housekeeping = now >= self._housekeeping_s
        if housekeeping or now >= self._due_s:
            self._due_s = float("inf")
            self.server.on_time(now)
            self.sessions.on_time(now)
        self.resizer.on_time(now)
        if housekeeping:
            self._housekeeping_s = now + _HOUSEKEEPING_S
            self._pool.expire()
            self.members.on_time(now)

    def _timeout_ms(self, now: float) -> int:
        if self._reading or self._submissions:
            return 0
        wake_s = min(self._due_s, self.resizer.wake_s(), self._housekeeping_s)
        # Rounded up: waking a little early would mean a turn for nothing.
        return max(0, int((wake_s - now) * 1000) + 1)

    def _take_submissions(self, now: float) -> None:
        if not self._submissions:
            return
        for submission in self._submissions.take():
            try:
                self._submit(submission, now)
            except MemServeError as error:
                submission.future.set_exception(error)
            except Exception as error:
                self._counts.internal_errors += 1
                log.exception("agent of rank %d: %s", self._config.rank, type(submission.request))
                if not submission.future.done():
                    submission.future.set_exception(MemServeError(f"internal error: {error!r}"))

    def _submit(self, submission: Submission, now: float) -> None:
        match submission:
            case FetchSubmission(request, future):
                self.sessions.submit(request, now, partial(settle, future))
            case ResizeSubmission(request, future):
                self.resizer.submit(request, now, partial(settle, future))

    # -- messages --

    def _on_request(
        self, server: Server, item: tuple[Route, Message] | MalformedFrames, now: float
    ) -> None:
        if isinstance(item, MalformedFrames):
            self._counts.malformed += 1
            if item.route is not None:
                server.send(item.route, ErrorReply("ProtocolError", str(item)))
            return
        route, message = item
        answer = partial(server.send, route)
        try:
            if server is self._peer_server:
                self._on_peer(message, now, route)
            else:
                self._on_local(message, now, route)
        except MemServeError as error:
            answer(error_reply(error))
        except Exception as error:
            self._counts.internal_errors += 1
            log.exception("agent of rank %d: %s", self._config.rank, type(message).__name__)
            answer(ErrorReply("MemServeError", f"internal error: {type(error).__name__}: {error}"))

    def _on_peer(self, message: Message, now: float, route: Route) -> None:
        answer = partial(self._peer_server.send, route)
        if not isinstance(message, OfferRequest):
            self.server.handle(route.asker.hex(), message, now, answer)
            return
        if self._config.offers is Offers.REFUSED:
            raise ProtocolError(
                f"{self._config.instance_id} takes no offers: it fetches what its own side asks for"
            )
        wanted = FetchRequest.of(
            message.peer_id, message.peer_address, message.keys, 0.0, message.deadline_s
        )
        self.sessions.submit(wanted, now, answer)

    def _on_local(self, message: Message, now: float, route: Route) -> None:
        answer = partial(self._local_server.send, route)
        match message:
            case FetchRequest():
                self.sessions.submit(message, now, answer)
            case SnapshotRequest():
                # Batches first: the snapshot is true after the last one that was taken.
                self._publish()
                answer(SnapshotReply(events.encode_snapshot(self._pool.snapshot())))
            case StatsRequest():
                answer(StatsReply(self.stats()))
            case InfoRequest():
                answer(self.info())
            case ResizeRequest():
                self.resizer.submit(message, now, answer)
            case PeersRequest():
                answer(self.members.set_members(message.peers, message.valid_s, now))
            case _:
                raise ProtocolError(f"{type(message).__name__} is not for a local socket")

    def _on_answers(self, address: str, now: float) -> None:
        peer = self.sessions.peer(address)
        dialer = self._dialers[address]
        if peer is None:
            return
        for item in dialer.receive(_MESSAGES_A_TURN):
            if isinstance(item, MalformedFrames):
                self._counts.malformed += 1
                continue
            if not self.members.on_message(peer, *item, now):
                self.sessions.on_message(peer, *item, now)

    def _publish(self) -> None:
        # Cleared first: what is written from now on sets it again.
        self._events_waiting.clear()
        self._published_s = time.monotonic()
        for seq, changes in self._pool.drain_events():
            batch = events.EventBatch(ts=time.time(), events=list(changes))
            self._publisher.send(events.encode_frames(seq, batch))

    def _dial(self, address: str) -> _PeerLink:
        dialer = Dialer(self._context, address)
        self._dialers[address] = dialer
        self._poller.register(dialer.socket, zmq.POLLIN)
        return _PeerLink(self, address, dialer)

    def hang_up(self, address: str) -> None:
        dialer = self._dialers.pop(address)
        self._poller.unregister(dialer.socket)
        dialer.close()

    # -- what others may know --

    def info(self) -> InfoReply:
        return InfoReply(
            rank=self._config.rank,
            generation=self._config.generation,
            namespace=self._config.namespace,
            peer_address=self.peer_address,
            events_address=self.events_address,
            total_blocks=self._pool.total_blocks,
        )

    def stats(self) -> dict[str, float]:
        own = {
            "malformed_messages_total": self._counts.malformed,
            "internal_errors_total": self._counts.internal_errors,
            **self.server.stats(),
            **self.sessions.stats(),
            **self.members.stats(),
        }
        return {
            **self._pool.stats(),
            **{f"transfer_{name}": value for name, value in own.items()},
            **self._config.more_stats(),
        }


class _PeerLink:
    """``peers.Link`` over a dialer of the loop."""

    def __init__(self, loop: AgentLoop, address: str, dialer: Dialer) -> None:
        self._loop = loop
        self._address = address
        self._dialer = dialer

    def send(self, request_id: int, message: Message) -> None:
        self._dialer.send(request_id, message)

    def close(self) -> None:
        self._loop.hang_up(self._address)
