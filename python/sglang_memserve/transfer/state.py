"""One fetch as a state machine: no clock, no socket, no thread.

Life cycle. A fetch makes a chain of page keys readable here by reading what is missing from one
peer, round by round, until all is readable or something ends it:

    GREETING    the peer's generation and memory are learnt (skipped when they are known)
       v
    LEASING     the peer pins the next missing pages; it may wait for pages it is computing
       v
    READING     into blocks of ours that nobody can see yet
       v
    RELEASING   the peer says whether its blocks stayed put: only then they are published
       v
    back to LEASING, or ENDED with an Outcome

BLOCKED replaces READING when somebody else on this rank is filling the missing pages: it waits for
them. Every state has a deadline, and none of them lies behind that of the fetch.

What is held and given back: the peer's lease (released, or it expires), our blocks being filled (a
``Store``: committed, aborted, or handed to ``Port.abandon`` when a read into them still runs), and
pins on our own readable pages of the chain. The pins outlive the fetch by a grace period, so that
the request that the fetch was made for finds its pages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Protocol

from ..errors import LimitExceeded, MemServeError
from ..protocol.control import (
    KEY_BYTES,
    ErrorReply,
    FetchReply,
    FetchRequest,
    Hello,
    HelloReply,
    LeaseReply,
    LeaseRequest,
    Message,
    ReleaseReply,
    ReleaseRequest,
)
from ..types import BlockId, PageKey
from .base import BlockStore, Lease, ReadState, Store


class Outcome(Enum):
    """Why a fetch ended; the values are ``FetchReply.outcome``."""

    COMPLETE = "complete"
    MISS = "miss"  # the peer does not hold the rest, or not in time
    NO_BLOCKS = "no_blocks"  # our arena is full of pinned blocks
    DEADLINE = "deadline"
    PEER_UNREACHABLE = "peer_unreachable"
    NAMESPACE_MISMATCH = "namespace_mismatch"
    VERSION_MISMATCH = "version_mismatch"
    LEASE_INVALID = "lease_invalid"  # the peer restarted, or we read slower than the lease lasted
    TRANSFER_FAILED = "transfer_failed"
    LIMIT = "limit_exceeded"  # the peer refused: one of its bounds was reached
    PROTOCOL_ERROR = "protocol_error"
    CLOSED = "closed"  # this rank is shutting down


_OUTCOME_OF_ERROR = {
    "NamespaceMismatch": Outcome.NAMESPACE_MISMATCH,
    "VersionMismatch": Outcome.VERSION_MISMATCH,
    "LeaseInvalid": Outcome.LEASE_INVALID,
    "LimitExceeded": Outcome.LIMIT,
    "PeerUnreachable": Outcome.PEER_UNREACHABLE,
    "TransferFailed": Outcome.TRANSFER_FAILED,
}


_PROBE = PageKey(b"\xff" * KEY_BYTES)


def outcome_of(error_kind: str) -> Outcome:
    """``error_kind`` is the name of a class in ``errors``."""
    return _OUTCOME_OF_ERROR.get(error_kind, Outcome.PROTOCOL_ERROR)


@dataclass(frozen=True, slots=True)
class Greeting:
    """What is known of a peer once it was greeted: its boot, and its name in our transport."""

    generation: str
    transport_name: str


@dataclass(frozen=True, slots=True)
class FetchSettings:
    """``reply_timeout_s``: for a peer's answer, on top of any wait it was asked for.
    ``grace_s``: how long the pages of an ended fetch stay pinned. ``recheck_s``: how often a
    blocked fetch looks again by itself."""

    reply_timeout_s: float = 1.0
    max_pages_per_lease: int = 1024
    max_lease_ttl_s: float = 30.0
    grace_s: float = 3.0
    recheck_s: float = 0.05


class Port(Protocol):
    """What a fetch does to the world outside. Nothing here waits."""

    def send(self, message: Message) -> int:
        """To the peer; returns the request id under which it may answer."""
        ...

    def greeting(self) -> Greeting | None: ...

    def greet(self, reply: HelloReply) -> Greeting:
        """Check and remember a peer. Raises NamespaceMismatch, VersionMismatch, PeerError."""
        ...

    def forget(self) -> None:
        """The peer must be greeted again before anything else is asked of it."""
        ...

    def reconnect(self) -> None:
        """As ``forget``; and the transport has to learn the peer anew."""
        ...

    def read(self, name: str, remote: Sequence[int], local: Sequence[int]) -> int:
        """Raises TransferFailed when nothing was started."""
        ...

    def abandon(self, handle: int, store: Store) -> None:
        """Take over a read that runs and the blocks it writes to; abort ``store`` when it ended."""
        ...


class State(Enum):
    GREETING = auto()
    LEASING = auto()
    BLOCKED = auto()
    READING = auto()
    RELEASING = auto()
    ENDED = auto()


class Fetch:
    """``deadline_s`` and every ``now`` are on one monotonic clock of the caller.

    Call ``start`` once, then ``on_reply``, ``on_read_ended``, ``on_pages_readable`` as things
    happen and ``on_time`` no later than ``wake_s``, until ``outcome`` is set.
    """

    def __init__(
        self,
        request: FetchRequest,
        *,
        arrived_s: float,
        store: BlockStore,
        port: Port,
        hello: Hello,
        settings: FetchSettings,
    ) -> None:
        self.request = request
        self.keys = [PageKey(key) for key in request.keys]
        self.state = State.GREETING
        self.outcome: Outcome | None = None
        self.deadline_s = arrived_s + request.deadline_s
        self.wake_s = self.deadline_s
        self.read_handle: int | None = None
        self.grace_lease: Lease | None = None
        self._arrived_s = arrived_s
        self._ended_s = arrived_s
        self._wait_until_s = min(arrived_s + request.wait_s, self.deadline_s)
        self._pool = store
        self._port = port
        self._hello = hello
        self._settings = settings
        self._awaited: int | None = None
        self._greeting: Greeting | None = None
        self._regreeted = False
        self._lease_id = 0
        self._store: Store | None = None
        self._pins: list[Lease] = []
        self._pinned_pages = 0
        self._present_pages = 0
        self._readable_pages = 0
        self._fetched_pages = 0

    # -- events --

    def start(self, now: float) -> None:
        self._present_pages = self._look(now)
        self._next_round(now)

    def on_reply(self, request_id: int, message: Message, now: float) -> None:
        """A peer's answer to anything that was sent, in any order, late or twice."""
        if request_id != self._awaited or self.state is State.ENDED:
            self._return_stray_lease(message)
            return
        self._awaited = None
        if isinstance(message, ErrorReply):
            self._on_error(message, now)
        elif self.state is State.GREETING and isinstance(message, HelloReply):
            self._on_greeted(message, now)
        elif self.state is State.LEASING and isinstance(message, LeaseReply):
            self._on_lease(message, now)
        elif self.state is State.RELEASING and isinstance(message, ReleaseReply):
            self._on_released(message, now)
        else:
            self._end(Outcome.PROTOCOL_ERROR, now)

    def on_read_ended(self, handle: int, state: ReadState, now: float) -> None:
        assert state is not ReadState.RUNNING
        if self.state is not State.READING or handle != self.read_handle:
            return
        self.read_handle = None
        if state is ReadState.FAILED:
            self._port.reconnect()
            self._end(Outcome.TRANSFER_FAILED, now)
            return
        self._enter(State.RELEASING, now + self._settings.reply_timeout_s)
        self._awaited = self._port.send(self._release_request())

    def on_pages_readable(self, now: float) -> None:
        if self.state is State.BLOCKED:
            self._next_round(now)

    def on_time(self, now: float) -> None:
        if self.state is State.ENDED or now < self.wake_s:
            return
        if now >= self.deadline_s:
            silent = self.state is State.GREETING
            self._end(Outcome.PEER_UNREACHABLE if silent else Outcome.DEADLINE, now)
        elif self.state is State.BLOCKED:
            self._next_round(now)
        else:
            self._port.forget()
            self._end(Outcome.PEER_UNREACHABLE, now)

    def cancel(self, outcome: Outcome, now: float) -> None:
        if self.state is not State.ENDED:
            self._end(outcome, now)

    def reply(self) -> FetchReply:
        assert self.outcome is not None, "the fetch has not ended"
        return FetchReply(
            present_pages=self._present_pages,
            readable_pages=self._readable_pages,
            fetched_pages=self._fetched_pages,
            fetched_bytes=self._fetched_pages * self._pool.block_bytes,
            seconds=self._ended_s - self._arrived_s,
            outcome=self.outcome.value,
        )

    # -- transitions --

    def _next_round(self, now: float) -> None:
        if self._look(now) == len(self.keys):
            self._end(Outcome.COMPLETE, now)
            return
        if now >= self.deadline_s:
            self._end(Outcome.DEADLINE, now)
            return
        self._greeting = self._port.greeting()
        if self._greeting is None:
            self._enter(State.GREETING, now + self._settings.reply_timeout_s)
            self._awaited = self._port.send(self._hello)
        else:
            self._lease(self._greeting, now)

    def _lease(self, greeting: Greeting, now: float) -> None:
        settings = self._settings
        first = self._readable_pages
        # The peer's answer should come before our own deadline, to end as a miss and not as one.
        latest = min(self._wait_until_s, self.deadline_s - 0.1 * (self.deadline_s - now))
        wait_s = max(0.0, latest - now)
        ttl_s = min(self.deadline_s - now + settings.reply_timeout_s, settings.max_lease_ttl_s)
        self._enter(State.LEASING, now + wait_s + settings.reply_timeout_s)
        keys = self.request.keys[first : first + settings.max_pages_per_lease]
        self._awaited = self._port.send(
            LeaseRequest(greeting.generation, keys, min_pages=1, wait_s=wait_s, ttl_s=ttl_s)
        )

    def _on_greeted(self, message: HelloReply, now: float) -> None:
        try:
            self._greeting = self._port.greet(message)
        except MemServeError as error:
            self._end(outcome_of(type(error).__name__), now)
            return
        self._lease(self._greeting, now)

    def _on_lease(self, message: LeaseReply, now: float) -> None:
        count = len(message.addresses)
        if message.lease_id == 0 or count == 0:
            self._lease_id = message.lease_id
            self._end(Outcome.MISS, now)
            return
        self._lease_id = message.lease_id
        first = self._readable_pages
        keys = self.keys[first : first + self._settings.max_pages_per_lease]
        if count > len(keys):
            self._end(Outcome.PROTOCOL_ERROR, now)
            return
        parent = self.keys[first - 1] if first else None
        self._store = self._pool.prepare_store(keys[:count], parent=parent)
        if self._store.missing:
            self._read(self._store.missing, message.addresses, now)
        else:
            self._on_nothing_to_fill(now)

    def _on_nothing_to_fill(self, now: float) -> None:
        """Every leased page is readable by now, or being filled by others; or blocks ran out."""
        self._give_back()
        before = self._readable_pages
        if self._look(now) > before:
            self._next_round(now)
        elif self._blocks_left():
            self._enter(State.BLOCKED, now + self._settings.recheck_s)
        else:
            self._end(Outcome.NO_BLOCKS, now)

    def _read(
        self, missing: Sequence[tuple[int, BlockId]], addresses: Sequence[int], now: float
    ) -> None:
        assert self._greeting is not None
        remote = [addresses[index] for index, _ in missing]
        local = [self._pool.address(block) for _, block in missing]
        try:
            handle = self._port.read(self._greeting.transport_name, remote, local)
        except MemServeError:
            self._port.reconnect()
            self._end(Outcome.TRANSFER_FAILED, now)
            return
        self.read_handle = handle
        self._enter(State.READING, self.deadline_s)

    def _on_released(self, message: ReleaseReply, now: float) -> None:
        assert self._store is not None
        self._lease_id = 0
        if not message.valid:
            self._end(Outcome.LEASE_INVALID, now)
            return
        store, self._store = self._store, None
        store.commit()
        self._fetched_pages += len(store.missing)
        self._next_round(now)

    def _on_error(self, message: ErrorReply, now: float) -> None:
        outcome = outcome_of(message.kind)
        if outcome is Outcome.LEASE_INVALID:
            self._port.forget()
            if self.state is State.LEASING and not self._regreeted:
                # A new boot at the old address.
                self._regreeted = True
                self._next_round(now)
                return
        self._end(outcome, now)

    def _enter(self, state: State, wake_s: float) -> None:
        self.state = state
        self.wake_s = min(wake_s, self.deadline_s)

    def _end(self, outcome: Outcome, now: float) -> None:
        self._give_back()
        self.state = State.ENDED
        self._awaited = None
        self._ended_s = now
        self._readable_pages = self._pool.readable_pages(self.keys)
        complete = self._readable_pages == len(self.keys)
        self.outcome = Outcome.COMPLETE if complete else outcome
        self.grace_lease = self._pin(0, self._settings.grace_s)
        for pin in self._pins:
            pin.release()
        self._pins.clear()

    # -- what is held --

    def _give_back(self) -> None:
        """The peer's lease and our unpublished blocks."""
        if self._lease_id:
            self._port.send(self._release_request())
            self._lease_id = 0
        store, self._store = self._store, None
        handle, self.read_handle = self.read_handle, None
        if store is None:
            return
        if handle is None:
            store.abort()
        else:
            self._port.abandon(handle, store)

    def _release_request(self) -> ReleaseRequest:
        assert self._greeting is not None
        return ReleaseRequest(self._greeting.generation, self._lease_id)

    def _return_stray_lease(self, message: Message) -> None:
        stray = isinstance(message, LeaseReply) and message.lease_id not in (0, self._lease_id)
        if stray and self._greeting is not None:
            assert isinstance(message, LeaseReply)
            self._port.send(ReleaseRequest(self._greeting.generation, message.lease_id))

    def _look(self, now: float) -> int:
        """Count and pin our own readable pages of the chain."""
        self._readable_pages = self._pool.readable_pages(self.keys)
        if self._readable_pages > self._pinned_pages:
            ttl_s = max(0.0, self.deadline_s - now) + self._settings.grace_s
            pin = self._pin(self._pinned_pages, ttl_s)
            if pin is not None:
                self._pins.append(pin)
                self._pinned_pages += len(pin.blocks)
        return self._readable_pages

    def _pin(self, first: int, ttl_s: float) -> Lease | None:
        keys = self.keys[first : self._readable_pages]
        if not keys:
            return None
        ttl_s = min(ttl_s, self._settings.max_lease_ttl_s)
        try:
            return self._pool.acquire(keys, owner=f"fetch from {self.request.peer_id}", ttl_s=ttl_s)
        except LimitExceeded:
            # Unpinned pages may be evicted before they are used; they are then computed.
            return None

    def _blocks_left(self) -> bool:
        """Whether the pool can give a block at all, tried with a page that nobody else fills."""
        probe = self._pool.prepare_store([_PROBE])
        left = bool(probe.missing)
        probe.abort()
        return left
