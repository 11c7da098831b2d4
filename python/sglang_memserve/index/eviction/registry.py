"""Policies by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ...types import Eviction
from .base import EvictionPolicy
from .lru import Lru
from .two_queue import TwoQueue

POLICIES: Mapping[Eviction, Callable[[int], EvictionPolicy]] = {
    Eviction.LRU: Lru,
    Eviction.TWO_QUEUE: TwoQueue,
}


def make_policy(eviction: Eviction, total_blocks: int) -> EvictionPolicy:
    return POLICIES[eviction](total_blocks)
