"""Two rank agents in one process, over each transport: what a fetch does, and how it ends."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from functools import partial

import pytest
from sglang_memserve.errors import PeerUnreachable
from sglang_memserve.protocol.control import (
    FetchRequest,
)
from sglang_memserve.transfer.base import ReadState, Transport
from sglang_memserve.transfer.faulty import Faults, FaultyTransport
from sglang_memserve.transfer.loopback import LoopbackTransport
from unit.agents import (
    BLOCK,
    KEYS,
    LIMIT_S,
    Rank,
    content,
    holds,
    put,
    readable,
    until,
)


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
    assert reader.fetch(holder, KEYS, wait_s=0.5, deadline_s=0.5).outcome == "miss"
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
