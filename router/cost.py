"""What things cost here: seconds of prefill and of transfer, learnt while serving.

Two linear models whose coefficients are never negative:

    prefill   seconds = a + b * new + c * new * (cached + new / 2)     per instance
    transfer  seconds = latency + pages' bytes / bandwidth             per (source, target)

``new`` tokens each attend to what is cached and to half of the new ones on average, hence the
third term. Each model is a weighted least-squares fit with forgetting: observations count by their
relative error, older ones fade, and a prior stands in for what has not been seen. The prior of an
instance is what the whole fleet has shown; the fleet's is a small CPU (docs/router-core.md).
Nothing is stored but sums, so memory is constant for each instance and pair.

Owned by one event loop. No clock: durations come from the caller.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations

from sglang_memserve.types import InstanceId

# SmolLM2-135M on one core: 1 ms a token, 2 GB/s between two processes. The first observation
# scales it to the machine at hand.
PRIOR_PREFILL = (0.010, 8e-4, 1e-7)
PRIOR_TRANSFER = (0.005, 0.5e-9)
DEFAULT_PAGE_BYTES = 368_640

_RELATIVE_ERROR = 0.2
# Loose for the fleet, tighter for one instance of a fleet that is known.
_FLEET_PRIOR_SPREAD = 3.0
_MEMBER_PRIOR_SPREAD = 1.0
_FORGET = 0.98
_LEAST_SECONDS = 1e-4
_TYPICAL_PROMPT_TOKENS = 1000


class LinearFit:
    """Non-negative least squares of ``seconds ~ theta . features`` with forgetting and a prior."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._gram = [[0.0] * size for _ in range(size)]
        self._moment = [0.0] * size
        self.observations = 0

    def observe(self, features: Sequence[float], seconds: float) -> None:
        assert len(features) == self._size, (features, self._size)
        seconds = max(seconds, _LEAST_SECONDS)
        weight = 1.0 / (_RELATIVE_ERROR * seconds) ** 2
        for i, x in enumerate(features):
            self._moment[i] = self._moment[i] * _FORGET + weight * x * seconds
            for j, y in enumerate(features):
                self._gram[i][j] = self._gram[i][j] * _FORGET + weight * x * y
        self.observations += 1

    def solve(self, prior: Sequence[float], spread: float) -> tuple[float, ...]:
        """Coefficients, all >= 0. Without observations, the prior.

        The prior is scaled to what was observed first, so that it speaks of proportions: a machine
        or a network may be a thousand times faster or slower than it says. ``spread``: how far
        each coefficient may then be off, as a multiple of itself.
        """
        gram = [row[:] for row in self._gram]
        moment = self._moment[:]
        scale = self._scale(prior)
        prior = [value * scale for value in prior]
        for i, value in enumerate(prior):
            # A coefficient that the prior has at zero may still grow a little.
            precision = 1.0 / (spread * max(value, 1e-12)) ** 2
            gram[i][i] += precision
            moment[i] += precision * value
        return _solve_nonnegative(gram, moment)

    def _scale(self, prior: Sequence[float]) -> float:
        """The factor that fits a multiple of the prior to the observations best."""
        pairs = [(i, j) for i in range(self._size) for j in range(self._size)]
        square = sum(prior[i] * self._gram[i][j] * prior[j] for i, j in pairs)
        product = sum(m * value for m, value in zip(self._moment, prior, strict=True))
        return product / square if square > 0 and product > 0 else 1.0


def _solve_nonnegative(gram: list[list[float]], moment: list[float]) -> tuple[float, ...]:
    """Minimise ``x G x / 2 - m x`` over x >= 0 by trying every support: there are at most 8."""
    size = len(moment)
    best, best_value = (0.0,) * size, 0.0
    for count in range(size, 0, -1):
        for support in combinations(range(size), count):
            solved = _solve([[gram[i][j] for j in support] for i in support], moment, support)
            if any(value < 0 or not math.isfinite(value) for value in solved):
                continue
            full = [0.0] * size
            for i, value in zip(support, solved, strict=True):
                full[i] = value
            # At the minimum of a support, x G x = m x.
            value = -sum(m * x for m, x in zip(moment, full, strict=True)) / 2
            if value < best_value:
                best, best_value = tuple(full), value
        if count == size and best_value < 0:
            break
    return best


def _solve(
    matrix: list[list[float]], moment: Sequence[float], support: Sequence[int]
) -> list[float]:
    """Gaussian elimination of a positive definite system, scaled to a unit diagonal first: the
    coefficients' units differ by eight orders of magnitude."""
    size = len(support)
    scale = [1.0 / math.sqrt(matrix[i][i]) for i in range(size)]
    rows = [
        [matrix[i][j] * scale[i] * scale[j] for j in range(size)] + [moment[support[i]] * scale[i]]
        for i in range(size)
    ]
    for i in range(size):
        pivot = rows[i][i]
        if pivot <= 1e-12:
            return [-1.0] * size
        for k in range(i + 1, size):
            factor = rows[k][i] / pivot
            rows[k] = [a - factor * b for a, b in zip(rows[k], rows[i], strict=True)]
    solved = [0.0] * size
    for i in reversed(range(size)):
        rest = sum(rows[i][j] * solved[j] for j in range(i + 1, size))
        solved[i] = (rows[i][size] - rest) / rows[i][i]
    return [value * factor for value, factor in zip(solved, scale, strict=True)]


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
        self._prior_prefill = prior_prefill
        self._prior_transfer = prior_transfer
        self._prefill_fits: dict[InstanceId, LinearFit] = {}
        self._transfer_fits: dict[tuple[InstanceId, InstanceId], LinearFit] = {}
        self._fleet_prefill = LinearFit(3)
        self._fleet_transfer = LinearFit(2)
        # Solved coefficients; cleared by observations, since predictions outnumber them.
        self._prefill: dict[InstanceId, tuple[float, ...]] = {}
        self._transfer: dict[tuple[InstanceId, InstanceId], tuple[float, ...]] = {}

    # -- learning --

    def observe_prefill(
        self, instance: InstanceId, new_tokens: int, cached_tokens: int, seconds: float
    ) -> None:
        """One prompt's computing time, queueing excluded as far as the caller can. Nonsense (no
        tokens, no time) is ignored."""
        if new_tokens <= 0 or cached_tokens < 0 or not 0 < seconds < math.inf:
            return
        features = _prefill_features(new_tokens, cached_tokens)
        self._prefill_fits.setdefault(instance, LinearFit(3)).observe(features, seconds)
        self._fleet_prefill.observe(features, seconds)
        self._prefill.clear()

    def observe_transfer(
        self, source: InstanceId, target: InstanceId, moved_bytes: int, seconds: float
    ) -> None:
        """One fetch that moved something, as ``FetchResult.fetched_bytes`` and ``seconds``."""
        if moved_bytes <= 0 or not 0 < seconds < math.inf:
            return
        features = (1.0, float(moved_bytes))
        self._transfer_fits.setdefault((source, target), LinearFit(2)).observe(features, seconds)
        self._fleet_transfer.observe(features, seconds)
        self._transfer.clear()

    def forget(self, instance: InstanceId) -> None:
        """The instance left or rebooted."""
        self._prefill_fits.pop(instance, None)
        self._prefill.pop(instance, None)
        for pair in [pair for pair in self._transfer_fits if instance in pair]:
            del self._transfer_fits[pair]
        self._transfer.clear()

    # -- predicting --

    def predict_prefill_s(self, instance: InstanceId, new_tokens: int, cached_tokens: int) -> float:
        """Seconds to compute ``new_tokens`` after ``cached_tokens``; 0 for no tokens."""
        if new_tokens <= 0:
            return 0.0
        fixed, linear, attention = self._prefill_of(instance)
        return fixed + new_tokens * (linear + attention * (cached_tokens + new_tokens / 2))

    def predict_backlog_s(self, instance: InstanceId, tokens: int) -> float:
        """Seconds until ``tokens`` that are queued there, of unknown prompts, are computed."""
        _, linear, attention = self._prefill_of(instance)
        return max(tokens, 0) * (linear + attention * _TYPICAL_PROMPT_TOKENS / 2)

    def predict_transfer_s(self, source: InstanceId, target: InstanceId, pages: int) -> float:
        """Seconds to move ``pages``; 0 for none."""
        if pages <= 0:
            return 0.0
        pair = (source, target)
        theta = self._transfer.get(pair)
        if theta is None:
            theta = self._solve(
                self._transfer_fits.get(pair), self._fleet_transfer, self._prior_transfer
            )
            self._transfer[pair] = theta
        return theta[0] + theta[1] * pages * self.page_bytes

    def explain(self) -> dict[str, dict[str, float]]:
        """Fitted coefficients by instance and by ``source -> target``, for people."""
        table: dict[str, dict[str, float]] = {}
        for instance, fit in self._prefill_fits.items():
            fixed, linear, attention = self._prefill_of(instance)
            table[instance] = {
                "fixed_s": fixed,
                "s_per_token": linear,
                "s_per_token_squared": attention,
                "observations": fit.observations,
            }
        for (source, target), fit in self._transfer_fits.items():
            page_s = self.predict_transfer_s(source, target, 2) - self.predict_transfer_s(
                source, target, 1
            )
            table[f"{source} -> {target}"] = {
                "latency_s": self.predict_transfer_s(source, target, 1) - page_s,
                "s_per_page": page_s,
                "observations": fit.observations,
            }
        return table

    def _prefill_of(self, instance: InstanceId) -> tuple[float, ...]:
        theta = self._prefill.get(instance)
        if theta is None:
            theta = self._solve(
                self._prefill_fits.get(instance), self._fleet_prefill, self._prior_prefill
            )
            self._prefill[instance] = theta
        return theta

    def _solve(
        self, fit: LinearFit | None, fleet: LinearFit, prior: tuple[float, ...]
    ) -> tuple[float, ...]:
        known = fleet.solve(prior, _FLEET_PRIOR_SPREAD)
        return known if fit is None else fit.solve(known, _MEMBER_PRIOR_SPREAD)


def _prefill_features(new_tokens: int, cached_tokens: int) -> tuple[float, float, float]:
    return 1.0, float(new_tokens), new_tokens * (cached_tokens + new_tokens / 2)
