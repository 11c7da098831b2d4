"""Reads the merged tree for the drawing, a little at a time, while requests go on.

The tree may change meanwhile: a run can be missed or seen twice, which a drawing bears. A survey
runs only while somebody looks, and rests ``REST_FACTOR`` times as long as it took.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass

from sglang_memserve.types import InstanceId, ShortKey

from ..request.journal import Heat, Journal
from ..tree.merged import MergedTree
from ..tree.reference import BITS
from .outline import Drawn, Span, outline

SLICE_S = 0.002
PAUSE_S = 0.005
LEAST_REST_S = 2.0
REST_FACTOR = 10.0
MOST_RUNS = 200_000


@dataclass(frozen=True, slots=True)
class Survey:
    """``members``: who the numbers in ``drawn`` are. ``complete`` is False when there were more
    than ``MOST_RUNS`` runs."""

    number: int
    members: tuple[InstanceId, ...]
    drawn: list[Drawn]
    pages: int
    runs: int
    complete: bool
    seconds: float


class Surveyor:
    def __init__(self, tree: MergedTree, journal: Journal) -> None:
        self._tree = tree
        self._journal = journal
        self._latest = Survey(0, (), [], 0, 0, True, 0.0)
        self._rested_at = 0.0
        self._task: asyncio.Task[None] | None = None

    def latest(self) -> Survey:
        """The last one, at once; a new one is begun when it is time."""
        now = time.monotonic()
        if (self._task is None or self._task.done()) and now >= self._rested_at:
            self._task = asyncio.create_task(self._look(), name="survey of the tree")
        return self._latest

    async def fresh(self) -> Survey:
        """The latest after the survey that is under way, if one is."""
        survey = self.latest()
        if self._task is not None and not self._task.done():
            await asyncio.shield(self._task)
            survey = self._latest
        return survey

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _look(self) -> None:
        began = time.monotonic()
        try:
            spans, members, complete = await self._spans(self._journal.heat())
            drawn = await asyncio.to_thread(outline, spans)
            stats = self._tree.stats()
            took_s = time.monotonic() - began
            self._latest = Survey(
                self._latest.number + 1,
                tuple(members),
                drawn,
                stats.pages,
                stats.nodes,
                complete,
                took_s,
            )
        finally:
            took_s = time.monotonic() - began
            self._rested_at = time.monotonic() + max(LEAST_REST_S, REST_FACTOR * took_s)

    async def _spans(
        self, heat: Mapping[ShortKey, Heat]
    ) -> tuple[list[Span], dict[InstanceId, int], bool]:
        hot, now = set(heat), self._journal.now()
        spans: list[Span] = []
        members: dict[InstanceId, int] = {}
        until = time.monotonic() + SLICE_S
        nodes = self._tree.nodes()
        while True:
            try:
                node = next(nodes, None)
            except RuntimeError:
                # The tree in Python cannot be walked while it changes: this time without a pause.
                nodes, spans, until = self._tree.nodes(), [], float("inf")
                continue
            if node is None:
                return spans, members, True
            if len(spans) >= MOST_RUNS:
                return spans, members, False
            holders = {
                members.setdefault(who, len(members)): sum(BITS[tier] for tier in tiers)
                for who, tiers in node.holders.items()
            }
            asked = [heat[key] for key in hot.intersection(node.keys)] if hot else []
            spans.append(
                Span(
                    first=node.keys[0],
                    last=node.keys[-1],
                    pages=len(node.keys),
                    parent=node.parent_key,
                    holders=holders,
                    hits=sum(one.hits for one in asked),
                    used_s=now - max(one.last_at for one in asked) if asked else None,
                    known_s=now - min(one.first_at for one in asked) if asked else None,
                )
            )
            if time.monotonic() >= until:
                await asyncio.sleep(PAUSE_S)
                until = time.monotonic() + SLICE_S
