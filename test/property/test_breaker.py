"""Any history of a circuit breaker, beside a model that keeps the whole history."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from sglang_memserve.router.members.breaker import Breaker, BreakerSettings, BreakerState

SETTINGS = BreakerSettings(failures=3, pause_s=2.0, longest_pause_s=16.0)


class BreakerMachine(RuleBasedStateMachine):
    """``in_a_row``: failures since the last success; ``trials``: failed ones among them."""

    def __init__(self) -> None:
        super().__init__()
        self.breaker = Breaker(SETTINGS)
        self.now = 0.0
        self.in_a_row = 0
        self.trials = 0
        self.opened_at: float | None = None
        self.trying = False

    def until(self) -> float:
        assert self.opened_at is not None
        pause_s: float = min(SETTINGS.pause_s * 2**self.trials, SETTINGS.longest_pause_s)
        return self.opened_at + pause_s

    def expected(self) -> BreakerState:
        if self.opened_at is None:
            return BreakerState.CLOSED
        return BreakerState.OPEN if self.now < self.until() else BreakerState.HALF_OPEN

    @rule(seconds=st.sampled_from([0.0, 0.5, 1.0, 2.0, 5.0, 40.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @precondition(lambda self: self.breaker.allows(self.now))
    @rule()
    def a_request_starts(self) -> None:
        self.trying = self.expected() is BreakerState.HALF_OPEN
        self.breaker.started(self.now)

    @rule()
    def a_request_succeeds(self) -> None:
        self.breaker.succeeded()
        self.in_a_row = self.trials = 0
        self.opened_at, self.trying = None, False

    @rule()
    def a_request_fails(self) -> None:
        state = self.expected()
        self.in_a_row += 1
        if state is BreakerState.HALF_OPEN:
            self.trials += 1
            self.opened_at = self.now
        elif state is BreakerState.CLOSED and self.in_a_row >= SETTINGS.failures:
            self.opened_at = self.now
        self.trying = False
        self.breaker.failed(self.now)

    @rule()
    def a_request_is_cancelled(self) -> None:
        self.trying = False
        self.breaker.abandoned()

    @invariant()
    def it_agrees(self) -> None:
        self.breaker.check()
        state = self.expected()
        assert self.breaker.state(self.now) is state
        free = state is BreakerState.HALF_OPEN and not self.trying
        assert self.breaker.allows(self.now) == (state is BreakerState.CLOSED or free)
        assert bool(self.breaker.reason(self.now)) == (state is not BreakerState.CLOSED)

    @invariant()
    def it_is_never_shut_for_ever(self) -> None:
        assert self.trying or self.breaker.allows(self.now + SETTINGS.longest_pause_s)


TestBreaker = BreakerMachine.TestCase
TestBreaker.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
