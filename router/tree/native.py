"""The merged tree over the native core: the same tree as ``reference``, several times faster.

The core knows instances by small numbers, given out here, and tiers by their bits; everything else,
the rules included, is as ``reference`` tells it. Both pass the same tests.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import cast

from sglang_memserve.errors import LimitExceeded, ProtocolError
from sglang_memserve.kernels import RadixTreeCore
from sglang_memserve.protocol.events import AllBlocksCleared, BlockStored, Event
from sglang_memserve.types import InstanceId, ShortKey, Tier

from ..values import Match
from .reference import BITS, DEFAULT_MAX_PAGES, MEDIUM_BITS, NodeView, TreeStats, tiers_of_bits

# The core's answers to ``store``; ``Stored`` in ``include/memserve/radix_tree.h``.
_DONE, _PAGE_TWICE, _BELOW_ITSELF, _FULL = range(4)

# Instances that hold a prompt mostly hold one of a few lengths of it, and a Match never changes.
_match = functools.lru_cache(maxsize=4096)(Match)


class NativeTree:
    """``core`` is empty, and used by this tree alone."""

    def __init__(self, core: RadixTreeCore, max_pages: int = DEFAULT_MAX_PAGES) -> None:
        self._core = core
        self._max_pages = max_pages
        self._numbers: dict[InstanceId, int] = {}
        self._names: list[InstanceId] = []
        self._free: list[int] = []
        self._block_size: dict[InstanceId, int] = {}
        self._ignored_events = 0

    def match(self, keys: Sequence[ShortKey]) -> dict[InstanceId, Match]:
        """As ``GlobalTree.match``."""
        names = self._names
        return {
            names[who]: _match(pages, hbm, pages - dram)
            for who, pages, hbm, dram in self._core.match_tiers(keys)
        }

    def apply(self, instance: InstanceId, event: Event) -> None:
        """As ``GlobalTree.apply``; a page key beyond 64 bits is a ProtocolError too."""
        if isinstance(event, AllBlocksCleared):
            self._clear(instance)
            return
        bit = MEDIUM_BITS.get(event.medium)
        try:
            if bit is None:
                self._ignored_events += 1
            elif isinstance(event, BlockStored):
                self._store(instance, event, bit)
            elif instance in self._numbers:
                self._core.remove(self._numbers[instance], event.block_hashes, bit)
        except (ValueError, TypeError) as error:
            raise ProtocolError(f"event of {instance}: {error}") from error

    def drop(self, instance: InstanceId) -> None:
        """As ``GlobalTree.drop``."""
        self._clear(instance)
        number = self._numbers.pop(instance, None)
        if number is not None:
            self._free.append(number)
        self._block_size.pop(instance, None)

    def replace(self, instance: InstanceId, events: Iterable[Event]) -> None:
        """As ``GlobalTree.replace``."""
        self._clear(instance)
        for event in events:
            self.apply(instance, event)

    def dump(self, instance: InstanceId) -> list[Event]:
        """As ``GlobalTree.dump``."""
        if instance not in self._numbers:
            return []
        return [
            BlockStored(
                block_hashes=keys,
                parent_block_hash=parent,
                token_ids=[],
                block_size=self._block_size.get(instance, 0),
                medium=tier.value,
            )
            for keys, parent, tiers in self._core.dump(self._numbers[instance])
            for tier, bit in BITS.items()
            if tiers & bit
        ]

    def held(self, instance: InstanceId) -> int:
        """As ``GlobalTree.held``."""
        number = self._numbers.get(instance)
        return 0 if number is None else sum(self._core.counts(number))

    def holders(self, key: ShortKey) -> dict[InstanceId, frozenset[Tier]]:
        """Who holds one page, and where."""
        return {self._names[who]: tiers_of_bits(bits) for who, bits in self._core.holders(key)}

    def nodes(self) -> Iterator[NodeView]:
        """Every node, in no particular order. Do not change the tree meanwhile."""
        for place in range(self._core.capacity):
            node = self._core.node_at(place)
            if node is not None:
                keys, parent, holders = node
                yield NodeView(
                    tuple(cast(list[ShortKey], keys)),
                    cast(ShortKey | None, parent),
                    {self._names[who]: tiers_of_bits(bits) for who, bits in holders},
                )

    def stats(self) -> TreeStats:
        held = {
            instance: dict(zip((Tier.HBM, Tier.DRAM), self._core.counts(number), strict=True))
            for instance, number in self._numbers.items()
        }
        core = self._core
        return TreeStats(core.nodes, core.pages, held, self._ignored_events, core.rings)

    def check(self) -> None:
        """Assert every invariant; time proportional to the tree."""
        wrong = self._core.check()
        assert wrong is None, wrong
        numbers = [*self._numbers.values(), *self._free]
        assert sorted(numbers) == list(range(len(self._names))), numbers
        for instance, number in self._numbers.items():
            assert self._names[number] == instance, (instance, number)
        for number in self._free:
            assert self._core.counts(number) == (0, 0), number

    # -- for this module --

    def _store(self, instance: InstanceId, event: BlockStored, bit: int) -> None:
        number = self._numbers.get(instance)
        if number is None:
            number = self._free[-1] if self._free else len(self._names)
        outcome = self._core.store(number, event.block_hashes, event.parent_block_hash, bit)
        if outcome == _PAGE_TWICE:
            raise ProtocolError(f"stored chain of {instance} contains a page twice")
        if outcome == _BELOW_ITSELF:
            raise ProtocolError(f"stored chain of {instance} hangs below itself")
        if outcome == _FULL:
            raise LimitExceeded(f"the global tree is full ({self._max_pages} pages)")
        assert outcome == _DONE, outcome
        if instance not in self._numbers:
            self._numbers[instance] = number
            if self._free:
                self._free.pop()
                self._names[number] = instance
            else:
                self._names.append(instance)
        self._block_size[instance] = event.block_size

    def _clear(self, instance: InstanceId) -> None:
        if instance in self._numbers:
            self._core.clear(self._numbers[instance])
