"""Least squares that learns online, fades, and does not believe a single surprise. Pure.

``LinearFit`` is the estimator. ``RobustFit`` guards it: an observation that is several times off
what was predicted is held back. It was a stall, a paging disk, a debugger, a count that was wrong.
Only when the next ones say the same did the world change, and then the old sums are dropped at
once. So one frozen instance costs no later prediction, and a real change costs four observations.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

_RELATIVE_ERROR = 0.2
_FORGET = 0.98
_LEAST_SECONDS = 1e-4
_LEAST_SHARE = 0.3
# Off by more than this factor is a surprise; so many that agree within it are a change, and so
# many in a row on one side are one whatever they say.
SURPRISE_FACTOR = 3.0
_AGREEING = 4
_IN_A_ROW = 12


@dataclass(frozen=True, slots=True)
class Observation:
    features: tuple[float, ...]
    seconds: float


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

    def fade(self, left: float) -> None:
        """What was observed so far counts ``left`` (0 to 1) of what it did."""
        self._gram = [[value * left for value in row] for row in self._gram]
        self._moment = [value * left for value in self._moment]

    def solve(
        self,
        prior: Sequence[float],
        spread: float,
        trust: float = 1.0,
        shape: Sequence[float] | None = None,
    ) -> tuple[float, ...]:
        """Coefficients, all >= 0. Without observations, the prior.

        The prior is scaled to what was observed first, so that it speaks of proportions: a machine
        or a network may be a thousand times faster or slower than it says. ``spread``: how far
        each coefficient may then be off, as a multiple of itself. ``trust``: what the observations
        still count for, 0 to 1. ``shape``: proportions that are always possible, for a prior that
        was fitted itself and may have lost a coefficient.
        """
        gram = [[value * trust for value in row] for row in self._gram]
        moment = [value * trust for value in self._moment]
        scale = self._scale(prior) ** trust
        prior = [value * scale for value in prior]
        likely: list[float] = []
        if shape is not None:
            share = _LEAST_SHARE * self._scale(shape) ** trust
            likely = [share * value for value in shape]
        for i, value in enumerate(prior):
            # A coefficient that the prior has at zero may still grow a little.
            least = likely[i] if likely else 1e-12
            precision = 1.0 / (spread * max(value, least)) ** 2
            gram[i][i] += precision
            moment[i] += precision * value
        return _solve_nonnegative(gram, moment)

    def _scale(self, prior: Sequence[float]) -> float:
        """The factor that fits a multiple of the prior to the observations best."""
        pairs = [(i, j) for i in range(self._size) for j in range(self._size)]
        square = sum(prior[i] * self._gram[i][j] * prior[j] for i, j in pairs)
        product = sum(m * value for m, value in zip(self._moment, prior, strict=True))
        return product / square if square > 0 and product > 0 else 1.0


class RobustFit:
    """``fit`` behind the guard. ``refused``: observations that were not believed so far."""

    def __init__(self, size: int) -> None:
        self._size = size
        self.fit = LinearFit(size)
        self.refused = 0
        self._held: deque[tuple[Observation, float]] = deque(maxlen=_AGREEING)
        self._row = 0

    def observe(
        self, seen: Observation, predicted_s: float | None, trust: float = 1.0
    ) -> tuple[Observation, ...]:
        """Take it, or hold it back; returns what was taken now.

        ``predicted_s`` is None while nothing is known that it could be measured by. ``trust``:
        what those before it still count for, if it is taken.
        """
        if predicted_s is None or predicted_s <= 0:
            return self._take((seen,), trust)
        ratio = max(seen.seconds, _LEAST_SECONDS) / max(predicted_s, _LEAST_SECONDS)
        if 1 / SURPRISE_FACTOR <= ratio <= SURPRISE_FACTOR:
            return self._take((seen,), trust)
        if self._held and (self._held[-1][1] > 1) != (ratio > 1):
            self._drop_held()
        self._held.append((seen, ratio))
        self._row += 1
        ratios = [one for _, one in self._held]
        agree = len(ratios) == _AGREEING and max(ratios) <= SURPRISE_FACTOR * min(ratios)
        if not agree and self._row < _IN_A_ROW:
            self.refused += 1
            return ()
        believed = tuple(one for one, _ in self._held)
        self.refused -= len(believed) - 1
        self.fit = LinearFit(self._size)
        return self._take(believed, trust)

    def _take(self, seen: tuple[Observation, ...], trust: float) -> tuple[Observation, ...]:
        self._drop_held()
        if trust < 1:
            self.fit.fade(trust)
        for one in seen:
            self.fit.observe(one.features, one.seconds)
        return seen

    def _drop_held(self) -> None:
        self._held.clear()
        self._row = 0


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
