"""Pages that were fetched for a request stay until it takes them, through everything else."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from msgspec.structs import replace
from sglang_memserve.config import Limits
from sglang_memserve.errors import ConfigError, LimitExceeded, ProtocolError
from sglang_memserve.mempool import MemPool
from sglang_memserve.protocol.control import FetchRequest
from sglang_memserve.transfer.loopback import LoopbackTransport
from sglang_memserve.transfer.nixl import NixlTransport
from sglang_memserve.transfer.port import FetchSettings
from sglang_memserve.types import HoldOutcome, ResizeOutcome
from unit.agents import BLOCK, KEYS, NAMESPACE, MakeTransport, Rank, holds, put
from unit.test_session import KEYS as THEIRS
from unit.test_session import A, B, Bench

Ranks = Callable[..., Rank]

AT_ONCE = FetchSettings(grace_s=1e-9)


def flood(pool: MemPool) -> None:
    """More than fits, as a busy instance stores it."""
    for first in range(12, 40, 4):
        put(pool, KEYS[first : first + 4])


def held(pool: MemPool) -> tuple[float, float]:
    stats = pool.stats()
    return stats["holds"], stats["held_blocks"]


@pytest.mark.parametrize("make", [LoopbackTransport, NixlTransport], ids=["loopback", "nixl"])
def test_held_pages_survive_a_flood(ranks: Ranks, make: MakeTransport) -> None:
    holder, reader = ranks(make), ranks(make, blocks=16, settings=AT_ONCE)
    put(holder.pool, KEYS)
    assert reader.fetch(holder, KEYS[:8]).outcome == "complete"
    flood(reader.pool)
    assert reader.pool.readable_pages(KEYS[:8]) == 0
    assert reader.fetch_and_hold(holder, KEYS[:8], 60.0).outcome == "complete"
    flood(reader.pool)
    assert holds(reader.pool, KEYS[:8]) and held(reader.pool) == (1, 8)
    reader.pool.claim_hold(KEYS[:8])
    flood(reader.pool)
    assert reader.pool.readable_pages(KEYS[:8]) == 0
    reader.pool.check()


def test_what_is_too_much_to_hold_is_fetched_all_the_same(ranks: Ranks) -> None:
    holder, reader = ranks(), ranks(blocks=16, settings=AT_ONCE)
    put(holder.pool, KEYS)
    assert reader.fetch_and_hold(holder, KEYS[:6], 60.0).outcome == "complete"
    assert reader.fetch_and_hold(holder, KEYS[:9], 60.0).outcome == "complete"
    stats = reader.stats()
    assert (stats["holds"], stats["held_blocks"], stats["holds_refused_total"]) == (1, 6, 1)
    assert holds(reader.pool, KEYS[:9])
    # A page that two requests share counts once.
    assert reader.fetch_and_hold(holder, KEYS[:8], 60.0).outcome == "complete"
    assert held(reader.pool) == (2, 8)
    reader.pool.check()


def test_the_end_of_an_agent_and_of_a_pool_with_holds(ranks: Ranks) -> None:
    holder, reader = ranks(), ranks(blocks=16)
    put(holder.pool, KEYS)
    assert reader.fetch_and_hold(holder, KEYS[:8], 60.0).outcome == "complete"
    reader.agent.close()
    reader.pool.check()
    reader.pool.close()
    assert held(reader.pool) == (0, 0)
    assert reader.pool.stats()["leases"] == 0


# -- the reader's side on virtual time --


def ask(bench: Bench, address: str, hold_s: float, pages: int = 8, deadline_s: float = 5.0) -> None:
    wanted = FetchRequest.of("p", address, list(THEIRS[:pages]), 0.0, deadline_s)
    bench.sessions.submit(replace(wanted, hold_s=hold_s), bench.now, bench.replies.append)
    bench.sessions.check()


def fetched(bench: Bench, hold_s: float, pages: int = 8) -> None:
    ask(bench, A, hold_s, pages)
    bench.serve(A)
    assert bench.replies[-1].outcome == "complete"


@pytest.fixture
def bench(request: pytest.FixtureRequest) -> Bench:
    made = Bench(Limits(max_fetches=1, max_queued_fetches=1, max_hold_s=50.0))
    request.addfinalizer(made.close)
    return made


def test_a_hold_ends_with_its_time_and_pins_instead_of_the_grace(bench: Bench) -> None:
    fetched(bench, 20.0)
    assert held(bench.pool) == (1, 8) and bench.pool.stats()["leases"] == 0
    bench.pass_time(19.0)
    assert held(bench.pool) == (1, 8)
    bench.pass_time(1.5)
    stats = bench.pool.stats()
    assert (stats["holds"], stats["pinned_blocks"], stats["holds_expired_total"]) == (0, 0, 1)


def test_a_hold_lasts_no_longer_than_the_rank_allows(bench: Bench) -> None:
    fetched(bench, float("inf"))
    bench.pass_time(51.0)
    assert held(bench.pool) == (0, 0)


def test_nothing_is_held_unless_it_is_asked_for(bench: Bench) -> None:
    fetched(bench, 0.0)
    assert held(bench.pool) == (0, 0) and bench.pool.stats()["leases"] == 1


def test_a_request_that_is_there_first_leaves_nothing_to_hold(bench: Bench) -> None:
    ask(bench, A, 20.0)
    bench.pool.claim_hold(THEIRS)
    bench.serve(A)
    assert bench.replies[-1].outcome == "complete" and held(bench.pool) == (0, 0)


def test_what_was_fetched_of_a_prompt_is_held(bench: Bench) -> None:
    bench.peer_pool.delete(THEIRS[5:])
    ask(bench, A, 20.0)
    bench.serve(A)
    assert bench.replies[-1].readable_pages == 5 and held(bench.pool) == (1, 5)
    # The rest comes later: one hold of both.
    with bench.peer_pool.prepare_store(THEIRS) as store:
        store.commit()
    fetched(bench, 30.0)
    assert held(bench.pool) == (1, 8)
    bench.pass_time(25.0)
    assert held(bench.pool) == (1, 8)


def test_fetches_that_never_start_hold_nothing(bench: Bench) -> None:
    ask(bench, A, 20.0)
    ask(bench, B, 20.0, deadline_s=0.5)
    with pytest.raises(LimitExceeded):
        ask(bench, B, 20.0)
    bench.pass_time(0.6)
    assert [reply.outcome for reply in bench.replies] == ["deadline"]
    ask(bench, B, 20.0)
    bench.sessions.close(bench.now)
    assert [reply.outcome for reply in bench.replies[1:]] == ["closed", "closed"]
    assert held(bench.pool) == (0, 0) and not bench.pool._ledger.holds._waiting


@pytest.mark.parametrize("hold_s", [-1.0, float("nan")])
def test_a_time_that_is_none(bench: Bench, hold_s: float) -> None:
    with pytest.raises(ProtocolError, match="hold"):
        ask(bench, A, hold_s)


# -- the pool alone --


def test_shrinking_ends_the_holds_that_are_in_the_way() -> None:
    pool = MemPool(
        NAMESPACE,
        arena_bytes=16 * BLOCK,
        generation="g",
        reserve_bytes=16 * BLOCK,
        slab_bytes=4 * BLOCK,
        hold_share=0.5,
    )
    put(pool, KEYS[:8])
    put(pool, KEYS[8:16])
    assert pool.prepare_hold(KEYS[:4]).complete(60.0) is HoldOutcome.HELD
    assert pool.prepare_hold(KEYS[8:11]).complete(60.0) is HoldOutcome.HELD
    assert pool.resize(8 * BLOCK).outcome is ResizeOutcome.RESIZED
    # What is left may be held half, and blocks that went not at all.
    assert held(pool)[1] <= 4
    pool.check()
    assert pool.resize(16 * BLOCK).outcome is ResizeOutcome.RESIZED
    put(pool, KEYS[20:26])
    pool.claim_hold(KEYS[:4])
    assert pool.prepare_hold(KEYS[20:26]).complete(60.0) is HoldOutcome.HELD
    pool.check()
    with pytest.raises(ConfigError):
        pool.prepare_hold([])
    late = pool.prepare_hold(KEYS[:2])
    pool.close()
    assert late.complete(1.0) is HoldOutcome.NEEDLESS
