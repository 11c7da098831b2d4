"""Copies by kernels to and from packed device memory, and the copy engine between that and blocks.

The device's cores are busy only as long as device memory takes; the bus is the copy engine's, with
one transfer for each run of neighbouring blocks. Two buffers take turns, so that the engine copies
one while the kernel works on the other. That is why stores, which nobody waits for, go this way by
default. A load must bring over whole blocks, all layers, before its first layer can land.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import torch

from ..arena import Arena
from ..pinning import PinnedRanges
from .base import ArenaViews, Pairs, PoolTensors, Rows, neighbours
from .moves import PageMoves
from .streams import Event, Stream, Streams, wait

SLICE_BYTES = 32 << 20
PROGRAMS = 512
_BUFFERS = 2


class PackedCopies:
    """See the module. The device must reach the blocks, which ``pins`` knows."""

    def __init__(
        self,
        tensors: PoolTensors,
        moves: PageMoves,
        streams: Streams,
        pins: PinnedRanges,
        slice_bytes: int = SLICE_BYTES,
    ) -> None:
        self.tensors = tensors
        self.moves = moves
        self.streams = streams
        self.pins = pins
        self.slice_blocks = max(1, slice_bytes // tensors.layout.block_bytes)
        self._stores = (streams.stream(), streams.stream())
        self._loads = (streams.stream(), streams.stream())

    def gather(self, arena: Arena, blocks: Rows, pages: Rows) -> None:
        pairs = Pairs.to_blocks(blocks, pages, arena, self.tensors.num_pages)
        if not len(pairs):
            return
        kernels, engine = self._stores
        work = _Slices(self, kernels, arena, pairs)
        copied: dict[int, Event] = {}
        for number, piece in enumerate(work.pieces):
            if number >= _BUFFERS:
                kernels.wait(copied[number - _BUFFERS])
            kernels.run(partial(self.moves.gather, *work.numbers(number), PROGRAMS))
            engine.wait(kernels.record())
            engine.run(partial(work.copy_out, number, piece))
            copied[number] = engine.record()
        wait(list(copied.values()))

    def scatter(self, arena: Arena, blocks: Rows, pages: Rows) -> None:
        load = self.begin_load(arena, blocks, pages)
        for layer in range(self.tensors.layout.num_layers):
            load.layer(layer)
        load.finish()

    def begin_load(self, arena: Arena, blocks: Rows, pages: Rows) -> PackedLoad:
        pairs = Pairs.to_pages(blocks, pages, arena, self.tensors.num_pages)
        return PackedLoad(self, self._loads, arena, pairs)


class PackedLoad:
    """``base.Load``. The first ``layer`` brings everything over; slices that must make room for
    others are scattered whole, the last ones layer by layer."""

    def __init__(
        self, copies: PackedCopies, streams: tuple[Stream, Stream], arena: Arena, pairs: Pairs
    ) -> None:
        self._copies = copies
        self._kernels, self._engine = streams
        self._work = _Slices(copies, self._kernels, arena, pairs)
        self._events: dict[int, Event] = {}

    def layer(self, layer: int) -> None:
        assert 0 <= layer < self._copies.tensors.layout.num_layers, layer
        if not self._events:
            self._bring()
        for number in range(len(self._work.pieces))[-_BUFFERS:]:
            self._scatter(number, layer)
        self._events[layer] = self._kernels.record()

    def _bring(self) -> None:
        pieces = self._work.pieces
        # The buffers may be memory that this stream's earlier work still uses.
        self._engine.wait(self._kernels.record())
        for number, piece in enumerate(pieces):
            if number >= _BUFFERS:
                self._scatter(number - _BUFFERS, None)
                self._engine.wait(self._kernels.record())
            self._engine.run(partial(self._work.copy_in, number, piece))
            self._kernels.wait(self._engine.record())

    def _scatter(self, number: int, layer: int | None) -> None:
        numbers = self._work.numbers(number)
        self._kernels.run(lambda: self._copies.moves.scatter(*numbers, PROGRAMS, layer))

    def admit(self, layer: int) -> None:
        self._copies.streams.admit(self._events[layer])

    def finish(self) -> None:
        wait(list(self._events.values()))


class _Slices:
    """A copy cut into pieces, two buffers for them, and the numbers the kernel needs."""

    def __init__(self, copies: PackedCopies, stream: Stream, arena: Arena, pairs: Pairs) -> None:
        self._pins = copies.pins
        self._views: ArenaViews = copies.tensors.arena_views(arena)
        self._arena = arena
        self.pieces = list(pairs.slices(copies.slice_blocks))
        longest = min(len(pairs), copies.slice_blocks)
        shape = (min(_BUFFERS, len(self.pieces)), longest, self._views.words.shape[1])
        self._buffers = stream.empty(shape, copies.tensors.word)
        packed = self._buffers.data_ptr() + np.arange(shape[0] * longest) * arena.block_bytes
        self._pages = stream.upload(pairs.pages)
        self._packed = stream.upload(packed).view(shape[0], longest)
        self._slice_blocks = copies.slice_blocks

    def numbers(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Pages, and the addresses of their packed blocks, of piece ``number``."""
        start, length = number * self._slice_blocks, len(self.pieces[number])
        return self._pages[start : start + length], self._packed[number % _BUFFERS][:length]

    def copy_out(self, number: int, piece: Pairs) -> None:
        for start, stop, first in self._runs(piece):
            host = self._views.words[first : first + stop - start]
            host.copy_(self._buffers[number % _BUFFERS][start:stop], non_blocking=True)

    def copy_in(self, number: int, piece: Pairs) -> None:
        for start, stop, first in self._runs(piece):
            host = self._views.words[first : first + stop - start]
            self._buffers[number % _BUFFERS][start:stop].copy_(host, non_blocking=True)

    def _runs(self, piece: Pairs) -> list[tuple[int, int, int]]:
        """(start, stop, first block) of neighbours that one transfer may take: a transfer across
        the seam of two registrations is refused by the driver."""
        addresses = self._arena.base + piece.blocks * self._arena.block_bytes
        within = neighbours(piece.blocks, self._pins.numbers(addresses))
        return [(start, stop, int(piece.blocks[start])) for start, stop in within]
