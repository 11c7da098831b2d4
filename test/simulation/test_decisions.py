"""What decisions come to over many requests: the simulator's fleet, small (``virtual_fleet``)."""

from __future__ import annotations

import random
from statistics import median

import pytest
from sglang_memserve.router.simulate.profile import Prefill
from simulation.virtual_fleet import Fleet, plan_of

# A small CPU: about 1 ms a token. A GPU: 20 us a token.
SLOW = Prefill(fixed_s=0.01, token_s=8e-4, pair_s=1e-7, chunk_tokens=2048)
QUICK = Prefill(fixed_s=0.004, token_s=2e-5, pair_s=1e-9, chunk_tokens=8192)


def slow(new: int, cached: int) -> float:
    return SLOW.fixed_s + SLOW.tokens_s(new, cached)


def prompt(source: random.Random, shared: list[int], own: int) -> list[int]:
    return [*shared, *(source.randrange(50_000) for _ in range(own))]


def tokens(source: random.Random, count: int) -> list[int]:
    return [source.randrange(50_000) for _ in range(count)]


def test_one_new_prefix_is_computed_where_it_is_being_computed() -> None:
    source, fleet = random.Random(1), Fleet(["prefill"] * 4 + ["decode"] * 4, SLOW)
    shared = tokens(source, 4000)
    for _ in range(12):
        fleet.ask(0.0, prompt(source, shared, 100))
    served = fleet.run()
    assert len(served) == 12
    computed = sum(site.engine.computed_tokens for site in fleet.sites.values())
    # Twelve times the prefix would be 48,000.
    assert computed < 3 * 4000 + 12 * 300, computed
    assert len({plan_of(one).decode for one in served}) == 4


def test_a_herd_does_not_wait_for_one_instance_for_ever() -> None:
    """A little prefix and long rests: one instance alone would take four times as long."""
    source, fleet = random.Random(2), Fleet(["prefill"] * 4 + ["decode"] * 2, SLOW)
    shared = tokens(source, 320)
    for _ in range(32):
        fleet.ask(0.0, prompt(source, shared, 1500))
    served = fleet.run()
    counts = [fleet.site(number).prefills for number in range(4)]
    assert sum(counts) + sum(plan_of(one).prefill is None for one in served) == 32
    assert max(counts) <= 12, counts
    alone = 32 * slow(1500, 320)
    assert max(one.ttft_s for one in served) < alone / 2


@pytest.mark.parametrize("policy", ["cost", "prefix", "least-load", "round-robin"])
def test_idle_equals_share_the_work(policy: str) -> None:
    source = random.Random(3)
    fleet = Fleet(["prefill"] * 12 + ["decode"] * 12, SLOW, policy=policy)
    for number in range(240):
        # One after the other: nothing but turns can spread them.
        fleet.ask(number * 20.0, tokens(source, 800))
    fleet.run()
    for site in list(fleet.sites.values())[:12]:
        assert 10 <= site.prefills <= 30, (site.id, site.prefills)
    for site in list(fleet.sites.values())[12:]:
        assert 10 <= site.decodes <= 30, (site.id, site.decodes)


def test_a_burst_is_spread_before_anything_is_seen_done() -> None:
    source, fleet = random.Random(4), Fleet(["prefill"] * 8 + ["decode"] * 8, SLOW, output_s=5.0)
    for _ in range(64):
        fleet.ask(0.0, tokens(source, 1000))
    fleet.run()
    assert max(fleet.site(number).prefills for number in range(8)) <= 10
    assert max(fleet.site(number).decodes for number in range(8, 16)) <= 10


def test_pages_do_not_move_over_links_that_are_slower_than_computing() -> None:
    """Fitted from a few transfers, not assumed: computing is quick here and the network is not."""
    source = random.Random(5)
    fleet = Fleet(["both"] * 4, QUICK, bytes_per_s=2e8)
    shared = [tokens(source, 1000) for _ in range(4)]
    for number in range(200):
        fleet.ask(number * 0.05, prompt(source, shared[number % 4], 50))
    fleet.run()
    late = fleet.served[50:]
    assert sum(plan_of(one).decode_source is not None for one in late) <= 4


def test_contention_keeps_pages_where_they_are() -> None:
    """Many want what one instance holds. One transfer is quicker than computing, four that share
    the way are not: a few move, and the others compute or gather where somebody does."""
    source = random.Random(6)
    fleet = Fleet(["both"] * 8, SLOW, bytes_per_s=1e8)
    alone_s = 0.001 + 100 * fleet.costs.page_bytes / 1e8
    for _ in range(5):
        pair = fleet.site(0).id, fleet.site(1).id
        fleet.costs.observe_transfer(*pair, 100 * fleet.costs.page_bytes, alone_s)
    assert alone_s < slow(1600, 0) < 5 * alone_s
    shared = tokens(source, 1616)
    fleet.ask(0.0, shared)
    for _ in range(24):
        fleet.ask(100.0, prompt(source, shared[:1600], 400))
    fleet.run()
    burst = [one for one in fleet.served if one.arrived_s == 100.0]
    assert fleet.transfers <= 6, fleet.transfers
    # Computing all of it on eight instances.
    assert max(one.ttft_s for one in burst) < 24 / 8 * slow(2000, 0)


def test_a_frozen_instance_is_left_and_found_again() -> None:
    source = random.Random(7)
    fleet = Fleet(["prefill"] * 3 + ["decode"] * 3, SLOW)
    fleet.site(0).engine.frozen.append((100.0, 160.0))
    for number in range(900):
        fleet.ask(number * 0.5, tokens(source, 600))
    served = fleet.run()
    during = [one for one in served if 101 <= one.arrived_s < 160]
    stuck = [one for one in during if plan_of(one).prefill == fleet.site(0).id]
    # Two or three find it looking idle; nobody after them.
    assert len(stuck) <= 3, len(stuck)
    healthy = median(one.ttft_s for one in served if one.arrived_s < 99)
    rest = [one.ttft_s for one in during if one not in stuck]
    assert median(rest) < 3 * healthy
    after = [one for one in served if one.arrived_s >= 200]
    share = sum(plan_of(one).prefill == fleet.site(0).id for one in after) / len(after)
    assert share > 0.15, share
    assert fleet.costs.predict_prefill_s(fleet.site(0).id, 600, 0) == pytest.approx(
        slow(600, 0), rel=0.3
    )


def test_an_instance_that_was_slow_is_tried_again() -> None:
    source = random.Random(8)
    fleet = Fleet(["prefill"] * 3 + ["decode"] * 3, SLOW)
    fleet.site(0).engine.slowness = 20.0

    def mended() -> None:
        fleet.site(0).engine.slowness = 1.0

    fleet.at(600.0, mended)
    for number in range(2400):
        fleet.ask(number * 1.0, tokens(source, 600))
    served = fleet.run()
    while_slow = [one for one in served if 100 <= one.arrived_s < 600]
    share = sum(plan_of(one).prefill == fleet.site(0).id for one in while_slow) / len(while_slow)
    assert share < 0.1, share
    after = [one for one in served if one.arrived_s >= 1800]
    share = sum(plan_of(one).prefill == fleet.site(0).id for one in after) / len(after)
    assert share > 0.2, share


def test_the_default_is_quicker_than_the_others() -> None:
    """Conversations that share a few long prefixes, at a load that hurts."""

    def mean_and_worst(policy: str) -> tuple[float, float]:
        source = random.Random(9)
        fleet = Fleet(["prefill"] * 3 + ["decode"] * 3, SLOW, policy=policy, output_s=3.0)
        shared = [tokens(source, 1500) for _ in range(6)]
        talks = [prompt(source, shared[number % 6], 100) for number in range(60)]
        when = 0.0
        for _ in range(300):
            when += source.expovariate(5.0)
            talk = source.choice(talks)
            talk.extend(tokens(source, 150))
            fleet.ask(when, list(talk))
        times = [one.ttft_s for one in fleet.run()]
        return sum(times) / len(times), max(times)

    ours = mean_and_worst("cost")
    for other in ("prefix", "least-load", "round-robin"):
        theirs = mean_and_worst(other)
        assert ours[0] < theirs[0] and ours[1] <= theirs[1], (other, ours, theirs)
