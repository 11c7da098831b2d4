"""The merged tree as a drawing: its heaviest runs, the rest lumped together. Pure.

A node's width is its subtree's pages. What does not fit among ``most`` nodes becomes one node a
parent, "the rest", so widths still add up.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from sglang_memserve.types import ShortKey

MOST_NODES = 400


@dataclass(frozen=True, slots=True)
class Span:
    """One run of pages as the survey saw it: its first and last page, how many, below which page;
    who holds it, by number, in which tiers (bits). Times are ages in seconds."""

    first: ShortKey
    last: ShortKey
    pages: int
    parent: ShortKey | None
    holders: Mapping[int, int]
    hits: int = 0
    used_s: float | None = None
    known_s: float | None = None


@dataclass(frozen=True, slots=True)
class Drawn:
    """A node of the drawing. ``above``: index of its parent in the drawing, -1 for a root.
    ``start``: pages before it in its prefix. ``weight``: pages of its subtree, itself included;
    ``runs``: how many runs those are. ``key`` is empty for what is lumped together."""

    key: str
    above: int
    start: int
    pages: int
    weight: int
    runs: int
    hits: int
    used_s: float | None
    known_s: float | None
    holders: Mapping[int, int]


@dataclass(slots=True)
class _Forest:
    spans: Sequence[Span]
    children: dict[int, list[int]] = field(default_factory=dict)
    roots: list[int] = field(default_factory=list)
    weight: list[int] = field(default_factory=list)
    runs: list[int] = field(default_factory=list)
    hits: list[int] = field(default_factory=list)
    used: list[float | None] = field(default_factory=list)


def outline(spans: Sequence[Span], most: int = MOST_NODES) -> list[Drawn]:
    """At most ``most`` runs, heaviest first, parents before children, and a rest for each parent
    that has more. Runs that hang below themselves (a faulty sender's) are left out."""
    forest = _forest(spans)
    drawn: list[Drawn] = []
    heap: list[tuple[int, int, int, int]] = []
    left: dict[int, list[int]] = {}

    def offer(children: list[int], above: int, start: int) -> None:
        for child in children:
            heapq.heappush(heap, (-forest.weight[child], child, above, start))

    offer(forest.roots, -1, 0)
    while heap and len(drawn) < most:
        _, at, above, start = heapq.heappop(heap)
        span = forest.spans[at]
        place = len(drawn)
        drawn.append(
            Drawn(
                key=f"{span.first & (2**64 - 1):016x}",
                above=above,
                start=start,
                pages=span.pages,
                weight=forest.weight[at],
                runs=forest.runs[at],
                hits=forest.hits[at],
                used_s=forest.used[at],
                known_s=span.known_s,
                holders=dict(span.holders),
            )
        )
        offer(forest.children.get(at, []), place, start + span.pages)
    starts: dict[int, int] = {}
    for _, at, above, start in heap:
        left.setdefault(above, []).append(at)
        starts[above] = start
    for above, rest in left.items():
        drawn.append(_lump(forest, rest, above, starts[above]))
    return drawn


def _lump(forest: _Forest, rest: Sequence[int], above: int, start: int) -> Drawn:
    holders: dict[int, int] = {}
    for at in rest:
        for who, tiers in forest.spans[at].holders.items():
            holders[who] = holders.get(who, 0) | tiers
    weight = sum(forest.weight[at] for at in rest)
    recent = [used for at in rest if (used := forest.used[at]) is not None]
    return Drawn(
        key="",
        above=above,
        start=start,
        pages=weight,
        weight=weight,
        runs=sum(forest.runs[at] for at in rest),
        hits=sum(forest.hits[at] for at in rest),
        used_s=min(recent, default=None),
        known_s=None,
        holders=holders,
    )


def _forest(spans: Sequence[Span]) -> _Forest:
    # A survey takes its time: a run that was split meanwhile may have been seen twice.
    spans = list({span.first: span for span in spans}.values())
    ends = {span.last: at for at, span in enumerate(spans)}
    forest = _Forest(spans)
    for at, span in enumerate(spans):
        above = ends.get(span.parent) if span.parent is not None else None
        if above is None or above == at:
            forest.roots.append(at)
        else:
            forest.children.setdefault(above, []).append(at)
    order: list[int] = []
    waiting = list(forest.roots)
    while waiting:
        at = waiting.pop()
        order.append(at)
        waiting += forest.children.get(at, [])
    forest.weight = [span.pages for span in spans]
    forest.runs = [1] * len(spans)
    forest.hits = [span.hits for span in spans]
    forest.used = [span.used_s for span in spans]
    for at in reversed(order):
        for child in forest.children.get(at, []):
            forest.weight[at] += forest.weight[child]
            forest.runs[at] += forest.runs[child]
            forest.hits[at] += forest.hits[child]
            ages = [age for age in (forest.used[at], forest.used[child]) if age is not None]
            forest.used[at] = min(ages, default=None)
    return forest
