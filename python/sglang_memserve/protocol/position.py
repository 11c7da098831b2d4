"""Where a subscriber stands in an event stream (see ``events``). Pure.

A PUB socket drops what a subscriber cannot take, so a batch may be missing at any time: in the
middle, which the next number shows, or at the end, which only the sender's word shows.
"""

from __future__ import annotations

from enum import Enum


class Step(Enum):
    """What a batch is to a subscriber: to be applied, to be ignored, or proof of a loss."""

    NEXT = "next"
    STALE = "stale"
    GAP = "gap"


class Position:
    """``seq``: last batch taken; ``known_seq``: last that the sender has told of."""

    def __init__(self) -> None:
        self.seq = -1
        self.known_seq = -1
        self._behind_since: float | None = None
        # Batches up to the snapshot's may still arrive, rising, until the first newer one does.
        self._last_stale: int | None = -1

    def restart(self, seq: int) -> None:
        """A snapshot that is true right after batch ``seq`` was taken."""
        self.seq = self.known_seq = seq
        self._last_stale = -1
        self._behind_since = None

    def judge(self, seq: int) -> Step:
        """What batch ``seq`` is; call ``taken`` once a NEXT one is applied."""
        if self._last_stale is not None and self._last_stale < seq <= self.seq:
            self._last_stale = seq
            return Step.STALE
        return Step.NEXT if seq == self.seq + 1 else Step.GAP

    def taken(self) -> None:
        self._last_stale = None
        self.seq += 1
        self.known_seq = max(self.known_seq, self.seq)

    def told_of(self, seq: int) -> None:
        """The sender says that it has published ``seq``."""
        self.known_seq = max(self.known_seq, seq)

    def lags(self, now: float, patience_s: float) -> bool:
        """Whether the sender has been ahead for more than ``patience_s``. Ask again and again:
        the time counts from the first call that finds it ahead."""
        if self.seq >= self.known_seq:
            self._behind_since = None
            return False
        if self._behind_since is None:
            self._behind_since = now
        return now - self._behind_since > patience_s
