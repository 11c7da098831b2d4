"""The contract of page copies, and what every way of copying shares.

The device pool has two tensors a layer, ``k_buffer[l]`` and ``v_buffer[l]``, each
``[slots, heads, head_dim]``; page ``p`` is the slots ``p * page_size ..``. So one page of one
tensor is one contiguous *row*, in the device pool as in a block (``layout``), and a copy is, for
every tensor, ``destination[rows_to] = source[rows_from]``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from ...errors import ConfigError
from .. import huge_pages
from ..arena import Arena
from ..layout import BlockLayout

_WORDS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}

Rows = Sequence[int] | torch.Tensor
"""Block or page numbers: int64 ``[n]``."""


class Load(Protocol):
    """Blocks on their way to pages, layer by layer.

    One thread calls ``layer`` for each layer in order, then ``finish``; pages and blocks must stay
    as they are until ``finish`` has returned.
    """

    def layer(self, layer: int) -> None:
        """Start K and V of one layer; on a CPU they have landed when it returns."""

    def admit(self, layer: int) -> None:
        """What the calling thread queues on the device from now on comes after this layer.

        For the forward's thread, once ``layer(layer)`` has returned. Does not wait."""

    def finish(self) -> None:
        """Wait until every layer that was started has landed; any thread, any number of times.

        Raises CopyStalled when the device does not get there in time."""


class Copies(Protocol):
    """One way to copy. May be used by several threads at once.

    ``blocks`` and ``pages`` have equal lengths and lie within the arena and the pool, and nothing
    is named twice at the destination: an AssertionError says what is wrong before a byte moves.
    """

    def gather(self, arena: Arena, blocks: Rows, pages: Rows) -> None:
        """Page ``pages[i]``, all layers, into block ``blocks[i]``. Done when it returns."""

    def scatter(self, arena: Arena, blocks: Rows, pages: Rows) -> None:
        """Block ``blocks[i]``, all layers, into page ``pages[i]``. Done when it returns."""

    def begin_load(self, arena: Arena, blocks: Rows, pages: Rows) -> Load:
        """As ``scatter``, one layer at a time."""


class PoolTensors:
    """The engine's KV tensors, seen as rows.

    ``k_buffer[l]`` is ``[slots, heads, head_dim]`` and ``v_buffer[l]``
    ``[slots, heads, v_head_dim]``, contiguous, all on one device. ``rows`` has them in a block's
    order, K of layer 0, V of layer 0, K of layer 1, ..., each as ``[pages, words of a page]``.
    Raises ConfigError when they do not fit ``layout``. Source: SGLang's ``MHATokenToKVPool``.
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
        self.device = k_buffer[0].device
        buffers = [buffer for pair in zip(k_buffer, v_buffer, strict=True) for buffer in pair]
        self.word_bytes = math.gcd(8, layout.k_bytes, layout.v_bytes)
        for buffer in buffers:
            offset_bytes = buffer.storage_offset() * buffer.element_size()
            self.word_bytes = math.gcd(self.word_bytes, offset_bytes)
        self.rows = [
            self._as_rows(buffer, layout.v_head_dim if index % 2 else layout.head_dim)
            for index, buffer in enumerate(buffers)
        ]
        self.num_pages = min(len(rows) for rows in self.rows)
        self._views: ArenaViews | None = None

    def prefer_huge_pages(self) -> None:
        """For tensors in host memory."""
        for rows in self.rows:
            huge_pages.prefer(rows.data_ptr(), rows.nbytes)

    @property
    def word(self) -> torch.dtype:
        return _WORDS[self.word_bytes]

    def arena_views(self, arena: Arena) -> ArenaViews:
        """Kept, and with them the arena's mapping, until another arena is asked for."""
        views = self._views
        if views is None or views.arena is not arena:
            views = ArenaViews.of(arena, self.layout, self.word_bytes)
            self._views = views
        return views

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
        return rows.view(_WORDS[self.word_bytes])


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


@dataclass(frozen=True, slots=True)
class RowPlan:
    """Pairs of rows, sorted by destination: int64 ``[rows]`` each, on the CPU.

    ``runs`` is empty, or holds (start, stop, first row) for each run of neighbours in ``rows_to``:
    empty where the destinations are scattered.
    """

    rows_to: torch.Tensor
    rows_from: torch.Tensor
    runs: list[int]

    @classmethod
    def of(cls, rows_to: Rows, rows_from: Rows, *, limit_to: int, limit_from: int) -> RowPlan:
        """Rows are below their limits, and no destination is named twice."""
        to, source = _checked(rows_to, rows_from, limit_to=limit_to, limit_from=limit_from)
        order = np.argsort(to, kind="stable")
        to, source = to[order], source[order]
        runs: list[int] = []
        found = list(neighbours(to))
        # A run costs an operation a tensor; where runs are short, scattered copies are cheaper.
        if len(found) <= max(1, len(to) // 4):
            for start, stop in found:
                runs += (start, stop, int(to[start]))
        return cls(torch.from_numpy(to), torch.from_numpy(source), runs)

    def __len__(self) -> int:
        return len(self.rows_to)

    def pieces(self, rows: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Destinations and sources, at most ``rows`` at a time."""
        return zip(torch.split(self.rows_to, rows), torch.split(self.rows_from, rows), strict=True)


@dataclass(frozen=True, slots=True)
class Pairs:
    """Blocks and the pages they are copied from or to, sorted by block: int64 ``[n]`` each.

    Neighbouring blocks are neighbours in host memory, whichever direction the copy has.
    """

    blocks: NDArray[np.int64]
    pages: NDArray[np.int64]

    @classmethod
    def to_blocks(cls, blocks: Rows, pages: Rows, arena: Arena, num_pages: int) -> Pairs:
        limits = {"limit_to": arena.total_blocks, "limit_from": num_pages}
        return cls(*_checked(blocks, pages, **limits))._sorted()

    @classmethod
    def to_pages(cls, blocks: Rows, pages: Rows, arena: Arena, num_pages: int) -> Pairs:
        limits = {"limit_to": num_pages, "limit_from": arena.total_blocks}
        to, source = _checked(pages, blocks, **limits)
        return cls(source, to)._sorted()

    def _sorted(self) -> Pairs:
        order = np.argsort(self.blocks, kind="stable")
        return Pairs(self.blocks[order], self.pages[order])

    def __len__(self) -> int:
        return len(self.blocks)

    def slices(self, pairs: int) -> Iterator[Pairs]:
        for start in range(0, len(self), pairs):
            yield Pairs(self.blocks[start : start + pairs], self.pages[start : start + pairs])


def neighbours(
    numbers: NDArray[np.int64], groups: NDArray[np.int64] | None = None
) -> Iterator[tuple[int, int]]:
    """Half-open ranges ``[start, stop)`` within which each number is its predecessor plus one and,
    if given, the group stays the same."""
    if not len(numbers):
        return iter(())
    apart = np.diff(numbers) != 1
    if groups is not None:
        apart |= np.diff(groups) != 0
    starts = [0, *(np.flatnonzero(apart) + 1).tolist()]
    return zip(starts, [*starts[1:], len(numbers)], strict=True)


def _checked(
    rows_to: Rows, rows_from: Rows, *, limit_to: int, limit_from: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    to = np.asarray(rows_to, dtype=np.int64)
    source = np.asarray(rows_from, dtype=np.int64)
    assert to.ndim == 1 and to.shape == source.shape, (to.shape, source.shape)
    if len(to):
        # A page costs 30 us to copy: what is done once for all pages must not cost as much.
        ordered = np.sort(to)
        assert ordered[0] >= 0 and ordered[-1] < limit_to, (ordered[0], ordered[-1], limit_to)
        assert (ordered[1:] > ordered[:-1]).all(), "a destination is named twice"
        least, most = source.min(), source.max()
        assert least >= 0 and most < limit_from, (least, most, limit_from)
    return to, source
