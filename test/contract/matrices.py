"""What the tests of the engine's ops hand to them."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sgl_kernel_ext import ops
from sgl_kernel_ext import reference_engine as reference
from sgl_kernel_ext.tables import Dtype, Isa

BEST = ops.isa()
LEVELS = [level for level in Isa if level <= BEST]
# Half a unit in the last place of a rounded result.
ROUNDING = {Dtype.BF16: 2.0**-8, Dtype.FP16: 2.0**-11, Dtype.FP32: 2.0**-24}
REFERENCE = SimpleNamespace(
    rms_norm=reference.RmsNorm,
    kv_slots=reference.KvSlots,
    rotary=reference.Rotary,
    gate=reference.gate,
)


@dataclass(frozen=True)
class Matrix:
    """Rows of ``width`` numbers, ``stride`` apart, somewhere in a buffer of its own."""

    buffer: NDArray[Any]
    offset: int
    rows: int
    width: int
    stride: int
    dtype: Dtype

    @classmethod
    def of(cls, values: NDArray[Any], dtype: Dtype, offset: int = 0, gap: int = 0) -> Matrix:
        rows, width = values.shape
        stride = width + gap
        # What lies between is NaN in every dtype: to read it would show.
        filler = np.full(offset + rows * stride + 40, np.nan, np.float32)
        made = cls(reference.from_float(filler, dtype), offset, rows, width, stride, dtype)
        made.view[:] = reference.from_float(values.astype(np.float32), dtype)
        return made

    @classmethod
    def blank(cls, rows: int, width: int, dtype: Dtype, offset: int = 0, gap: int = 0) -> Matrix:
        return cls.of(np.full((rows, width), np.nan), dtype, offset, gap)

    @property
    def address(self) -> int:
        return int(self.buffer.ctypes.data) + self.offset * self.buffer.itemsize

    @property
    def view(self) -> NDArray[Any]:
        return reference.matrix(self.address, self.rows, self.width, self.stride, self.dtype)

    @property
    def bits(self) -> NDArray[Any]:
        """A copy, of integers."""
        whole = self.view.copy()
        return whole.view(f"i{whole.itemsize}")

    @property
    def values(self) -> NDArray[np.float64]:
        return reference.to_float(self.view, self.dtype).astype(np.float64)

    def others_untouched(self) -> bool:
        """What is not in the rows is as it was made."""
        inside = np.zeros(len(self.buffer), bool)
        for row in range(self.rows):
            start = self.offset + row * self.stride
            inside[start : start + self.width] = True
        outside = reference.to_float(self.buffer, self.dtype)[~inside]
        return bool(np.isnan(outside).all())


def random(seed: int, rows: int, width: int, dtype: Dtype, gap: int = 0) -> Matrix:
    values = np.random.default_rng(seed).standard_normal((rows, width))
    return Matrix.of(values, dtype, seed % 7, gap)


def copy_of(one: Matrix) -> Matrix:
    return Matrix(one.buffer.copy(), one.offset, one.rows, one.width, one.stride, one.dtype)
