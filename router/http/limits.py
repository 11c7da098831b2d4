"""Bounds of one request: how large, how many, how long. Frozen values."""

from __future__ import annotations

from dataclasses import dataclass

from sglang_memserve.config import Limits as InstanceLimits


@dataclass(frozen=True, slots=True)
class Limits:
    """``attempts``: how often instances are tried for one request. ``max_in_flight`` requests run
    at once, ``max_waiting`` more wait for ``wait_s`` seconds at most."""

    max_body_bytes: int = 64 * 2**20
    max_in_flight: int = 4096
    max_waiting: int = 1024
    wait_s: float = 30.0
    attempts: int = 6


@dataclass(frozen=True, slots=True)
class StepDeadlines:
    """Seconds. ``fetch_s``: for pages that exist already. ``prefill_s``: for P's computing, at
    most; a P that takes ``late_factor`` times what is predicted, and ``least_prefill_s`` more, is
    late. ``grace_s``: how long D's fetch may go on after P is done, at most; at least
    ``least_grace_s``, and no longer than computing the rest is predicted to take. ``most_fetch_s``:
    what an instance lets one fetch last; a longer prefill takes several. ``hold_s``: how long
    pages that were fetched stay for a request that waits for its turn there."""

    fetch_s: float = 10.0
    prefill_s: float = 300.0
    late_factor: float = 5.0
    least_prefill_s: float = 5.0
    grace_s: float = 10.0
    least_grace_s: float = 0.5
    most_fetch_s: float = InstanceLimits().fetch_deadline_s
    hold_s: float = 300.0

    @property
    def most_existing_s(self) -> float:
        """For a fetch of pages that exist, and for the wait before it for those that are coming."""
        return min(self.fetch_s, 0.5 * self.most_fetch_s)

    @property
    def most_wait_s(self) -> float:
        """Pages that are predicted to come later are not worth a fetch: ``wait_s`` is cut short."""
        return 0.5 * self.most_existing_s

    def wait_s(self, predicted_s: float) -> float:
        """How long to wait for pages that are predicted to come so soon: generously."""
        return min(2 * predicted_s + self.least_grace_s, self.most_existing_s)
