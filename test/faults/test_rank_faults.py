"""Faults that are real: ranks in processes of their own, over NIXL, killed, stopped and cut off.

After each fault the survivors hold nothing that belongs to the dead, every readable page has its
own bytes, and the pool still serves. Over TCP a read of some hundred pages lasts long enough to be
interrupted; shared memory copies them in an instant.
"""

from __future__ import annotations

import time

import pytest
from faults.bad_line import BadLine, Line
from faults.ranks import RankProcess, Ranks
from sglang_memserve.cluster.machine import free_ports

SLOW = {"UCX_TLS": "tcp"}
MANY = 1200  # 440 MB
FEW = 24


def still_serves(
    ranks: Ranks, rank: RankProcess, environment: dict[str, str], lease_ttl_s: float = 30.0
) -> None:
    """It reads from a rank that is well, and that one reads from it."""
    other = ranks.start("healthy", blocks=2 * FEW, environment=environment, lease_ttl_s=lease_ttl_s)
    other.call("fill", chain="afterwards", pages=FEW)
    rank.call("clear")
    reply = rank.fetch(other, chain="afterwards", pages=FEW)
    assert reply["outcome"] == "complete" and reply["fetched"] == FEW, reply
    assert rank.call("wrong_pages", chain="afterwards", pages=FEW) == []
    other.call("clear")
    reply = other.fetch(rank, chain="afterwards", pages=FEW)
    assert reply["outcome"] == "complete" and reply["fetched"] == FEW, reply
    assert other.call("wrong_pages", chain="afterwards", pages=FEW) == []
    other.expect_sound(connections=1)
    other.quit()


def begin_long_read(reader: RankProcess, holder: RankProcess, **arguments: float) -> None:
    """Returns while bytes are being read."""
    reader.begin_fetch(holder, chain="long", pages=MANY, **arguments)  # type: ignore[arg-type]
    reader.wait_for("filling_blocks", 1)
    time.sleep(0.02)
    assert reader.state()["filling_blocks"], "the read was over before it could be disturbed"


def test_holder_is_killed_in_mid_read(ranks: Ranks) -> None:
    holder = ranks.start("holder", blocks=MANY, environment=SLOW)
    reader = ranks.start("reader", blocks=MANY, environment=SLOW)
    holder.call("fill", chain="long", pages=MANY)
    begin_long_read(reader, holder, deadline_s=8.0)
    holder.kill()
    reply = reader.end_fetch(20.0)
    assert reply["outcome"] in ("transfer_failed", "peer_unreachable", "deadline"), reply
    assert reply["seconds"] < 10, reply
    assert reply["readable"] < MANY
    assert reader.call("wrong_pages", chain="long", pages=MANY) == []
    reader.expect_sound(connections=0)
    still_serves(ranks, reader, SLOW)
    reader.quit()


def test_reader_is_killed_in_mid_read(ranks: Ranks) -> None:
    holder = ranks.start("holder", blocks=MANY, environment=SLOW, lease_ttl_s=4.0)
    reader = ranks.start("reader", blocks=MANY, environment=SLOW, lease_ttl_s=4.0)
    holder.call("fill", chain="long", pages=MANY)
    begin_long_read(reader, holder)
    reader.kill()
    assert holder.state()["transfer_leases_held_by_peers"] > 0
    # Its leases end by themselves, and what they pinned may go.
    holder.expect_sound(connections=0)
    assert holder.call("fill", chain="other", pages=MANY) == MANY
    assert holder.call("wrong_pages", chain="other", pages=MANY) == []
    still_serves(ranks, holder, SLOW, lease_ttl_s=4.0)
    holder.quit()


@pytest.mark.parametrize("environment", [SLOW, {}], ids=["tcp", "shared memory"])
def test_holder_is_frozen_for_longer_than_the_deadline(
    ranks: Ranks, environment: dict[str, str]
) -> None:
    holder = ranks.start("holder", blocks=2 * FEW, environment=environment)
    reader = ranks.start("reader", blocks=2 * FEW, environment=environment)
    holder.call("fill", chain="cold", pages=FEW)
    assert reader.fetch(holder, chain="cold", pages=FEW // 2)["outcome"] == "complete"
    with holder.stopped():
        started = time.monotonic()
        reply = reader.fetch(holder, chain="cold", pages=FEW, wait_s=0.5, deadline_s=2.0)
        assert reply["outcome"] in ("peer_unreachable", "deadline"), reply
        assert reply["readable"] == FEW // 2
        assert time.monotonic() - started < 10
    # It thaws, answers what was asked long ago, and is a good peer again.
    reply = reader.fetch(holder, chain="cold", pages=FEW)
    assert reply["outcome"] == "complete", reply
    assert reader.call("wrong_pages", chain="cold", pages=FEW) == []
    reader.expect_sound(connections=1)
    holder.expect_sound(connections=1, limit_s=40.0)
    reader.quit()
    holder.quit()


def test_holder_is_frozen_in_mid_read(ranks: Ranks) -> None:
    """Over TCP its own CPU serves the read, so the read stands still."""
    holder = ranks.start("holder", blocks=MANY, environment=SLOW, lease_ttl_s=5.0)
    reader = ranks.start("reader", blocks=MANY, environment=SLOW, lease_ttl_s=5.0)
    holder.call("fill", chain="long", pages=MANY)
    begin_long_read(reader, holder, deadline_s=2.0)
    with holder.stopped():
        reply = reader.end_fetch(10.0)
        assert reply["outcome"] == "deadline", reply
        assert reply["seconds"] < 4, reply
    # What was given up ends some time after the thaw; until then its blocks are out of use.
    reader.expect_sound(connections=1, limit_s=60.0)
    holder.expect_sound(connections=1, limit_s=60.0)
    assert reader.call("wrong_pages", chain="long", pages=MANY) == []
    reply = reader.fetch(holder, chain="long", pages=MANY)
    assert reply["outcome"] == "complete", reply
    assert reader.call("wrong_pages", chain="long", pages=MANY) == []
    reader.quit()
    holder.quit()


def test_holder_comes_back_under_the_same_address(ranks: Ranks) -> None:
    (port,) = free_ports(1, taken=set())
    first = ranks.start("holder", blocks=2 * FEW, peer_port=port)
    reader = ranks.start("reader", blocks=4 * FEW)
    first.call("fill", chain="before", pages=FEW)
    assert reader.fetch(first, chain="before", pages=FEW)["outcome"] == "complete"
    first.kill()
    second = ranks.start("holder", blocks=2 * FEW, peer_port=port)
    assert second.address == first.address
    # It holds nothing of its earlier life, and says so; what it holds now is read from it.
    reply = reader.fetch(second, chain="before", pages=FEW + 1)
    assert reply["outcome"] in ("miss", "peer_unreachable") and reply["readable"] == FEW, reply
    second.call("fill", chain="after", pages=FEW)
    reply = reader.fetch(second, chain="after", pages=FEW)
    assert reply["outcome"] == "complete", reply
    for chain in ("before", "after"):
        assert reader.call("wrong_pages", chain=chain, pages=FEW) == []
    reader.expect_sound(connections=1)
    second.expect_sound(connections=1)
    reader.quit()
    second.quit()


@pytest.mark.parametrize("seed", range(4))
def test_control_messages_are_lost_and_repeated(ranks: Ranks, seed: int) -> None:
    holder = ranks.start("holder", blocks=8 * FEW, lease_ttl_s=1.0)
    reader = ranks.start("reader", blocks=8 * FEW, lease_ttl_s=1.0, reply_timeout_s=0.2)
    for chain in range(6):
        holder.call("fill", chain=f"chain {chain}", pages=FEW)
    complete = 0
    with BadLine(holder.address, Line(lose=0.2, repeat=0.3), seed) as line:
        for turn in range(18):
            chain = f"chain {turn % 6}"
            reply = reader.fetch(line.address, chain=chain, pages=FEW, deadline_s=3.0)
            assert reply["seconds"] < 4, reply
            complete += reply["outcome"] == "complete"
            assert reader.call("wrong_pages", chain=chain, pages=FEW) == []
        assert line.lost and line.repeated
    assert complete, "nothing came through a line that loses one message in five"
    holder.expect_sound(connections=1)
    reader.expect_sound(connections=1)
    still_serves(ranks, reader, {})
    reader.quit()
    holder.quit()


def test_arena_is_full_of_pinned_pages(ranks: Ranks) -> None:
    holder = ranks.start("holder", blocks=FEW)
    reader = ranks.start("reader", blocks=FEW)
    holder.call("fill", chain="wanted", pages=FEW)
    reader.call("fill", chain="own", pages=FEW)
    assert reader.call("pin", chain="own", pages=FEW) == FEW
    reply = reader.fetch(holder, chain="wanted", pages=FEW, deadline_s=5.0)
    assert reply["outcome"] == "no_blocks" and reply["readable"] == 0, reply
    assert reader.call("readable", chain="own", pages=FEW) == FEW
    assert reader.call("wrong_pages", chain="own", pages=FEW) == []
    reader.call("unpin")
    reply = reader.fetch(holder, chain="wanted", pages=FEW)
    assert reply["outcome"] == "complete", reply
    assert reader.call("wrong_pages", chain="wanted", pages=FEW) == []
    reader.expect_sound(connections=1)
    holder.expect_sound(connections=1)
    reader.quit()
    holder.quit()


def test_lease_expires_while_its_pages_are_read(ranks: Ranks) -> None:
    """The holder may reuse the blocks then: what was read is thrown away."""
    holder = ranks.start("holder", blocks=MANY, environment=SLOW, lease_ttl_s=0.1)
    reader = ranks.start("reader", blocks=MANY, environment=SLOW, lease_ttl_s=0.1)
    holder.call("fill", chain="long", pages=MANY)
    begin_long_read(reader, holder)
    holder.call("fill", chain="other", pages=MANY)
    reply = reader.end_fetch(40.0)
    assert reply["outcome"] != "complete", reply
    assert reader.call("wrong_pages", chain="long", pages=MANY) == []
    reader.expect_sound(connections=1)
    holder.expect_sound(connections=1)
    assert holder.call("wrong_pages", chain="other", pages=MANY) == []
    still_serves(ranks, reader, SLOW, lease_ttl_s=0.1)
    reader.quit()
    holder.quit()
