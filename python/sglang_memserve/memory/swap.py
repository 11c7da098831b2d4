"""The engine's device pool and its copies: HBM to DRAM (gather), DRAM to HBM (scatter).

How the bytes get there is the business of ``copies``: on a CPU native code, if there is some; on an
accelerator what ``copies.choice`` picks for each copy.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from ..errors import DeviceError
from ..kernels import native
from .arena import Arena
from .copies.base import Copies, Load, PoolTensors, Rows
from .copies.choice import Ways, for_accelerator
from .copies.cpu import CpuCopies
from .copies.native import NativeCopies
from .copies.streams import Event, wait
from .layout import BlockLayout
from .pinning import PinnedRanges

log = logging.getLogger(__name__)


class DevicePool:
    """The engine's KV tensors and the copies from and to them. Several threads may use it at once.

    Arguments and errors as of ``PoolTensors``; ``ways`` matter on an accelerator only. ``close``
    when no copy is under way any more.
    """

    def __init__(
        self,
        layout: BlockLayout,
        k_buffer: Sequence[torch.Tensor],
        v_buffer: Sequence[torch.Tensor],
        ways: Ways | None = None,
    ) -> None:
        tensors = PoolTensors(layout, k_buffer, v_buffer)
        self.layout = layout
        self.num_layers = layout.num_layers
        self.num_pages = tensors.num_pages
        self.device = tensors.device
        self.is_accelerator = self.device.type != "cpu"
        self._copies: Copies
        self._pins: PinnedRanges | None = None
        if self.is_accelerator:
            self._copies, self._pins = for_accelerator(tensors, ways or Ways())
        else:
            tensors.prefer_huge_pages()
            ops = native()
            self._copies = CpuCopies(tensors) if ops is None else NativeCopies(tensors, ops)

    # -- pinning: for whoever owns the arena --

    def pin(self, base: int, length: int) -> None:
        """Let the device reach this part of an arena; where it cannot, copies are staged.

        Takes about as long as touching all of it; nothing on a CPU."""
        if self._pins is None:
            return
        try:
            self._pins.pin(base, length)
        except DeviceError as error:
            log.warning(
                "%.1f GiB of DRAM pool cannot be pinned; its pages are copied through staging "
                "memory, which is slower: %s",
                length / 2**30,
                error,
            )

    def unpin(self, base: int, length: int) -> None:
        """Before this part of an arena is given back; no copy uses it any more."""
        if self._pins is None:
            return
        try:
            self._pins.unpin(base, length)
        except DeviceError as error:
            log.error("%.1f GiB of DRAM pool stay pinned: %s", length / 2**30, error)

    @property
    def pinned_bytes(self) -> int:
        return 0 if self._pins is None else self._pins.pinned_bytes

    def close(self) -> None:
        """Unpin everything. Before the arena's memory goes."""
        if self._pins is not None:
            self._pins.close()

    # -- copies --

    def wait(self, ready: Sequence[Event]) -> None:
        """Until the device has got as far as ``ready`` says. Raises CopyStalled if it does not."""
        wait(ready)

    def gather(self, arena: Arena, blocks: Rows, pages: Rows) -> None:
        """Page ``pages[i]``, all layers, into block ``blocks[i]``. Done when it returns."""
        self._copies.gather(arena, blocks, pages)

    def scatter(self, arena: Arena, blocks: Rows, pages: Rows) -> None:
        """Block ``blocks[i]``, all layers, into page ``pages[i]``. Done when it returns."""
        self._copies.scatter(arena, blocks, pages)

    def begin_scatter(self, arena: Arena, blocks: Rows, pages: Rows) -> Load:
        """As ``scatter``, one layer at a time."""
        return self._copies.begin_load(arena, blocks, pages)
