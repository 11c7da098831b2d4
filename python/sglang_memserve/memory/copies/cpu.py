"""Copies where the device pool lies in host memory.

Two things make them fast without native code:

- Rows that are neighbours at the destination are written by one ``index_select(out=...)``, three
  times faster than ``index_copy_``, which is left for scattered rows. The pairs are sorted by
  destination to find neighbours.
- The loop over tensors is TorchScript: it lets go of the GIL once a call instead of once a tensor.
  A thread busy in Python hands the GIL over only after the interpreter's switch interval (5 ms),
  and every one of 100 small operations would wait for that.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import List, cast  # noqa: UP035 - TorchScript knows List only

import torch

from ..arena import Arena
from .base import ArenaViews, PoolTensors, RowPlan, Rows


def copy_rows_reference(
    to: List[torch.Tensor],  # noqa: UP006
    source: List[torch.Tensor],  # noqa: UP006
    rows_to: torch.Tensor,
    rows_from: torch.Tensor,
    runs: List[int],  # noqa: UP006
) -> None:
    """``to[i][rows_to] = source[i][rows_from]`` for every i; ``runs`` as in ``RowPlan``."""
    for i in range(len(to)):
        if len(runs) == 0:
            to[i].index_copy_(0, rows_to, source[i].index_select(0, rows_from))
        for j in range(0, len(runs), 3):
            start, stop, first = runs[j], runs[j + 1], runs[j + 2]
            torch.index_select(
                source[i], 0, rows_from[start:stop], out=to[i][first : first + stop - start]
            )


CopyRows = Callable[
    [list[torch.Tensor], list[torch.Tensor], torch.Tensor, torch.Tensor, list[int]], None
]


def _compiled(function: CopyRows) -> CopyRows:
    with warnings.catch_warnings():
        # torch deprecates TorchScript, yet has nothing else that runs such a loop without the GIL.
        warnings.simplefilter("ignore")
        return cast(CopyRows, torch.jit.script(function))


copy_rows = _compiled(copy_rows_reference)


class CpuCopies:
    """See the module. ``copy`` moves the rows."""

    def __init__(self, tensors: PoolTensors, copy: CopyRows = copy_rows) -> None:
        self._tensors = tensors
        self._copy = copy

    def gather(self, arena: Arena, blocks: Rows, pages: Rows) -> None:
        views = self._tensors.arena_views(arena)
        plan = RowPlan.of(
            blocks, pages, limit_to=arena.total_blocks, limit_from=self._tensors.num_pages
        )
        if len(plan):
            rows = self._tensors.rows
            self._copy(views.columns, rows, plan.rows_to, plan.rows_from, plan.runs)

    def scatter(self, arena: Arena, blocks: Rows, pages: Rows) -> None:
        load = self.begin_load(arena, blocks, pages)
        load.tensors(0, len(self._tensors.rows))

    def begin_load(self, arena: Arena, blocks: Rows, pages: Rows) -> CpuLoad:
        plan = RowPlan.of(
            pages, blocks, limit_to=self._tensors.num_pages, limit_from=arena.total_blocks
        )
        return CpuLoad(self._tensors, self._tensors.arena_views(arena), plan, self._copy)


class CpuLoad:
    """``base.Load``: every layer has landed when ``layer`` returns."""

    def __init__(
        self, tensors: PoolTensors, views: ArenaViews, plan: RowPlan, copy: CopyRows
    ) -> None:
        self._tensors = tensors
        self._views = views
        self._plan = plan
        self._copy = copy

    def layer(self, layer: int) -> None:
        assert 0 <= layer < self._tensors.layout.num_layers, layer
        self.tensors(2 * layer, 2 * layer + 2)

    def tensors(self, start: int, stop: int) -> None:
        """The tensors ``start .. stop - 1`` of K0, V0, K1, V1, ..., in one call."""
        plan = self._plan
        if len(plan):
            to, source = self._tensors.rows[start:stop], self._views.columns[start:stop]
            self._copy(to, source, plan.rows_to, plan.rows_from, plan.runs)

    def admit(self, layer: int) -> None:
        assert 0 <= layer < self._tensors.layout.num_layers, layer

    def finish(self) -> None:
        """Nothing is under way."""
