"""Which pages the engine's own pool holds, by key: what routers call HBM.

A mirror, told of changes by whoever watches the engine's tree (``plugin.device_watch``). It decides
nothing: which page the engine drops is the engine's affair. Kept beside the index of blocks so that
both tiers are in one stream of events and one snapshot, under one number.

About 120 bytes a page by ``tracemalloc``; as many pages as the engine's pool has. Not thread-safe.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..types import PageKey, Tier
from .journal import Dropped, Record, Stored, rebuild


class DevicePages:
    def __init__(self) -> None:
        self._parents: dict[PageKey, PageKey | None] = {}

    def __len__(self) -> int:
        return len(self._parents)

    def apply(self, changes: Sequence[Record]) -> list[Record]:
        """Make the changes; returns those parts that changed something, in the same order."""
        made: list[Record] = []
        for change in changes:
            match change:
                case Stored(keys, parent):
                    made += self._store(keys, parent)
                case Dropped(keys):
                    made += self._drop(keys)
                case _:
                    made += self.clear()
        return made

    def clear(self) -> list[Record]:
        gone = list(self._parents)
        self._parents.clear()
        return [Dropped(gone, Tier.HBM)] if gone else []

    def pages(self) -> list[Stored]:
        """The records that lead from an empty mirror to this one, parents before children."""
        return rebuild(list(self._parents), list(self._parents.values()), Tier.HBM)

    def _store(self, keys: Sequence[PageKey], parent: PageKey | None) -> list[Record]:
        parents = self._parents
        runs: list[Record] = []
        run: list[PageKey] | None = None
        for key in keys:
            if key in parents:
                run = None
            else:
                parents[key] = parent
                if run is None:
                    run = []
                    runs.append(Stored(run, parent, Tier.HBM))
                run.append(key)
            parent = key
        return runs

    def _drop(self, keys: Sequence[PageKey]) -> list[Record]:
        gone = [key for key in keys if self._parents.pop(key, self) is not self]
        return [Dropped(gone, Tier.HBM)] if gone else []
