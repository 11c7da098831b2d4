"""Pages that are to stay for a request, as a value: ``index.holds`` under the pool's lock."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from ..types import HoldOutcome, PageKey
from .ledger import Ledger


class PoolHold:
    """Made by ``MemPool.prepare_hold`` before the pages come. Thread-safe; see
    ``transfer.base.Hold``."""

    __slots__ = ("_hold", "_ledger", "_lock")

    def __init__(self, lock: threading.Lock, ledger: Ledger, keys: Sequence[PageKey]) -> None:
        self._lock = lock
        self._ledger = ledger
        with lock:
            self._hold = ledger.holds.prepare(keys)

    def complete(self, ttl_s: float) -> HoldOutcome:
        with self._lock:
            if self._ledger.closed:
                return HoldOutcome.NEEDLESS
            self._ledger.end_expired()
            return self._ledger.holds.complete(self._hold, self._ledger.clock() + ttl_s)

    def abort(self) -> None:
        with self._lock:
            self._ledger.holds.abort(self._hold)
