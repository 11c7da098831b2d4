"""Labels that cannot multiply without end: values that others choose are bounded in number, and
those of instances that left are taken back after a while. Pure but for Prometheus' own objects.
"""

from __future__ import annotations

from prometheus_client import Counter

MOST_REASONS = 32
OTHER = "other"
REMEMBER_S = 900.0


class Bounded:
    """The first ``MOST_REASONS`` values as they are, all later ones as ``other``."""

    def __init__(self, most: int = MOST_REASONS) -> None:
        self._most = most
        self._known: set[str] = set()

    def __call__(self, value: str) -> str:
        if value in self._known:
            return value
        if len(self._known) >= self._most:
            return OTHER
        self._known.add(value)
        return value


class Departed:
    """Forgets (source, target) labels ``REMEMBER_S`` after one of the two left, so that the last
    figures of an instance are scraped and a cluster that changes for months does not grow."""

    def __init__(self, counters: tuple[Counter, ...], remember_s: float = REMEMBER_S) -> None:
        self._counters = counters
        self._remember_s = remember_s
        self._pairs: set[tuple[str, str]] = set()
        self._left: dict[str, float] = {}

    def used(self, pair: tuple[str, str]) -> None:
        self._pairs.add(pair)

    def left(self, instance: str, now: float) -> None:
        self._left[instance] = now

    def returned(self, instance: str) -> None:
        self._left.pop(instance, None)

    def sweep(self, now: float) -> None:
        gone = {who for who, at in self._left.items() if now - at >= self._remember_s}
        for pair in [pair for pair in self._pairs if gone.intersection(pair)]:
            self._pairs.discard(pair)
            for counter in self._counters:
                counter.remove(*pair)
        for who in gone:
            del self._left[who]
