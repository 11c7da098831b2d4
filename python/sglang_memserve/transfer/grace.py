"""Pins that outlive their fetch for a moment: the request it was made for shall find its pages."""

from __future__ import annotations

from collections import deque

from ..config import Limits
from .base import Lease


class GracePins:
    """At most ``limits.max_grace_leases`` on at most ``limits.grace_share`` of all blocks, but for
    the last one's; the oldest go first when there are too many."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._kept: deque[tuple[float, Lease]] = deque()

    def keep(self, lease: Lease, until_s: float, total_blocks: int) -> None:
        kept = self._kept
        kept.append((until_s, lease))
        most_blocks = self.limits.grace_share * total_blocks
        blocks = sum(len(lease.blocks) for _, lease in kept)
        while len(kept) > 1 and (len(kept) > self.limits.max_grace_leases or blocks > most_blocks):
            oldest = kept.popleft()[1]
            blocks -= len(oldest.blocks)
            oldest.release()

    def wake_s(self) -> float:
        return self._kept[0][0] if self._kept else float("inf")

    def on_time(self, now: float) -> None:
        while self._kept and self._kept[0][0] <= now:
            self._kept.popleft()[1].release()

    def release_all(self) -> None:
        while self._kept:
            self._kept.popleft()[1].release()

    def check(self) -> None:
        assert len(self._kept) <= self.limits.max_grace_leases, len(self._kept)
