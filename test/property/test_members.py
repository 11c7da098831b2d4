"""Membership against peers and a network that lose, delay, refuse, restart and come back.

Time is virtual, the pool is real, the transport is modelled: a read runs until the test ends it, as
NIXL's do, and a name that was disconnected reads nothing any more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from sglang_memserve.config import Limits
from sglang_memserve.errors import TransferFailed
from sglang_memserve.mempool import MemPool
from sglang_memserve.protocol.control import (
    ErrorReply,
    Hello,
    HelloReply,
    Message,
    PeerEntry,
)
from sglang_memserve.transfer.base import ReadState
from sglang_memserve.transfer.members import Membership, MembershipLimits, State
from sglang_memserve.transfer.peers import Peer, PeerTable
from sglang_memserve.types import Namespace

NAMESPACE = Namespace("m", "1", "float16", 4, 1, 1, 8, 8, 0, 1)
OTHER = Namespace("other", "1", "float16", 4, 1, 1, 8, 8, 0, 1)
LIMITS = MembershipLimits(
    members=3,
    at_a_time=2,
    hello_s=1.0,
    first_read_s=1.0,
    retry_first_s=0.5,
    retry_most_s=4.0,
    leave_s=3.0,
)
PEERS = Limits(max_peers=6, peer_idle_s=5.0)
HOSTS = ("tcp://a:1", "tcp://b:1", "tcp://c:1", "tcp://d:1")
VALID_S = 20.0


@dataclass
class FakeTransport:
    connected: set[str] = field(default_factory=set)
    reads: dict[int, ReadState] = field(default_factory=dict)
    cancelled: set[int] = field(default_factory=set)
    refusing: bool = False
    next_read: int = 1

    def register(self, base: int, length: int) -> None:
        raise NotImplementedError

    def unregister(self, base: int, length: int) -> None:
        raise NotImplementedError

    def metadata(self) -> bytes:
        raise NotImplementedError

    def name_in(self, metadata: bytes) -> str:
        return metadata.decode()

    def connect(self, metadata: bytes) -> str:
        if self.refusing:
            raise TransferFailed("refused")
        self.connected.add(metadata.decode())
        return metadata.decode()

    def disconnect(self, peer: str) -> None:
        self.connected.remove(peer)

    def read(self, peer: str, remote: Sequence[int], local: Sequence[int], block_bytes: int) -> int:
        assert peer in self.connected, peer
        if self.refusing:
            raise TransferFailed("refused")
        self.next_read += 1
        self.reads[self.next_read] = ReadState.RUNNING
        return self.next_read

    def poll(self, handle: int) -> ReadState:
        state = self.reads[handle]
        if state is not ReadState.RUNNING:
            del self.reads[handle]
            self.cancelled.discard(handle)
        return state

    def cancel(self, handle: int) -> None:
        self.cancelled.add(handle)

    def close(self) -> None:
        self.reads.clear()


@dataclass
class FakeLink:
    address: str
    sent: list[tuple[int, Message]] = field(default_factory=list)
    closed: bool = False

    def send(self, request_id: int, message: Message) -> None:
        assert not self.closed
        self.sent.append((request_id, message))

    def close(self) -> None:
        assert not self.closed
        self.closed = True


class World(RuleBasedStateMachine):
    @initialize()
    def begin(self) -> None:
        self.now = 100.0
        self.pool = MemPool(
            NAMESPACE,
            arena_bytes=4 * NAMESPACE.block_bytes,
            generation="me",
            clock=lambda: self.now,
        )
        self.transport = FakeTransport()
        self.links: dict[str, FakeLink] = {}
        self.fetching: set[str] = set()
        self.boots = dict.fromkeys(HOSTS, 1)
        self.listed: dict[str, float] = {}
        hello = Hello(1, "me", "me", NAMESPACE)
        self.table = PeerTable(
            self.transport,
            hello,
            self.open_link,
            PEERS,
            in_use=lambda p: p.address in self.fetching,
        )
        self.members = Membership(self.table, self.pool, self.transport, hello, LIMITS)

    def open_link(self, address: str) -> FakeLink:
        assert address not in self.links or self.links[address].closed
        self.links[address] = FakeLink(address)
        return self.links[address]

    def entry(self, address: str) -> PeerEntry:
        return PeerEntry(f"http://{address[6]}", f"boot-{self.boots[address]}", address)

    # -- the router --

    @rule(listed=st.sets(st.sampled_from(HOSTS)))
    def list_members(self, listed: set[str]) -> None:
        entries = [self.entry(address) for address in sorted(listed)]
        mine = PeerEntry("http://me", "me", "tcp://me:1")
        reply = self.members.set_members([mine, *entries], VALID_S, self.now)
        kept = {entry.peer_address for entry in entries[: LIMITS.members]}
        if len(kept | self.listed.keys()) > LIMITS.members:
            self.listed.clear()
        for address in self.listed.keys() - kept:
            self.listed[address] = min(self.listed[address], self.now + LIMITS.leave_s)
        self.listed.update(dict.fromkeys(kept, self.now + VALID_S))
        assert reply.members == len(self.listed)

    @rule(address=st.sampled_from(HOSTS))
    def restart(self, address: str) -> None:
        self.boots[address] += 1

    # -- time and the network --

    @rule(seconds=st.sampled_from([0.1, 0.6, 1.1, 3.1, 6.0, 21.0]))
    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        self.members.on_time(self.now)
        self.table.on_time(self.now)
        self.listed = {a: until for a, until in self.listed.items() if self.now < until}

    @precondition(lambda self: any(link.sent for link in self.open_links()))
    @rule(data=st.data(), answer=st.sampled_from(["hello", "error", "stranger", "lost", "twice"]))
    def deliver(self, data: st.DataObject, answer: str) -> None:
        link = data.draw(st.sampled_from([link for link in self.open_links() if link.sent]))
        request_id, message = link.sent.pop(0)
        assert isinstance(message, Hello)
        if answer != "lost":
            self.answer(link, request_id, answer)

    def answer(self, link: FakeLink, request_id: int, how: str) -> None:
        peer = self.table.get(link.address)
        assert peer is not None
        boot = f"boot-{self.boots[link.address]}"
        reply: Message
        if how == "error":
            reply = ErrorReply("PeerUnreachable", "shutting down")
        else:
            namespace = OTHER if how == "stranger" else NAMESPACE
            name = f"{link.address} {boot}"
            reply = HelloReply(1, "p", boot, namespace, name.encode(), [(0x1000, 4096)])
        for _ in range(2 if how == "twice" else 1):
            self.members.on_message(peer, request_id, reply, self.now)

    @precondition(lambda self: self.transport.reads)
    @rule(data=st.data(), state=st.sampled_from([ReadState.DONE, ReadState.FAILED]))
    def end_read(self, data: st.DataObject, state: ReadState) -> None:
        handle = data.draw(st.sampled_from(sorted(self.transport.reads)))
        self.transport.reads[handle] = state
        self.members.poll_reads(self.now)

    @rule(refusing=st.booleans())
    def set_refusing(self, refusing: bool) -> None:
        self.transport.refusing = refusing

    # -- fetches --

    @precondition(lambda self: len(self.fetching) < PEERS.max_peers - LIMITS.members - 1)
    @rule(address=st.sampled_from(HOSTS))
    def begin_fetch(self, address: str) -> None:
        self.table.obtain(address, self.now)
        self.fetching.add(address)

    @precondition(lambda self: self.fetching)
    @rule(data=st.data(), outcome=st.sampled_from(["fine", "forget", "disconnect"]))
    def end_fetch(self, data: st.DataObject, outcome: str) -> None:
        address = data.draw(st.sampled_from(sorted(self.fetching)))
        peer = self.table.get(address)
        assert peer is not None, "a peer in use was forgotten"
        if outcome == "forget":
            peer.greeting = None
        elif outcome == "disconnect":
            self.table.disconnect(peer)
        self.fetching.remove(address)

    # -- what must hold --

    def open_links(self) -> list[FakeLink]:
        return [link for link in self.links.values() if not link.closed]

    @invariant()
    def consistent(self) -> None:
        self.members.check()
        self.table.check()
        assert {link.address for link in self.open_links()} == {peer.address for peer in self.table}
        assert {a for a in HOSTS if self.members.state(a) is not None} == set(self.listed)
        names = {peer.connected.transport_name for peer in self.table if peer.connected}
        assert names == self.transport.connected
        assert self.pool.stats()["filling_blocks"] == len(self.transport.reads)
        self.pool.check()

    def teardown(self) -> None:
        if not hasattr(self, "members"):
            return
        self.settle()
        self.members.close()
        self.table.close()
        self.transport.close()
        self.members.after_close()
        assert self.pool.stats()["filling_blocks"] == 0
        assert not self.open_links()
        self.pool.close()

    def settle(self) -> None:
        """Everybody behaves from now on: members get connected, the others are forgotten."""
        self.transport.refusing = False
        self.fetching.clear()
        members = sorted(HOSTS)[: LIMITS.members]
        for address in members:
            self.boots[address] += 1
        for _ in range(60):
            self.now += 0.5
            self.members.set_members([self.entry(a) for a in members], VALID_S, self.now)
            for link in self.open_links():
                for request_id, _ in link.sent:
                    self.answer(link, request_id, "hello")
                link.sent.clear()
            for handle in self.transport.reads:
                self.transport.reads[handle] = ReadState.DONE
            self.members.poll_reads(self.now)
            self.members.on_time(self.now)
            self.table.on_time(self.now)
            self.members.check()
        assert [self.members.state(a) for a in members] == [State.CONNECTED] * len(members)
        assert {peer.address for peer in self.table} == set(members)
        assert all(_boot(peer) == f"boot-{self.boots[peer.address]}" for peer in self.table)


def _boot(peer: Peer) -> str:
    assert peer.greeting is not None
    return peer.greeting.generation


TestMembers = World.TestCase
TestMembers.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
