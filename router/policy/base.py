"""What a policy is, and what all of them share.

A policy is a pure function: the same prompt, views and rotation give the same plan, nothing is
changed, and instances are told apart by what they are, not by what they are called (only
``session`` looks at names). The caller moves the rotation on, once a request.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar, runtime_checkable

from sglang_memserve.errors import NoInstance

from ..values import InstanceView, Plan, Prompt

_T = TypeVar("_T")

DEFAULT_BYPASS_TOKENS = 96
"""Uncached tokens that a decode instance computes itself under the policies that predict nothing.

On a CPU (1 ms a token) a detour over a prefill instance costs what computing about 100 tokens does.
"""


class Policy(Protocol):
    def decide(self, prompt: Prompt, views: Sequence[InstanceView]) -> Plan:
        """Where to prefill, what to fetch and where to decode.

        ``views`` are the instances that may be used now, in a steady order. Raises NoInstance,
        with a reason for each of them, when none can decode.
        """
        ...


@runtime_checkable
class Weighing(Policy, Protocol):
    """A policy that compares plans by what they are predicted to cost."""

    def candidates(self, prompt: Prompt, views: Sequence[InstanceView], most: int) -> list[Plan]:
        """The best ``most`` of them, best first by ``terms["total"]``. Raises as ``decide``."""
        ...


@dataclass(slots=True)
class Rotation:
    """The counter that breaks ties: explicit state, read by ``decide``, moved by the caller."""

    turn: int = 0

    def advance(self) -> None:
        """Call once for every request that was placed (a retry is not another request)."""
        self.turn += 1


def rotated(items: Sequence[_T], turn: int) -> list[_T]:
    """Beginning with another one each turn: the first of equals is not always the same."""
    at = turn % len(items) if items else 0
    return [*items[at:], *items[:at]]


def usable_pages(prompt: Prompt) -> int:
    """Full pages of a prompt that a cache can serve: the engine always computes the last token."""
    return max(prompt.tokens - 1, 0) // prompt.page_size


def cached_pages(prompt: Prompt, view: InstanceView) -> int:
    return min(view.match.pages, usable_pages(prompt))


def movable_pages(prompt: Prompt, view: InstanceView) -> int:
    """Of ``cached_pages``, those that another instance can fetch."""
    return min(view.match.movable_pages, usable_pages(prompt))


def can_hand_over(prompt: Prompt, prefill: InstanceView, decode: InstanceView) -> bool:
    """Whether ``decode`` can fetch all that ``prefill`` will have. Pages that are in HBM alone are
    not computed again, so they do not become fetchable by a prefill."""
    held = cached_pages(prompt, prefill)
    return movable_pages(prompt, prefill) == held or cached_pages(prompt, decode) >= held


def uncached_tokens(prompt: Prompt, view: InstanceView) -> int:
    return prompt.tokens - cached_pages(prompt, view) * prompt.page_size


def decode_candidates(views: Sequence[InstanceView]) -> list[InstanceView]:
    """Those whose role lets them decode; when there are none, everybody.

    A role steers routing, and every instance is a whole engine: a cluster that lost its decode
    instances answers from the others. Raises NoInstance without any view.
    """
    if not views:
        raise NoInstance({})
    return [view for view in views if view.role.can_decode] or list(views)


def load_of(view: InstanceView) -> tuple[int, int]:
    """Requests there, then prompt tokens there; smaller is idler."""
    return view.running_requests + view.waiting_requests, view.in_flight_prefill_tokens


def by_load(tied: Sequence[InstanceView], turn: int) -> InstanceView:
    """The idlest; equals take turns."""
    least = min(load_of(view) for view in tied)
    idlest = [view for view in tied if load_of(view) == least]
    return idlest[turn % len(idlest)]


def best_source(
    prompt: Prompt, target: InstanceView, views: Sequence[InstanceView]
) -> InstanceView | None:
    """Who holds the most pages, if that is more than ``target`` has and they can be moved."""
    if not target.can_fetch:
        return None
    holders = [view for view in views if view.can_fetch and view.id != target.id]
    best = max(holders, key=lambda view: movable_pages(prompt, view), default=None)
    if best is None or movable_pages(prompt, best) <= cached_pages(prompt, target):
        return None
    return best


def complete(
    prompt: Prompt,
    decode: InstanceView,
    views: Sequence[InstanceView],
    choose_prefill: Callable[[Sequence[InstanceView]], InstanceView],
    bypass_tokens: int | None,
    why: str,
) -> Plan:
    """A plan around a chosen decode instance, for the policies that predict nothing.

    The decode instance computes the rest itself when that is short, when it may prefill too, or
    when nobody else can; else ``choose_prefill`` picks among the others. Whoever computes fetches
    first from whoever holds more.
    """
    limit = DEFAULT_BYPASS_TOKENS if bypass_tokens is None else bypass_tokens
    source = best_source(prompt, decode, views)
    held = cached_pages(prompt, decode) if source is None else movable_pages(prompt, source)
    rest = prompt.tokens - held * prompt.page_size
    others = [v for v in views if v.role.can_prefill and v.can_fetch and v.id != decode.id]
    others = [view for view in others if can_hand_over(prompt, view, decode)]
    whole_pages_left = usable_pages(prompt) > held
    short = rest <= limit or not whole_pages_left
    if short or decode.role.can_prefill or not others or not decode.can_fetch:
        moved = "" if source is None else f", pages from {source.id}"
        reason = f"{why}: {decode.id} computes {rest} tokens{moved}"
        moved_from = None if source is None else source.id
        return Plan(decode.id, decode_source=moved_from, held_pages=held, reason=reason)
    prefill = choose_prefill(others)
    source = best_source(prompt, prefill, views)
    held = cached_pages(prompt, prefill) if source is None else movable_pages(prompt, source)
    rest = prompt.tokens - held * prompt.page_size
    moved = "" if source is None else f", pages from {source.id}"
    reason = f"{why}: {prefill.id} computes {rest} tokens{moved}, {decode.id} decodes"
    moved_from = None if source is None else source.id
    return Plan(decode.id, prefill.id, moved_from, held_pages=held, reason=reason)
