"""Fetches from several holders at once, and what arrives damaged."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial

import pytest
from sglang_memserve.protocol.control import FetchReply, Source
from sglang_memserve.transfer.faulty import Faults, FaultyTransport
from sglang_memserve.transfer.loopback import LoopbackTransport
from sglang_memserve.transfer.nixl import NixlTransport
from sglang_memserve.transfer.port import FetchSettings
from sglang_memserve.types import Checksums
from unit.agents import BLOCK, KEYS, LIMIT_S, MakeTransport, Rank, holds, put, readable, until

Ranks = Callable[..., Rank]


class CountingTransport(LoopbackTransport):
    """Counts the blocks that were read from each peer."""

    blocks: list[int]

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.blocks = []

    def read(self, peer: str, remote: Sequence[int], local: Sequence[int], block_bytes: int) -> int:
        handle = super().read(peer, remote, local, block_bytes)
        self.blocks += local
        return handle


class DamagingTransport(LoopbackTransport):
    """Flips one bit of the last block of each read."""

    last: int = 0

    def read(self, peer: str, remote: Sequence[int], local: Sequence[int], block_bytes: int) -> int:
        self.last = local[-1]
        return super().read(peer, remote, local, block_bytes)

    def poll(self, handle: int):  # type: ignore[no-untyped-def]
        state = super().poll(handle)
        place = ctypes.c_uint8.from_address(self.last + BLOCK - 1)
        place.value ^= 1
        return state


def nothing_leased(holder: Rank) -> bool:
    return holder.stats()["transfer_leases_held_by_peers"] == 0


def outcomes(reply: FetchReply) -> list[tuple[str, int]]:
    return [(source.outcome, source.fetched_pages) for source in reply.sources]


@pytest.mark.parametrize("make", [LoopbackTransport, NixlTransport], ids=["loopback", "nixl"])
def test_each_source_gives_its_range(ranks: Ranks, make: MakeTransport) -> None:
    one, two, reader = ranks(make), ranks(make), ranks(make)
    put(one.pool, KEYS[:25])
    put(two.pool, KEYS)
    reply = reader.fetch_from([one.source(0, 25), two.source(25)])
    assert (reply.outcome, reply.readable_pages, reply.fetched_pages) == ("complete", 40, 40)
    assert outcomes(reply) == [("complete", 25), ("complete", 15)]
    assert holds(reader.pool, KEYS)
    for holder in (one, two):
        until(partial(nothing_leased, holder))


def test_a_page_that_two_sources_have_is_read_once(ranks: Ranks) -> None:
    one, two = ranks(), ranks()
    made: list[CountingTransport] = []

    def make(name: str) -> CountingTransport:
        made.append(CountingTransport(name))
        return made[0]

    reader = ranks(make)
    put(one.pool, KEYS)
    put(two.pool, KEYS)
    reply = reader.fetch_from([one.source(0, 30), two.source(10)])
    assert outcomes(reply) == [("complete", 30), ("complete", 10)]
    assert len(made[0].blocks) == len(set(made[0].blocks)) == 40


def test_a_source_that_covers_the_pages_takes_over_from_one_that_fails(ranks: Ranks) -> None:
    one, two, reader = ranks(), ranks(), ranks()
    put(one.pool, KEYS[:5])
    put(two.pool, KEYS)
    reply = reader.fetch_from([one.source(), two.source()])
    assert (reply.outcome, reply.readable_pages) == ("complete", 40)
    assert outcomes(reply) == [("miss", 5), ("complete", 35)]
    assert "page 5" in reply.sources[0].detail


def test_an_unreachable_source_costs_only_its_range(ranks: Ranks) -> None:
    two, reader = ranks(), ranks(settings=FetchSettings(reply_timeout_s=0.2))
    put(two.pool, KEYS)
    gone = Source("gone", "tcp://127.0.0.1:1", 0, 10)
    reply = reader.fetch_from([gone, two.source(10)])
    assert (reply.outcome, reply.readable_pages, reply.fetched_pages) == ("peer_unreachable", 0, 30)
    assert outcomes(reply) == [("peer_unreachable", 0), ("complete", 30)]
    # What lies behind the hole is here: whoever fills the hole has everything.
    put(reader.pool, KEYS[:10])
    assert holds(reader.pool, KEYS)
    reader.pool.check()


def test_pages_that_no_source_was_named_for_are_a_miss(ranks: Ranks) -> None:
    one, reader = ranks(), ranks()
    put(one.pool, KEYS)
    reply = reader.fetch_from([one.source(0, 10), one.source(20, 10)])
    assert (reply.outcome, reply.readable_pages, reply.fetched_pages) == ("miss", 10, 20)
    assert outcomes(reply) == [("complete", 10), ("complete", 10)]
    assert reader.fetch_from([]).outcome == "miss"


def test_one_source_is_waited_for_while_another_is_read(ranks: Ranks) -> None:
    one, two, reader = ranks(), ranks(), ranks()
    put(two.pool, KEYS)
    fetch: Future[FetchReply] = reader.start_from([one.source(0, 20), two.source(20)], wait_s=15.0)
    until(lambda: reader.pool.readable_pages(KEYS[20:]) == 20)
    for ready in (4, 20):
        put(one.pool, KEYS[:ready])
        until(partial(readable, reader.pool, ready if ready < 20 else 40))
    assert outcomes(fetch.result(LIMIT_S)) == [("complete", 20), ("complete", 20)]


def test_rounds_of_a_few_pages_each(ranks: Ranks) -> None:
    settings = FetchSettings(rounds=3, max_bytes_per_lease=4 * BLOCK)
    one, reader = ranks(NixlTransport), ranks(NixlTransport, settings=settings)
    put(one.pool, KEYS)
    reply = reader.fetch_from([one.source()])
    assert (reply.outcome, reply.fetched_pages) == ("complete", 40)
    assert one.stats()["transfer_leases_granted_total"] == 10
    assert holds(reader.pool, KEYS)


def test_sources_that_fail_again_and_again(ranks: Ranks) -> None:
    faults = Faults(read=0.3, midway=0.3, delay=0.3)
    one, two = ranks(), ranks()
    reader = ranks(
        lambda name: FaultyTransport(LoopbackTransport(name), faults, seed=5),
        settings=FetchSettings(max_bytes_per_lease=4 * BLOCK),
    )
    put(one.pool, KEYS)
    put(two.pool, KEYS)
    for _ in range(60):
        reply = reader.fetch_from([one.source(0, 30), two.source(10)], deadline_s=5.0)
        assert holds(reader.pool, KEYS[: reply.readable_pages])
        if reply.outcome == "complete":
            break
    assert readable(reader.pool, 40)
    reader.pool.check()


# -- checksums --


@pytest.mark.parametrize("make", [LoopbackTransport, NixlTransport], ids=["loopback", "nixl"])
def test_checksums_travel_with_the_pages(ranks: Ranks, make: MakeTransport) -> None:
    first = ranks(make, checksums=Checksums.ON)
    second, third = ranks(make), ranks(make)
    put(first.pool, KEYS)
    assert second.fetch(first, KEYS).outcome == "complete"
    assert third.fetch(second, KEYS).outcome == "complete"
    blocks = third.pool.match(KEYS)
    assert third.pool.checksums(blocks) == first.pool.checksums(first.pool.match(KEYS))
    assert all(third.pool.checksums(blocks)) and holds(third.pool, KEYS)


def test_a_byte_that_flipped_at_the_holder_is_caught(ranks: Ranks) -> None:
    holder = ranks(checksums=Checksums.ON)
    reader = ranks(settings=FetchSettings(max_bytes_per_lease=10 * BLOCK))
    put(holder.pool, KEYS)
    (block,) = holder.pool.match(KEYS)[17:18]
    ctypes.c_uint8.from_address(holder.pool.address(block) + 99).value ^= 0x10
    reply = reader.fetch_from([holder.source()])
    assert reply.outcome == "checksum_mismatch" and reply.readable_pages == 10
    assert KEYS[17].hex()[:16] in reply.sources[0].detail
    assert holds(reader.pool, KEYS[: reply.readable_pages])
    assert reader.stats()["transfer_damaged_reads_total"] == 1
    assert reader.pool.readable_pages([KEYS[17]]) == 0
    until(partial(nothing_leased, holder))
    assert reader.stats()["filling_blocks"] == 0
    reader.pool.check()


def test_another_holder_gives_what_arrived_damaged(ranks: Ranks) -> None:
    bad, good, reader = ranks(checksums=Checksums.ON), ranks(), ranks()
    put(bad.pool, KEYS)
    put(good.pool, KEYS)
    (block,) = bad.pool.match(KEYS)[:1]
    ctypes.c_uint8.from_address(bad.pool.address(block)).value ^= 1
    reply = reader.fetch_from([bad.source(), good.source()])
    assert outcomes(reply) == [("checksum_mismatch", 0), ("complete", 40)]
    assert reply.outcome == "complete" and holds(reader.pool, KEYS)


def test_bytes_that_a_transport_damages_are_caught(ranks: Ranks) -> None:
    holder, reader = ranks(checksums=Checksums.ON), ranks(DamagingTransport)
    put(holder.pool, KEYS)
    reply = reader.fetch_from([holder.source()])
    assert (reply.outcome, reply.readable_pages) == ("checksum_mismatch", 0)
    reader.pool.check()
