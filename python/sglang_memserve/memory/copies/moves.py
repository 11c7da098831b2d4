"""The Triton kernel that moves pages between the pool's tensors and blocks, all in one launch.

The kernel gets a table of the tensors' addresses (K0, V0, K1, V1, ...), page numbers, and the
address of each page's block: host memory that the device reaches, or packed device memory. It sees
bytes as words, 8 bytes each where sizes and addresses allow, so dtypes do not matter.

A bounded number of programs share the work: piece after piece of at most ``CHUNK_WORDS`` words of
one row, in the order in which the pieces lie in the blocks, so that programs that run side by side
write side by side. That order matters across PCIe, where small writes are as dear as long ones.
"""

from __future__ import annotations

import math
import subprocess
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from triton.errors import TritonError

from ...errors import DeviceError
from .base import PoolTensors

CHUNK_WORDS = 1024
# One access of a thread moves this much where everything is aligned to it.
ACCESS_BYTES = 16
_MAX_PIECES = 1 << 31
_WORDS = {8: tl.int64, 4: tl.int32, 2: tl.int16, 1: tl.int8}


# What differs from launch to launch must not make another kernel: a forward would wait for the
# compiler.
@triton.jit(  # type: ignore[untyped-decorator, unused-ignore]
    do_not_specialize=["first_tensor", "num_tensors", "count"],
    do_not_specialize_on_alignment=["pages", "blocks"],
)
def move_pages(  # type: ignore[no-untyped-def]
    tensors,
    pages,
    blocks,
    first_tensor,
    num_tensors,
    count,
    k_words,
    v_words,
    TO_BLOCKS: tl.constexpr,
    WORD: tl.constexpr,
    ALIGN: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """``tensors``, ``pages`` ``[count]`` and ``blocks`` ``[count]`` are int64; sizes in words."""
    chunks = (tl.maximum(k_words, v_words) + CHUNK - 1) // CHUNK
    pieces = count * num_tensors * chunks
    lane = tl.arange(0, CHUNK)
    for piece in tl.range(tl.program_id(0), pieces, tl.num_programs(0)):
        row = piece // chunks
        tensor = first_tensor + row % num_tensors
        index = row // num_tensors
        is_v = tensor % 2
        words = tl.where(is_v == 1, v_words, k_words)
        before = (tensor // 2) * (k_words + v_words) + is_v * k_words
        page = tl.load(pages + index)
        in_pool = tl.load(tensors + tensor).to(tl.pointer_type(WORD)) + page * words
        in_block = tl.load(blocks + index).to(tl.pointer_type(WORD)) + before
        in_pool = tl.multiple_of(in_pool, ALIGN)
        in_block = tl.multiple_of(in_block, ALIGN)
        at = (piece % chunks) * CHUNK + lane
        inside = at < words
        # Nothing is read twice here: leave the cache to the forward.
        if TO_BLOCKS:
            value = tl.load(in_pool + at, mask=inside, eviction_policy="evict_first")
            tl.store(in_block + at, value, mask=inside)
        else:
            value = tl.load(in_block + at, mask=inside, eviction_policy="evict_first")
            tl.store(in_pool + at, value, mask=inside)


class PageMoves:
    """Launches of the kernel over one pool's tensors, on the calling thread's current stream.

    ``pages`` and ``blocks`` are int64 ``[n]`` on the pool's device: page numbers, and addresses of
    whole blocks, at least ``ACCESS_BYTES`` aligned. They are trusted: checked before, by ``Pairs``.
    """

    def __init__(self, tensors: PoolTensors, kernel: Any = move_pages) -> None:
        layout = tensors.layout
        addresses = [rows.data_ptr() for rows in tensors.rows]
        self._kernel = kernel
        self._table = torch.tensor(addresses, dtype=torch.int64, device=tensors.device)
        self._all = len(addresses)
        self._word_bytes = math.gcd(8, layout.k_bytes, layout.v_bytes, *addresses)
        aligned = math.gcd(ACCESS_BYTES, layout.k_bytes, layout.v_bytes, *addresses)
        self._align_bytes = max(aligned, self._word_bytes)
        self._k_words = layout.k_bytes // self._word_bytes
        self._v_words = layout.v_bytes // self._word_bytes
        longest = max(self._k_words, self._v_words)
        self._chunk = min(CHUNK_WORDS, 1 << (longest - 1).bit_length())
        self._chunks = -(-longest // self._chunk)

    def prepare(self) -> None:
        """Compile both directions, on the calling thread's current device.

        Raises DeviceError where Triton cannot; it needs a C compiler, for one."""
        nothing = torch.empty(0, dtype=torch.int64, device=self._table.device)
        try:
            self.gather(nothing, nothing, 1)
            self.scatter(nothing, nothing, 1)
        except (RuntimeError, OSError, subprocess.SubprocessError, TritonError) as error:
            raise DeviceError(f"Triton cannot compile the page kernel: {error}") from error

    def gather(self, pages: torch.Tensor, blocks: torch.Tensor, programs: int) -> None:
        """All tensors of ``pages[i]`` to the block at ``blocks[i]``."""
        self._launch(pages, blocks, 0, self._all, programs, to_blocks=True)

    def scatter(
        self, pages: torch.Tensor, blocks: torch.Tensor, programs: int, layer: int | None = None
    ) -> None:
        """The block at ``blocks[i]`` to ``pages[i]``: one layer's K and V, or all tensors."""
        first, stop = (0, self._all) if layer is None else (2 * layer, 2 * layer + 2)
        self._launch(pages, blocks, first, stop, programs, to_blocks=False)

    def _launch(
        self,
        pages: torch.Tensor,
        blocks: torch.Tensor,
        first: int,
        stop: int,
        programs: int,
        *,
        to_blocks: bool,
    ) -> None:
        pieces = len(pages) * (stop - first) * self._chunks
        assert len(pages) == len(blocks) and pieces < _MAX_PIECES, (len(pages), len(blocks))
        launch: Callable[..., object] = self._kernel[(max(1, min(programs, pieces)),)]
        launch(
            self._table,
            pages,
            blocks,
            first,
            stop - first,
            len(pages),
            self._k_words,
            self._v_words,
            TO_BLOCKS=to_blocks,
            WORD=_WORDS[self._word_bytes],
            ALIGN=self._align_bytes,
            CHUNK=self._chunk,
            num_warps=4,
        )
