"""What things cost here: seconds of prefill and of transfer, learnt while serving.

    prefill   seconds = a + b * new + c * new * (cached + new / 2)            per instance
    transfer  seconds = latency + (bytes + bytes beside them) / bandwidth     per (source, target)

``new`` tokens each attend to what is cached and to half of the new ones on average, hence the
third term: prefill is not linear in what is left to compute. ``bytes beside them``: ``flows``.
Pages that move while their prompt is computed take only a part of their time afterwards; that part
is measured too.

Each model is a guarded least-squares fit (``fit``): observations count by their relative error,
older ones fade, surprises must be confirmed, no coefficient is negative. A prior stands in for what
has not been seen: of an instance what the whole fleet has shown, of the fleet a small CPU
(docs/router-core.md). What an instance showed long ago counts less the more the others have
shown since: one that was slow once, and gets no work because of that, is tried again.

Nothing is stored but sums, so memory is constant for each instance and pair. Owned by one event
loop. No clock: durations come from the caller.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from sglang_memserve.types import InstanceId

from .fit import Observation, RobustFit
from .flows import Flow, Flows
from .spells import Computed, Spell

# SmolLM2-135M on one core: 1 ms a token, 2 GB/s between two processes. The first observation
# scales it to the machine at hand.
PRIOR_PREFILL = (0.010, 8e-4, 1e-7)
PRIOR_TRANSFER = (0.005, 0.5e-9)
DEFAULT_PAGE_BYTES = 368_640

# Loose for the fleet, tighter for one instance of a fleet that is known.
_FLEET_PRIOR_SPREAD = 3.0
_MEMBER_PRIOR_SPREAD = 1.0
# What is left of an instance's own observations after one more by the others.
_FADE = 0.99
# Observations by anybody before a surprise is recognised as one.
_ENOUGH = 3
_TYPICAL_PROMPT_TOKENS = 1000
_TYPICAL_GAIN = 0.05
_TAIL_GAIN = 0.2
_MOST_TAIL = 50.0

_K = TypeVar("_K")


@dataclass(slots=True)
class _Learnt:
    """One instance's or pair's fit. ``fleet_at``: everybody's observations at its last own one;
    ``solved_at``: when ``theta`` was solved."""

    fit: RobustFit
    fleet_at: int = 0
    solved_at: int = -1
    theta: tuple[float, ...] = ()


class _Family(Generic[_K]):
    """One model for many instances or pairs, and for the fleet of all of them."""

    def __init__(self, prior: tuple[float, ...]) -> None:
        self._prior = prior
        self._members: dict[_K, _Learnt] = {}
        # Guarded too: where members differ, a mixture of them is like none of them.
        self._fleet = RobustFit(len(prior))
        self._seen = 0
        self._known: tuple[float, ...] | None = None

    def observe(self, member: _K, features: tuple[float, ...], seconds: float) -> None:
        learnt = self._members.get(member)
        if learnt is None:
            learnt = self._members[member] = _Learnt(RobustFit(len(self._prior)))
        predicted = None
        if self._seen >= _ENOUGH:
            predicted = _dot(self.theta(member), features)
        trust = self._trust(learnt)
        taken = learnt.fit.observe(Observation(features, seconds), predicted, trust)
        for seen in taken:
            expected = _dot(self.fleet(), seen.features) if self._seen >= _ENOUGH else None
            self._seen += 1
            if self._fleet.observe(seen, expected):
                self._known = None
        if taken:
            learnt.fleet_at, learnt.solved_at = self._seen, -1

    def theta(self, member: _K) -> tuple[float, ...]:
        """Coefficients; those of the fleet for one that has shown nothing."""
        learnt = self._members.get(member)
        if learnt is None or not learnt.fit.fit.observations:
            return self.fleet()
        seen = self._seen
        # Solving anew for what others showed can wait a little, once there is plenty.
        if learnt.solved_at < 0 or seen - learnt.solved_at > min(learnt.solved_at / 4, 64):
            trust = self._trust(learnt)
            learnt.theta = learnt.fit.fit.solve(
                self.fleet(), _MEMBER_PRIOR_SPREAD, trust, self._prior
            )
            learnt.solved_at = seen
        return learnt.theta

    def _trust(self, learnt: _Learnt) -> float:
        return _FADE ** (self._seen - learnt.fleet_at)

    def fleet(self) -> tuple[float, ...]:
        if self._known is None:
            self._known = self._fleet.fit.solve(self._prior, _FLEET_PRIOR_SPREAD)
        return self._known

    def observations(self, member: _K | None = None) -> tuple[int, int]:
        """Taken and refused; of the fleet without ``member``."""
        if member is not None:
            fit = self._members[member].fit
            return fit.fit.observations, fit.refused
        return self._seen, sum(one.fit.refused for one in self._members.values())

    def members(self) -> Iterator[_K]:
        yield from self._members

    def forget(self, members: list[_K]) -> None:
        for member in members:
            self._members.pop(member, None)


class CostModel:
    """Predictions for the cost policy, fitted from what the dispatcher observes.

    ``page_bytes``: bytes of one page over all ranks; set it when the first instance joins.
    """

    def __init__(
        self,
        prior_prefill: tuple[float, float, float] = PRIOR_PREFILL,
        prior_transfer: tuple[float, float] = PRIOR_TRANSFER,
        page_bytes: int = DEFAULT_PAGE_BYTES,
    ) -> None:
        self.page_bytes = page_bytes
        self.flows = Flows()
        self._prefill: _Family[InstanceId] = _Family(prior_prefill)
        self._transfer: _Family[tuple[InstanceId, InstanceId]] = _Family(prior_transfer)
        self._typical_tokens = float(_TYPICAL_PROMPT_TOKENS)
        self._tail = 1.0

    # -- learning --

    def observe_prefill(
        self, instance: InstanceId, new_tokens: int, cached_tokens: int, seconds: float
    ) -> None:
        """One prompt's computing time, queueing excluded as far as the caller can. Nonsense (no
        tokens, no time) is ignored."""
        self.observe_spell(instance, Spell((Computed(new_tokens, cached_tokens),), seconds))

    def observe_spell(self, instance: InstanceId, spell: Spell) -> None:
        """Prompts that an instance computed together, and nothing else meanwhile."""
        prompts = [one for one in spell.prompts if one.new_tokens > 0 and one.cached_tokens >= 0]
        if not prompts or not 0 < spell.seconds < math.inf:
            return
        each = [_prefill_features(one.new_tokens, one.cached_tokens) for one in prompts]
        fixed, linear, attention = map(sum, zip(*each, strict=True))
        self._prefill.observe(instance, (fixed, linear, attention), spell.seconds)
        mean = linear / len(prompts)
        self._typical_tokens += _TYPICAL_GAIN * (mean - self._typical_tokens)

    def observe_transfer(
        self,
        source: InstanceId,
        target: InstanceId,
        moved_bytes: int,
        seconds: float,
        beside_bytes: float = 0.0,
    ) -> None:
        """One fetch that moved something, as ``FetchResult.fetched_bytes`` and ``seconds``.

        ``beside_bytes``: what shared its way (``Flows.beside_bytes`` when it began)."""
        if moved_bytes <= 0 or not 0 < seconds < math.inf or not 0 <= beside_bytes < math.inf:
            return
        self._transfer.observe((source, target), (1.0, moved_bytes + beside_bytes), seconds)

    def observe_tail(
        self, source: InstanceId, target: InstanceId, pages: int, seconds: float
    ) -> None:
        """What of a transfer was left when the prompt it moved along with was computed."""
        whole_s = self.predict_transfer_s(source, target, pages)
        if whole_s <= 0 or not 0 <= seconds < math.inf:
            return
        # One late fetch moves it by no more than a few times what it was.
        ratio = min(seconds / whole_s, 4 * self._tail + 0.5, _MOST_TAIL)
        self._tail += _TAIL_GAIN * (ratio - self._tail)

    def forget(self, instance: InstanceId) -> None:
        """The instance left or rebooted."""
        self._prefill.forget([instance])
        self._transfer.forget([pair for pair in self._transfer.members() if instance in pair])

    # -- predicting --

    def predict_prefill_s(self, instance: InstanceId, new_tokens: int, cached_tokens: int) -> float:
        """Seconds to compute ``new_tokens`` after ``cached_tokens``; 0 for no tokens."""
        if new_tokens <= 0:
            return 0.0
        fixed, linear, attention = self._prefill.theta(instance)
        return fixed + new_tokens * (linear + attention * (cached_tokens + new_tokens / 2))

    def prefill_theta(self, instance: InstanceId) -> tuple[float, ...]:
        """(fixed s, s a token, s a token squared), for those who predict many at once."""
        return self._prefill.theta(instance)

    def predict_backlog_s(self, instance: InstanceId, tokens: int) -> float:
        """Seconds until ``tokens`` that are queued there, of unknown prompts, are computed."""
        _, linear, attention = self._prefill.theta(instance)
        return max(tokens, 0) * (linear + attention * _TYPICAL_PROMPT_TOKENS / 2)

    def predict_request_s(self, instance: InstanceId) -> float:
        """Seconds of a prompt there of which nothing is known."""
        return self.predict_prefill_s(instance, max(int(self._typical_tokens), 1), 0)

    def predict_transfer_s(self, source: InstanceId, target: InstanceId, pages: int) -> float:
        """Seconds to move ``pages`` beside what is on the move now; 0 for none."""
        if pages <= 0:
            return 0.0
        latency, per_byte = self._transfer.theta((source, target))
        size = pages * self.page_bytes
        return latency + per_byte * (size + self.flows.beside_bytes(source, target, size))

    def predict_tail_s(self, source: InstanceId, target: InstanceId, pages: int) -> float:
        """What is left of moving ``pages`` when the prompt they belong to has been computed."""
        return self._tail * self.predict_transfer_s(source, target, pages)

    def begin_transfer(
        self, source: InstanceId, target: InstanceId, pages: int, during_s: float = 0.0
    ) -> Flow:
        """It is on the move until the caller ends it. ``during_s``: how long its pages come one by
        one as they are computed, and so leave room for others."""
        size = max(pages, 0) * self.page_bytes
        alone_s = self.predict_transfer_s(source, target, pages)
        share = alone_s / (alone_s + during_s) if during_s > 0 and alone_s > 0 else 1.0
        return self.flows.begin(source, target, size * share)

    def explain(self) -> dict[str, Any]:
        """Fitted coefficients, for people and for ``GET /memserve/models``."""
        return {
            "prefill": {
                "fleet": _told(_PREFILL, self._prefill.fleet(), self._prefill.observations()),
                "instances": {
                    who: _told(_PREFILL, self._prefill.theta(who), self._prefill.observations(who))
                    for who in self._prefill.members()
                },
            },
            "transfer": {
                "page_bytes": self.page_bytes,
                "tail_share": self._tail,
                "flows": self.flows.count(),
                "fleet": _told(_TRANSFER, self._transfer.fleet(), self._transfer.observations()),
                "pairs": {
                    f"{source} -> {target}": _told(
                        _TRANSFER,
                        self._transfer.theta((source, target)),
                        self._transfer.observations((source, target)),
                    )
                    for source, target in self._transfer.members()
                },
            },
            "typical_prompt_tokens": round(self._typical_tokens),
        }


def _dot(theta: tuple[float, ...], features: tuple[float, ...]) -> float:
    return sum(a * b for a, b in zip(theta, features, strict=True))


_PREFILL = ("fixed_s", "s_per_token", "s_per_token_squared")
_TRANSFER = ("latency_s", "s_per_byte")


def _told(
    names: tuple[str, ...], theta: tuple[float, ...], observations: tuple[int, int]
) -> dict[str, float]:
    told: dict[str, float] = dict(zip(names, theta, strict=True))
    return told | {"observations": observations[0], "refused": observations[1]}


def _prefill_features(new_tokens: int, cached_tokens: int) -> tuple[float, float, float]:
    return 1.0, float(new_tokens), new_tokens * (cached_tokens + new_tokens / 2)
