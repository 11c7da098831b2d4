"""Fits that are lied to, stalls, and links that are shared."""

from __future__ import annotations

import random

import pytest
from sglang_memserve.router.cost.fit import Observation, RobustFit
from sglang_memserve.router.cost.learned import CostModel
from sglang_memserve.router.cost.spells import MOST_PROMPTS, Computed, Spell, Spells
from sglang_memserve.types import InstanceId

A, B, C = (InstanceId(f"http://{name}:1") for name in "abc")


def truth(new: int, cached: int) -> float:
    return 0.02 + 2e-4 * new + 3e-8 * new * (cached + new / 2)


def taught(*instances: InstanceId, rounds: int = 60) -> CostModel:
    source, costs = random.Random(1), CostModel()
    for _ in range(rounds):
        for instance in instances:
            new, cached = source.randrange(50, 4000), source.randrange(0, 4000)
            noise = source.uniform(0.8, 1.25)
            costs.observe_prefill(instance, new, cached, truth(new, cached) * noise)
    return costs


def right(costs: CostModel, instance: InstanceId, factor: float = 1.0) -> bool:
    return all(
        0.7 < costs.predict_prefill_s(instance, new, cached) / (factor * truth(new, cached)) < 1.4
        for new, cached in ((100, 0), (1000, 0), (1000, 3000), (4000, 0))
    )


@pytest.mark.parametrize("seconds", [30.0, 300.0, 0.0005])
def test_one_stall_or_wrong_count_changes_nothing(seconds: float) -> None:
    costs = taught(A, B)
    before = costs.prefill_theta(A)
    costs.observe_prefill(A, 1000, 0, seconds)
    assert costs.prefill_theta(A) == before
    assert costs.explain()["prefill"]["instances"][A]["refused"] == 1


def test_stalls_of_all_lengths_change_nothing() -> None:
    costs = taught(A)
    for seconds in (5.0, 60.0, 400.0, 9.0, 150.0):
        costs.observe_prefill(A, 1000, 0, seconds)
    assert right(costs, A)


@pytest.mark.parametrize("factor", [8.0, 1 / 8, 100.0])
def test_a_change_that_stays_is_believed_after_four(factor: float) -> None:
    costs = taught(A, B)
    for new in (500, 900, 2000, 1300):
        costs.observe_prefill(A, new, 100, factor * truth(new, 100))
    for new in (600, 1000, 1800):
        told = costs.predict_prefill_s(A, new, 100)
        assert told == pytest.approx(factor * truth(new, 100), rel=0.3)
    assert right(costs, B)


def test_a_long_row_is_a_change_even_if_it_makes_no_sense() -> None:
    source, costs = random.Random(3), taught(A)
    for _ in range(12):
        costs.observe_prefill(A, 1000, 0, truth(1000, 0) * source.choice([5.0, 20.0, 80.0]))
    assert costs.predict_prefill_s(A, 1000, 0) > 4 * truth(1000, 0)


@pytest.mark.parametrize("first", [40.0, 0.0001])
def test_a_first_observation_that_lies_is_outvoted(first: float) -> None:
    costs = CostModel()
    costs.observe_prefill(A, 1000, 0, first)
    source = random.Random(2)
    for _ in range(12):
        new = source.randrange(200, 3000)
        costs.observe_prefill(A, new, 0, truth(new, 0))
    assert costs.predict_prefill_s(A, 1000, 0) == pytest.approx(truth(1000, 0), rel=0.3)


def test_what_an_instance_showed_long_ago_fades_into_the_fleet() -> None:
    costs = taught(A, B)
    for new in (500, 900, 2000, 1300, 700):
        costs.observe_prefill(C, new, 0, 20 * truth(new, 0))
    assert costs.predict_prefill_s(C, 1000, 0) == pytest.approx(20 * truth(1000, 0), rel=0.3)
    source = random.Random(4)
    for _ in range(800):
        new = source.randrange(50, 4000)
        costs.observe_prefill(A, new, 0, truth(new, 0))
    assert costs.predict_prefill_s(C, 1000, 0) < 2 * truth(1000, 0)
    # And one look is enough then.
    costs.observe_prefill(C, 1000, 0, truth(1000, 0))
    assert costs.predict_prefill_s(C, 1000, 0) == pytest.approx(truth(1000, 0), rel=0.3)


def test_rows_of_one_side_begin_anew_after_the_other() -> None:
    fit = RobustFit(1)
    for _ in range(3):
        assert fit.observe(Observation((1.0,), 10.0), 1.0) == ()
    assert fit.observe(Observation((1.0,), 0.1), 1.0) == ()
    assert fit.observe(Observation((1.0,), 10.0), 1.0) == ()
    assert fit.refused == 5 and fit.fit.observations == 0
    assert len(fit.observe(Observation((1.0,), 1.1), 1.0)) == 1


def test_transfers_beside_others_take_longer_and_are_learnt_so() -> None:
    costs = CostModel(page_bytes=1_000_000)
    alone = costs.predict_transfer_s(A, B, 100)
    flow = costs.begin_transfer(A, C, 100)
    beside = costs.predict_transfer_s(A, B, 100)
    assert beside == pytest.approx(2 * alone, rel=0.1)
    assert costs.predict_transfer_s(B, A, 100) == alone
    # A large one beside many little ones waits for those; a little one for little of a large one.
    assert costs.predict_transfer_s(A, B, 1) < 0.1 * beside
    for _ in range(10):
        costs.observe_transfer(A, B, 100_000_000, 0.205, beside_bytes=100_000_000)
    flow.end()
    flow.end()
    assert costs.predict_transfer_s(A, B, 100) == pytest.approx(0.105, rel=0.15)


def test_pages_that_come_one_by_one_leave_room() -> None:
    costs = CostModel(page_bytes=1_000_000)
    alone = costs.predict_transfer_s(A, B, 100)
    with_slow = costs.begin_transfer(A, C, 100, during_s=100 * alone)
    assert costs.predict_transfer_s(A, B, 100) < 1.1 * alone
    with_slow.end()


def test_what_is_left_of_a_transfer_is_learnt_and_one_late_fetch_is_not_all() -> None:
    costs = CostModel()
    whole = costs.predict_transfer_s(A, B, 100)
    assert costs.predict_tail_s(A, B, 100) == whole
    for _ in range(30):
        costs.observe_tail(A, B, 100, 0.1 * whole)
    assert costs.predict_tail_s(A, B, 100) == pytest.approx(0.1 * whole, rel=0.1)
    costs.observe_tail(A, B, 100, 500.0)
    assert costs.predict_tail_s(A, B, 100) < 0.3 * whole
    costs.observe_tail(A, B, 0, 1.0)
    costs.observe_tail(A, B, 100, float("nan"))
    assert costs.predict_tail_s(A, B, 100) < 0.3 * whole


def test_a_spell_is_all_that_was_computed_from_idle_to_idle() -> None:
    spells = Spells()
    spells.begin(A, 1.0)
    spells.begin(A, 1.5)
    spells.begin(B, 2.0)
    assert spells.end(A, 3.0, Computed(100, 0)) is None
    spells.begin(A, 3.0)
    assert spells.end(A, 3.5, Computed(50, 10)) is None
    assert spells.end(B, 4.0, None) is None
    spell = spells.end(A, 5.0, Computed(20, 0))
    assert spell == Spell((Computed(100, 0), Computed(50, 10), Computed(20, 0)), 4.0)
    spells.check()


def test_a_spell_with_a_failure_or_strangers_or_too_many_tells_nothing() -> None:
    spells = Spells()
    spells.begin(A, 0.0)
    spells.begin(A, 0.0)
    assert spells.end(A, 1.0, None) is None
    assert spells.end(A, 2.0, Computed(1, 0)) is None
    spells.begin(A, 3.0)
    spells.spoil(A)
    assert spells.end(A, 4.0, Computed(1, 0)) is None
    for _ in range(MOST_PROMPTS + 1):
        spells.begin(A, 5.0)
    ends = [spells.end(A, 6.0, Computed(1, 0)) for _ in range(MOST_PROMPTS + 1)]
    assert ends == [None] * (MOST_PROMPTS + 1)
    spells.begin(A, 7.0)
    assert spells.end(A, 8.0, Computed(1, 0)) is not None
    spells.check()


def test_spells_teach_what_single_prompts_do() -> None:
    source, costs = random.Random(5), CostModel()
    for _ in range(80):
        prompts = tuple(
            Computed(source.randrange(50, 3000), source.randrange(0, 3000))
            for _ in range(source.randrange(1, 6))
        )
        seconds = sum(truth(one.new_tokens, one.cached_tokens) for one in prompts)
        costs.observe_spell(A, Spell(prompts, seconds))
    assert right(costs, A)
