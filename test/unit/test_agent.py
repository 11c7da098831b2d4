"""Two rank agents in one process, over each transport, and what strangers can send them."""

from __future__ import annotations

import asyncio
import ctypes
import hashlib
import random
import secrets
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import msgspec
import pytest
import zmq
from sglang_memserve.errors import ConfigError, LimitExceeded, PeerUnreachable, ProtocolError
from sglang_memserve.mempool import MemPool
from sglang_memserve.protocol import PROTOCOL_VERSION, events
from sglang_memserve.protocol.control import (
    ErrorReply,
    FetchReply,
    FetchRequest,
    Hello,
    HelloReply,
    InfoReply,
    InfoRequest,
    LeaseReply,
    LeaseRequest,
    Message,
    ReleaseReply,
    ReleaseRequest,
    SnapshotReply,
    SnapshotRequest,
    StatsReply,
    StatsRequest,
    decode,
    encode,
)
from sglang_memserve.transfer.agent import RankAgent
from sglang_memserve.transfer.base import ReadState, Transport
from sglang_memserve.transfer.client import LocalClient
from sglang_memserve.transfer.faulty import Faults, FaultyTransport
from sglang_memserve.transfer.loopback import LoopbackTransport
from sglang_memserve.transfer.nixl import NixlTransport
from sglang_memserve.transfer.serve import ServeLimits
from sglang_memserve.transfer.session import SessionLimits
from sglang_memserve.types import Namespace, PageKey

NAMESPACE = Namespace("m", "1", "float16", 16, 2, 2, 64, 64, 0, 1)
BLOCK = NAMESPACE.block_bytes
KEYS = [PageKey(hashlib.sha256(b"page %d" % index).digest()) for index in range(40)]
LIMIT_S = 20.0

MakeTransport = Callable[[str], Transport]


def content(key: bytes) -> bytes:
    return hashlib.shake_128(key).digest(BLOCK)


def put(pool: MemPool, keys: Sequence[PageKey]) -> None:
    with pool.prepare_store(keys) as store:
        for index, block in store.missing:
            ctypes.memmove(pool.address(block), content(keys[index]), BLOCK)
        store.commit()


def holds(pool: MemPool, keys: Sequence[PageKey]) -> bool:
    blocks = pool.match(keys)
    found = [ctypes.string_at(pool.address(block), BLOCK) for block in blocks]
    return found == [content(key) for key in keys]


def readable(pool: MemPool, pages: int) -> bool:
    return pool.readable_pages(KEYS) == pages


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)


class Rank:
    def __init__(
        self,
        folder: Path,
        make: MakeTransport,
        *,
        blocks: int = 64,
        namespace: Namespace = NAMESPACE,
        session_limits: SessionLimits | None = None,
        serve_limits: ServeLimits | None = None,
    ) -> None:
        self.generation = f"g-{secrets.token_hex(6)}"
        self.path = folder / f"{self.generation}.sock"
        self.pool = MemPool(
            namespace, arena_bytes=blocks * namespace.block_bytes, generation=self.generation
        )
        self.agent = RankAgent(
            self.pool,
            make(self.generation),
            namespace=namespace,
            instance_id=f"http://{self.generation}",
            generation=self.generation,
            rank=0,
            host="127.0.0.1",
            local_path=self.path,
            session_limits=session_limits,
            serve_limits=serve_limits,
        )
        self.agent.start()

    def close(self) -> None:
        self.agent.close()
        self.pool.close()

    def start(
        self, other: Rank, keys: Sequence[bytes], wait_s: float = 0.0, deadline_s: float = 10.0
    ) -> Future[FetchReply]:
        address = other.agent.peer_address
        return self.agent.fetch(FetchRequest.of("peer", address, list(keys), wait_s, deadline_s))

    def fetch(
        self, other: Rank, keys: Sequence[bytes], wait_s: float = 0.0, deadline_s: float = 10.0
    ) -> FetchReply:
        return self.start(other, keys, wait_s, deadline_s).result(LIMIT_S)

    def stats(self) -> dict[str, float]:
        reply = self.ask(StatsRequest())
        assert isinstance(reply, StatsReply)
        return reply.values

    def ask(self, message: Message) -> Message:
        with Asker(f"ipc://{self.path}") as asker:
            return asker.ask(message)


class Asker:
    """A stranger with a DEALER socket."""

    def __init__(self, address: str) -> None:
        self.context = zmq.Context()
        self.socket = self.context.socket(zmq.DEALER)
        self.socket.linger = 0
        self.socket.rcvtimeo = int(LIMIT_S * 1000)
        self.socket.connect(address)

    def __enter__(self) -> Asker:
        return self

    def __exit__(self, *_: object) -> None:
        self.context.destroy(0)

    def ask(self, message: Message) -> Message:
        request_id = secrets.token_bytes(8)
        self.socket.send_multipart([request_id, encode(message)])
        frames = self.socket.recv_multipart()
        assert frames[0] == request_id
        return decode(frames[1])

    def drain(self, message: Message) -> None:
        """Read answers up to the one to ``message``, whatever it is."""
        request_id = b"the last"
        self.socket.send_multipart([request_id, encode(message)])
        while self.socket.recv_multipart()[0] != request_id:
            pass


@pytest.fixture
def folder() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="ms-"))
    yield path
    shutil.rmtree(path)


@pytest.fixture
def ranks(folder: Path) -> Iterator[Callable[..., Rank]]:
    with ExitStack() as stack:

        def start(make: MakeTransport = LoopbackTransport, **options: object) -> Rank:
            rank = Rank(folder, make, **options)  # type: ignore[arg-type]
            stack.callback(rank.close)
            return rank

        yield start


@pytest.fixture(params=[LoopbackTransport, NixlTransport], ids=["loopback", "nixl"])
def pair(request: pytest.FixtureRequest, ranks: Callable[..., Rank]) -> tuple[Rank, Rank]:
    """Holder and reader."""
    return ranks(request.param), ranks(request.param)


@pytest.fixture
def two(ranks: Callable[..., Rank]) -> tuple[Rank, Rank]:
    return ranks(), ranks()


# -- fetching --


def test_a_fetch_makes_the_pages_of_a_peer_our_own(pair: tuple[Rank, Rank]) -> None:
    holder, reader = pair
    put(holder.pool, KEYS)
    reply = reader.fetch(holder, KEYS)
    assert (reply.outcome, reply.present_pages, reply.readable_pages) == ("complete", 0, 40)
    assert (reply.fetched_pages, reply.fetched_bytes) == (40, 40 * BLOCK)
    assert holds(reader.pool, KEYS)
    until(lambda: holder.stats()["transfer_leases_held_by_peers"] == 0)
    again = reader.fetch(holder, KEYS)
    assert (again.outcome, again.present_pages, again.fetched_pages) == ("complete", 40, 0)
    for rank in pair:
        rank.pool.check()


def test_only_what_is_missing_is_read(pair: tuple[Rank, Rank]) -> None:
    holder, reader = pair
    put(holder.pool, KEYS)
    put(reader.pool, KEYS[:13])
    reply = reader.fetch(holder, KEYS)
    assert (reply.present_pages, reply.fetched_pages) == (13, 27)
    assert holds(reader.pool, KEYS)


def test_both_read_from_each_other(pair: tuple[Rank, Rank]) -> None:
    one, two = pair
    put(one.pool, KEYS[:10])
    put(two.pool, KEYS[20:])
    there, back = two.start(one, KEYS[:10]), one.start(two, KEYS[20:])
    assert there.result(LIMIT_S).outcome == back.result(LIMIT_S).outcome == "complete"
    assert holds(two.pool, KEYS[:10]) and holds(one.pool, KEYS[20:])


def test_pages_are_read_as_they_appear(pair: tuple[Rank, Rank]) -> None:
    holder, reader = pair
    put(holder.pool, KEYS[:3])
    fetch = reader.start(holder, KEYS, wait_s=15.0, deadline_s=18.0)
    for ready in (3, 10, 11, 30):
        put(holder.pool, KEYS[:ready])
        until(partial(readable, reader.pool, ready))
        assert not fetch.done()
    put(holder.pool, KEYS)
    reply = fetch.result(LIMIT_S)
    assert (reply.outcome, reply.fetched_pages) == ("complete", 40)
    assert holds(reader.pool, KEYS)


def test_a_miss_says_how_far_it_got(two: tuple[Rank, Rank]) -> None:
    holder, reader = two
    put(holder.pool, KEYS[:7])
    for wait_s in (0.0, 0.05):
        reply = reader.fetch(holder, KEYS, wait_s)
        assert (reply.outcome, reply.readable_pages) == ("miss", 7)
    assert reader.fetch(holder, []).outcome == "complete"
    assert reader.fetch(holder, KEYS, deadline_s=0.0).outcome in ("deadline", "peer_unreachable")


def test_fetches_of_the_same_pages_share_the_work(pair: tuple[Rank, Rank]) -> None:
    holder, reader = pair
    put(holder.pool, KEYS)
    replies = [fetch.result(LIMIT_S) for fetch in [reader.start(holder, KEYS) for _ in range(12)]]
    assert {reply.outcome for reply in replies} == {"complete"}
    assert sum(reply.fetched_pages for reply in replies) == 40
    assert holds(reader.pool, KEYS)
    reader.pool.check()


def test_a_page_that_another_is_filling_is_waited_for(two: tuple[Rank, Rank]) -> None:
    holder, reader = two
    put(holder.pool, KEYS)
    store = reader.pool.prepare_store(KEYS[:2])
    fetch = reader.start(holder, KEYS)
    time.sleep(0.1)
    assert not fetch.done()
    for index, block in store.missing:
        ctypes.memmove(reader.pool.address(block), content(KEYS[index]), BLOCK)
    store.commit()
    assert fetch.result(LIMIT_S).outcome == "complete"
    assert holds(reader.pool, KEYS)


def test_a_page_whose_filling_is_aborted_is_fetched(two: tuple[Rank, Rank]) -> None:
    holder, reader = two
    put(holder.pool, KEYS)
    store = reader.pool.prepare_store(KEYS[:2])
    fetch = reader.start(holder, KEYS)
    time.sleep(0.05)
    store.abort()
    assert fetch.result(LIMIT_S).outcome == "complete"
    assert holds(reader.pool, KEYS)


def test_no_blocks_ends_a_fetch_with_what_fits(ranks: Callable[..., Rank]) -> None:
    holder, reader = ranks(), ranks(blocks=10)
    put(holder.pool, KEYS)
    reply = reader.fetch(holder, KEYS)
    assert (reply.outcome, reply.readable_pages) == ("no_blocks", 10)
    assert holds(reader.pool, KEYS[:10])


def test_fetched_pages_are_not_evicted_before_their_request(ranks: Callable[..., Rank]) -> None:
    holder, reader = ranks(), ranks(blocks=16)
    put(holder.pool, KEYS)
    assert reader.fetch(holder, KEYS[:8]).outcome == "complete"
    put(reader.pool, KEYS[20:36])
    assert holds(reader.pool, KEYS[:8])


def test_a_holder_that_closes_ends_the_wait(two: tuple[Rank, Rank]) -> None:
    holder, reader = two
    put(holder.pool, KEYS[:5])
    fetch = reader.start(holder, KEYS, wait_s=15.0, deadline_s=15.0)
    until(lambda: reader.pool.readable_pages(KEYS) == 5)
    holder.agent.close()
    reply = fetch.result(5.0)
    assert (reply.outcome, reply.readable_pages) == ("peer_unreachable", 5)


def test_nobody_at_the_address(ranks: Callable[..., Rank]) -> None:
    reader = ranks()
    request = FetchRequest.of("peer", "tcp://127.0.0.1:1", list(KEYS), 5.0, 0.3)
    reply = reader.agent.fetch(request).result(LIMIT_S)
    assert reply.outcome == "peer_unreachable" and reply.seconds < LIMIT_S


def test_a_reader_that_closes_answers_its_callers(two: tuple[Rank, Rank]) -> None:
    holder, reader = two
    put(holder.pool, KEYS[:5])
    fetch = reader.start(holder, KEYS, wait_s=15.0, deadline_s=15.0)
    until(lambda: reader.pool.readable_pages(KEYS) == 5)
    reader.agent.close()
    assert fetch.result(LIMIT_S).outcome == "closed"
    with pytest.raises(PeerUnreachable):
        reader.fetch(holder, KEYS)


def test_failing_reads_never_publish_and_are_recovered_from(ranks: Callable[..., Rank]) -> None:
    def make(name: str) -> Transport:
        faults = Faults(connect=0.1, read=0.2, midway=0.4, delay=0.5)
        return FaultyTransport(LoopbackTransport(name), faults, seed=7)

    holder, reader = ranks(), ranks(make)
    put(holder.pool, KEYS)
    outcomes: list[str] = []
    while not outcomes or outcomes[-1] != "complete":
        outcomes.append(reader.fetch(holder, KEYS).outcome)
        assert holds(reader.pool, KEYS[: reader.pool.readable_pages(KEYS)])
        reader.pool.check()
        assert len(outcomes) < 100
    assert set(outcomes) <= {"complete", "transfer_failed"} and "transfer_failed" in outcomes


class SlowTransport(LoopbackTransport):
    """Its reads go on until ``release``, whatever is said to them."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.release = False

    def poll(self, handle: int) -> ReadState:
        return super().poll(handle) if self.release else ReadState.RUNNING


def test_blocks_of_a_read_that_was_given_up_stay_out_of_use(ranks: Callable[..., Rank]) -> None:
    slow: list[SlowTransport] = []

    def make(name: str) -> Transport:
        slow.append(SlowTransport(name))
        return slow[-1]

    holder, reader = ranks(), ranks(make)
    put(holder.pool, KEYS)
    assert reader.fetch(holder, KEYS, deadline_s=0.2).outcome == "deadline"
    assert reader.stats()["transfer_quarantined_blocks"] == 40
    assert reader.pool.stats()["filling_blocks"] == 40
    # Nothing more is read from such a peer: that bounds what can be out of use.
    assert reader.fetch(holder, KEYS[:1], deadline_s=0.2).outcome in ("deadline", "transfer_failed")
    assert reader.fetch(holder, KEYS[::-1], deadline_s=0.2).outcome != "complete"
    assert reader.stats()["transfer_quarantined_blocks"] == 40
    slow[0].release = True
    until(lambda: reader.pool.stats()["filling_blocks"] == 0)
    assert reader.stats()["transfer_quarantined_blocks"] == 0
    assert reader.pool.readable_pages(KEYS) == 0
    assert reader.fetch(holder, KEYS).outcome == "complete"


# -- who may ask what --


def test_another_namespace_is_refused_with_the_reason(ranks: Callable[..., Rank]) -> None:
    holder = ranks()
    other = Namespace("another model", "1", "float16", 16, 2, 2, 64, 64, 0, 1)
    reader = ranks(namespace=other)
    put(holder.pool, KEYS)
    assert reader.fetch(holder, KEYS).outcome == "namespace_mismatch"
    with Asker(holder.agent.peer_address) as asker:
        reply = asker.ask(Hello(PROTOCOL_VERSION, "x", "y", other))
        assert isinstance(reply, ErrorReply) and reply.kind == "NamespaceMismatch"
        assert "another model" in reply.message
        reply = asker.ask(Hello(PROTOCOL_VERSION + 1, "x", "y", NAMESPACE))
        assert isinstance(reply, ErrorReply) and reply.kind == "VersionMismatch"
        assert isinstance(asker.ask(Hello(PROTOCOL_VERSION, "x", "y", NAMESPACE)), HelloReply)


def lease(rank: Rank, ttl_s: float = 5.0, wait_s: float = 0.0, **changes: object) -> LeaseRequest:
    request = LeaseRequest(rank.generation, list(KEYS), 1, wait_s, ttl_s)
    return msgspec.structs.replace(request, **changes)


def test_leases_pin_and_end_once(ranks: Callable[..., Rank]) -> None:
    holder = ranks()
    put(holder.pool, KEYS[:6])
    with Asker(holder.agent.peer_address) as asker:
        granted = asker.ask(lease(holder))
        assert isinstance(granted, LeaseReply) and granted.lease_id > 0
        blocks = holder.pool.match(KEYS)
        assert granted.addresses == [holder.pool.address(block) for block in blocks]
        assert holder.pool.stats()["pinned_blocks"] == 6
        other_boot = ReleaseRequest("another boot", granted.lease_id)
        assert asker.ask(other_boot) == ReleaseReply(False)
        release = ReleaseRequest(holder.generation, granted.lease_id)
        assert asker.ask(release) == ReleaseReply(True)
        assert asker.ask(release) == ReleaseReply(False)
        assert asker.ask(ReleaseRequest(holder.generation, 12345)) == ReleaseReply(False)
        assert holder.pool.stats()["pinned_blocks"] == 0


def test_an_expired_lease_is_not_valid(ranks: Callable[..., Rank]) -> None:
    holder = ranks()
    put(holder.pool, KEYS[:6])
    with Asker(holder.agent.peer_address) as asker:
        granted = asker.ask(lease(holder, ttl_s=0.05))
        assert isinstance(granted, LeaseReply)
        until(lambda: holder.pool.stats()["pinned_blocks"] == 0)
        release = ReleaseRequest(holder.generation, granted.lease_id)
        assert asker.ask(release) == ReleaseReply(False)


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"generation": "another boot"}, "LeaseInvalid"),
        ({"ttl_s": 1e9}, "LimitExceeded"),
        ({"ttl_s": 0.0}, "LimitExceeded"),
        ({"ttl_s": float("nan")}, "LimitExceeded"),
        ({"wait_s": -1.0}, "LimitExceeded"),
        ({"wait_s": float("inf")}, "LimitExceeded"),
        ({"keys": [bytes(32)] * 70_000}, "LimitExceeded"),
        ({"keys": [bytes(31)]}, "ProtocolError"),
    ],
)
def test_lease_requests_that_are_refused(
    ranks: Callable[..., Rank], changes: dict[str, object], kind: str
) -> None:
    holder = ranks()
    with Asker(holder.agent.peer_address) as asker:
        reply = asker.ask(lease(holder, **changes))  # type: ignore[arg-type]
        assert isinstance(reply, ErrorReply) and reply.kind == kind
        assert asker.ask(lease(holder)) == LeaseReply(0, [], [])


def test_waiting_lease_requests_are_bounded_and_end(ranks: Callable[..., Rank]) -> None:
    holder = ranks(serve_limits=ServeLimits(parked=2))
    with Asker(holder.agent.peer_address) as asker:
        for index in range(3):
            asker.socket.send_multipart([bytes([index]) * 8, encode(lease(holder, wait_s=0.2))])
        answers = [asker.socket.recv_multipart() for _ in range(3)]
        assert answers[0][0] == bytes([2]) * 8
        refused = decode(answers[0][1])
        assert isinstance(refused, ErrorReply) and refused.kind == "LimitExceeded"
        assert [decode(body) for _, body in answers[1:]] == [LeaseReply(0, [], [])] * 2


def test_leases_are_bounded(ranks: Callable[..., Rank]) -> None:
    holder = ranks(serve_limits=ServeLimits(leases=2))
    put(holder.pool, KEYS)
    with Asker(holder.agent.peer_address) as asker:
        kinds = [type(asker.ask(lease(holder, ttl_s=20.0))) for _ in range(3)]
    assert kinds == [LeaseReply, LeaseReply, ErrorReply]


def test_fetches_are_bounded(ranks: Callable[..., Rank]) -> None:
    holder = ranks()
    reader = ranks(session_limits=SessionLimits(active=1, queued=2))
    fetches = [reader.start(holder, KEYS, 0.4, 5.0) for _ in range(5)]
    ends = [fetch.exception(LIMIT_S) for fetch in fetches]
    assert [type(end) for end in ends] == [type(None)] * 3 + [LimitExceeded] * 2
    # The wait of those that queued counted from their arrival.
    assert {fetches[index].result().outcome for index in range(3)} == {"miss"}
    assert reader.stats()["transfer_fetches_refused_total"] == 2


@pytest.mark.parametrize(
    ("request_", "error"),
    [
        (FetchRequest.of("p", "ipc:///tmp/x", [], 0.0, 1.0), ProtocolError),
        (FetchRequest.of("p", "tcp://", [], 0.0, 1.0), ProtocolError),
        (FetchRequest.of("p", "tcp://no port", [], 0.0, 1.0), ProtocolError),
        (FetchRequest.of("p", "tcp://127.0.0.1:1", [], float("nan"), 1.0), ProtocolError),
        (FetchRequest.of("p", "tcp://127.0.0.1:1", [], 0.0, -1.0), ProtocolError),
        (FetchRequest.of("p", "tcp://127.0.0.1:1", [], 0.0, 1e6), LimitExceeded),
        (FetchRequest.of("p", "tcp://127.0.0.1:1", [bytes(32)] * 70_000, 0.0, 1.0), LimitExceeded),
    ],
)
def test_fetch_requests_that_are_refused(
    ranks: Callable[..., Rank], request_: FetchRequest, error: type[Exception]
) -> None:
    with pytest.raises(error):
        ranks().agent.fetch(request_).result(LIMIT_S)


def test_messages_on_the_wrong_socket(ranks: Callable[..., Rank]) -> None:
    rank = ranks()
    with Asker(rank.agent.peer_address) as asker:
        for message in (InfoRequest(), SnapshotRequest(), ReleaseReply(True)):
            reply = asker.ask(message)
            assert isinstance(reply, ErrorReply) and reply.kind == "ProtocolError"
    reply = rank.ask(Hello(PROTOCOL_VERSION, "x", "y", NAMESPACE))
    assert isinstance(reply, ErrorReply) and reply.kind == "ProtocolError"


@pytest.mark.parametrize("seed", range(3))
def test_frames_of_any_kind_do_no_harm(two: tuple[Rank, Rank], seed: int) -> None:
    holder, reader = two
    put(holder.pool, KEYS)
    chance = random.Random(seed)
    good = [
        encode(message)
        for message in (lease(holder), InfoRequest(), ReleaseRequest("x", 1), StatsRequest())
    ]
    for address in (holder.agent.peer_address, f"ipc://{holder.path}"):
        with Asker(address) as asker:
            for _ in range(300):
                body = bytearray(chance.choice(good))
                for _ in range(chance.randint(1, 4)):
                    body[chance.randrange(len(body))] = chance.randrange(256)
                frames = [chance.randbytes(chance.choice([0, 7, 8, 8, 8, 9])), bytes(body)]
                asker.socket.send_multipart(frames[: chance.choice([1, 2, 2, 2])])
            asker.socket.send_multipart([b""] * 5)
            asker.drain(InfoRequest())
    assert holder.stats()["transfer_malformed_messages_total"] > 0
    assert holder.stats()["transfer_internal_errors_total"] == 0
    assert holder.agent.alive
    assert reader.fetch(holder, KEYS).outcome == "complete"


def test_a_peer_that_answers_nonsense(ranks: Callable[..., Rank]) -> None:
    reader = ranks()
    context = zmq.Context()
    router = context.socket(zmq.ROUTER)
    router.rcvtimeo = int(LIMIT_S * 1000)
    port = router.bind_to_random_port("tcp://127.0.0.1")
    try:
        request = FetchRequest.of("p", f"tcp://127.0.0.1:{port}", list(KEYS), 0.0, 5.0)
        fetch = reader.agent.fetch(request)
        asker, request_id, _ = router.recv_multipart()
        router.send_multipart([asker, b"short", b"x"])
        router.send_multipart([asker, request_id, b"\xc1"])
        router.send_multipart([asker, request_id])
        router.send_multipart([asker, request_id, encode(LeaseReply(5, [1, 2], []))])
        assert fetch.result(LIMIT_S).outcome == "protocol_error"
        assert reader.stats()["transfer_malformed_messages_total"] == 3
    finally:
        context.destroy(0)


# -- what the HTTP process asks, and the events --


def test_info_stats_and_socket_permissions(ranks: Callable[..., Rank]) -> None:
    rank = ranks()
    info = rank.ask(InfoRequest())
    assert info == InfoReply(
        0, rank.generation, NAMESPACE, rank.agent.peer_address, rank.agent.events_address, 64
    )
    assert stat.S_IMODE(rank.path.stat().st_mode) == 0o600
    values = rank.stats()
    assert values["total_blocks"] == 64 and values["transfer_fetches_total"] == 0
    assert all(isinstance(value, int | float) for value in values.values())
    rank.agent.close()
    assert not rank.path.exists() and not rank.agent.alive
    rank.agent.close()


def test_events_and_the_snapshot_agree(ranks: Callable[..., Rank]) -> None:
    rank = ranks()
    context = zmq.Context()
    sub = context.socket(zmq.SUB)
    try:
        sub.rcvtimeo = int(LIMIT_S * 1000)
        sub.setsockopt(zmq.SUBSCRIBE, b"")
        sub.connect(rank.agent.events_address)

        def subscribed() -> bool:
            # Each try writes an event, until the subscription is known at the other end.
            rank.pool.clear()
            return bool(sub.poll(50))

        until(subscribed)
        put(rank.pool, KEYS[:4])
        rank.pool.delete(KEYS[3:4])
        reply = rank.ask(SnapshotRequest())
        assert isinstance(reply, SnapshotReply)
        snapshot = events.decode_snapshot(reply.snapshot)
        assert snapshot.generation == rank.generation
        seen: list[int] = []
        stored: list[int] = []
        while not seen or seen[-1] < snapshot.seq:
            seq, batch = events.decode_frames(sub.recv_multipart())
            seen.append(seq)
            for event in batch.events:
                match event:
                    case events.BlockStored():
                        stored.extend(event.block_hashes)
                    case events.BlockRemoved():
                        stored = [short for short in stored if short not in event.block_hashes]
                    case events.AllBlocksCleared():
                        stored.clear()
        assert seen == list(range(seen[0], snapshot.seq + 1))
        held = [
            short
            for event in snapshot.events
            if isinstance(event, events.BlockStored)
            for short in event.block_hashes
        ]
        assert sorted(stored) == sorted(held) and len(held) == 3
    finally:
        context.destroy(0)


# -- faults of our own --


def test_an_error_in_the_pool_is_answered_and_survived(
    ranks: Callable[..., Rank], monkeypatch: pytest.MonkeyPatch
) -> None:
    rank = ranks()

    def broken() -> object:
        raise RuntimeError("a bug")

    monkeypatch.setattr(rank.pool, "snapshot", broken)
    reply = rank.ask(SnapshotRequest())
    assert isinstance(reply, ErrorReply) and "RuntimeError: a bug" in reply.message
    assert rank.agent.alive and rank.stats()["transfer_internal_errors_total"] == 1


def test_an_agent_that_fails_for_ever_gives_up(
    ranks: Callable[..., Rank], monkeypatch: pytest.MonkeyPatch
) -> None:
    rank = ranks()

    def broken() -> int:
        raise RuntimeError("a bug")

    monkeypatch.setattr(rank.pool, "expire", broken)
    until(lambda: not rank.agent.alive)
    with pytest.raises(PeerUnreachable):
        rank.agent.fetch(FetchRequest.of("p", "tcp://127.0.0.1:1", [], 0.0, 1.0)).result(LIMIT_S)


def test_what_cannot_start_says_so(folder: Path) -> None:
    pool = MemPool(NAMESPACE, arena_bytes=BLOCK, generation="g")

    def agent(**changes: object) -> RankAgent:
        options: dict[str, object] = {"host": "127.0.0.1", "local_path": folder / "s", **changes}
        return RankAgent(
            pool,
            LoopbackTransport(secrets.token_hex(6)),
            namespace=NAMESPACE,
            instance_id="i",
            generation="g",
            rank=0,
            **options,  # type: ignore[arg-type]
        )

    for changes in (
        {"host": "192.0.2.1"},
        {"host": "no.such.host.invalid"},
        {"local_path": folder / ("x" * 120)},
    ):
        failing = agent(**changes)
        with pytest.raises(ConfigError):
            failing.start()
        assert not failing.alive
        failing.close()
    with pytest.raises(ConfigError, match="advertise"):
        agent(host="0.0.0.0")
    with agent(host="localhost") as running:
        assert running.peer_address.startswith("tcp://localhost:")
    pool.close()


# -- the client --


def test_the_client_calls_concurrently_and_raises_typed_errors(two: tuple[Rank, Rank]) -> None:
    holder, reader = two
    put(holder.pool, KEYS)
    address = holder.agent.peer_address

    async def talk() -> None:
        client = LocalClient(reader.path)
        try:
            waiting = asyncio.create_task(
                client.call(FetchRequest.of("p", address, [bytes(32)], 0.5, 5.0), LIMIT_S)
            )
            complete = await client.call(
                FetchRequest.of("p", address, list(KEYS), 0.0, 5.0), LIMIT_S
            )
            assert isinstance(complete, FetchReply) and complete.outcome == "complete"
            assert isinstance(await client.call(InfoRequest(), LIMIT_S), InfoReply)
            assert not waiting.done()
            missed = await waiting
            assert isinstance(missed, FetchReply) and missed.outcome == "miss"
            with pytest.raises(ProtocolError, match="not for a local socket"):
                await client.call(ReleaseReply(True), LIMIT_S)
            with pytest.raises(LimitExceeded):
                await client.call(FetchRequest.of("p", address, [], 0.0, 1e6), LIMIT_S)
            with pytest.raises(ProtocolError):
                await client.call(InfoRequest(), float("inf"))
        finally:
            client.close()
            client.close()

    asyncio.run(talk())


def test_the_client_gives_up_and_returns_with_the_rank(folder: Path) -> None:
    async def talk() -> None:
        client = LocalClient(folder / "absent.sock")
        with pytest.raises(PeerUnreachable):
            await client.call(InfoRequest(), 0.1)
        hanging = asyncio.create_task(client.call(InfoRequest(), LIMIT_S))
        await asyncio.sleep(0.05)
        client.close()
        with pytest.raises(PeerUnreachable):
            await hanging

    asyncio.run(talk())
