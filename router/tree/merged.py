"""The merged tree that the router runs: native where there is native code, else in Python."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

from sglang_memserve.kernels import RadixTreeCore, native
from sglang_memserve.protocol.events import Event
from sglang_memserve.types import InstanceId, ShortKey, Tier

from ..values import Match
from .native import NativeTree
from .reference import DEFAULT_MAX_PAGES, GlobalTree, NodeView, TreeStats

log = logging.getLogger(__name__)


class Matcher(Protocol):
    """What decisions ask."""

    def match(self, keys: Sequence[ShortKey]) -> dict[InstanceId, Match]: ...


class MergedTree(Matcher, Protocol):
    """What both trees do; ``GlobalTree`` says how it is meant."""

    def apply(self, instance: InstanceId, event: Event) -> None: ...

    def drop(self, instance: InstanceId) -> None: ...

    def replace(self, instance: InstanceId, events: Iterable[Event]) -> None: ...

    def dump(self, instance: InstanceId) -> list[Event]: ...

    def held(self, instance: InstanceId) -> int: ...

    def holders(self, key: ShortKey) -> dict[InstanceId, frozenset[Tier]]: ...

    def nodes(self) -> Iterator[NodeView]: ...

    def stats(self) -> TreeStats: ...

    def check(self) -> None: ...


def merged_tree(max_pages: int = DEFAULT_MAX_PAGES) -> MergedTree:
    """An empty tree of the faster kind that this machine has."""
    core = native_core(max_pages)
    return GlobalTree(max_pages) if core is None else NativeTree(core, max_pages)


def native_core(max_pages: int, position_limit: int = 1 << 30) -> RadixTreeCore | None:
    """An empty native tree; None where there is none, or one built from older sources."""
    ops = native()
    if ops is None:
        return None
    core = ops.radix_tree(max_pages, position_limit)
    if not hasattr(core, "match_tiers"):
        log.warning("the native radix tree is older than this router: build sgl-kernel-ext again")
        return None
    return core
