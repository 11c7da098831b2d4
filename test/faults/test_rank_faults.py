"""Faults that are real: ranks in processes of their own, over NIXL, killed, stopped and cut off.

After each fault the survivors hold nothing that belongs to the dead, every readable page has its
own bytes, and the pool still serves. Reads that are to be disturbed go block by block, at a pace
that leaves time for it on a busy machine.
"""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from faults.bad_line import BadLine, Line
from faults.ranks import RankProcess, Ranks
from sglang_memserve.cluster.machine import free_ports
from sglang_memserve.transfer.faulty import Faults
from sglang_memserve.types import Checksums

# Over TCP the holder's own CPU serves a read; over shared memory the reader's kernel does it all.
TCP = {"UCX_TLS": "tcp"}
# Tests that wait for a lease to end have short ones, and a busy machine stands still for longer.
LEASE_TRIES = 5
SHARED: dict[str, str] = {}
PAGES = 24
SLOWLY = Faults(blocks_per_s=8.0)
both_ways = pytest.mark.parametrize("environment", [TCP, SHARED], ids=["tcp", "shared memory"])


def still_serves(ranks: Ranks, rank: RankProcess, environment: Mapping[str, str]) -> None:
    """It reads from a rank that is well, and that one reads from it."""
    other = ranks.start("healthy", blocks=2 * PAGES, environment=environment)
    other.call("fill", chain="afterwards", pages=PAGES)
    for reader, holder in ((rank, other), (other, rank)):
        reader.call("clear")
        for _ in range(LEASE_TRIES):
            reply = reader.fetch(holder, chain="afterwards", pages=PAGES)
            if reply["outcome"] != "lease_invalid":
                break
        assert reply["outcome"] == "complete" and reply["readable"] == PAGES, reply
        assert reader.call("wrong_pages", chain="afterwards", pages=PAGES) == []
    other.expect_sound(connections=1)
    other.quit()


def begin_long_read(reader: RankProcess, holder: RankProcess, deadline_s: float = 30.0) -> None:
    """Returns while bytes are being read."""
    reader.begin_fetch(holder, chain="long", pages=PAGES, deadline_s=deadline_s)
    reader.wait_for("filling_blocks", 1)


@both_ways
def test_holder_is_killed_in_mid_read(ranks: Ranks, environment: dict[str, str]) -> None:
    holder = ranks.start("holder", blocks=PAGES, environment=environment)
    reader = ranks.start("reader", blocks=PAGES, environment=environment, faults=SLOWLY)
    holder.call("fill", chain="long", pages=PAGES)
    begin_long_read(reader, holder, deadline_s=8.0)
    holder.kill()
    reply = reader.end_fetch()
    assert reply["outcome"] in ("transfer_failed", "peer_unreachable", "deadline"), reply
    assert reply["seconds"] < 9, reply
    assert reply["readable"] < PAGES
    assert reader.call("wrong_pages", chain="long", pages=PAGES) == []
    reader.expect_sound(connections=0)
    still_serves(ranks, reader, environment)
    reader.quit()


@both_ways
def test_reader_is_killed_in_mid_read(ranks: Ranks, environment: dict[str, str]) -> None:
    holder = ranks.start("holder", blocks=PAGES, environment=environment, lease_ttl_s=3.0)
    reader = ranks.start(
        "reader", blocks=PAGES, environment=environment, faults=Faults(killed_by_read=1)
    )
    holder.call("fill", chain="long", pages=PAGES)
    reader.begin_fetch(holder, chain="long", pages=PAGES)
    reader.await_death()
    # Its lease ends by itself, and what it pinned may go.
    holder.expect_sound(connections=0)
    assert holder.call("fill", chain="other", pages=PAGES) == PAGES
    assert holder.call("wrong_pages", chain="other", pages=PAGES) == []
    still_serves(ranks, holder, environment)
    holder.quit()


@both_ways
def test_holder_is_frozen_for_longer_than_the_deadline(
    ranks: Ranks, environment: dict[str, str]
) -> None:
    holder = ranks.start("holder", blocks=2 * PAGES, environment=environment)
    reader = ranks.start("reader", blocks=2 * PAGES, environment=environment)
    holder.call("fill", chain="cold", pages=PAGES)
    assert reader.fetch(holder, chain="cold", pages=PAGES // 2)["outcome"] == "complete"
    with holder.stopped():
        reply = reader.fetch(holder, chain="cold", pages=PAGES, wait_s=0.5, deadline_s=2.0)
        assert reply["outcome"] in ("peer_unreachable", "deadline"), reply
        assert reply["readable"] == PAGES // 2
        assert reply["seconds"] < 4, reply
    # It thaws, answers what was asked long ago, and is a good peer again.
    reply = reader.fetch(holder, chain="cold", pages=PAGES)
    assert reply["outcome"] == "complete", reply
    assert reader.call("wrong_pages", chain="cold", pages=PAGES) == []
    reader.expect_sound(connections=1)
    holder.expect_sound(connections=1, limit_s=40.0)
    reader.quit()
    holder.quit()


def test_holder_is_frozen_in_mid_read(ranks: Ranks) -> None:
    """Over TCP the read stands still until the thaw; its blocks are out of use as long."""
    holder = ranks.start("holder", blocks=PAGES, environment=TCP, lease_ttl_s=5.0)
    reader = ranks.start("reader", blocks=PAGES, environment=TCP, faults=SLOWLY)
    holder.call("fill", chain="long", pages=PAGES)
    begin_long_read(reader, holder, deadline_s=2.5)
    with holder.stopped():
        reply = reader.end_fetch()
        assert reply["outcome"] == "deadline", reply
        assert reply["seconds"] < 5, reply
    reader.expect_sound(connections=1, limit_s=40.0)
    holder.expect_sound(connections=1, limit_s=40.0)
    assert reader.call("wrong_pages", chain="long", pages=PAGES) == []
    reply = reader.fetch(holder, chain="long", pages=PAGES)
    assert reply["outcome"] == "complete", reply
    assert reader.call("wrong_pages", chain="long", pages=PAGES) == []
    reader.quit()
    holder.quit()


def test_holder_comes_back_under_the_same_address(ranks: Ranks) -> None:
    (port,) = free_ports(1, taken=set())
    first = ranks.start("holder", blocks=2 * PAGES, peer_port=port)
    reader = ranks.start("reader", blocks=4 * PAGES)
    first.call("fill", chain="before", pages=PAGES)
    assert reader.fetch(first, chain="before", pages=PAGES)["outcome"] == "complete"
    first.kill()
    second = ranks.start("holder", blocks=2 * PAGES, peer_port=port)
    assert second.address == first.address
    # It holds nothing of its earlier life, and says so; what it holds now is read from it.
    reply = reader.fetch(second, chain="before", pages=PAGES + 1)
    assert reply["outcome"] in ("miss", "peer_unreachable") and reply["readable"] == PAGES, reply
    second.call("fill", chain="after", pages=PAGES)
    reply = reader.fetch(second, chain="after", pages=PAGES)
    assert reply["outcome"] == "complete", reply
    for chain in ("before", "after"):
        assert reader.call("wrong_pages", chain=chain, pages=PAGES) == []
    reader.expect_sound(connections=1)
    second.expect_sound(connections=1)
    reader.quit()
    second.quit()


@pytest.mark.parametrize("seed", range(4))
def test_control_messages_are_lost_and_repeated(ranks: Ranks, seed: int) -> None:
    holder = ranks.start("holder", blocks=8 * PAGES, lease_ttl_s=1.0)
    reader = ranks.start("reader", blocks=8 * PAGES, lease_ttl_s=1.0, reply_timeout_s=0.2)
    for number in range(6):
        holder.call("fill", chain=f"chain {number}", pages=PAGES)
    complete = 0
    with BadLine(holder.address, Line(lose=0.2, repeat=0.3), seed) as line:
        for turn in range(18):
            chain = f"chain {turn % 6}"
            reply = reader.fetch(line.address, chain=chain, pages=PAGES, deadline_s=3.0)
            assert reply["seconds"] < 4, reply
            complete += reply["outcome"] == "complete"
            assert reader.call("wrong_pages", chain=chain, pages=PAGES) == []
        assert line.lost and line.repeated
    assert complete, "nothing came through a line that loses one message in five"
    holder.expect_sound(connections=1)
    reader.expect_sound(connections=1)
    still_serves(ranks, reader, SHARED)
    reader.quit()
    holder.quit()


def test_arena_is_full_of_pinned_pages(ranks: Ranks) -> None:
    holder = ranks.start("holder", blocks=PAGES)
    reader = ranks.start("reader", blocks=PAGES)
    holder.call("fill", chain="wanted", pages=PAGES)
    reader.call("fill", chain="own", pages=PAGES)
    assert reader.call("pin", chain="own", pages=PAGES) == PAGES
    reply = reader.fetch(holder, chain="wanted", pages=PAGES, deadline_s=5.0)
    assert reply["outcome"] == "no_blocks" and reply["readable"] == 0, reply
    assert reader.call("readable", chain="own", pages=PAGES) == PAGES
    assert reader.call("wrong_pages", chain="own", pages=PAGES) == []
    reader.call("unpin")
    reply = reader.fetch(holder, chain="wanted", pages=PAGES)
    assert reply["outcome"] == "complete", reply
    assert reader.call("wrong_pages", chain="wanted", pages=PAGES) == []
    reader.expect_sound(connections=1)
    holder.expect_sound(connections=1)
    reader.quit()
    holder.quit()


@both_ways
def test_lease_expires_while_its_pages_are_read(ranks: Ranks, environment: dict[str, str]) -> None:
    """The holder reuses the blocks, and what was read is thrown away."""
    holder = ranks.start("holder", blocks=PAGES, environment=environment, lease_ttl_s=0.5)
    reader = ranks.start("reader", blocks=PAGES, environment=environment, faults=SLOWLY)
    holder.call("fill", chain="long", pages=PAGES)
    begin_long_read(reader, holder)
    holder.expect_sound(connections=1)
    assert holder.call("fill", chain="other", pages=PAGES) == PAGES
    reply = reader.end_fetch()
    assert reply["outcome"] in ("lease_invalid", "miss"), reply
    assert reply["readable"] == 0, reply
    reader.expect_sound(connections=1)
    assert holder.call("wrong_pages", chain="other", pages=PAGES) == []
    still_serves(ranks, holder, environment)
    reader.quit()
    holder.quit()


def test_a_byte_flips_in_a_held_page(ranks: Ranks) -> None:
    """The reader publishes what is before it; another holder gives the rest."""
    bad, good, reader = (
        ranks.start(name, blocks=2 * PAGES, checksums=Checksums.ON)
        for name in ("bad", "good", "reader")
    )
    bad.call("fill", chain="page", pages=PAGES)
    good.call("fill", chain="page", pages=PAGES)
    bad.call("flip_a_byte", chain="page", page=PAGES // 2)
    assert bad.call("wrong_pages", chain="page", pages=PAGES) == [PAGES // 2]
    reply = reader.fetch(bad, chain="page", pages=PAGES)
    assert reply["outcome"] == "checksum_mismatch", reply
    assert reply["readable"] <= PAGES // 2, reply
    assert reader.call("wrong_pages", chain="page", pages=PAGES) == []
    reply = reader.fetch(bad, good, chain="page", pages=PAGES)
    assert reply["outcome"] == "complete", reply
    assert reader.call("wrong_pages", chain="page", pages=PAGES) == []
    # One thread compares checksums, and stays.
    reader.expect_sound(connections=2, threads=1)
    for rank in (bad, good):
        rank.expect_sound(connections=1)
    for rank in (reader, bad, good):
        rank.quit()


def test_a_read_ends_early_and_says_that_it_is_whole(ranks: Ranks) -> None:
    holder = ranks.start("holder", blocks=PAGES, checksums=Checksums.ON)
    reader = ranks.start(
        "reader", blocks=PAGES, checksums=Checksums.ON, faults=Faults(truncate=1.0)
    )
    holder.call("fill", chain="page", pages=PAGES)
    reply = reader.fetch(holder, chain="page", pages=PAGES)
    assert reply["outcome"] == "checksum_mismatch", reply
    assert reader.call("wrong_pages", chain="page", pages=PAGES) == []
    reader.expect_sound(connections=1, threads=1)
    holder.expect_sound(connections=1)
    reader.quit()
    holder.quit()


def test_one_of_two_holders_is_killed_in_mid_read(ranks: Ranks) -> None:
    """The other takes over what the dead one owes."""
    doomed = ranks.start("doomed", blocks=PAGES)
    well = ranks.start("well", blocks=PAGES)
    reader = ranks.start("reader", blocks=PAGES, faults=SLOWLY)
    doomed.call("fill", chain="long", pages=PAGES)
    well.call("fill", chain="long", pages=PAGES)
    reader.begin_fetch(doomed, well, chain="long", pages=PAGES)
    reader.wait_for("filling_blocks", 1)
    doomed.kill()
    reply = reader.end_fetch()
    assert reply["outcome"] == "complete" and reply["readable"] == PAGES, reply
    assert reader.call("wrong_pages", chain="long", pages=PAGES) == []
    reader.expect_sound(connections=1)
    well.expect_sound(connections=1)
    reader.quit()
    well.quit()
