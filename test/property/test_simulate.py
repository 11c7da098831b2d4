"""Random traffic through simulated fleets: everything ends once, nothing is lost or made up."""

from __future__ import annotations

from itertools import accumulate

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from oracle.stepwise_engine import Stream, serve
from pytest import approx
from sglang_memserve.hashing import page_keys
from sglang_memserve.router.simulate import trace
from sglang_memserve.router.simulate.bound import bound
from sglang_memserve.router.simulate.fleet import NAMES, Fleet, Terms
from sglang_memserve.router.simulate.pages import Pages
from sglang_memserve.router.simulate.profile import Decode, Link, Prefill, Profile
from sglang_memserve.router.simulate.trace import Arrival
from sglang_memserve.types import BlockId, Eviction, PageKey, Role

PAGE, BLOCK = 4, 8

seconds = st.sampled_from([0.0, 0.001, 0.1, 1.0, 3.7])


@st.composite
def profiles(draw: st.DrawFn) -> Profile:
    return Profile(
        name="drawn",
        model="m",
        source="drawn",
        estimates=[],
        kv_bytes_per_token=100,
        hbm_tokens=draw(st.integers(80, 400)),
        dram_bytes=draw(st.integers(0, 40_000)),
        load_bytes_per_s=draw(st.sampled_from([1e3, 1e9])),
        hop_s=draw(st.sampled_from([0.0, 0.01])),
        prefill=Prefill(
            draw(seconds), draw(st.sampled_from([0.001, 0.1])), 1e-5, draw(st.integers(1, 60))
        ),
        decode=Decode(draw(seconds), draw(seconds), 1e-4, draw(st.integers(1, 6))),
        link=Link(draw(st.sampled_from([0.0, 0.2])), draw(st.sampled_from([100.0, 1e5]))),
    )


@st.composite
def arrivals(draw: st.DrawFn) -> list[Arrival]:
    """Prompts over a few blocks, so that many share their beginnings."""
    gaps = draw(st.lists(st.sampled_from([0.0, 0.3, 2.0, 20.0]), min_size=1, max_size=25))
    found = []
    for at_s in accumulate(gaps):
        tokens = draw(st.integers(1, 60))
        count = -(-tokens // BLOCK)
        blocks = draw(st.lists(st.integers(0, 2), min_size=count, max_size=count))
        output = draw(st.integers(1, 20))
        answered: tuple[int, ...] = ()
        if draw(st.booleans()):
            more = -(-(tokens + output) // BLOCK) - tokens // BLOCK
            said = draw(st.lists(st.integers(0, 2), min_size=more, max_size=more))
            answered = (*blocks[: tokens // BLOCK], *said)
        found.append(Arrival(at_s, tokens, output, tuple(blocks), None, answered))
    return found


ROLES = st.lists(st.sampled_from(list(Role)), min_size=1, max_size=4).filter(
    lambda roles: any(role.can_decode for role in roles)
)


@settings(max_examples=80, deadline=None)
@given(
    profiles(),
    arrivals(),
    ROLES,
    st.sampled_from(NAMES),
    st.sampled_from(list(Eviction)),
    st.sampled_from([PAGE, BLOCK]),
)
def test_every_request_ends_once_and_every_token_comes_from_somewhere(
    profile: Profile,
    requests: list[Arrival],
    roles: list[Role],
    policy: str,
    eviction: Eviction,
    page: int,
) -> None:
    fleet = Fleet(profile, roles, Terms(policy=policy, page_tokens=page, eviction=eviction))
    for asked in requests:
        keyed, answered = trace.keyed(asked, page, BLOCK), trace.answered_keys(asked, page, BLOCK)
        fleet.submit(asked.at_s, keyed, asked.output_tokens, None, answered)
    served = fleet.run()
    fleet.check()
    for one, asked in zip(served, requests, strict=True):
        assert not one.refused and one.first_token_s is not None and one.ended_s is not None
        assert asked.at_s <= one.first_token_s <= one.ended_s
        parts = (one.hbm_tokens, one.dram_tokens, one.fetched_tokens, one.computed_tokens)
        assert sum(parts) == asked.prompt_tokens and min(parts) >= 0, one
        assert one.computed_tokens >= 1
    computed = sum(one.computed_tokens + one.again_tokens for one in served)
    sites = fleet.sites.values()
    assert computed == sum(site.engine.computed_tokens for site in sites)
    generated = sum(site.engine.generated_tokens for site in sites)
    assert generated == sum(asked.output_tokens for asked in requests)


@settings(max_examples=30, deadline=None)
@given(profiles(), arrivals(), ROLES, st.sampled_from(NAMES), st.sampled_from([PAGE, BLOCK]))
def test_nobody_beats_the_bound_and_one_request_at_a_time_reaches_it(
    profile: Profile, requests: list[Arrival], roles: list[Role], policy: str, page: int
) -> None:
    def means(roles: list[Role], profile: Profile, gap_s: float) -> tuple[float, float, float]:
        fleet = Fleet(profile, roles, Terms(policy=policy, page_tokens=page))
        for number, one in enumerate(requests):
            keyed, answered = trace.keyed(one, page, BLOCK), trace.answered_keys(one, page, BLOCK)
            fleet.submit(one.at_s + number * gap_s, keyed, one.output_tokens, None, answered)
        served = fleet.run()
        cached = 1 - sum(one.computed_tokens for one in served) / sum(
            one.prompt_tokens for one in served
        )
        of = len(served) / 1e3
        return sum(s.ttft_s for s in served) / of, sum(s.jct_s for s in served) / of, cached

    least = bound(requests, profile, page, BLOCK)
    ttft_ms, jct_ms, _ = means(roles, profile, 0.0)
    assert ttft_ms >= least.ttft_ms.mean * (1 - 1e-9)
    assert jct_ms >= least.jct_ms.mean * (1 - 1e-9)
    roomy = msgspec.structs.replace(profile, hbm_tokens=100_000)
    reached = (least.ttft_ms.mean, least.jct_ms.mean, least.cached_share)
    assert means([Role.BOTH], roomy, 1e4) == approx(reached)


@settings(max_examples=30, deadline=None)
@given(profiles(), arrivals(), ROLES, st.sampled_from(NAMES), st.floats(0, 60))
def test_a_run_that_stops_early_is_whole_all_the_same(
    profile: Profile, requests: list[Arrival], roles: list[Role], policy: str, until: float
) -> None:
    def run(*stops: float) -> list[tuple[float | None, float | None]]:
        fleet = Fleet(profile, roles, Terms(policy=policy, page_tokens=PAGE))
        for asked in requests:
            fleet.submit(asked.at_s, trace.keyed(asked, PAGE, BLOCK), asked.output_tokens)
        for stop in stops:
            fleet.run(stop)
            fleet.check()
        return [(one.first_token_s, one.ended_s) for one in fleet.run()]

    assert run(until / 2, until) == run()


@settings(max_examples=60, deadline=None)
@given(profiles(), arrivals())
def test_steps_in_sums_are_steps_one_by_one(profile: Profile, requests: list[Arrival]) -> None:
    """One instance with room for all and nothing shared, against the engine that counts steps."""
    # Times that are nobody's multiples: which of two things at one instant is first is not told.
    profile = msgspec.structs.replace(
        profile,
        hbm_tokens=100_000,
        hop_s=0.0,
        prefill=msgspec.structs.replace(profile.prefill, fixed_s=0.013171),
        decode=msgspec.structs.replace(profile.decode, fixed_s=0.070711),
    )
    fleet = Fleet(profile, [Role.BOTH], Terms(policy="round-robin", page_tokens=1024))
    slow = []
    at_s = 0.0
    for number, one in enumerate(requests):
        at_s += one.at_s / 7 + 0.0031
        alone = trace.keyed(Arrival(at_s, one.prompt_tokens, 1, (number,)), 1024, 1024)
        fleet.submit(at_s, alone, one.output_tokens)
        slow.append(Stream(at_s, one.prompt_tokens, one.output_tokens))
    serve(profile, slow)
    for quick, counted in zip(fleet.run(), slow, strict=True):
        assert quick.first_token_s == approx(counted.first_token_s)
        assert quick.ended_s == approx(counted.ended_s)


class PagesMachine(RuleBasedStateMachine):
    """``Pages`` against a set of the keys that are resident."""

    def __init__(self) -> None:
        super().__init__()
        self.pages = Pages(12, Eviction.LRU)
        self.resident: set[PageKey] = set()
        self.taken: list[list[BlockId]] = []

    @rule(branch=st.integers(0, 3), start=st.integers(0, 4), length=st.integers(0, 9))
    def store(self, branch: int, start: int, length: int) -> None:
        keys = page_keys([1, 2, *range(branch * 10, branch * 10 + 8)], 1)
        end = min(start + length, len(keys))
        before = set(self.resident)
        change = self.pages.store(keys, start, end)
        assert not set(change.stored) & before
        assert set(change.removed) <= before
        self.resident = (before - set(change.removed)) | set(change.stored)
        stored = list(change.stored)
        assert not stored or stored == keys[(at := keys.index(stored[0])) : at + len(stored)]

    @rule(count=st.integers(0, 6))
    def take(self, count: int) -> None:
        available = self.pages.available
        blocks, removed = self.pages.take(count)
        assert len(blocks) == min(count, available)
        self.resident -= set(removed)
        self.taken.append(blocks)

    @precondition(lambda self: bool(self.taken))
    @rule()
    def give(self) -> None:
        self.pages.give(self.taken.pop())

    @invariant()
    def conserved(self) -> None:
        self.pages.check()
        assert set(self.pages.index.pages()[0]) == self.resident
        assert self.pages.private == sum(map(len, self.taken))


TestPages = PagesMachine.TestCase
TestPages.settings = settings(max_examples=30, stateful_step_count=25, deadline=None)
