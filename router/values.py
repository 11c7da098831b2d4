"""The values a routing decision is made of. Pure data; no clock, socket or framework."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import Enum

from sglang_memserve.types import Generation, InstanceId, Role


@dataclass(frozen=True, slots=True)
class Match:
    """Leading pages of a prompt that an instance holds: ``pages`` in any tier, of which the first
    ``hbm_pages`` are in HBM. Others can fetch what is in DRAM: all but the last ``local_pages``."""

    pages: int
    hbm_pages: int = 0
    local_pages: int = 0

    @property
    def movable_pages(self) -> int:
        return self.pages - self.local_pages


class Moves(Enum):
    """Which pages may move between instances. ``FROM_PREFILL``: only those of prefill instances, so
    what a decode instance generated stays there. ``NONE``: each instance has only its own."""

    ALL = "all"
    FROM_PREFILL = "from-prefill"
    NONE = "none"


# Not frozen, since one is made for every instance and request: that would cost twice the time.
@dataclass(slots=True)
class InstanceView:
    """One instance as a decision sees it. Nobody changes one.

    ``in_flight_prefill_tokens``: uncached prompt tokens this router has sent there and that are
    not answered yet. ``running_requests``: what the router has in flight there, or the last
    heartbeat's figure if that is larger. ``free_tokens`` of ``total_tokens`` KV slots are free; the
    total is 0 where it is unknown. ``can_fetch`` is False for a plain SGLang server, which has no
    MemPool: nothing can be moved to it or from it.

    ``queue_s``: predicted seconds of computing that wait there. ``coming_pages``: leading pages
    that will be there in ``coming_s``, being computed there; 0 where no more than ``match``.
    """

    id: InstanceId
    generation: Generation
    role: Role
    running_requests: int = 0
    waiting_requests: int = 0
    in_flight_prefill_tokens: int = 0
    free_tokens: int = 0
    total_tokens: int = 0
    queue_s: float = 0.0
    coming_pages: int = 0
    coming_s: float = 0.0
    match: Match = field(default=Match(0))
    can_fetch: bool = True


def restrain(view: InstanceView, moves: Moves) -> InstanceView:
    """``view`` as a policy sees it where not all pages may move."""
    if moves is Moves.NONE:
        return replace(view, can_fetch=False)
    if moves is Moves.FROM_PREFILL and view.role is not Role.PREFILL:
        return replace(view, match=replace(view.match, local_pages=view.match.pages))
    return view


@dataclass(frozen=True, slots=True)
class Prompt:
    """``tokens`` and ``page_size`` size the work; ``session`` is the client's affinity key."""

    tokens: int
    page_size: int
    session: str | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """What to do with a request.

    ``prefill`` is None for a bypass: ``decode`` computes what it lacks by itself.
    ``prefill_source``: fetch from there to the prefill instance first (it holds more).
    ``decode_source``: with no prefill instance, fetch from there to ``decode`` first.
    ``held_pages``: what whoever computes need not compute, after the fetch.
    ``wait_s``: the pages to fetch first are still being computed; how long to wait for them.
    ``reason`` is one line for a header, a log and a person; ``terms`` the predicted seconds.
    """

    decode: InstanceId
    prefill: InstanceId | None = None
    prefill_source: InstanceId | None = None
    decode_source: InstanceId | None = None
    held_pages: int = 0
    wait_s: float = 0.0
    reason: str = ""
    terms: dict[str, float] = field(default_factory=dict)
