"""Copies where the device pool lies in host memory, by native code (``kernels``).

One call moves the rows of all tensors, or of one layer's two, without the GIL. ``cpu`` does the
same where native code is not built or is switched off.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from ...kernels import Native
from ..arena import Arena
from .base import Pairs, PoolTensors, Rows

if TYPE_CHECKING:
    from sgl_kernel_ext.tables import RowTable


class NativeCopies:
    """See the module."""

    def __init__(self, tensors: PoolTensors, native: Native) -> None:
        self._tensors = tensors
        self._native = native
        self._pool = self._table(tensors.rows)
        # The arena whose rows the table has.
        self._arena: tuple[Arena, RowTable] | None = None

    def gather(self, arena: Arena, blocks: Rows, pages: Rows) -> None:
        pairs = Pairs.to_blocks(blocks, pages, arena, self._tensors.num_pages)
        if len(pairs):
            to = self._arena_table(arena)
            self._native.copy_rows(to, self._pool, pairs.blocks, pairs.pages)

    def scatter(self, arena: Arena, blocks: Rows, pages: Rows) -> None:
        load = self.begin_load(arena, blocks, pages)
        load.tensors(0, len(self._pool))

    def begin_load(self, arena: Arena, blocks: Rows, pages: Rows) -> NativeLoad:
        pairs = Pairs.to_pages(blocks, pages, arena, self._tensors.num_pages)
        return NativeLoad(self._native, self._pool, self._arena_table(arena), pairs)

    def _arena_table(self, arena: Arena) -> RowTable:
        known = self._arena
        if known is None or known[0] is not arena:
            known = (arena, self._table(self._tensors.arena_views(arena).columns))
            self._arena = known
        return known[1]

    def _table(self, tensors: Sequence[torch.Tensor]) -> RowTable:
        size = self._tensors.word_bytes
        return self._native.row_table(
            [tensor.data_ptr() for tensor in tensors],
            [tensor.stride(0) * size for tensor in tensors],
            [tensor.shape[1] * size for tensor in tensors],
            [len(tensor) for tensor in tensors],
            tensors,
        )


class NativeLoad:
    """``base.Load``: every layer has landed when ``layer`` returns."""

    def __init__(self, native: Native, to: RowTable, source: RowTable, pairs: Pairs) -> None:
        self._native = native
        self._to = to
        self._source = source
        self._pairs = pairs

    def layer(self, layer: int) -> None:
        assert 0 <= 2 * layer < len(self._to), layer
        self.tensors(2 * layer, 2 * layer + 2)

    def tensors(self, start: int, stop: int) -> None:
        """The tensors ``start .. stop - 1`` of K0, V0, K1, V1, ..., in one call."""
        if len(self._pairs):
            to, source = self._to.part(start, stop), self._source.part(start, stop)
            self._native.copy_rows(to, source, self._pairs.pages, self._pairs.blocks)

    def admit(self, layer: int) -> None:
        assert 0 <= 2 * layer < len(self._to), layer

    def finish(self) -> None:
        """Nothing is under way."""
