"""The event streams in numbers: for ``/metrics`` and ``/workers``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from .source import SnapshotReason, SourceStatus

Statuses = Callable[[], Sequence[SourceStatus]]

_COUNTERS = (
    ("event_gap", "gaps", "Times an event stream broke"),
    ("event_batches", "batches", "Batches of events applied"),
    ("snapshot_failures", "failures", "Snapshots that could not be had"),
    ("refused_pages", "refused_pages", "Pages there was no room for in the tree"),
)


class SourceCollector(Collector):
    """Asks the sources when asked; an instance that has left is not in the answer."""

    def __init__(self, statuses: Statuses) -> None:
        self._statuses = statuses

    def collect(self) -> Iterable[Metric]:
        statuses = self._statuses()
        for name, field, text in _COUNTERS:
            counter = CounterMetricFamily(f"memserve_{name}", text, labels=["instance"])
            for status in statuses:
                counter.add_metric([status.instance], getattr(status, field))
            yield counter
        taken = CounterMetricFamily(
            "memserve_snapshot", "Snapshots applied", labels=["instance", "reason"]
        )
        lag = GaugeMetricFamily(
            "memserve_event_lag_seconds",
            "Age of the last event batch when it arrived, by the sender's clock",
            labels=["instance"],
        )
        for status in statuses:
            for reason in SnapshotReason:
                taken.add_metric([status.instance, reason.value], status.reasons.get(reason, 0))
            lag.add_metric([status.instance], status.lag_s)
        yield taken
        yield lag


def described(status: SourceStatus) -> dict[str, object]:
    """For people: one source as JSON."""
    return {
        "state": status.state.value,
        "seq": status.seq,
        "known_seq": status.known_seq,
        "batches": status.batches,
        "gaps": status.gaps,
        "snapshots": {reason.value: count for reason, count in status.reasons.items()},
        "failures": status.failures,
        "refused_pages": status.refused_pages,
        "lag_s": round(status.lag_s, 4),
        "last_error": status.last_error or None,
    }
