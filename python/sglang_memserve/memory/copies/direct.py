"""Copies by kernels that reach into pinned blocks across the bus: no staging, no copy engine.

The first layer of a load lands after its own bytes only, not after those of all layers, as blocks
hold all layers of one page together. That is why loads go this way by default. The price: some of
the device's cores wait for the bus as long as the copy runs; ``PROGRAMS`` bounds how many.
"""

from __future__ import annotations

import numpy as np

from ..arena import Arena
from .base import Pairs, PoolTensors, Rows
from .moves import PageMoves
from .streams import Event, Streams, wait

# Each has up to 8 KiB under way, and PCIe 5.0 x16 holds about 55 GB/s x 1.5 us = 83 KB.
PROGRAMS = 32


class DirectCopies:
    """See the module. The device must reach the blocks (``memory.pinning``)."""

    def __init__(
        self,
        tensors: PoolTensors,
        moves: PageMoves,
        streams: Streams,
        programs: int = PROGRAMS,
    ) -> None:
        self._tensors = tensors
        self._moves = moves
        self._streams = streams
        self._programs = programs
        self._stores = streams.stream()
        self._loads = streams.stream()

    def gather(self, arena: Arena, blocks: Rows, pages: Rows) -> None:
        pairs = Pairs.to_blocks(blocks, pages, arena, self._tensors.num_pages)
        if len(pairs):
            numbers = self._stores.upload(addressed(arena, pairs))
            self._stores.run(lambda: self._moves.gather(numbers[0], numbers[1], self._programs))
            wait([self._stores.record()])

    def scatter(self, arena: Arena, blocks: Rows, pages: Rows) -> None:
        pairs = Pairs.to_pages(blocks, pages, arena, self._tensors.num_pages)
        if len(pairs):
            numbers = self._loads.upload(addressed(arena, pairs))
            self._loads.run(lambda: self._moves.scatter(numbers[0], numbers[1], self._programs))
            wait([self._loads.record()])

    def begin_load(self, arena: Arena, blocks: Rows, pages: Rows) -> DirectLoad:
        pairs = Pairs.to_pages(blocks, pages, arena, self._tensors.num_pages)
        return DirectLoad(self, arena, pairs)


class DirectLoad:
    """``base.Load``: one launch a layer."""

    def __init__(self, copies: DirectCopies, arena: Arena, pairs: Pairs) -> None:
        self._moves = copies._moves
        self._streams = copies._streams
        self._stream = copies._loads
        self._programs = copies._programs
        self._num_layers = copies._tensors.layout.num_layers
        self._numbers = self._stream.upload(addressed(arena, pairs))
        self._events: dict[int, Event] = {}

    def layer(self, layer: int) -> None:
        assert 0 <= layer < self._num_layers, layer
        numbers = self._numbers
        self._stream.run(lambda: self._moves.scatter(numbers[0], numbers[1], self._programs, layer))
        self._events[layer] = self._stream.record()

    def admit(self, layer: int) -> None:
        self._streams.admit(self._events[layer])

    def finish(self) -> None:
        wait(list(self._events.values()))


def addressed(arena: Arena, pairs: Pairs) -> np.ndarray[tuple[int, int], np.dtype[np.int64]]:
    """Page numbers and the blocks' addresses: ``[2, n]``."""
    return np.stack([pairs.pages, arena.base + pairs.blocks * arena.block_bytes])
