"""SGLang's radix tree and device allocator, as the device verbs need them.

Everything here runs on the scheduler thread between two steps. Ranks of one instance have equal
trees, so what this module answers is equal on all of them.

Locks in SGLang's tree cover a node and all its ancestors. So the part of a path that somebody
holds is always its head, and ``inc_lock_ref`` tells how long the free rest is: ``delta``.
A native tree core aborts when a node that is not an unlocked leaf is evicted: ``evict`` makes sure.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from sglang.srt.mem_cache.base_prefix_cache import InsertParams, MatchPrefixParams
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.unified_cache.component_type import ComponentType

from ..types import PageKey


@dataclass(frozen=True, slots=True)
class Prefix:
    """Tokens in their namespace, and the keys of their full pages."""

    tokens: array[int]
    keys: tuple[PageKey, ...]
    extra_key: str | None = None
    cache_salt: str | None = None


@dataclass(frozen=True, slots=True)
class Hold:
    """A lock on a node and its ancestors. ``free_tokens``: of the path's end nobody else holds."""

    node: int
    receipt: Any
    tokens: int
    free_tokens: int


@dataclass(frozen=True, slots=True)
class Span:
    """A node of a path: tokens ``start .. end - 1``. ``parent`` may be the root."""

    node: int
    parent: int
    start: int
    end: int
    children: int


class DeviceTree:
    """Over ``UnifiedRadixCache``."""

    def __init__(self, cache: Any) -> None:
        self._cache = cache
        self._core = cache.tree_core
        self._allocator = cache.token_to_kv_pool_allocator
        self.page_size: int = cache.page_size

    @property
    def supported(self) -> bool:
        """A tree for speculative decoding keys pairs of tokens, which the verbs do not."""
        return not self._core.is_eagle

    @property
    def storing(self) -> bool:
        """Whether SGLang holds nodes until their write-through is done: a matter of milliseconds,
        unlike the hold of a request."""
        return bool(self._cache.linker.pending_offloads)

    # -- looking --

    def match(self, prefix: Prefix) -> int:
        """Leading pages of ``prefix`` in HBM. Changes nothing, not even recency."""
        if not prefix.tokens:
            return 0
        tokens, _, _ = self._core.match_full_device_prefix(self._key(prefix, len(prefix.keys)))
        return int(tokens) // self.page_size

    def path(self, node: int) -> list[Span]:
        """From the root's child to ``node``; empty for the root. Raises KeyError."""
        (infos,) = self._core.collect_path_info([node])
        return [_span(info) for info in infos]

    def below(self, node: int) -> list[list[Span]]:
        """For every leaf under ``node`` that may be evicted: the spans from below ``node`` to it.

        Takes the time of a look at all evictable leaves, so ask only for nodes with children."""
        full = ComponentType.FULL
        leaves = []
        # The walk that evicts, without evicting: it offers every evictable leaf once.
        self._core.evict_device_start(full, self._core.full_evictable_size() + 1)
        try:
            while (step := self._core.evict_device_next_node(full, {full: 0})).node_id is not None:
                leaves.append(step.node_id)
        finally:
            self._core.evict_device_end(full)
        found = []
        for infos in self._core.collect_path_info(leaves):
            nodes = [info.node_id for info in infos]
            if node in nodes and nodes[-1] != node:
                found.append([_span(info) for info in infos[nodes.index(node) + 1 :]])
        return found

    def keys_of(self, span: Span) -> list[PageKey]:
        return [PageKey(bytes.fromhex(key)) for key in self._core.get_hash_values(span.node)]

    def parent_key(self, span: Span) -> PageKey | None:
        """Key of the page before the span's first."""
        if span.start == 0:
            return None
        return PageKey(bytes.fromhex(self._core.get_last_hash_value(span.parent)))

    def slots(self, span: Span) -> torch.Tensor:
        """Device slots of one node: int64 ``[tokens]``."""
        slots: torch.Tensor = self._core.collect_full_device_indices(span.node, span.parent)
        return slots

    # -- holding --

    def hold(self, prefix: Prefix) -> Hold | None:
        """Lock what of ``prefix`` is in HBM, which counts as a use of it; None if nothing is.

        A node that reaches beyond the prefix is split, so that the hold ends with it."""
        key = self._key(prefix, len(prefix.keys))
        found = self._cache.match_prefix(MatchPrefixParams(key=key))
        if found.device_prefix_len == 0:
            return None
        return self.hold_node(found.last_device_node)

    def hold_node(self, node: int) -> Hold:
        tokens = self.path(node)[-1].end
        lock = self._cache.inc_lock_ref(node)
        return Hold(node, lock.to_dec_params(), tokens, int(lock.delta))

    def release(self, hold: Hold) -> None:
        self._cache.dec_lock_ref(hold.node, hold.receipt)

    # -- changing --

    def evict(self, node: int) -> int:
        """Tokens freed: none unless ``node`` is a leaf that nobody holds. It leaves the tree."""
        try:
            span = self.path(node)[-1]
        except KeyError:
            return 0
        probe = self.hold_node(node)
        self.release(probe)
        if span.children or probe.free_tokens < span.end - span.start:
            return 0
        tracker = {ComponentType.FULL: 0}
        backup = self._cache._evict_device_leaf(node, tracker)
        assert backup is None, f"node {node} is to be written back"
        return tracker[ComponentType.FULL]

    def room(self) -> int:
        """Tokens that are free or can be evicted."""
        return int(self._allocator.available_size() + self._cache.evictable_size())

    def allocate(self, tokens: int) -> torch.Tensor | None:
        """Device slots of whole pages, evicting the least recently used; None if there are not so
        many. They belong to nobody in the tree until ``insert`` or ``free``."""
        self._allocator.evict_to_free_tokens(self._cache, tokens)
        slots: torch.Tensor | None = self._allocator.alloc(tokens)
        return slots

    def free(self, slots: torch.Tensor) -> None:
        self._allocator.free(slots)

    def insert(self, prefix: Prefix, held: Hold | None, slots: torch.Tensor) -> None:
        """Slots that continue what is held become part of the tree, unlocked. Pages that the tree
        has got meanwhile keep their own slots, and ours are freed."""
        known = held.tokens if held is not None else 0
        if held is not None:
            slots = torch.cat([self._cache.path_device_indices(held.node), slots])
        key = self._key(prefix, len(slots) // self.page_size)
        self._cache.insert(InsertParams(key=key, value=slots, prev_prefix_len=known))

    def _key(self, prefix: Prefix, pages: int) -> RadixKey:
        tokens = prefix.tokens[: pages * self.page_size]
        return RadixKey(tokens, prefix.extra_key, cache_salt=prefix.cache_salt)


def leading(spans: Sequence[Span], pages: int, page_size: int) -> int:
    """Of ``spans``' pages, those among the first ``pages``."""
    inside = (max(0, min(span.end, pages * page_size) - span.start) for span in spans)
    return sum(inside) // page_size


def _span(info: Any) -> Span:
    return Span(info.node_id, info.parent_id, info.path_start, info.path_end, info.num_children)
