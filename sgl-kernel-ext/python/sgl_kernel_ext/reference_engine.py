"""The engine's ops in numpy: the oracle of the native ones, and their stand-in."""

from __future__ import annotations

import ctypes

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from .tables import Dtype

MOST_THREADS = 256
MOST_THIN_ROWS = 16

_STORED: dict[Dtype, type[np.generic]] = {
    Dtype.BF16: np.uint16,
    Dtype.FP16: np.float16,
    Dtype.FP32: np.float32,
}
Stored = NDArray[np.generic]
Floats = NDArray[np.float32]


def check_threads(threads: int) -> None:
    if not 1 <= threads <= MOST_THREADS:
        raise ValueError(f"threads must be in 1..{MOST_THREADS}, got {threads}")


def matrix(address: int, rows: int, width: int, stride: int, dtype: Dtype) -> Stored:
    """Memory as ``[rows, width]``, rows ``stride`` elements apart; writable. bf16 as its bits."""
    stored = np.dtype(_STORED[dtype])
    span = ((rows - 1) * stride + width) * stored.itemsize
    memory = (ctypes.c_uint8 * span).from_address(address)
    flat = np.ctypeslib.as_array(memory).view(stored)
    return as_strided(flat, (rows, width), (stride * stored.itemsize, stored.itemsize))


def to_float(stored: Stored, dtype: Dtype) -> Floats:
    if dtype is Dtype.BF16:
        return (stored.astype(np.uint32) << 16).view(np.float32)
    return stored.astype(np.float32)


def from_float(values: Floats, dtype: Dtype) -> Stored:
    """Rounded to nearest even; what no NaN is rounds to infinity where it is too large."""
    if dtype is not Dtype.BF16:
        with np.errstate(over="ignore"):
            return values.astype(_STORED[dtype])
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)


def check_address(what: str, address: int, dtype: Dtype) -> None:
    size = np.dtype(_STORED[dtype]).itemsize
    if not 0 < address < 2**64 or address % size:
        raise ValueError(f"{what} at {address}: an address is positive and aligned to {size} bytes")


def check_stride(what: str, rows: int, width: int, stride: int) -> None:
    if stride < 0 or stride > 2**40 // rows or (rows > 1 and stride < width):
        raise ValueError(f"{what}: rows of {width} elements, {stride} apart")


class ThinLinear:
    """As ``ops.thin_linear``; sums in float64, one thread."""

    def __init__(self, weight: int, n: int, k: int, stride: int, bias: int, dtype: int) -> None:
        self._dtype = Dtype(dtype)
        if not (0 < n <= 2**40 and 0 < k <= 2**24):
            raise ValueError(f"weights of {n} x {k}")
        check_stride("weights", n, k, stride)
        check_address("weight", weight, self._dtype)
        self._weight = matrix(weight, n, k, stride, self._dtype)
        self._bias: Stored | None = None
        if bias:
            check_address("bias", bias, self._dtype)
            self._bias = matrix(bias, 1, n, n, self._dtype)

    def apply(
        self, x: int, rows: int, x_stride: int, out: int, out_stride: int, threads: int
    ) -> None:
        check_threads(threads)
        if not 1 <= rows <= MOST_THIN_ROWS:
            raise ValueError(f"{rows} rows are not in 1..{MOST_THIN_ROWS}")
        n, k = self._weight.shape
        for what, address, width, stride in (("x", x, k, x_stride), ("out", out, n, out_stride)):
            check_stride(what, rows, width, stride)
            check_address(what, address, self._dtype)
        given = to_float(matrix(x, rows, k, x_stride, self._dtype), self._dtype)
        sums = given.astype(np.float64) @ to_float(self._weight, self._dtype).T.astype(np.float64)
        if self._bias is not None:
            sums += to_float(self._bias, self._dtype)
        with np.errstate(over="ignore"):
            result = from_float(sums.astype(np.float32), self._dtype)
        matrix(out, rows, n, out_stride, self._dtype)[:] = result
