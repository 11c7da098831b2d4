"""What the ops are handed: where rows lie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

MOST_THIN_ROWS = 128
"""That a thin linear layer takes in one call."""


class Store(IntEnum):
    """How a copy writes its destination. Values are those of ``include/memserve/rows.h``."""

    AUTOMATIC = 0
    """Streaming where the copy is larger than what caches are good for."""
    CACHED = 1
    STREAMING = 2
    """Past the caches: the destination need not be read first, and pushes nothing out."""


class Sha(IntEnum):
    """How SHA-256 is computed. Values are those of ``include/memserve/sha256.h``."""

    AUTOMATIC = 0
    """With the processor's instructions where it has them."""
    PLAIN = 1
    INSTRUCTIONS = 2


class Isa(IntEnum):
    """What the engine's ops are compiled for; each level contains those before it. Values are those
    of ``include/memserve/cpu.h``."""

    PLAIN = 0
    AVX2 = 1
    """With FMA."""
    AVX512 = 2
    """F, BW, DQ and VL."""
    AVX512_BF16 = 3


class Dtype(IntEnum):
    """How activations and weights are kept. Values are those of ``include/memserve/bf16.h``."""

    BF16 = 0
    FP16 = 1
    FP32 = 2


class NormForm(IntEnum):
    """Where a norm's weight comes in. Values are those of ``include/memserve/elementwise.h``, as
    those of the two below."""

    PLAIN = 0
    """In fp32, before the one rounding: SGLang's ``RMSNorm``."""
    GEMMA = 1
    """The same with 1 + weight; a residual is added in the activations' dtype: ``GemmaRMSNorm``."""
    CAST_FIRST = 2
    """Rounded before the weight and after it: ``RMSNorm(cast_x_before_out_mul=True)``."""


class RotaryStyle(IntEnum):
    """Which two numbers of a head are turned together."""

    NEOX = 0
    """i and i + rotary_dim / 2."""
    INTERLEAVED = 1
    """2i and 2i + 1."""


class Activation(IntEnum):
    SILU = 0
    GELU_TANH = 1


@dataclass(frozen=True, slots=True)
class RowTable:
    """Tensors of bytes: row ``r`` of tensor ``t`` is the ``row_bytes[t]`` bytes at address
    ``pointers[t] + r * strides_bytes[t]``, for ``0 <= r < rows[t]``.

    All arrays are ``[tensors]``: uint64 the pointers, int64 the others; ``of`` makes them, and they
    cannot be written afterwards. ``owners`` are kept alive with the table: what the addresses lie
    in. The table trusts its addresses; ops check everything else.
    """

    pointers: NDArray[np.uint64]
    strides_bytes: NDArray[np.int64]
    row_bytes: NDArray[np.int64]
    rows: NDArray[np.int64]
    owners: tuple[object, ...] = field(default=(), repr=False)

    @classmethod
    def of(
        cls,
        pointers: Sequence[int],
        strides_bytes: Sequence[int],
        row_bytes: Sequence[int],
        rows: Sequence[int],
        owners: Sequence[object] = (),
    ) -> RowTable:
        """Raises ValueError where the columns differ in length or a number does not fit."""
        lengths = {len(pointers), len(strides_bytes), len(row_bytes), len(rows)}
        if len(lengths) != 1:
            raise ValueError(f"a row table's columns differ in length: {sorted(lengths)}")
        try:
            table = cls(
                np.array(pointers, dtype=np.uint64),
                np.array(strides_bytes, dtype=np.int64),
                np.array(row_bytes, dtype=np.int64),
                np.array(rows, dtype=np.int64),
                tuple(owners),
            )
        except OverflowError as error:
            raise ValueError(f"a row table's numbers must fit 64 bits: {error}") from error
        for column in (table.pointers, table.strides_bytes, table.row_bytes, table.rows):
            column.flags.writeable = False
        return table

    @classmethod
    def of_arrays(cls, arrays: Sequence[NDArray[np.generic]]) -> RowTable:
        """One tensor an array: ``[rows, ...]``, contiguous within a row, rows any distance apart.

        Raises ValueError for an array that is not so.
        """
        row_bytes = []
        for array in arrays:
            if array.ndim < 2 or (len(array) and not array[0].flags.c_contiguous):
                raise ValueError(f"rows of {array.shape} with strides {array.strides} have gaps")
            row_bytes.append(array[:1].nbytes if len(array) else array.strides[0])
        return cls.of(
            [array.ctypes.data for array in arrays],
            [
                array.strides[0] if len(array) > 1 else row
                for array, row in zip(arrays, row_bytes, strict=True)
            ],
            row_bytes,
            [len(array) for array in arrays],
            arrays,
        )

    def __len__(self) -> int:
        return len(self.pointers)

    def part(self, start: int, stop: int) -> RowTable:
        """The tensors ``start .. stop - 1`` (of a layer, say). Costs a microsecond."""
        return RowTable(
            self.pointers[start:stop],
            self.strides_bytes[start:stop],
            self.row_bytes[start:stop],
            self.rows[start:stop],
            self.owners,
        )
