"""Who belongs to the cluster, and being connected to them before the first fetch.

A member goes through

    WAITING     until its turn, or until it may be tried again
       v
    GREETING    Hello is sent: generation, namespace, the transport learns its memory
       v
    READING     the first bytes are read: UCX connects when something is first read, not before
       v
    CONNECTED   a fetch finds all of that done; back to WAITING when a fetch lost the connection

A few at a time, each with a deadline; who does not answer is tried again ever more rarely, and who
can never be read from (another namespace or version) not before it is another boot. A member is
kept however idle it is. One that is not listed any more is forgotten a little later, so that a
router which has just restarted and knows half of the cluster does no harm; another boot of the same
instance, or at the same address, replaces it at once.

Belongs to the agent's thread. No clock and no socket of its own.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum, auto

from ..errors import MemServeError, NamespaceMismatch, ProtocolError, VersionMismatch
from ..protocol.control import ErrorReply, Hello, HelloReply, Message, PeerEntry, PeersReply
from ..types import PageKey
from .base import Pool, ReadState, Store, Transport
from .peers import Peer, PeerTable
from .port import Greeting

_FIRST_READ_BYTES = 64
_MOST_VALID_S = 3600.0
# Another attempt with the same boot would end the same way.
_FINAL = (NamespaceMismatch.__name__, VersionMismatch.__name__)


class Failure(Enum):
    """Why an attempt failed; the values are part of the names of counters."""

    SILENT = "silent"
    REFUSED = "refused"
    TRANSFER = "transfer"


class State(Enum):
    WAITING = auto()
    GREETING = auto()
    READING = auto()
    CONNECTED = auto()


@dataclass(frozen=True, slots=True)
class MembershipLimits:
    """``members``: at most three quarters of ``Limits.max_peers`` of them, for fetches from others
    need room too.
    ``at_a_time``: learning a peer keeps the agent's thread busy for tens of milliseconds."""

    members: int = 192
    at_a_time: int = 2
    hello_s: float = 2.0
    first_read_s: float = 5.0
    retry_first_s: float = 0.5
    retry_most_s: float = 30.0
    leave_s: float = 10.0


@dataclass(slots=True, eq=False)
class _Member:
    """``wake_s``: when to try (WAITING) or to give up (GREETING, READING)."""

    entry: PeerEntry
    until_s: float
    wake_s: float
    state: State = State.WAITING
    peer: Peer | None = None
    attempts: int = 0
    started_s: float = 0.0
    request_id: int = 0
    handle: int = 0
    store: Store | None = None


@dataclass(slots=True)
class _Counts:
    connects: int = 0
    connect_s: float = 0.0
    failures: Counter[Failure] = field(default_factory=Counter)


class Membership:
    """The members of one rank's cluster; ``peers`` holds their links and connections."""

    def __init__(
        self,
        peers: PeerTable,
        pool: Pool,
        transport: Transport,
        hello: Hello,
        limits: MembershipLimits | None = None,
    ) -> None:
        self.limits = limits or MembershipLimits()
        self._most = min(self.limits.members, 3 * peers.limits.max_peers // 4)
        self._peers = peers
        self._pool = pool
        self._transport = transport
        self._hello = hello
        self._members: dict[str, _Member] = {}
        self._requests: dict[int, _Member] = {}
        self._reads: dict[int, _Member] = {}
        self._overdue: dict[int, tuple[Peer, Store]] = {}
        self._leaving: list[Peer] = []
        self._counts = _Counts()
        peers.keep_while(self._wanted)

    # -- the agent's side --

    @property
    def reading(self) -> bool:
        return bool(self._reads)

    def state(self, address: str) -> State | None:
        """None for an address that is no member's."""
        member = self._members.get(address)
        return None if member is None else member.state

    def set_members(self, entries: Sequence[PeerEntry], valid_s: float, now: float) -> PeersReply:
        """``entries`` are all others of the cluster, for ``valid_s`` unless it is said again.

        Those beyond what there is room for are left out: they are met at the first fetch. Raises
        ProtocolError for a duration that makes no sense."""
        if not 0 < valid_s <= _MOST_VALID_S:
            raise ProtocolError(f"members valid for {valid_s} s, the limit is {_MOST_VALID_S:g} s")
        others = [entry for entry in entries if entry.generation != self._hello.generation]
        listed = {entry.peer_address: entry for entry in others[: self._most]}
        boots = {entry.peer_id: entry.generation for entry in listed.values()}
        full = len(self._members.keys() | listed.keys()) > self._most
        for address, member in list(self._members.items()):
            if address in listed:
                continue
            newer_boot = boots.get(member.entry.peer_id, member.entry.generation)
            if full or newer_boot != member.entry.generation:
                self._remove(member)
            else:
                member.until_s = min(member.until_s, now + self.limits.leave_s)
        for address, entry in listed.items():
            self._list(address, entry, now + valid_s, now)
        self._start_some(now)
        return PeersReply(len(self._members), self._connected())

    def on_message(self, peer: Peer, request_id: int, message: Message, now: float) -> bool:
        """Whether it was an answer to a greeting of ours that is awaited still."""
        member = self._requests.get(request_id)
        if member is None or member.peer is not peer:
            return False
        del self._requests[request_id]
        peer.used_s = now
        if isinstance(message, HelloReply):
            try:
                greeting = self._peers.greet(peer, message)
            except MemServeError as error:
                self._fail_with(member, error, now)
            else:
                self._read_first(member, peer, greeting, now)
        elif isinstance(message, ErrorReply):
            self._refused(member, message.kind, now)
        else:
            self._fail(member, Failure.REFUSED, now)
        self._start_some(now)
        return True

    def poll_reads(self, now: float) -> None:
        for handle, member in list(self._reads.items()):
            state = self._transport.poll(handle)
            if state is ReadState.RUNNING:
                continue
            del self._reads[handle]
            assert member.store is not None and member.peer is not None
            member.store.abort()
            member.store = None
            if state is ReadState.DONE:
                self._connect(member, now)
            else:
                self._peers.disconnect(member.peer)
                self._fail(member, Failure.TRANSFER, now)
        self._start_some(now)

    def on_time(self, now: float) -> None:
        """Several times a second."""
        for member in list(self._members.values()):
            if now >= member.until_s:
                self._remove(member)
            elif member.state is State.CONNECTED:
                assert member.peer is not None
                if member.peer.greeting is None:
                    self._wait(member, now + self.limits.retry_first_s)
            elif member.state is not State.WAITING and now >= member.wake_s:
                silent = member.state is State.GREETING
                self._stop(member)
                self._fail(member, Failure.SILENT if silent else Failure.TRANSFER, now)
        for handle, (_, store) in list(self._overdue.items()):
            if self._transport.poll(handle) is not ReadState.RUNNING:
                del self._overdue[handle]
                store.abort()
        self._leaving = [peer for peer in self._leaving if not self._peers.forget(peer)]
        self._start_some(now)

    def close(self) -> None:
        for member in list(self._members.values()):
            self._stop(member)
        self._members.clear()
        self._leaving.clear()

    def after_close(self) -> None:
        """The transport is closed: no read runs any more."""
        for _, store in self._overdue.values():
            store.abort()
        self._overdue.clear()

    def stats(self) -> dict[str, float]:
        counts = self._counts
        return {
            "members": len(self._members),
            "members_connected": self._connected(),
            "member_connects_total": counts.connects,
            "member_connect_seconds_total": counts.connect_s,
            **{f"member_failures_{kind.value}_total": counts.failures[kind] for kind in Failure},
        }

    def check(self) -> None:
        assert len(self._members) <= self._most
        states = [member.state for member in self._members.values()]
        busy = states.count(State.GREETING) + states.count(State.READING)
        assert busy <= self.limits.at_a_time, states
        assert len(self._requests) == states.count(State.GREETING)
        assert len(self._reads) == states.count(State.READING)
        for address, member in self._members.items():
            assert member.entry.peer_address == address
            assert (member.store is not None) == (member.state is State.READING), member
            assert member.peer is None or self._peers.get(address) is member.peer, member
            assert member.peer is not None or member.state is State.WAITING, member
        for peer in self._leaving:
            assert peer.address not in self._members

    # -- who is listed --

    def _list(self, address: str, entry: PeerEntry, until_s: float, now: float) -> None:
        self._leaving = [peer for peer in self._leaving if peer.address != address]
        member = self._members.get(address)
        if member is None:
            self._members[address] = _Member(entry, until_s, now)
            return
        member.until_s = until_s
        if member.entry == entry:
            return
        # Another boot, which listens where the old one did.
        member.entry = entry
        self._stop(member)
        if member.peer is not None:
            member.peer.greeting = None
        member.attempts = 0
        self._wait(member, now)

    def _remove(self, member: _Member) -> None:
        self._stop(member)
        del self._members[member.entry.peer_address]
        if member.peer is not None and not self._peers.forget(member.peer):
            self._leaving.append(member.peer)

    def _wanted(self, peer: Peer) -> bool:
        overdue = any(other is peer for other, _ in self._overdue.values())
        return overdue or peer.address in self._members

    def _connected(self) -> int:
        return sum(member.state is State.CONNECTED for member in self._members.values())

    # -- getting connected --

    def _start_some(self, now: float) -> None:
        waiting = [
            member
            for member in self._members.values()
            if member.state is State.WAITING and member.wake_s <= now
        ]
        for member in sorted(waiting, key=lambda member: member.wake_s):
            if len(self._requests) + len(self._reads) >= self.limits.at_a_time:
                return
            self._start(member, now)

    def _start(self, member: _Member, now: float) -> None:
        try:
            peer = self._peers.obtain(member.entry.peer_address, now)
        except MemServeError as error:
            self._fail_with(member, error, now)
            return
        member.peer = peer
        if any(other is peer for other, _ in self._overdue.values()):
            self._fail(member, Failure.TRANSFER, now)
            return
        member.started_s = now
        known = peer.greeting
        if known is not None and known.generation == member.entry.generation:
            self._read_first(member, peer, known, now)
            return
        member.state = State.GREETING
        member.wake_s = now + self.limits.hello_s
        member.request_id = self._peers.send(peer, self._hello)
        self._requests[member.request_id] = member

    def _read_first(self, member: _Member, peer: Peer, greeting: Greeting, now: float) -> None:
        """Into a block of ours that is never published."""
        probe = PageKey(hashlib.sha256(b"first read " + peer.address.encode()).digest())
        store = self._pool.prepare_store([probe])
        if not store.missing or not greeting.memory:
            # Nothing to read, or nowhere to read it to: the first fetch pays for that part.
            store.abort()
            self._connect(member, now)
            return
        local = self._pool.address(store.missing[0][1])
        remote = greeting.memory[0][0]
        try:
            handle = self._transport.read(
                greeting.transport_name,
                [remote],
                [local],
                min(_FIRST_READ_BYTES, self._pool.block_bytes),
            )
        except MemServeError:
            store.abort()
            self._peers.disconnect(peer)
            self._fail(member, Failure.TRANSFER, now)
            return
        member.state = State.READING
        member.wake_s = now + self.limits.first_read_s
        member.store, member.handle = store, handle
        self._reads[handle] = member

    def _connect(self, member: _Member, now: float) -> None:
        member.state = State.CONNECTED
        member.attempts = 0
        self._counts.connects += 1
        self._counts.connect_s += now - member.started_s

    def _fail_with(self, member: _Member, error: MemServeError, now: float) -> None:
        if isinstance(error, ProtocolError | NamespaceMismatch):
            self._refused(member, type(error).__name__, now)
        else:
            self._fail(member, Failure.TRANSFER, now)

    def _refused(self, member: _Member, kind: str, now: float) -> None:
        self._fail(member, Failure.REFUSED, now)
        if kind in _FINAL:
            self._wait(member, float("inf"))

    def _fail(self, member: _Member, failure: Failure, now: float) -> None:
        self._counts.failures[failure] += 1
        pause_s = min(
            self.limits.retry_first_s * 2 ** min(member.attempts, 16), self.limits.retry_most_s
        )
        member.attempts += 1
        self._wait(member, now + pause_s)

    def _wait(self, member: _Member, until_s: float) -> None:
        member.state = State.WAITING
        member.wake_s = until_s

    def _stop(self, member: _Member) -> None:
        """Wait for nothing more. A read that runs keeps its block until it has ended."""
        self._requests.pop(member.request_id, None)
        store, member.store = member.store, None
        if store is not None:
            assert member.peer is not None
            del self._reads[member.handle]
            self._transport.cancel(member.handle)
            self._overdue[member.handle] = (member.peer, store)
