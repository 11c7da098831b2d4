"""Which way a copy goes on an accelerator: the preferred one where the device reaches the blocks.

Stores prefer ``packed`` and loads ``direct``, for the reasons these modules give. That is reasoned
from known figures of PCIe and copy engines; ``benchmark/gpu/copies.py`` measures both ways.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

import numpy as np

from ...errors import DeviceError
from ..arena import Arena
from ..pinning import CudaDriver, PinnedRanges
from .base import Copies, Load, PoolTensors, Rows
from .staged import StagedCopies
from .streams import TorchStreams

log = logging.getLogger(__name__)


class Way(Enum):
    """Modules of the same names."""

    DIRECT = "direct"
    PACKED = "packed"
    STAGED = "staged"


@dataclass(frozen=True, slots=True)
class Ways:
    store: Way = Way.PACKED
    load: Way = Way.DIRECT


class ChosenCopies:
    """``base.Copies``: each copy goes its preferred way if ``pins`` covers all its blocks, and
    staged if not."""

    def __init__(
        self, ways: Ways, by_way: Mapping[Way, Copies], staged: Copies, pins: PinnedRanges
    ) -> None:
        self._store = by_way.get(ways.store, staged)
        self._load = by_way.get(ways.load, staged)
        self._staged = staged
        self._pins = pins

    def gather(self, arena: Arena, blocks: Rows, pages: Rows) -> None:
        self._reaching(self._store, arena, blocks).gather(arena, blocks, pages)

    def scatter(self, arena: Arena, blocks: Rows, pages: Rows) -> None:
        self._reaching(self._load, arena, blocks).scatter(arena, blocks, pages)

    def begin_load(self, arena: Arena, blocks: Rows, pages: Rows) -> Load:
        return self._reaching(self._load, arena, blocks).begin_load(arena, blocks, pages)

    def _reaching(self, preferred: Copies, arena: Arena, blocks: Rows) -> Copies:
        addresses = arena.base + np.asarray(blocks, dtype=np.int64) * arena.block_bytes
        return preferred if self._pins.covers(addresses, arena.block_bytes) else self._staged


def for_accelerator(tensors: PoolTensors, ways: Ways) -> tuple[Copies, PinnedRanges | None]:
    """The copies, and where to pin what they shall reach; None where this device cannot."""
    streams = TorchStreams(tensors.device)
    staged = StagedCopies(tensors, streams)
    try:
        pins, by_way = _reaching(tensors, streams)
    except DeviceError as error:
        log.warning("KV pages are copied through staging memory: %s", error)
        return staged, None
    return ChosenCopies(ways, by_way, staged, pins), pins


def _reaching(
    tensors: PoolTensors, streams: TorchStreams
) -> tuple[PinnedRanges, dict[Way, Copies]]:
    """What needs a device that reaches pinned blocks. Raises DeviceError where it does not."""
    device = tensors.device
    if device.type != "cuda":
        raise DeviceError(f"no kernels for devices of type {device.type!r}")
    if importlib.util.find_spec("triton") is None:
        raise DeviceError("Triton is not installed")
    pins = PinnedRanges(CudaDriver(device))
    # Triton takes a second to import and is of no use without a device.
    from .direct import DirectCopies
    from .moves import PageMoves
    from .packed import PackedCopies

    moves = PageMoves(tensors)
    streams.stream().run(moves.prepare)
    return pins, {
        Way.DIRECT: DirectCopies(tensors, moves, streams),
        Way.PACKED: PackedCopies(tensors, moves, streams, pins),
    }
