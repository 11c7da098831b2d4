"""Pins that outlive their fetch for a moment: the request it was made for shall find its pages."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from .base import Lease


@dataclass(frozen=True, slots=True)
class GraceLimits:
    """At most ``leases``, on at most ``share`` of all blocks, but for the last one's."""

    leases: int = 64
    share: float = 0.25


class GracePins:
    """The oldest go first when there are too many."""

    def __init__(self, limits: GraceLimits) -> None:
        self.limits = limits
        self._kept: deque[tuple[float, Lease]] = deque()

    def keep(self, lease: Lease, until_s: float, total_blocks: int) -> None:
        kept = self._kept
        kept.append((until_s, lease))
        most_blocks = self.limits.share * total_blocks
        blocks = sum(len(lease.blocks) for _, lease in kept)
        while len(kept) > 1 and (len(kept) > self.limits.leases or blocks > most_blocks):
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
        assert len(self._kept) <= self.limits.leases, len(self._kept)
