"""What each policy chooses in the cases people reason about."""

from __future__ import annotations

from dataclasses import replace

import pytest
from sglang_memserve.errors import ConfigError, NoInstance
from sglang_memserve.router.cost.learned import CostModel
from sglang_memserve.router.http.limits import StepDeadlines
from sglang_memserve.router.policy.base import Rotation
from sglang_memserve.router.policy.cost import MOST_WAIT_S
from sglang_memserve.router.policy.registry import POLICIES, make_policy
from sglang_memserve.router.values import InstanceView, Match, Moves, Plan, Prompt, restrain
from sglang_memserve.types import Generation, InstanceId, Role

G = Generation("g")
P = InstanceView(InstanceId("http://p:1"), G, Role.PREFILL)
D = InstanceView(InstanceId("http://d:1"), G, Role.DECODE)
P2, D2 = replace(P, id=InstanceId("http://p2:1")), replace(D, id=InstanceId("http://d2:1"))
B = InstanceView(InstanceId("http://b:1"), G, Role.BOTH)
B2 = replace(B, id=InstanceId("http://b2:1"))
LONG = Prompt(tokens=1505, page_size=16)
FULL = Match(94)


def decide(
    name: str, prompt: Prompt, *views: InstanceView, bypass: int | None = None, turn: int = 0
) -> Plan:
    return make_policy(name, Rotation(turn), CostModel(), bypass).decide(prompt, views)


@pytest.mark.parametrize("name", POLICIES)
def test_a_long_new_prompt_is_prefilled_elsewhere(name: str) -> None:
    plan = decide(name, LONG, P, D)
    assert (plan.prefill, plan.decode) == (P.id, D.id)


@pytest.mark.parametrize("name", POLICIES)
def test_a_short_rest_goes_straight_to_decode(name: str) -> None:
    assert decide(name, Prompt(40, 16), P, D).prefill is None
    assert decide(name, LONG, P, replace(D, match=FULL)).prefill is None


@pytest.mark.parametrize("name", POLICIES)
def test_a_prefill_instance_alone_does_everything(name: str) -> None:
    """A role steers routing; it is no reason to refuse a request."""
    plan = decide(name, LONG, P)
    assert (plan.prefill, plan.decode, plan.decode_source) == (None, P.id, None)


@pytest.mark.parametrize("name", POLICIES)
def test_nobody_serves_nobody(name: str) -> None:
    with pytest.raises(NoInstance, match="none is known"):
        decide(name, LONG)


@pytest.mark.parametrize("name", POLICIES)
def test_a_decode_instance_alone_computes_everything(name: str) -> None:
    plan = decide(name, LONG, D, bypass=0)
    assert (plan.prefill, plan.decode, plan.decode_source) == (None, D.id, None)


@pytest.mark.parametrize("name", POLICIES)
def test_pages_that_lie_on_another_instance_are_fetched(name: str) -> None:
    plan = decide(name, LONG, replace(P, match=FULL), D)
    assert (plan.prefill, plan.decode_source) == (None, P.id)


@pytest.mark.parametrize("name", POLICIES)
def test_pages_in_hbm_alone_are_no_source(name: str) -> None:
    """Whoever holds them neither gives them away nor computes them again for others."""
    plan = decide(name, LONG, replace(P, match=Match(94, 94, 94)), D)
    assert (plan.prefill, plan.prefill_source, plan.decode_source) == (None, None, None)
    half = replace(P2, match=Match(50))
    plan = decide(name, LONG, replace(P, match=Match(94, 94, 94)), half, D)
    assert P.id not in (plan.prefill, plan.decode_source)
    assert P2.id in (plan.prefill, plan.decode_source)


@pytest.mark.parametrize("name", POLICIES)
def test_pages_in_hbm_alone_do_not_matter_where_decode_has_them(name: str) -> None:
    plan = decide(
        name, LONG, replace(P, match=Match(30, 30, 30)), replace(D, match=Match(40)), bypass=0
    )
    assert (plan.prefill, plan.decode) == (P.id, D.id)


@pytest.mark.parametrize("name", POLICIES)
def test_the_next_turn_is_prefilled_from_what_decode_generated(name: str) -> None:
    plan = decide(name, LONG, P, replace(D, match=Match(40)), turn=0)
    assert (plan.prefill, plan.prefill_source) == (P.id, D.id)


@pytest.mark.parametrize("name", POLICIES)
def test_plain_servers_get_whole_requests(name: str) -> None:
    plain = replace(D, can_fetch=False)
    plan = decide(name, LONG, replace(P, match=FULL), plain, bypass=0)
    assert (plan.prefill, plan.decode_source) == (None, None)


@pytest.mark.parametrize("name", POLICIES)
def test_bypass_tokens_is_a_limit(name: str) -> None:
    assert decide(name, LONG, P, D, bypass=2000).prefill is None
    assert decide(name, Prompt(40, 16), P, D, bypass=0).prefill == P.id
    # Not one full page to compute elsewhere.
    assert decide(name, Prompt(16, 16), P, D, bypass=0).prefill is None
    assert decide(name, Prompt(1, 16), P, D, bypass=0).prefill is None


def test_cost_spares_busy_decode_instances() -> None:
    prompt = Prompt(80, 16)
    assert decide("cost", prompt, P, D).prefill is None
    assert decide("cost", prompt, P, replace(D, running_requests=6)).prefill == P.id
    # An idle instance of both roles computes for itself; one with streams lets another do it.
    assert decide("cost", LONG, B).prefill is None
    busy = replace(B, running_requests=4)
    plan = decide("cost", LONG, busy, replace(B2, role=Role.PREFILL))
    assert (plan.prefill, plan.decode) == (B2.id, B.id)


def test_cost_avoids_queues() -> None:
    queue = replace(P, queue_s=5.0)
    assert decide("cost", LONG, queue, P2, D).prefill == P2.id
    assert decide("cost", LONG, queue, D).prefill is None


def test_cost_weighs_a_match_against_a_queue() -> None:
    holder = replace(B, match=FULL, queue_s=16.0)
    plan = decide("cost", LONG, holder, B2)
    assert (plan.decode, plan.decode_source) == (B2.id, B.id)
    assert decide("cost", LONG, replace(holder, queue_s=0.0), B2).decode == B.id


def test_cost_waits_for_pages_no_longer_than_a_fetch_does() -> None:
    busy = replace(B, queue_s=60.0)
    soon = replace(busy, coming_pages=94, coming_s=0.8)
    plan = decide("cost", LONG, soon, B2)
    assert (plan.decode, plan.decode_source, plan.wait_s) == (B2.id, B.id, 0.8)
    # Behind a queue: who fetched them would give up, and compute them after all.
    late = replace(busy, coming_pages=94, coming_s=20.0)
    hurried = replace(B2, queue_s=19.0)
    plan = decide("cost", LONG, late, hurried)
    assert (plan.decode, plan.decode_source, plan.held_pages) == (B2.id, None, 0)
    patient = make_policy("cost", Rotation(), CostModel(), most_wait_s=30.0)
    assert patient.decide(LONG, [late, hurried]).decode_source == B.id


def test_a_fetch_waits_for_what_the_policy_counts_on() -> None:
    for deadlines in (StepDeadlines(), StepDeadlines(fetch_s=2.0), StepDeadlines(most_fetch_s=1.0)):
        assert deadlines.wait_s(deadlines.most_wait_s) >= deadlines.most_wait_s
    assert StepDeadlines().most_wait_s == MOST_WAIT_S


def test_cost_moves_only_what_is_slow_to_compute() -> None:
    costs = CostModel()
    for _ in range(5):
        costs.observe_transfer(B.id, B2.id, 35_000_000, 60.0)
        costs.observe_prefill(B2.id, 1500, 0, 0.05)
    views = (replace(B, role=Role.PREFILL, match=FULL), B2)
    plan = make_policy("cost", Rotation(), costs).decide(LONG, views)
    assert (plan.prefill, plan.decode, plan.decode_source) == (None, B2.id, None)


def test_cost_explains_itself() -> None:
    plan = decide("cost", LONG, P, D)
    assert plan.reason.startswith("prefill: http://p:1 computes 1505 tokens, 94 pages move")
    parts = ("queue", "fetch", "compute", "move", "decode_queue", "tail", "load", "room")
    assert plan.terms["ttft"] == pytest.approx(sum(plan.terms[part] for part in parts))
    assert plan.terms["total"] == pytest.approx(plan.terms["ttft"] + plan.terms["delay"])


def test_prefix_takes_the_longest_match_then_the_idlest() -> None:
    views = (replace(D, match=Match(5)), replace(D2, match=Match(9)), P)
    assert decide("prefix", LONG, *views).decode == D2.id
    assert decide("prefix", LONG, replace(D, running_requests=1), D2, P).decode == D2.id


def test_least_load_ignores_matches() -> None:
    views = (replace(D, match=FULL, running_requests=1), D2, P)
    assert decide("least-load", LONG, *views).decode == D2.id


def test_round_robin_takes_turns() -> None:
    chosen = [decide("round-robin", LONG, D, D2, P, P2, turn=turn) for turn in range(4)]
    assert [plan.decode for plan in chosen] == [D.id, D2.id, D.id, D2.id]
    assert [plan.prefill for plan in chosen] == [P.id, P2.id, P.id, P2.id]


def test_sessions_stay_and_only_those_of_a_leaver_move() -> None:
    views = [replace(B, id=InstanceId(f"http://b{n}:1")) for n in range(4)]

    def home(session: str, *among: InstanceView) -> str:
        return decide("session", Prompt(1505, 16, session), *among).decode

    sessions = [f"user {n}" for n in range(40)]
    homes = {session: home(session, *views) for session in sessions}
    assert len(set(homes.values())) == 4
    for session in sessions:
        if homes[session] != views[0].id:
            assert home(session, *views[1:]) == homes[session]


def test_unknown_policies_are_refused() -> None:
    with pytest.raises(ConfigError, match="unknown policy 'best': choose one of cost, prefix"):
        make_policy("best", Rotation(), CostModel())


def test_one_observation_moves_the_prior_to_a_gpu() -> None:
    costs = CostModel()
    assert costs.predict_prefill_s(P.id, 1000, 0) == pytest.approx(0.86)
    costs.observe_prefill(P.id, 1000, 0, 0.02)
    assert costs.predict_prefill_s(P.id, 1000, 0) == pytest.approx(0.02, rel=0.3)
    # Others of the fleet are expected to be alike.
    assert costs.predict_prefill_s(D.id, 1000, 0) == pytest.approx(0.02, rel=0.3)
    costs.forget(P.id)
    assert costs.explain()["prefill"]["instances"] == {}


def test_the_fit_finds_the_true_coefficients() -> None:
    costs = CostModel()

    def truth(new: int, cached: int) -> float:
        return 0.02 + 2e-4 * new + 3e-8 * new * (cached + new / 2)

    for turn in range(200):
        new, cached = 50 + 97 * turn % 4000, 61 * turn % 6000
        costs.observe_prefill(P.id, new, cached, truth(new, cached))
    for new, cached in ((100, 0), (1000, 3000), (4000, 0)):
        assert costs.predict_prefill_s(P.id, new, cached) == pytest.approx(
            truth(new, cached), rel=0.05
        )


def test_nonsense_is_not_learnt_from() -> None:
    costs = CostModel()
    costs.observe_prefill(P.id, 0, 0, 1.0)
    costs.observe_prefill(P.id, 5, 0, float("nan"))
    costs.observe_prefill(P.id, 5, -1, 1.0)
    costs.observe_transfer(P.id, D.id, 0, 1.0)
    costs.observe_transfer(P.id, D.id, 5, float("inf"))
    told = costs.explain()
    assert told["prefill"]["instances"] == told["transfer"]["pairs"] == {}
    assert costs.predict_prefill_s(P.id, 0, 9) == 0
    assert costs.predict_transfer_s(P.id, D.id, 0) == 0


@pytest.mark.parametrize("name", POLICIES)
def test_what_a_decode_instance_generated_may_be_kept_there(name: str) -> None:
    """The next turn: D has more than P, which computes what D may not give."""
    p, d = replace(P, match=Match(40)), replace(D, match=Match(50))
    assert decide(name, LONG, p, d, bypass=0).prefill_source == d.id
    kept = decide(name, LONG, p, restrain(d, Moves.FROM_PREFILL), bypass=0)
    assert (kept.prefill, kept.prefill_source, kept.held_pages) == (p.id, None, 40)


@pytest.mark.parametrize("name", POLICIES)
def test_a_handover_is_no_reuse_across_requests(name: str) -> None:
    """What a prefill instance has still goes to the decode instance."""
    views = [restrain(v, Moves.FROM_PREFILL) for v in (replace(P, match=FULL), D)]
    plan = decide(name, LONG, *views, bypass=0)
    assert (plan.decode, plan.decode_source or plan.prefill) == (D.id, P.id)


@pytest.mark.parametrize("name", POLICIES)
def test_where_nothing_may_move_nothing_does(name: str) -> None:
    views = [restrain(v, Moves.NONE) for v in (replace(B, match=FULL), B2, P, D)]
    for turn in range(4):
        plan = decide(name, LONG, *views, turn=turn)
        assert (plan.prefill, plan.prefill_source, plan.decode_source) == (None, None, None)
