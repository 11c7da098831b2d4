"""Copies between the engine's device pool and blocks: HBM to DRAM (gather), DRAM to HBM (scatter).

The device pool has two tensors a layer, ``k_buffer[l]`` and ``v_buffer[l]``, each
``[slots, heads, head_dim]``; page ``p`` is the slots ``p * page_size ..``. So one page of one
tensor is one contiguous *row*, in the device pool as in a block (``layout``), and a copy is, for
every tensor, ``destination[rows_to] = source[rows_from]``.

Two things make that fast on a CPU:

- Rows that are neighbours at the destination are written by one ``index_select(out=...)``, three
  times faster than ``index_copy_``, which is left for scattered rows. The pairs are sorted by
  destination to find neighbours.
- The loop over tensors is TorchScript: it lets go of the GIL once a call instead of once a tensor.
  A thread busy in Python hands the GIL over only after the interpreter's switch interval (5 ms),
  and every one of 100 small operations would wait for that.

On an accelerator rows go through pinned staging memory, ``STAGING_BYTES`` at a time.
"""

from __future__ import annotations

import math
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, List, Protocol, cast  # noqa: UP035 - TorchScript knows List only

import numpy as np
import torch

from ..errors import ConfigError
from .arena import Arena
from .layout import BlockLayout

STAGING_BYTES = 64 << 20
_WORDS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}

Rows = Sequence[int] | torch.Tensor
"""Block or page numbers: int64 ``[n]``."""


class DeviceEvent(Protocol):
    """``torch.cuda.Event`` and its like."""

    def synchronize(self) -> None: ...


def copy_rows_reference(
    to: List[torch.Tensor],  # noqa: UP006
    source: List[torch.Tensor],  # noqa: UP006
    rows_to: torch.Tensor,
    rows_from: torch.Tensor,
    runs: List[int],  # noqa: UP006
) -> None:
    """``to[i][rows_to] = source[i][rows_from]`` for every i.

    ``runs`` is empty, or holds (start, stop, first row) for each run of neighbours in ``rows_to``.
    """
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


@dataclass(frozen=True, slots=True)
class RowPlan:
    """Pairs of rows, sorted by destination: int64 ``[rows]`` each, on the CPU.

    ``runs`` as for ``copy_rows``: empty where the destinations are scattered.
    """

    rows_to: torch.Tensor
    rows_from: torch.Tensor
    runs: list[int]

    @classmethod
    def of(cls, rows_to: Rows, rows_from: Rows, *, limit_to: int, limit_from: int) -> RowPlan:
        """Rows are below their limits, and no destination is named twice."""
        to = np.asarray(rows_to, dtype=np.int64)
        source = np.asarray(rows_from, dtype=np.int64)
        assert to.ndim == 1 and to.shape == source.shape, (to.shape, source.shape)
        if not len(to):
            return cls(torch.from_numpy(to), torch.from_numpy(source), [])
        order = np.argsort(to, kind="stable")
        to, source = to[order], source[order]
        assert to[0] >= 0 and to[-1] < limit_to, (to[0], to[-1], limit_to)
        assert source.min() >= 0 and source.max() < limit_from, (source.max(), limit_from)
        steps = np.diff(to)
        assert (steps > 0).all(), "a destination is named twice"
        starts = [0, *(np.flatnonzero(steps != 1) + 1).tolist()]
        runs: list[int] = []
        # A run costs an operation a tensor; where runs are short, index_copy_ is cheaper.
        if len(starts) <= max(1, len(to) // 4):
            for start, stop in zip(starts, [*starts[1:], len(to)], strict=True):
                runs += (start, stop, int(to[start]))
        return cls(torch.from_numpy(to), torch.from_numpy(source), runs)

    def __len__(self) -> int:
        return len(self.rows_to)

    def pieces(self, rows: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Destinations and sources, at most ``rows`` at a time."""
        return zip(torch.split(self.rows_to, rows), torch.split(self.rows_from, rows), strict=True)


class DevicePool:
    """The engine's KV tensors, seen as rows. May be used by several threads at once.

    ``k_buffer[l]`` is ``[slots, heads, head_dim]`` and ``v_buffer[l]``
    ``[slots, heads, v_head_dim]``, contiguous, all on one device. Raises ConfigError when they do
    not fit ``layout``. Source: SGLang's ``MHATokenToKVPool``.
    """

    def __init__(
        self,
        layout: BlockLayout,
        k_buffer: Sequence[torch.Tensor],
        v_buffer: Sequence[torch.Tensor],
    ) -> None:
        if not len(k_buffer) == len(v_buffer) == layout.num_layers:
            raise ConfigError(
                f"device pool has {len(k_buffer)} K and {len(v_buffer)} V tensors, "
                f"the layout has {layout.num_layers} layers"
            )
        self.layout = layout
        self.num_layers = layout.num_layers
        self.device = k_buffer[0].device
        self.is_accelerator = self.device.type != "cpu"
        # K of layer 0, V of layer 0, K of layer 1, ...: the order in a block.
        buffers = [buffer for pair in zip(k_buffer, v_buffer, strict=True) for buffer in pair]
        self._word_bytes = math.gcd(8, layout.k_bytes, layout.v_bytes)
        for buffer in buffers:
            offset_bytes = buffer.storage_offset() * buffer.element_size()
            self._word_bytes = math.gcd(self._word_bytes, offset_bytes)
        self.rows = [
            self._as_rows(buffer, layout.v_head_dim if index % 2 else layout.head_dim)
            for index, buffer in enumerate(buffers)
        ]
        self.num_pages = min(len(rows) for rows in self.rows)
        self._views: ArenaViews | None = None
        self._local = threading.local()

    def wait(self, ready: Sequence[DeviceEvent]) -> None:
        """Until the device has got as far as ``ready`` says."""
        for event in ready:
            event.synchronize()

    def gather(self, arena: Arena, blocks: Rows, pages: Rows) -> None:
        """Page ``pages[i]``, all layers, into block ``blocks[i]``. Done when it returns."""
        views = self.arena_views(arena)
        plan = RowPlan.of(blocks, pages, limit_to=arena.total_blocks, limit_from=self.num_pages)
        if not self.is_accelerator:
            if len(plan):
                copy_rows(views.columns, self.rows, plan.rows_to, plan.rows_from, plan.runs)
            return
        for to, source in plan.pieces(max(1, STAGING_BYTES // self.layout.block_bytes)):
            with self.stream():
                source = source.to(self.device)
                packed = torch.empty(
                    (len(to), views.words.shape[1]), dtype=views.words.dtype, device=self.device
                )
                for rows, columns in zip(self.rows, views.split(packed), strict=True):
                    torch.index_select(rows, 0, source, out=columns)
                staged = self.staging(packed.shape, packed.dtype)
                staged.copy_(packed, non_blocking=True)
                self.synchronize()
            views.words.index_copy_(0, to, staged)

    def scatter(self, arena: Arena, blocks: Rows, pages: Rows) -> None:
        """Block ``blocks[i]``, all layers, into page ``pages[i]``. Done when it returns."""
        transfer = self.begin_scatter(arena, blocks, pages)
        if self.is_accelerator:
            for layer in range(self.num_layers):
                transfer.layer(layer)
        else:
            transfer.tensors(0, len(self.rows))

    def begin_scatter(self, arena: Arena, blocks: Rows, pages: Rows) -> Scatter:
        """As ``scatter``, one layer at a time."""
        plan = RowPlan.of(pages, blocks, limit_to=self.num_pages, limit_from=arena.total_blocks)
        return Scatter(self, self.arena_views(arena), plan)

    # -- for this module --

    def arena_views(self, arena: Arena) -> ArenaViews:
        """Kept, and with them the arena's mapping, until another arena is asked for."""
        views = self._views
        if views is None or views.arena is not arena:
            views = ArenaViews.of(arena, self.layout, self._word_bytes)
            self._views = views
        return views

    def staging(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        # torch keeps freed pinned memory and does not hand it out again while a copy uses it.
        return torch.empty(tuple(shape), dtype=dtype, pin_memory=self.device.type != "cpu")

    def stream(self) -> AbstractContextManager[Any]:
        """This thread's own stream, so that copies do not queue behind the forward."""
        if self.device.type == "cpu":
            return nullcontext()
        module = torch.get_device_module(self.device)
        if not hasattr(self._local, "stream"):
            self._local.stream = module.Stream(self.device)
        return cast(AbstractContextManager[Any], module.stream(self._local.stream))

    def synchronize(self) -> None:
        """Until this thread's copies are done."""
        if self.device.type != "cpu":
            self._local.stream.synchronize()

    def _as_rows(self, buffer: torch.Tensor, dim: int) -> torch.Tensor:
        """``[pages, words of one page]`` over the same memory."""
        layout = self.layout
        if (
            buffer.shape[1:] != (layout.num_kv_heads, dim)
            or buffer.element_size() != layout.element_bytes
            or buffer.device != self.device
            or not buffer.is_contiguous()
        ):
            raise ConfigError(
                f"device tensor {tuple(buffer.shape)} {buffer.dtype} on {buffer.device} with "
                f"strides {buffer.stride()} is not a contiguous [slots, {layout.num_kv_heads}, "
                f"{dim}] of {layout.element_bytes}-byte elements on {self.device}"
            )
        page_size = layout.page_size_tokens
        pages = buffer.shape[0] // page_size
        rows = buffer[: pages * page_size].view(pages, page_size * layout.num_kv_heads * dim)
        return rows.view(_WORDS[self._word_bytes])


@dataclass(frozen=True, slots=True)
class ArenaViews:
    """``words``: the arena as ``[blocks, words of a block]``, blocks included that it may grow by.
    ``bounds``: where the columns of each device tensor begin, and the end. ``columns``: these
    columns, ``[blocks, words of a row]``."""

    arena: Arena
    words: torch.Tensor
    bounds: list[int]
    columns: list[torch.Tensor]

    @classmethod
    def of(cls, arena: Arena, layout: BlockLayout, word_bytes: int) -> ArenaViews:
        assert arena.block_bytes == layout.block_bytes, (arena.block_bytes, layout)
        words = torch.from_numpy(arena.reserved).view(_WORDS[word_bytes])
        bounds = [
            offset // word_bytes
            for layer in range(layout.num_layers)
            for offset in (layout.k_offset(layer), layout.v_offset(layer))
        ]
        bounds.append(layout.block_bytes // word_bytes)
        views = cls(arena, words, bounds, [])
        views.columns.extend(views.split(words))
        return views

    def split(self, words: torch.Tensor) -> list[torch.Tensor]:
        """The columns of each device tensor within ``words``, ``[any, words of a block]``."""
        return [
            words[:, start:stop] for start, stop in zip(self.bounds, self.bounds[1:], strict=False)
        ]


class Scatter:
    """A copy from blocks to pages under way; nothing is copied before ``layer`` asks for it."""

    def __init__(self, pool: DevicePool, views: ArenaViews, plan: RowPlan) -> None:
        self._pool = pool
        self._views = views
        self._plan = plan
        self._rows_to = plan.rows_to.to(pool.device)

    def layer(self, layer: int) -> None:
        """Copy K and V of one layer. Done when it returns."""
        assert 0 <= layer < self._pool.num_layers, layer
        if self._pool.is_accelerator:
            self._layer_staged(layer)
        else:
            self.tensors(2 * layer, 2 * layer + 2)

    def tensors(self, start: int, stop: int) -> None:
        """On a CPU: the tensors ``start .. stop - 1`` of K0, V0, K1, V1, ..., in one call."""
        plan = self._plan
        if len(plan):
            to, source = self._pool.rows[start:stop], self._views.columns[start:stop]
            copy_rows(to, source, plan.rows_to, plan.rows_from, plan.runs)

    def _layer_staged(self, layer: int) -> None:
        first, middle, last = self._views.bounds[2 * layer : 2 * layer + 3]
        source = self._views.words[:, first:last]
        rows = max(1, STAGING_BYTES // self._pool.layout.layer_bytes)
        done = 0
        for _, rows_from in self._plan.pieces(rows):
            staged = self._pool.staging((len(rows_from), last - first), source.dtype)
            torch.index_select(source, 0, rows_from, out=staged)
            rows_to = self._rows_to[done : done + len(rows_from)]
            done += len(rows_from)
            with self._pool.stream():
                packed = staged.to(self._pool.device, non_blocking=True)
                self._pool.rows[2 * layer].index_copy_(0, rows_to, packed[:, : middle - first])
                self._pool.rows[2 * layer + 1].index_copy_(0, rows_to, packed[:, middle - first :])
        with self._pool.stream():
            self._pool.synchronize()
