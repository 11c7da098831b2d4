"""``transfer_with_insert``: a rank has another one fetch from it."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable

import pytest
import zmq
from sglang_memserve.config import Limits
from sglang_memserve.errors import LimitExceeded, PeerUnreachable, ProtocolError
from sglang_memserve.protocol.control import InfoRequest, OfferRequest, decode
from sglang_memserve.transfer.loopback import LoopbackTransport
from sglang_memserve.transfer.nixl import NixlTransport
from sglang_memserve.transfer.offer import Offers, offer
from sglang_memserve.types import PageKey
from unit.agents import BLOCK, KEYS, LIMIT_S, MakeTransport, Rank, holds, put, receive_offers


@pytest.mark.parametrize("make", [LoopbackTransport, NixlTransport], ids=["loopback", "nixl"])
def test_pages_are_moved_and_published(ranks: Callable[..., Rank], make: MakeTransport) -> None:
    sender, receiver = ranks(make), ranks(make, offers=Offers.TAKEN)
    put(sender.pool, KEYS[:10])
    reply = sender.agent.transfer_with_insert(receiver.agent.peer_address, KEYS[:10], LIMIT_S)
    assert (reply.outcome, reply.fetched_pages, reply.fetched_bytes) == ("complete", 10, 10 * BLOCK)
    assert holds(receiver.pool, KEYS[:10])
    assert sender.stats()["leases"] == 0


def test_offer_of_what_the_sender_lacks_says_so(ranks: Callable[..., Rank]) -> None:
    sender, receiver = ranks(), ranks(offers=Offers.TAKEN)
    put(sender.pool, KEYS[:3])
    reply = sender.agent.transfer_with_insert(receiver.agent.peer_address, KEYS[:5], LIMIT_S)
    assert (reply.outcome, reply.readable_pages) == ("miss", 3)


def test_rank_takes_no_offers_unless_it_was_made_to(two: tuple[Rank, Rank]) -> None:
    sender, receiver = two
    put(sender.pool, KEYS[:3])
    with pytest.raises(ProtocolError, match="takes no offers"):
        sender.agent.transfer_with_insert(receiver.agent.peer_address, KEYS[:3], LIMIT_S)
    assert receiver.pool.readable_pages(KEYS[:3]) == 0


def test_bounds_of_a_fetch_hold_for_an_offer(ranks: Callable[..., Rank]) -> None:
    sender = ranks()
    receiver = ranks(offers=Offers.TAKEN, limits=Limits(max_pages_per_request=4))
    with pytest.raises(LimitExceeded):
        sender.agent.transfer_with_insert(receiver.agent.peer_address, KEYS[:5], LIMIT_S)


def test_receiver_that_is_not_there(ranks: Callable[..., Rank]) -> None:
    with pytest.raises(PeerUnreachable, match="did not answer"):
        ranks().agent.transfer_with_insert("tcp://127.0.0.1:1", KEYS[:1], 0.05)
    with pytest.raises(ProtocolError, match="address"):
        ranks().agent.transfer_with_insert("nonsense", KEYS[:1], 0.05)


def test_offers_that_make_no_sense(ranks: Callable[..., Rank]) -> None:
    sender, receiver = ranks(), ranks(offers=Offers.TAKEN)
    address = receiver.agent.peer_address
    for deadline_s in (float("inf"), float("nan"), -1.0):
        with pytest.raises(ProtocolError, match="deadline"):
            sender.agent.transfer_with_insert(address, KEYS[:1], deadline_s)
    with pytest.raises(ProtocolError, match="page key of 3 bytes"):
        sender.agent.transfer_with_insert(address, [PageKey(b"odd")], 1.0)
    with pytest.raises(LimitExceeded, match="fetch_deadline_s"):
        sender.agent.transfer_with_insert(address, KEYS[:1], 1e9)
    sender.agent.close()
    with pytest.raises(PeerUnreachable, match="not running"):
        sender.agent.transfer_with_insert(address, KEYS[:1], 1.0)


def test_the_deadline_of_an_offer_is_that_of_the_call() -> None:
    """The fetch gets a little less of it, so that its answer arrives in time."""
    context = zmq.Context()
    router = context.socket(zmq.ROUTER)
    router.rcvtimeo = int(LIMIT_S * 1000)
    address = f"tcp://127.0.0.1:{router.bind_to_random_port('tcp://127.0.0.1')}"
    try:
        for deadline_s, fetch_s in ((0.2, 0.15), (0.0, 0.0)):
            with pytest.raises(PeerUnreachable, match="did not answer"):
                offer(address, peer_id="p", peer_address="a", keys=[], deadline_s=deadline_s)
            if deadline_s:
                received = decode(router.recv_multipart()[2])
                assert isinstance(received, OfferRequest)
                assert received.deadline_s == pytest.approx(fetch_s)
    finally:
        context.destroy(0)


def test_offer_is_not_for_the_local_socket(ranks: Callable[..., Rank]) -> None:
    rank = ranks(offers=Offers.TAKEN)
    answer = rank.ask(OfferRequest("p", "tcp://127.0.0.1:1", [], 1.0))
    assert "not for a local socket" in getattr(answer, "message", "")
    assert rank.ask(InfoRequest())


def test_two_processes(ranks: Callable[..., Rank]) -> None:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=receive_offers, args=(theirs,), daemon=True)
    process.start()
    try:
        assert ours.poll(3 * LIMIT_S), "the receiver did not start"
        sender = ranks(NixlTransport)
        put(sender.pool, KEYS)
        reply = sender.agent.transfer_with_insert(ours.recv(), KEYS, LIMIT_S)
        assert (reply.outcome, reply.fetched_pages) == ("complete", len(KEYS))
        ours.send(len(KEYS))
        assert ours.poll(LIMIT_S) and ours.recv() is True
        ours.send("done")
        process.join(LIMIT_S)
        assert process.exitcode == 0
    finally:
        process.kill()
        process.join(LIMIT_S)
