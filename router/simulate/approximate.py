"""The peer: routing by a tree that knows only what the router itself has sent where.

What ``sglang-router``'s ``cache_aware`` policy does, as its documentation tells it: a request goes
to the worker that was sent the longest part of its prompt, if that is more than a share of it;
otherwise, and whenever the workers are out of balance, to the one with the fewest requests. No
events, so what a worker has evicted is still believed to be there until the tree's own bound lets
go of it. No pages move between workers but from prefill to decode, as in SGLang's own
disaggregation; the decode worker is the one with the fewest requests. The workers have DRAM too
(SGLang's hierarchical cache), of the same size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sglang_memserve.hashing import short_keys
from sglang_memserve.protocol.events import BlockRemoved, BlockStored
from sglang_memserve.types import Eviction, InstanceId, Role

from ..policy.base import Rotation, by_load, cached_pages, decode_candidates
from ..request.placement import Chain
from ..tree.merged import MergedTree, merged_tree
from ..values import InstanceView, Plan, Prompt
from .pages import Pages

NAME = "approximate"
# Defaults of sglang-router (and of SMG, its successor).
MATCH_SHARE = 0.3
APART_REQUESTS = 64
APART_RATIO = 1.5
# 2**26 characters a worker: in tokens of four and pages of 128.
WORKER_PAGES = 2**17


@dataclass(frozen=True, slots=True)
class Approximate:
    """A ``Policy`` over views whose matches are what ``Sent`` believes."""

    rotation: Rotation

    def decide(self, prompt: Prompt, views: Sequence[InstanceView]) -> Plan:
        decoding = decode_candidates(views)
        prefilling = [view for view in views if view.role is Role.PREFILL]
        if not prefilling:
            chosen = self._choose(prompt, decoding)
            held = cached_pages(prompt, chosen)
            return Plan(chosen.id, held_pages=held, reason=f"approximate: {chosen.id}")
        chosen = self._choose(prompt, prefilling)
        decode = by_load(decoding, self.rotation.turn)
        held = cached_pages(prompt, chosen)
        reason = f"approximate: {chosen.id}, {decode.id} decodes"
        return Plan(decode.id, chosen.id, held_pages=held, reason=reason)

    def _choose(self, prompt: Prompt, views: Sequence[InstanceView]) -> InstanceView:
        loads = [view.running_requests for view in views]
        apart = max(loads) - min(loads) > APART_REQUESTS and max(loads) > APART_RATIO * min(loads)
        most = max(cached_pages(prompt, view) for view in views)
        if apart or most * prompt.page_size <= MATCH_SHARE * prompt.tokens:
            return by_load(views, self.rotation.turn)
        tied = [view for view in views if cached_pages(prompt, view) == most]
        return by_load(tied, self.rotation.turn)


class Sent:
    """What was sent where, each worker's share bounded, the least recently sent forgotten first."""

    def __init__(self, page_tokens: int, native: Callable[[], MergedTree] = merged_tree) -> None:
        self.tree = native()
        self._page_tokens = page_tokens
        self._pages: dict[InstanceId, Pages] = {}

    def remember(self, instance: InstanceId, chain: Chain) -> None:
        pages = self._pages.get(instance)
        if pages is None:
            pages = Pages(WORKER_PAGES, Eviction.LRU)
            self._pages[instance] = pages
        change = pages.store(chain.keys, 0, len(chain.keys))
        if change.removed:
            self.tree.apply(instance, BlockRemoved([*short_keys(change.removed)]))
        if change.stored:
            at = chain.keys.index(change.stored[0])
            parent = chain.short[at - 1] if at else None
            stored = chain.short[at : at + len(change.stored)]
            self.tree.apply(instance, BlockStored([*stored], parent, [], self._page_tokens))
