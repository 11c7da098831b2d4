"""The engine's ops in numpy: the oracle of the native ones, and their stand-in."""

from __future__ import annotations

import ctypes

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from .tables import MOST_THIN_ROWS, Activation, Dtype, NormForm, RotaryStyle

MOST_THREADS = 256

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
    if rows == 0:
        return np.empty((0, width), stored)
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


def rounded(values: Floats, dtype: Dtype) -> Floats:
    return to_float(from_float(values, dtype), dtype)


def check_address(what: str, address: int, dtype: Dtype) -> None:
    size = np.dtype(_STORED[dtype]).itemsize
    if not 0 < address < 2**64 or address % size:
        raise ValueError(f"{what} at {address}: an address is positive and aligned to {size} bytes")


def check_size(what: str, size: int, most: int) -> None:
    if not 0 < size <= most:
        raise ValueError(f"{what} {size} is not in 1..{most}")


def check_rows(what: str, address: int, rows: int, width: int, stride: int, dtype: Dtype) -> None:
    if rows < 0 or stride < 0 or stride > 2**40 // max(rows, 1) or (rows > 1 and stride < width):
        raise ValueError(f"{what}: {rows} rows of {width} elements, {stride} apart")
    if rows:
        check_address(what, address, dtype)


def indices(what: str, address: int, rows: int, limit: int) -> NDArray[np.int64]:
    """A copy of ``rows`` int64 numbers in 0 .. limit - 1, or an IndexError."""
    if rows <= 0:
        return np.empty(0, np.int64)
    if not 0 < address < 2**64 or address % 8:
        raise ValueError(f"{what} at {address}: an address is positive and aligned to 8 bytes")
    numbers = np.ctypeslib.as_array((ctypes.c_int64 * rows).from_address(address)).copy()
    if numbers.min() < 0 or numbers.max() >= limit:
        raise IndexError(f"a {what} is not in 0..{limit - 1}")
    return numbers


class ThinLinear:
    """As ``ops.thin_linear``; sums in float64, one thread."""

    def __init__(self, weight: int, n: int, k: int, stride: int, bias: int, dtype: int) -> None:
        self._dtype, self.n, self.k, self.dtype = Dtype(dtype), n, k, Dtype(dtype)
        if not (0 < n <= 2**40 and 0 < k <= 2**24):
            raise ValueError(f"weights of {n} x {k}")
        check_rows("weight", weight, n, k, stride, self._dtype)
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
        check_rows("x", x, rows, k, x_stride, self._dtype)
        check_rows("out", out, rows, n, out_stride, self._dtype)
        given = to_float(matrix(x, rows, k, x_stride, self._dtype), self._dtype)
        sums = given.astype(np.float64) @ to_float(self._weight, self._dtype).T.astype(np.float64)
        if self._bias is not None:
            sums += to_float(self._bias, self._dtype)
        with np.errstate(over="ignore"):
            result = from_float(sums.astype(np.float32), self._dtype)
        matrix(out, rows, n, out_stride, self._dtype)[:] = result


class RmsNorm:
    """As ``ops.rms_norm``; the mean in float64."""

    def __init__(
        self, weight: int, width: int, eps: float, dtype: int, weight_dtype: int, form: int
    ) -> None:
        self._dtype, self._form, wide = Dtype(dtype), NormForm(form), Dtype(weight_dtype)
        check_size("width", width, 2**24)
        check_rows("weight", weight, 1, width, width, wide)
        if wide not in (self._dtype, Dtype.FP32):
            raise ValueError("a norm's weight is of the activations' dtype or fp32")
        if not 0 <= eps < np.inf:
            raise ValueError(f"eps must not be negative: {eps}")
        self._weight, self._weight_dtype = matrix(weight, 1, width, width, wide), wide
        self._width, self._eps = width, np.float32(eps)
        self.width, self.dtype = width, self._dtype

    def apply(
        self, x: int, x_stride: int, out: int, out_stride: int, rows: int, threads: int
    ) -> None:
        check_threads(threads)
        self._check(x, x_stride, out, out_stride, rows)
        if rows:
            given = to_float(matrix(x, rows, self._width, x_stride, self._dtype), self._dtype)
            self._norm(given, out, out_stride)

    def add_and_apply(
        self,
        x: int,
        x_stride: int,
        residual: int,
        residual_stride: int,
        out: int,
        out_stride: int,
        rows: int,
        threads: int,
    ) -> None:
        check_threads(threads)
        self._check(x, x_stride, out, out_stride, rows)
        check_rows("residual", residual, rows, self._width, residual_stride, self._dtype)
        if not rows:
            return
        held = matrix(residual, rows, self._width, residual_stride, self._dtype)
        given = matrix(x, rows, self._width, x_stride, self._dtype)
        total = to_float(given, self._dtype) + to_float(held, self._dtype)
        held[:] = from_float(total, self._dtype)
        if self._form is NormForm.GEMMA:
            total = to_float(held, self._dtype)
        self._norm(total, out, out_stride)

    def _check(self, x: int, x_stride: int, out: int, out_stride: int, rows: int) -> None:
        check_rows("x", x, rows, self._width, x_stride, self._dtype)
        check_rows("out", out, rows, self._width, out_stride, self._dtype)

    def _norm(self, values: Floats, out: int, out_stride: int) -> None:
        mean = np.square(values.astype(np.float64)).mean(-1, keepdims=True).astype(np.float32)
        normed = values * (np.float32(1) / np.sqrt(mean + self._eps))
        weight = to_float(self._weight, self._weight_dtype)
        if self._form is NormForm.GEMMA:
            weight = weight + np.float32(1)
        elif self._form is NormForm.CAST_FIRST:
            normed = rounded(normed, self._dtype)
        to = matrix(out, len(values), self._width, out_stride, self._dtype)
        to[:] = from_float(normed * weight, self._dtype)


class KvSlots:
    """As ``ops.kv_slots``."""

    def __init__(
        self,
        k: int,
        k_stride: int,
        k_width: int,
        v: int,
        v_stride: int,
        v_width: int,
        slots: int,
        dtype: int,
    ) -> None:
        self._dtype, self.slots = Dtype(dtype), slots
        for what, size in (("slots", slots), ("width of k", k_width), ("width of v", v_width)):
            check_size(what, size, 2**40)
        check_rows("k", k, slots, k_width, k_stride, self._dtype)
        check_rows("v", v, slots, v_width, v_stride, self._dtype)
        self._k = matrix(k, slots, k_width, k_stride, self._dtype)
        self._v = matrix(v, slots, v_width, v_stride, self._dtype)

    def write(
        self, slots: int, rows: int, k: int, k_stride: int, v: int, v_stride: int, threads: int
    ) -> None:
        check_threads(threads)
        self.check(slots, rows, k, k_stride, v, v_stride)
        for to, new, stride in ((self._k, k, k_stride), (self._v, v, v_stride)):
            if rows:
                rows_new = matrix(new, rows, to.shape[1], stride, self._dtype)
                to[indices("slot", slots, rows, self.slots)] = rows_new

    def check(self, slots: int, rows: int, k: int, k_stride: int, v: int, v_stride: int) -> None:
        check_rows("new k", k, rows, self._k.shape[1], k_stride, self._dtype)
        check_rows("new v", v, rows, self._v.shape[1], v_stride, self._dtype)
        indices("slot", slots, rows, self.slots)

    def takes(self, width: int, dtype: Dtype) -> bool:
        return self._k.shape[1] == width and self._dtype is dtype


class Rotary:
    """As ``ops.rotary``."""

    def __init__(
        self,
        cache: int,
        positions: int,
        rotary_dim: int,
        head_dim: int,
        q_heads: int,
        k_heads: int,
        dtype: int,
        cache_dtype: int,
        style: int,
    ) -> None:
        check_size("positions", positions, 2**30)
        check_size("rotary_dim", rotary_dim, 1024)
        for what, size in (("head_dim", head_dim), ("q heads", q_heads), ("k heads", k_heads)):
            check_size(what, size, 2**16)
        if rotary_dim % 2 or rotary_dim > head_dim:
            raise ValueError(f"{rotary_dim} dimensions of heads of {head_dim}: even, and fitting")
        stored = Dtype(cache_dtype)
        check_rows("cache", cache, positions, rotary_dim, rotary_dim, stored)
        self._cache = to_float(matrix(cache, positions, rotary_dim, rotary_dim, stored), stored)
        self._dtype, self._style, self._dim = Dtype(dtype), RotaryStyle(style), head_dim
        self._q_width, self._k_width = q_heads * head_dim, k_heads * head_dim
        self.heads, self.dtype = (q_heads, k_heads, head_dim), self._dtype
        self.positions = positions

    def apply(
        self, positions: int, rows: int, q: int, q_stride: int, k: int, k_stride: int, threads: int
    ) -> None:
        check_threads(threads)
        check_rows("q", q, rows, self._q_width, q_stride, self._dtype)
        check_rows("k", k, rows, self._k_width, k_stride, self._dtype)
        where = indices("position", positions, rows, len(self._cache))
        if rows:
            self._turn(matrix(q, rows, self._q_width, q_stride, self._dtype), where)
            self._turn(matrix(k, rows, self._k_width, k_stride, self._dtype), where)

    def apply_and_write(
        self,
        positions: int,
        rows: int,
        q: int,
        q_stride: int,
        k: int,
        k_stride: int,
        kv: KvSlots,
        slots: int,
        v: int,
        v_stride: int,
        threads: int,
    ) -> None:
        if not kv.takes(self._k_width, self._dtype):
            raise ValueError("what is written is not the k that is turned")
        kv.check(slots, rows, k, k_stride, v, v_stride)
        self.apply(positions, rows, q, q_stride, k, k_stride, threads)
        kv.write(slots, rows, k, k_stride, v, v_stride, threads)

    def _turn(self, heads: Stored, where: NDArray[np.int64]) -> None:
        angles = rounded(self._cache[where], self._dtype)[:, None]
        half = angles.shape[-1] // 2
        cosines, sines = angles[..., :half], angles[..., half:]
        split = heads.reshape(len(heads), -1, self._dim)
        if self._style is RotaryStyle.NEOX:
            first, second = slice(0, half), slice(half, 2 * half)
        else:
            first, second = slice(0, 2 * half, 2), slice(1, 2 * half, 2)
        a, b = (to_float(split[..., part], self._dtype) for part in (first, second))
        products = (a * cosines, b * sines, b * cosines, a * sines)
        ac, bs, bc, as_ = (rounded(one, self._dtype) for one in products)
        turned = split.copy()
        turned[..., first] = from_float(ac - bs, self._dtype)
        turned[..., second] = from_float(bc + as_, self._dtype)
        heads[:] = turned.reshape(heads.shape)


def gate(
    x: int,
    x_stride: int,
    out: int,
    out_stride: int,
    rows: int,
    width: int,
    dtype: int,
    activation: int,
    threads: int,
) -> None:
    """As ``ops.gate``, in float64 up to the first rounding."""
    check_threads(threads)
    stored, chosen = Dtype(dtype), Activation(activation)
    check_size("width", width, 2**30)
    check_rows("x", x, rows, 2 * width, x_stride, stored)
    check_rows("out", out, rows, width, out_stride, stored)
    if not rows:
        return
    both = to_float(matrix(x, rows, 2 * width, x_stride, stored), stored)
    value = both[:, :width].astype(np.float64)
    with np.errstate(over="ignore"):
        if chosen is Activation.SILU:
            active = value / (1 + np.exp(-value))
        else:
            inner = np.sqrt(2 / np.pi) * (value + 0.044715 * value**3)
            active = value / (1 + np.exp(-2 * inner))
        first = rounded(active.astype(np.float32), stored)
        result = from_float(first * both[:, width:], stored)
    matrix(out, rows, width, out_stride, stored)[:] = result
