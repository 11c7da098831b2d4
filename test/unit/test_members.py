"""What membership does about peers that refuse, stay silent or change, on virtual time."""

from __future__ import annotations

import itertools
import secrets
from collections.abc import Iterator
from dataclasses import replace

import pytest
from sglang_memserve.config import Limits
from sglang_memserve.errors import ProtocolError
from sglang_memserve.mempool import MemPool
from sglang_memserve.protocol.control import ErrorReply, Hello, HelloReply, Message, PeerEntry
from sglang_memserve.transfer.faulty import Faults, FaultyTransport
from sglang_memserve.transfer.loopback import LoopbackTransport
from sglang_memserve.transfer.members import Membership, MembershipLimits, State
from sglang_memserve.transfer.peers import PeerTable
from sglang_memserve.types import Namespace, PageKey

NAMESPACE = Namespace("m", "1", "float16", 4, 1, 1, 8, 8, 0, 1)
LIMITS = MembershipLimits(members=4, hello_s=1.0, retry_first_s=1.0, retry_most_s=8.0, leave_s=5.0)
A, B, C = "tcp://a:1", "tcp://b:1", "tcp://c:1"


class FakeLink:
    def __init__(self) -> None:
        self.sent: list[tuple[int, Message]] = []
        self.closed = False

    def send(self, request_id: int, message: Message) -> None:
        self.sent.append((request_id, message))

    def close(self) -> None:
        self.closed = True


class Bench:
    """Membership over loopback; the test plays the peers by hand."""

    def __init__(self, blocks: int = 4, faults: Faults | None = None, max_peers: int = 8) -> None:
        self.now = 10.0
        self.pool = MemPool(NAMESPACE, arena_bytes=blocks * NAMESPACE.block_bytes, generation="me")
        self.holder = LoopbackTransport(f"holder-{secrets.token_hex(6)}")
        self.holder_pool = MemPool(
            NAMESPACE, arena_bytes=4 * NAMESPACE.block_bytes, generation="peer"
        )
        self.memory = (self.holder_pool.arena_base, self.holder_pool.arena_bytes)
        self.holder.register(*self.memory)
        inner = LoopbackTransport(f"reader-{secrets.token_hex(6)}")
        self.transport = FaultyTransport(inner, faults or Faults(), seed=1)
        self.transport.register(self.pool.arena_base, self.pool.arena_bytes)
        self.links: dict[str, FakeLink] = {}
        self.fetching: set[str] = set()
        hello = Hello(1, "http://me", "me", NAMESPACE)
        self.table = PeerTable(
            self.transport,
            hello,
            self.open_link,
            Limits(max_peers=max_peers),
            in_use=lambda p: p.address in self.fetching,
        )
        self.members = Membership(self.table, self.pool, self.transport, hello, LIMITS)

    def open_link(self, address: str) -> FakeLink:
        if not address.startswith("tcp://"):
            raise ProtocolError(f"peer address {address!r}")
        self.links[address] = FakeLink()
        return self.links[address]

    def set(self, *addresses: str, boot: str = "boot") -> None:
        entries = [PeerEntry(f"http://{address}", boot, address) for address in addresses]
        self.members.set_members(entries, 1000.0, self.now)
        self.members.check()

    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        self.members.on_time(self.now)
        self.table.on_time(self.now)
        self.members.check()

    def asked(self, address: str) -> bool:
        link = self.links.get(address)
        return link is not None and bool(link.sent)

    def answer(self, address: str, reply: Message | None = None, boot: str = "boot") -> None:
        peer = self.table.get(address)
        assert peer is not None
        [(request_id, hello)] = self.links[address].sent
        assert isinstance(hello, Hello)
        self.links[address].sent.clear()
        if reply is None:
            metadata = self.holder.metadata()
            reply = HelloReply(1, "p", boot, NAMESPACE, metadata, [self.memory])
        assert self.members.on_message(peer, request_id, reply, self.now)
        assert not self.members.on_message(peer, request_id, reply, self.now)
        self.members.check()

    def read(self) -> None:
        while self.members.reading:
            self.members.poll_reads(self.now)
            self.members.check()

    def stat(self, name: str) -> float:
        return self.members.stats()[name]

    def close(self) -> None:
        self.members.close()
        self.table.close()
        self.transport.close()
        self.members.after_close()
        self.holder.close()
        assert self.pool.stats()["filling_blocks"] == 0
        self.pool.close()
        self.holder_pool.close()


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench()
    yield bench
    bench.close()


def test_members_are_greeted_and_read_a_few_at_a_time(bench: Bench) -> None:
    bench.set(A, B, C)
    assert bench.asked(A) and bench.asked(B) and not bench.asked(C)
    bench.answer(A)
    assert bench.members.state(A) is State.READING and not bench.asked(C)
    bench.now += 0.25
    bench.read()
    assert bench.members.state(A) is State.CONNECTED and bench.asked(C)
    assert bench.stat("members_connected") == 1
    assert bench.stat("member_connect_seconds_total") == pytest.approx(0.25)
    assert bench.pool.stats()["filling_blocks"] == 0


def test_a_connected_member_is_kept_however_idle_it_is(bench: Bench) -> None:
    bench.set(A)
    bench.answer(A)
    bench.read()
    bench.pass_time(900.0)
    assert bench.members.state(A) is State.CONNECTED and not bench.links[A].closed


def test_what_is_not_said_again_lapses(bench: Bench) -> None:
    bench.set(A)
    bench.pass_time(1001.0)
    assert bench.members.state(A) is None and bench.links[A].closed


def test_silence_is_asked_again_ever_more_rarely(bench: Bench) -> None:
    bench.set(A)
    times = []
    for _ in range(400):
        if bench.asked(A):
            times.append(bench.now)
            bench.links[A].sent.clear()
        bench.pass_time(0.1)
    pauses = [two - one for one, two in itertools.pairwise(times)]
    # A second of patience each, and then 1, 2, 4, 8, 8 ... seconds.
    assert pauses[:5] == pytest.approx([2, 3, 5, 9, 9], abs=0.35)
    assert bench.stat("member_failures_silent_total") == pytest.approx(len(times), abs=1)


def test_one_that_can_never_be_read_is_asked_again_as_another_boot_only(bench: Bench) -> None:
    bench.set(A, B)
    stranger = replace(NAMESPACE, model="other")
    bench.answer(A, HelloReply(1, "p", "boot", stranger, b"", []))
    bench.answer(B, ErrorReply("VersionMismatch", "1 and 2"))
    bench.pass_time(900.0)
    bench.set(A, B)
    assert not bench.asked(A) and not bench.asked(B)
    assert bench.stat("member_failures_refused_total") == 2
    bench.set(A, boot="boot-2")
    bench.answer(A, boot="boot-2")
    bench.read()
    assert bench.members.state(A) is State.CONNECTED


def test_a_refusal_that_may_pass_is_tried_again(bench: Bench) -> None:
    bench.set(A)
    bench.answer(A, ErrorReply("PeerUnreachable", "shutting down"))
    assert bench.members.state(A) is State.WAITING
    bench.pass_time(1.0)
    bench.answer(A)
    bench.read()
    assert bench.members.state(A) is State.CONNECTED


def test_an_answer_to_something_else_is_refused(bench: Bench) -> None:
    bench.set(A)
    bench.answer(A, Hello(1, "p", "boot", NAMESPACE))
    assert bench.stat("member_failures_refused_total") == 1


def test_a_first_read_that_fails_is_tried_again_from_the_greeting() -> None:
    bench = Bench(faults=Faults(midway=1.0))
    bench.set(A)
    bench.answer(A)
    bench.read()
    assert bench.stat("member_failures_transfer_total") == 1
    peer = bench.table.get(A)
    assert peer is not None and peer.connected is None
    bench.pass_time(1.0)
    assert bench.asked(A)
    bench.close()


def test_a_first_read_that_does_not_end_keeps_its_block_until_it_does() -> None:
    bench = Bench(faults=Faults(delay=1.0, max_delay_polls=20))
    bench.set(A)
    bench.answer(A)
    bench.pass_time(6.0)
    assert bench.members.state(A) is State.WAITING and not bench.members.reading
    assert bench.pool.stats()["filling_blocks"] == 1
    for _ in range(30):
        bench.pass_time(0.0)
    assert bench.pool.stats()["filling_blocks"] == 0
    bench.close()


def test_without_a_block_to_read_into_a_greeting_is_enough() -> None:
    bench = Bench(blocks=1)
    with bench.pool.prepare_store([PageKey(b"k" * 32)]):
        bench.set(A)
        bench.answer(A)
        assert bench.members.state(A) is State.CONNECTED
    bench.close()


def test_one_that_left_is_forgotten_a_little_later(bench: Bench) -> None:
    bench.set(A, B)
    bench.answer(A)
    bench.read()
    bench.set(B)
    bench.pass_time(4.0)
    assert bench.members.state(A) is State.CONNECTED
    bench.set(A, B)
    bench.pass_time(4.0)
    assert bench.members.state(A) is State.CONNECTED, "it was back before it was forgotten"
    bench.set(B)
    bench.pass_time(5.0)
    assert bench.members.state(A) is None and bench.links[A].closed
    assert bench.table.get(A) is None


def test_one_that_left_while_a_fetch_runs_is_forgotten_when_it_ends(bench: Bench) -> None:
    bench.set(A)
    bench.answer(A)
    bench.read()
    bench.fetching.add(A)
    bench.set()
    bench.pass_time(6.0)
    assert bench.members.state(A) is None and not bench.links[A].closed
    bench.fetching.clear()
    bench.pass_time(0.1)
    assert bench.links[A].closed and bench.table.get(A) is None


def test_another_boot_at_another_address_replaces_the_old_at_once(bench: Bench) -> None:
    bench.set(A)
    bench.answer(A)
    bench.read()
    bench.members.set_members([PeerEntry(f"http://{A}", "boot-2", C)], 1000.0, bench.now)
    assert bench.links[A].closed and bench.asked(C)


def test_another_boot_at_the_same_address_is_greeted_anew(bench: Bench) -> None:
    bench.set(A)
    bench.answer(A)
    bench.read()
    bench.set(A, boot="boot-2")
    peer = bench.table.get(A)
    assert peer is not None and peer.greeting is None, "a fetch would ask the old boot"
    bench.answer(A, boot="boot-2")
    bench.read()
    assert peer.greeting is not None
    assert peer.greeting.generation == "boot-2"


def test_a_connection_that_a_fetch_lost_is_made_again(bench: Bench) -> None:
    bench.set(A)
    bench.answer(A)
    bench.read()
    peer = bench.table.get(A)
    assert peer is not None
    bench.table.disconnect(peer)
    bench.pass_time(0.1)
    bench.pass_time(1.0)
    bench.answer(A)
    bench.read()
    assert bench.members.state(A) is State.CONNECTED and bench.stat("member_connects_total") == 2


def test_more_members_than_there_is_room_for_are_left_out(bench: Bench) -> None:
    addresses = [f"tcp://x:{port}" for port in range(6)]
    bench.set(*addresses)
    assert bench.stat("members") == 4
    bench.set(*reversed(addresses))
    assert bench.stat("members") == 4 and bench.members.state(addresses[0]) is None


def test_members_leave_room_for_peers_that_are_none() -> None:
    bench = Bench(max_peers=2)
    bench.set(A, B, C)
    assert bench.stat("members") == 1
    bench.fetching.add(B)
    bench.table.obtain(B, bench.now)
    bench.close()


def test_we_are_no_peer_of_our_own(bench: Bench) -> None:
    bench.members.set_members([PeerEntry("http://me", "me", A)], 10.0, bench.now)
    assert bench.stat("members") == 0


def test_an_address_that_is_none_fails_and_harms_nobody(bench: Bench) -> None:
    bench.set("nonsense", B)
    assert bench.asked(B) and bench.stat("member_failures_refused_total") == 1


@pytest.mark.parametrize("valid_s", [0.0, -1.0, float("nan"), float("inf"), 1e9])
def test_durations_that_make_no_sense_are_refused(bench: Bench, valid_s: float) -> None:
    with pytest.raises(ProtocolError, match="valid for"):
        bench.members.set_members([], valid_s, bench.now)
