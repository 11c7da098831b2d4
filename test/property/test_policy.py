"""What every policy must do, for random fleets and prompts."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from sglang_memserve.errors import NoInstance
from sglang_memserve.router.cost.fit import LinearFit
from sglang_memserve.router.cost.learned import CostModel
from sglang_memserve.router.policy.base import Rotation
from sglang_memserve.router.policy.registry import POLICIES, make_policy
from sglang_memserve.router.values import InstanceView, Match, Plan, Prompt
from sglang_memserve.types import Generation, InstanceId, Role

PAGE = 16
names = st.sampled_from(sorted(POLICIES))
roles = st.sampled_from(list(Role))
bypasses = st.sampled_from([None, 0, 50, 10_000])


@st.composite
def fleets(draw: st.DrawFn) -> list[InstanceView]:
    size = draw(st.integers(1, 5))
    return [
        InstanceView(
            id=InstanceId(f"http://host{index}:1"),
            generation=Generation("g"),
            role=draw(roles),
            running_requests=draw(st.integers(0, 5)),
            waiting_requests=draw(st.integers(0, 2)),
            in_flight_prefill_tokens=draw(st.sampled_from([0, 100, 5000])),
            free_tokens=draw(st.sampled_from([0, 10, 100_000])),
            total_tokens=draw(st.sampled_from([0, 10, 100_000])),
            queue_s=draw(st.sampled_from([0.0, 0.1, 5.0])),
            coming_pages=draw(st.sampled_from([0, 10, 60])),
            coming_s=draw(st.sampled_from([0.0, 0.2, 3.0])),
            match=Match(draw(st.integers(0, 40))),
            can_fetch=draw(st.booleans()),
        )
        for index in range(size)
    ]


prompts = st.builds(
    Prompt,
    tokens=st.integers(1, 1000),
    page_size=st.just(PAGE),
    session=st.none() | st.sampled_from(["ann", "bob"]),
)


def is_sound(plan: Plan, prompt: Prompt, views: list[InstanceView]) -> None:
    by_id = {view.id: view for view in views}
    full = (prompt.tokens - 1) // PAGE
    decode = by_id[plan.decode]
    assert decode.role.can_decode or not any(view.role.can_decode for view in views)
    assert plan.reason and "\n" not in plan.reason
    if plan.prefill is None:
        assert plan.prefill_source is None
        source, target = plan.decode_source, decode
    else:
        assert plan.decode_source is None
        assert plan.prefill != plan.decode
        assert by_id[plan.prefill].role.can_prefill
        assert decode.can_fetch and by_id[plan.prefill].can_fetch
        assert decode.match.pages < full
        source, target = plan.prefill_source, by_id[plan.prefill]
    if source is not None:
        assert source != target.id
        assert by_id[source].can_fetch and target.can_fetch
        there = by_id[source]
        held = max(there.match.pages, there.coming_pages * (plan.wait_s > 0))
        assert min(held, full) > target.match.pages
        assert plan.held_pages <= min(held, full)
    assert 0 <= plan.held_pages <= full
    assert plan.wait_s >= 0
    assert plan.wait_s == 0 or source is not None


@settings(max_examples=400, deadline=None)
@given(names, prompts, fleets(), bypasses, st.integers(0, 10))
def test_plans_are_sound_and_deciding_changes_nothing(
    name: str, prompt: Prompt, views: list[InstanceView], bypass: int | None, turn: int
) -> None:
    rotation, costs = Rotation(turn), CostModel()
    policy = make_policy(name, rotation, costs, bypass)
    before = copy.deepcopy(views)
    if not views:
        with pytest.raises(NoInstance):
            policy.decide(prompt, views)
        return
    plan = policy.decide(prompt, views)
    is_sound(plan, prompt, views)
    assert policy.decide(prompt, views) == plan
    assert views == before
    assert rotation.turn == turn


@settings(max_examples=200, deadline=None)
@given(names, prompts, fleets(), bypasses, st.integers(0, 10))
def test_names_do_not_matter(
    name: str, prompt: Prompt, views: list[InstanceView], bypass: int | None, turn: int
) -> None:
    assume(name != "session" or prompt.session is None)
    assume(views)
    policy = make_policy(name, Rotation(turn), CostModel(), bypass)
    other = {view.id: InstanceId(f"http://z{index}:9") for index, view in enumerate(views[::-1])}
    plan = policy.decide(prompt, views)
    renamed = policy.decide(prompt, [replace(view, id=other[view.id]) for view in views])
    sites = (plan.prefill, plan.prefill_source, plan.decode, plan.decode_source)
    assert (
        renamed.prefill,
        renamed.prefill_source,
        renamed.decode,
        renamed.decode_source,
    ) == tuple(None if site is None else other[site] for site in sites)
    assert renamed.terms == plan.terms


@settings(deadline=None)
@given(names, st.integers(1, 1000), st.integers(2, 5))
def test_equals_take_turns(name: str, tokens: int, size: int) -> None:
    view = InstanceView(InstanceId(""), Generation("g"), Role.BOTH)
    views = [replace(view, id=InstanceId(f"http://host{index}:1")) for index in range(size)]
    rotation = Rotation()
    policy = make_policy(name, rotation, CostModel())
    chosen = set()
    for _ in range(size):
        chosen.add(policy.decide(Prompt(tokens, PAGE), views).decode)
        rotation.advance()
    assert len(chosen) == size


observations = st.lists(
    st.tuples(st.integers(1, 10_000), st.integers(0, 10_000), st.floats(1e-4, 100.0)), max_size=30
)


@settings(deadline=None)
@given(observations, st.integers(1, 10_000), st.integers(0, 10_000))
def test_predictions_are_finite_and_grow_with_the_work(
    seen: list[tuple[int, int, float]], new: int, cached: int
) -> None:
    costs = CostModel()
    here = InstanceId("http://a:1")
    for tokens, held, seconds in seen:
        costs.observe_prefill(here, tokens, held, seconds)
    predicted = costs.predict_prefill_s(here, new, cached)
    assert 0 < predicted < 1e6
    assert costs.predict_prefill_s(here, new + 100, cached) >= predicted
    assert costs.predict_prefill_s(here, new, cached + 100) >= predicted
    assert costs.predict_backlog_s(here, new) >= 0


@settings(deadline=None)
@given(
    st.lists(st.floats(1e-3, 1e3), min_size=3, max_size=3),
    st.lists(
        st.tuples(st.floats(0, 10), st.floats(0, 10), st.floats(1e-3, 10)), min_size=1, max_size=9
    ),
)
def test_the_fit_is_never_worse_than_the_prior(
    prior: list[float], seen: list[tuple[float, float, float]]
) -> None:
    """An oracle for the solver: no nearby non-negative point has a smaller loss."""
    fit = LinearFit(3)
    for x, y, seconds in seen:
        fit.observe((1.0, x, y), seconds)
    found = fit.solve(prior, 1.0)
    assert all(value >= 0 for value in found)

    weights = [
        0.98**age / (0.2 * max(seconds, 1e-4)) ** 2
        for age, (_, _, seconds) in enumerate(seen[::-1])
    ]
    told = [prior[0] + prior[1] * x + prior[2] * y for x, y, _ in seen[::-1]]
    square = sum(w * t * t for w, t in zip(weights, told, strict=True))
    product = sum(
        w * t * max(s, 1e-4) for w, t, (_, _, s) in zip(weights, told, seen[::-1], strict=True)
    )
    scale = product / square if square > 0 else 1.0
    prior = [value * scale for value in prior]

    def loss(theta: tuple[float, ...]) -> float:
        total = 0.0
        for i, value in enumerate(prior):
            total += ((theta[i] - value) / max(value, 1e-12)) ** 2
        for age, (x, y, seconds) in enumerate(reversed(seen)):
            error = theta[0] + theta[1] * x + theta[2] * y - max(seconds, 1e-4)
            total += 0.98**age * (error / (0.2 * max(seconds, 1e-4))) ** 2
        return total

    best = loss(found)
    assert best <= loss(tuple(prior)) * (1 + 1e-6) + 1e-6
    for i in range(3):
        for factor in (0.9, 1.1):
            nudged = tuple(v * factor if i == j else v for j, v in enumerate(found))
            assert best <= loss(nudged) * (1 + 1e-6) + 1e-6
