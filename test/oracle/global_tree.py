"""The merged tree, obviously right and slow: a set of (page, tier) for each instance."""

from __future__ import annotations

from collections.abc import Sequence

from sglang_memserve.protocol.events import AllBlocksCleared, BlockStored, Event
from sglang_memserve.router.values import Match
from sglang_memserve.types import InstanceId, ShortKey, Tier


class FlatTree:
    def __init__(self) -> None:
        self.held: dict[InstanceId, set[tuple[int, Tier]]] = {}

    def apply(self, instance: InstanceId, event: Event) -> None:
        if isinstance(event, AllBlocksCleared):
            self.held[instance] = set()
            return
        pages = {(key, Tier(event.medium or Tier.HBM.value)) for key in event.block_hashes}
        if isinstance(event, BlockStored):
            self.held.setdefault(instance, set()).update(pages)
        else:
            self.held.setdefault(instance, set()).difference_update(pages)

    def drop(self, instance: InstanceId) -> None:
        self.held.pop(instance, None)

    def match(self, keys: Sequence[ShortKey]) -> dict[InstanceId, Match]:
        found = {}
        for instance, held in self.held.items():
            pages = hbm = dram = 0
            while pages < len(keys) and any((keys[pages], tier) in held for tier in Tier):
                pages += 1
            while hbm < pages and (keys[hbm], Tier.HBM) in held:
                hbm += 1
            while dram < pages and (keys[dram], Tier.DRAM) in held:
                dram += 1
            if pages:
                found[instance] = Match(pages, hbm, pages - dram)
        return found

    def pages(self, instance: InstanceId, tier: Tier) -> int:
        return sum(held_in is tier for _, held_in in self.held.get(instance, set()))
