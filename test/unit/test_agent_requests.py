"""What a rank agent answers to whom: leases, bounds, strangers, damaged frames."""

from __future__ import annotations

import random
from collections.abc import Callable

import msgspec
import pytest
import zmq
from sglang_memserve.config import Limits
from sglang_memserve.errors import LimitExceeded, ProtocolError
from sglang_memserve.protocol import PROTOCOL_VERSION
from sglang_memserve.protocol.control import (
    ErrorReply,
    FetchRequest,
    Hello,
    HelloReply,
    InfoRequest,
    LeaseReply,
    LeaseRequest,
    ReleaseReply,
    ReleaseRequest,
    SnapshotRequest,
    StatsRequest,
    decode,
    encode,
)
from sglang_memserve.types import Namespace
from unit.agents import (
    KEYS,
    LIMIT_S,
    NAMESPACE,
    Asker,
    Rank,
    put,
    until,
)


def test_another_namespace_is_refused_with_the_reason(ranks: Callable[..., Rank]) -> None:
    holder = ranks()
    other = Namespace("another model", "1", "float16", 16, 2, 2, 64, 64, 0, 1)
    reader = ranks(namespace=other)
    put(holder.pool, KEYS)
    fetched = reader.fetch(holder, KEYS)
    assert fetched.outcome == "namespace_mismatch"
    # Told by the holder, read by the reader: each value goes with its instance.
    detail = fetched.sources[0].detail
    assert f"http://{holder.generation} has 'm', http://{reader.generation} has 'another" in detail
    with Asker(holder.agent.peer_address) as asker:
        reply = asker.ask(Hello(PROTOCOL_VERSION, "x", "y", other))
        assert isinstance(reply, ErrorReply) and reply.kind == "NamespaceMismatch"
        assert "another model" in reply.message
        reply = asker.ask(Hello(PROTOCOL_VERSION + 1, "x", "y", NAMESPACE))
        assert isinstance(reply, ErrorReply) and reply.kind == "VersionMismatch"
        assert isinstance(asker.ask(Hello(PROTOCOL_VERSION, "x", "y", NAMESPACE)), HelloReply)


def test_shards_of_another_rank_or_split_are_refused(ranks: Callable[..., Rank]) -> None:
    """What the reader is told names both sides' values, each with its instance."""
    holder = ranks(namespace=Namespace("m", "1", "float16", 16, 2, 2, 64, 64, 0, 2))
    put(holder.pool, KEYS)
    crossed = ranks(namespace=Namespace("m", "1", "float16", 16, 2, 2, 64, 64, 1, 2))
    (source,) = crossed.fetch(holder, KEYS).sources
    assert source.outcome == "namespace_mismatch"
    assert f"tp_rank: http://{holder.generation} has 0" in source.detail
    whole = ranks(namespace=Namespace("m", "1", "float16", 16, 2, 2, 64, 64, 0, 1))
    (source,) = whole.fetch(holder, KEYS).sources
    assert f"http://{whole.generation} has 1" in source.detail


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
        ({"ttl_s": 0.0}, "ProtocolError"),
        ({"ttl_s": float("nan")}, "ProtocolError"),
        ({"wait_s": -1.0}, "ProtocolError"),
        ({"wait_s": float("nan")}, "ProtocolError"),
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


def test_who_asks_for_a_longer_lease_gets_the_holders_bound(ranks: Callable[..., Rank]) -> None:
    holder = ranks(limits=Limits(lease_ttl_s=0.05, lease_wait_s=0.05))
    with Asker(holder.agent.peer_address) as asker:
        assert asker.ask(lease(holder, wait_s=1e9)) == LeaseReply(0, [], [])
        put(holder.pool, KEYS[:6])
        granted = asker.ask(lease(holder, ttl_s=1e9))
        assert isinstance(granted, LeaseReply) and granted.addresses
        until(lambda: holder.pool.stats()["pinned_blocks"] == 0)


def test_waiting_lease_requests_are_bounded_and_end(ranks: Callable[..., Rank]) -> None:
    holder = ranks(limits=Limits(max_parked=2))
    with Asker(holder.agent.peer_address) as asker:
        for index in range(3):
            asker.socket.send_multipart([bytes([index]) * 8, encode(lease(holder, wait_s=0.2))])
        answers = [asker.socket.recv_multipart() for _ in range(3)]
        assert answers[0][0] == bytes([2]) * 8
        refused = decode(answers[0][1])
        assert isinstance(refused, ErrorReply) and refused.kind == "LimitExceeded"
        assert [decode(body) for _, body in answers[1:]] == [LeaseReply(0, [], [])] * 2


def test_leases_are_bounded(ranks: Callable[..., Rank]) -> None:
    holder = ranks(limits=Limits(max_leases=2))
    put(holder.pool, KEYS)
    with Asker(holder.agent.peer_address) as asker:
        kinds = [type(asker.ask(lease(holder, ttl_s=20.0))) for _ in range(3)]
    assert kinds == [LeaseReply, LeaseReply, ErrorReply]


def test_fetches_are_bounded(ranks: Callable[..., Rank]) -> None:
    holder = ranks()
    reader = ranks(limits=Limits(max_fetches=1, max_queued_fetches=2))
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


def test_nested_messages_do_no_harm(ranks: Callable[..., Rank]) -> None:
    """More of them than errors of its own an agent survives, from who asks and from who answers."""
    rank = ranks()
    nested = b"\x82\xa4type\xa5Hello\xa1x" + b"\x91" * 2_000
    with Asker(rank.agent.peer_address) as asker:
        for _ in range(30):
            asker.socket.send_multipart([bytes(8), nested])
        asker.drain(InfoRequest())
    context = zmq.Context()
    router = context.socket(zmq.ROUTER)
    router.rcvtimeo = int(LIMIT_S * 1000)
    port = router.bind_to_random_port("tcp://127.0.0.1")
    try:
        address = f"tcp://127.0.0.1:{port}"
        fetch = rank.agent.fetch(FetchRequest.of("p", address, list(KEYS), 0.0, 5.0))
        asker_id, request_id, _ = router.recv_multipart()
        for _ in range(30):
            router.send_multipart([asker_id, request_id, nested])
        assert fetch.result(LIMIT_S).outcome == "peer_unreachable"
    finally:
        context.destroy(0)
    assert rank.stats()["transfer_malformed_messages_total"] == 60
    assert rank.stats()["transfer_internal_errors_total"] == 0


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
