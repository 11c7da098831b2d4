"""Pages that instances will hold soon: what is being computed there. Pure.

When a hundred requests with one new prefix arrive together, nobody holds it yet, and a tree of what
is held would send each to another instance, to be computed a hundred times. Here the first of them
leaves a promise, and the others see that their prefix is on its way.

A request that is sent to the same instance queues behind the one it shares with, and finds its
pages. Another instance can fetch them once they are there. Pages that an instance fetches are
not promised: a request sent there would not queue behind the fetch.

A promise names only the pages that nobody promised there before, so each page has one owner, and
what it takes is bounded by what is in flight.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sglang_memserve.types import InstanceId, ShortKey

MAX_PAGES = 1_000_000


@dataclass(frozen=True, slots=True)
class Expected:
    """Leading pages of a prompt that will be there, and seconds until they are."""

    pages: int
    in_s: float


@dataclass(frozen=True, slots=True, eq=False)
class Promise:
    instance: InstanceId
    keys: tuple[ShortKey, ...]
    due_at: float


class Coming:
    """Owned by one event loop."""

    def __init__(self, max_pages: int = MAX_PAGES) -> None:
        self._max_pages = max_pages
        self._pages = 0
        self._by_key: dict[InstanceId, dict[ShortKey, Promise]] = {}

    def promise(self, instance: InstanceId, keys: Sequence[ShortKey], due_at: float) -> Promise:
        """``keys``: pages ``instance`` does not hold yet. Those promised already stay as they
        are; nothing is promised beyond the bound. The caller withdraws it."""
        table = self._by_key.get(instance, {})
        new = tuple(key for key in keys if key not in table)
        if self._pages + len(new) > self._max_pages:
            new = ()
        made = Promise(instance, new, due_at)
        if new:
            self._by_key.setdefault(instance, table).update(dict.fromkeys(new, made))
            self._pages += len(new)
        return made

    def withdraw(self, promise: Promise) -> None:
        """Kept or broken: the tree knows now. Twice is fine."""
        table = self._by_key.get(promise.instance)
        if table is None or not promise.keys or table.get(promise.keys[0]) is not promise:
            return
        for key in promise.keys:
            del table[key]
        self._pages -= len(promise.keys)
        if not table:
            del self._by_key[promise.instance]

    def expected(
        self, instance: InstanceId, keys: Sequence[ShortKey], held: int, now: float
    ) -> Expected | None:
        """Beyond ``held`` leading pages; None when nothing more is on its way.

        Promises are prefixes, so the last page that is promised is found by halving.
        """
        table = self._by_key.get(instance)
        if table is None or held >= len(keys) or keys[held] not in table:
            return None
        low, high = held, len(keys)
        while high - low > 1:
            middle = (low + high) // 2
            if keys[middle] in table:
                low = middle
            else:
                high = middle
        late = now - table[keys[low]].due_at
        # Overdue work is expected to take as long again.
        return Expected(low + 1, abs(late))

    def busy(self) -> bool:
        return bool(self._by_key)

    def check(self) -> None:
        assert self._pages == sum(len(table) for table in self._by_key.values()) <= self._max_pages
        for instance, table in self._by_key.items():
            assert table, instance
            for key, promise in table.items():
                assert promise.instance == instance and key in promise.keys
