"""Copies on any accelerator that torch knows, through pinned staging memory.

Needs nothing of the arena, which the CPU reads and writes, and no kernels of ours: what is left
where blocks cannot be pinned or Triton does not know the device. The CPU copies every byte once
more than the other ways, ``slice_bytes`` at a time.
"""

from __future__ import annotations

from functools import partial

import torch

from ..arena import Arena
from .base import ArenaViews, PoolTensors, RowPlan, Rows
from .streams import Event, Stream, Streams, wait

SLICE_BYTES = 64 << 20


class StagedCopies:
    """See the module."""

    def __init__(
        self, tensors: PoolTensors, streams: Streams, slice_bytes: int = SLICE_BYTES
    ) -> None:
        self._tensors = tensors
        self._streams = streams
        self._slice_bytes = slice_bytes
        self._stores = streams.stream()
        self._loads = streams.stream()

    def gather(self, arena: Arena, blocks: Rows, pages: Rows) -> None:
        tensors = self._tensors
        views = tensors.arena_views(arena)
        plan = RowPlan.of(blocks, pages, limit_to=arena.total_blocks, limit_from=tensors.num_pages)
        for to, source in plan.pieces(max(1, self._slice_bytes // tensors.layout.block_bytes)):
            shape = (len(to), views.words.shape[1])
            on_device = self._stores.upload(source.numpy())
            packed = self._stores.empty(shape, tensors.word)
            staged = self._streams.staging(shape, tensors.word)
            self._stores.run(partial(self._pack, views, on_device, packed, staged))
            wait([self._stores.record()])
            views.words.index_copy_(0, to, staged)

    def _pack(
        self,
        views: ArenaViews,
        pages: torch.Tensor,
        packed: torch.Tensor,
        staged: torch.Tensor,
    ) -> None:
        for rows, columns in zip(self._tensors.rows, views.split(packed), strict=True):
            torch.index_select(rows, 0, pages, out=columns)
        staged.copy_(packed, non_blocking=True)

    def scatter(self, arena: Arena, blocks: Rows, pages: Rows) -> None:
        load = self.begin_load(arena, blocks, pages)
        for layer in range(self._tensors.layout.num_layers):
            load.layer(layer)
        load.finish()

    def begin_load(self, arena: Arena, blocks: Rows, pages: Rows) -> StagedLoad:
        tensors = self._tensors
        plan = RowPlan.of(pages, blocks, limit_to=tensors.num_pages, limit_from=arena.total_blocks)
        rows = max(1, self._slice_bytes // tensors.layout.layer_bytes)
        views = tensors.arena_views(arena)
        return StagedLoad(tensors, views, plan, rows, self._streams, self._loads)


class StagedLoad:
    """``base.Load``; the CPU copies a layer into staging memory in ``layer``.

    A layer is waited for before the next one is staged, so that one layer at most is staged.
    """

    def __init__(
        self,
        tensors: PoolTensors,
        views: ArenaViews,
        plan: RowPlan,
        slice_rows: int,
        streams: Streams,
        stream: Stream,
    ) -> None:
        self._tensors = tensors
        self._views = views
        self._plan = plan
        self._slice_rows = slice_rows
        self._streams = streams
        self._stream = stream
        self._rows_to = stream.upload(plan.rows_to.numpy())
        self._events: dict[int, Event] = {}
        self._kept: list[torch.Tensor] = []

    def layer(self, layer: int) -> None:
        assert 0 <= layer < self._tensors.layout.num_layers, layer
        first, middle, last = self._views.bounds[2 * layer : 2 * layer + 3]
        source = self._views.words[:, first:last]
        self.finish()
        self._kept.clear()
        k, v = self._tensors.rows[2 * layer : 2 * layer + 2]
        done = 0
        for _, rows_from in self._plan.pieces(self._slice_rows):
            shape = (len(rows_from), last - first)
            staged = self._streams.staging(shape, source.dtype)
            torch.index_select(source, 0, rows_from, out=staged)
            packed = self._stream.empty(shape, source.dtype)
            rows_to = self._rows_to[done : done + len(rows_from)]
            done += len(rows_from)

            def unpack(
                staged: torch.Tensor = staged,
                packed: torch.Tensor = packed,
                rows_to: torch.Tensor = rows_to,
            ) -> None:
                packed.copy_(staged, non_blocking=True)
                k.index_copy_(0, rows_to, packed[:, : middle - first])
                v.index_copy_(0, rows_to, packed[:, middle - first :])

            self._stream.run(unpack)
            self._kept += (staged, packed)
        self._events[layer] = self._stream.record()

    def admit(self, layer: int) -> None:
        self._streams.admit(self._events[layer])

    def finish(self) -> None:
        wait(list(self._events.values()))
