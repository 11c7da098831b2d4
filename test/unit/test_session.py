"""The reader's side on virtual time: peers, bounds, leases that nobody waits for any more."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator

import msgspec
import pytest
from sglang_memserve.config import Limits
from sglang_memserve.errors import LimitExceeded
from sglang_memserve.mempool import MemPool
from sglang_memserve.protocol.control import (
    FetchReply,
    FetchRequest,
    Hello,
    HelloReply,
    LeaseReply,
    LeaseRequest,
    Message,
    ReleaseReply,
    ReleaseRequest,
    Source,
)
from sglang_memserve.transfer.base import ReadState
from sglang_memserve.transfer.loopback import LoopbackTransport
from sglang_memserve.transfer.port import FetchSettings
from sglang_memserve.transfer.session import Sessions
from sglang_memserve.transfer.verify import InlineVerifier
from sglang_memserve.types import Namespace, PageKey

NAMESPACE = Namespace("m", "1", "float16", 4, 1, 1, 8, 8, 0, 1)
KEYS = [PageKey(bytes([index + 1]) * 32) for index in range(8)]
HELLO = Hello(1, "reader", "reader", NAMESPACE)
BLOCK = NAMESPACE.block_bytes
A, B = "tcp://a:1", "tcp://b:1"
LIMITS = Limits(
    max_fetches=2, max_queued_fetches=2, max_grace_leases=3, max_peers=2, peer_idle_s=10.0
)


class FakeLink:
    def __init__(self) -> None:
        self.sent: list[tuple[int, Message]] = []
        self.closed = False

    def send(self, request_id: int, message: Message) -> None:
        assert not self.closed
        self.sent.append((request_id, message))

    def close(self) -> None:
        self.closed = True


class Bench:
    """``Sessions`` over loopback; the test plays the peers by hand."""

    def __init__(self, limits: Limits = LIMITS) -> None:
        self.now = 50.0
        self.pool = MemPool(
            NAMESPACE,
            arena_bytes=16 * NAMESPACE.block_bytes,
            generation="reader",
            clock=lambda: self.now,
        )
        self.peer_pool = MemPool(
            NAMESPACE, arena_bytes=16 * NAMESPACE.block_bytes, generation="peer"
        )
        with self.peer_pool.prepare_store(KEYS) as store:
            store.commit()
        self.holder = LoopbackTransport(f"holder-{secrets.token_hex(6)}")
        self.holder.register(self.peer_pool.arena_base, self.peer_pool.arena_bytes)
        self.transport = LoopbackTransport(f"reader-{secrets.token_hex(6)}")
        self.transport.register(self.pool.arena_base, self.pool.arena_bytes)
        self.links: dict[str, FakeLink] = {}
        self.replies: list[FetchReply] = []
        self.sessions = Sessions(
            self.pool,
            self.transport,
            HELLO,
            self.open_link,
            verifier=InlineVerifier(),
            settings=FetchSettings(),
            limits=limits,
        )

    def open_link(self, address: str) -> FakeLink:
        self.links[address] = FakeLink()
        return self.links[address]

    def hung_up(self, address: str) -> bool:
        return self.links[address].closed

    def submit(self, address: str, pages: int = 8, deadline_s: float = 5.0) -> None:
        request = FetchRequest.of("p", address, list(KEYS[:pages]), 0.0, deadline_s)
        self.sessions.submit(request, self.now, self.replies.append)
        self.sessions.check()

    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        self.pool.expire()
        self.sessions.on_time(self.now)
        self.sessions.check()

    def serve(self, address: str) -> None:
        """Play the peer until it has answered everything."""
        link, peer = self.links[address], self.sessions.peer(address)
        assert peer is not None
        while link.sent or self.sessions.reading:
            self.sessions.poll_reads(self.now)
            for request_id, message in link.sent[:]:
                link.sent.remove((request_id, message))
                reply = self.answer(message)
                self.sessions.on_message(peer, request_id, reply, self.now)
            self.sessions.check()

    def answer_all(self, address: str, reply: Message | None = None) -> None:
        """What has been sent so far, without looking at reads."""
        link, peer = self.links[address], self.sessions.peer(address)
        assert peer is not None
        for request_id, message in link.sent[:]:
            link.sent.remove((request_id, message))
            self.sessions.on_message(peer, request_id, reply or self.answer(message), self.now)
        self.sessions.check()

    def answer(self, message: Message) -> Message:
        match message:
            case Hello():
                memory = [(self.peer_pool.arena_base, self.peer_pool.arena_bytes)]
                return HelloReply(1, "p", "boot", NAMESPACE, self.holder.metadata(), memory)
            case LeaseRequest():
                blocks = self.peer_pool.match([PageKey(key) for key in message.keys])
                return LeaseReply(9, [self.peer_pool.address(block) for block in blocks], [])
            case ReleaseRequest():
                return ReleaseReply(True)
        raise AssertionError(message)

    def close(self) -> None:
        self.sessions.close(self.now)
        self.transport.close()
        self.sessions.after_close()
        self.holder.close()
        assert self.pool.stats()["leases"] == 0 and self.pool.stats()["filling_blocks"] == 0
        self.pool.check()
        self.pool.close()
        self.peer_pool.close()


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench()
    yield bench
    bench.close()


def test_a_peer_is_greeted_once(bench: Bench) -> None:
    bench.submit("tcp://a:1", pages=2)
    assert [type(message) for _, message in bench.links["tcp://a:1"].sent] == [Hello]
    bench.serve("tcp://a:1")
    bench.submit("tcp://a:1", pages=4)
    assert [type(message) for _, message in bench.links["tcp://a:1"].sent] == [LeaseRequest]
    bench.serve("tcp://a:1")
    assert [reply.outcome for reply in bench.replies] == ["complete"] * 2
    assert [reply.fetched_pages for reply in bench.replies] == [2, 2]


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        (lambda base: LeaseReply(9, [base - BLOCK], []), "no block is at"),
        (lambda base: LeaseReply(9, [base, base + 16 * BLOCK], []), "no block is at"),
        (lambda base: LeaseReply(9, [base + 1], []), "no block is at"),
        (lambda base: LeaseReply(9, [base + 16 * BLOCK - 1], []), "no block is at"),
        (lambda base: LeaseReply(9, [-5], []), "no block is at"),
        (lambda base: LeaseReply(9, [2**64 - 1], []), "no block is at"),
        (lambda base: LeaseReply(9, [base] * 9, []), "9 addresses for 8 pages"),
        (lambda base: LeaseReply(9, [base], [1, 2]), "2 checksums for 1 addresses"),
        (lambda base: ReleaseReply(True), "ReleaseReply while leasing"),
    ],
)
def test_a_lease_that_makes_no_sense_is_given_back(
    bench: Bench, wrong: Callable[[int], Message], text: str
) -> None:
    bench.submit("tcp://a:1", pages=1)
    bench.serve("tcp://a:1")
    bench.pool.clear()
    bench.submit("tcp://a:1")
    link, peer = bench.links["tcp://a:1"], bench.sessions.peer("tcp://a:1")
    assert peer is not None
    request_id, request = link.sent.pop()
    assert isinstance(request, LeaseRequest) and len(request.keys) == 8
    reply = wrong(bench.peer_pool.arena_base)
    bench.sessions.on_message(peer, request_id, reply, bench.now)
    (source,) = bench.replies[-1].sources
    assert (bench.replies[-1].outcome, source.outcome) == ("protocol_error",) * 2
    assert text in source.detail
    if "no block" in text:
        assert f"{bench.peer_pool.arena_base:#x}" in source.detail
    if isinstance(reply, LeaseReply):
        assert link.sent[-1][1] == ReleaseRequest("boot", 9)


def test_idle_peers_are_forgotten_and_greeted_again(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The transport keeps the connection: NIXL would leave a socket behind with each."""
    connects: list[bytes] = []
    connect = bench.transport.connect

    def count(metadata: bytes) -> str:
        connects.append(metadata)
        return connect(metadata)

    monkeypatch.setattr(bench.transport, "connect", count)
    bench.submit("tcp://a:1", pages=2)
    bench.serve("tcp://a:1")
    bench.pass_time(9.0)
    assert not bench.hung_up("tcp://a:1")
    bench.pass_time(2.0)
    assert bench.hung_up("tcp://a:1") and bench.sessions.peer("tcp://a:1") is None
    bench.submit("tcp://a:1")
    bench.serve("tcp://a:1")
    assert bench.replies[-1].outcome == "complete"
    assert len(connects) == 1


def test_peers_in_use_are_bounded(bench: Bench) -> None:
    bench.submit("tcp://a:1")
    bench.submit("tcp://b:1")
    bench.submit("tcp://c:1")
    bench.serve("tcp://a:1")
    bench.pass_time(0.0)
    # The fetch from c started when that from a ended, and a made room for it.
    assert set(bench.links) == {"tcp://a:1", "tcp://b:1", "tcp://c:1"}
    assert bench.hung_up("tcp://a:1")
    assert bench.replies[0].outcome == "complete"


def test_the_queue_is_bounded_and_its_deadlines_count_from_arrival(bench: Bench) -> None:
    for _ in range(4):
        bench.submit("tcp://a:1", deadline_s=0.5)
    with pytest.raises(LimitExceeded):
        bench.submit("tcp://a:1")
    bench.pass_time(0.5)
    assert [reply.outcome for reply in bench.replies] == ["peer_unreachable"] * 2 + ["deadline"] * 2
    assert all(reply.seconds == pytest.approx(0.5) for reply in bench.replies)


def test_a_queued_fetch_ends_at_its_deadline(bench: Bench) -> None:
    """Also while no turn is free for it."""
    for number in range(4):
        bench.submit("tcp://a:1", deadline_s=5.0 if number < 2 else 0.5)
    assert bench.sessions.wake_s(bench.now) == bench.now + 0.5
    bench.pass_time(0.6)
    assert [reply.outcome for reply in bench.replies] == ["deadline", "deadline"]
    assert bench.sessions.stats()["fetches_queued"] == 0
    assert bench.sessions.stats()["fetches_active"] == 2


def test_reads_end_with_the_fetch_that_another_read_ended(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two reads are found ended after the deadline: the first ends the fetch, which gives the
    second one up before it is looked at."""
    sources = [Source("p", A, 0, 4), Source("p", B, 4, 4)]
    request = FetchRequest(sources, list(KEYS), 0.0, 5.0)
    bench.sessions.submit(request, bench.now, bench.replies.append)
    with monkeypatch.context() as held:
        held.setattr(bench.transport, "poll", lambda handle: ReadState.RUNNING)
        for address in (A, B):
            bench.answer_all(address)
            bench.answer_all(address)
        assert bench.sessions.stats()["fetches_active"] == 1 and bench.sessions.reading
    bench.now += 6.0
    bench.sessions.poll_reads(bench.now)
    bench.sessions.check()
    assert [reply.outcome for reply in bench.replies] == ["deadline"]
    bench.pass_time(0.1)
    assert bench.sessions.stats()["quarantined_blocks"] == 0
    assert bench.pool.stats()["filling_blocks"] == 0


def test_a_fetch_does_not_hang_up_on_its_own_sources(bench: Bench) -> None:
    """When only one peer more may be known, the second source is the one that is left out."""
    bench.submit("tcp://x:1", pages=1)
    request = FetchRequest([Source("p", A), Source("p", B)], list(KEYS), 0.0, 5.0)
    bench.sessions.submit(request, bench.now, bench.replies.append)
    bench.sessions.check()
    assert not bench.hung_up(A)
    bench.serve(A)
    (reply,) = bench.replies
    assert reply.outcome == "complete" and reply.sources[1].outcome == "limit_exceeded", reply


def test_a_peer_cannot_name_itself_as_another_does(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other can be read from as before, and so can one holder under two addresses."""
    bench.submit(A, pages=2)
    bench.serve(A)
    bench.submit(B, pages=4)
    bench.serve(B)
    assert [reply.outcome for reply in bench.replies] == ["complete"] * 2
    bench.pass_time(20.0)
    monkeypatch.setattr(bench.transport, "name_in", lambda metadata: bench.holder.name)
    hello = bench.answer(Hello(1, "reader", "reader", NAMESPACE))
    assert isinstance(hello, HelloReply)
    bench.submit("tcp://liar:1", pages=6)
    lie = msgspec.structs.replace(hello, generation="other", transport_metadata=b"cut off")
    bench.answer_all("tcp://liar:1", lie)
    assert bench.replies[-1].outcome == "transfer_failed", bench.replies[-1]
    assert "as tcp://" in bench.replies[-1].sources[0].detail
    bench.submit(A, pages=8)
    bench.serve(A)
    assert bench.replies[-1].outcome == "complete"


def test_a_lease_that_comes_too_late_is_given_back(bench: Bench) -> None:
    bench.submit("tcp://a:1", pages=2)
    bench.serve("tcp://a:1")
    bench.submit("tcp://a:1", pages=4, deadline_s=0.5)
    link, peer = bench.links["tcp://a:1"], bench.sessions.peer("tcp://a:1")
    assert peer is not None
    request_id, lease_request = link.sent.pop()
    bench.pass_time(0.6)
    assert bench.replies[-1].outcome == "deadline"
    bench.sessions.on_message(peer, request_id, bench.answer(lease_request), bench.now)
    assert [message for _, message in link.sent] == [ReleaseRequest("boot", 9)]


def test_pages_of_an_ended_fetch_stay_pinned_for_a_while(bench: Bench) -> None:
    bench.submit("tcp://a:1")
    bench.serve("tcp://a:1")
    assert bench.pool.stats()["pinned_blocks"] == 8
    bench.pass_time(4.0)
    assert bench.pool.stats()["pinned_blocks"] == 0


def test_what_ended_fetches_pin_is_bounded(bench: Bench) -> None:
    for pages in (1, 2, 3, 4, 2):
        bench.submit("tcp://a:1", pages=pages)
        bench.serve("tcp://a:1")
    # A quarter of 16 blocks, and three leases, but always the last fetch's.
    assert bench.pool.stats()["leases"] == 1
    assert bench.pool.stats()["pinned_blocks"] == 2
    bench.submit("tcp://a:1", pages=8)
    bench.serve("tcp://a:1")
    assert bench.pool.stats()["pinned_blocks"] == 8


def test_closing_ends_what_runs_and_what_waits(bench: Bench) -> None:
    for _ in range(4):
        bench.submit("tcp://a:1")
    bench.sessions.close(bench.now)
    assert [reply.outcome for reply in bench.replies] == ["closed"] * 4
    assert bench.hung_up("tcp://a:1")
