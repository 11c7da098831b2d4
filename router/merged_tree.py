"""The merged tree that the router runs: native where there is native code, else in Python."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

from sglang_memserve.kernels import native
from sglang_memserve.protocol.events import Event
from sglang_memserve.types import InstanceId, ShortKey, Tier

from .global_tree import DEFAULT_MAX_PAGES, GlobalTree, NodeView, TreeStats
from .native_tree import NativeTree
from .values import Match


class MergedTree(Protocol):
    """What both trees do; ``GlobalTree`` says how it is meant."""

    def match(self, keys: Sequence[ShortKey]) -> dict[InstanceId, Match]: ...

    def apply(self, instance: InstanceId, event: Event) -> None: ...

    def drop(self, instance: InstanceId) -> None: ...

    def replace(self, instance: InstanceId, events: Iterable[Event]) -> None: ...

    def dump(self, instance: InstanceId) -> list[Event]: ...

    def holders(self, key: ShortKey) -> dict[InstanceId, frozenset[Tier]]: ...

    def nodes(self) -> Iterator[NodeView]: ...

    def stats(self) -> TreeStats: ...

    def check(self) -> None: ...


def merged_tree(max_pages: int = DEFAULT_MAX_PAGES) -> MergedTree:
    """An empty tree of the faster kind that this machine has."""
    ops = native()
    if ops is None:
        return GlobalTree(max_pages)
    return NativeTree(ops.radix_tree(max_pages), max_pages)
