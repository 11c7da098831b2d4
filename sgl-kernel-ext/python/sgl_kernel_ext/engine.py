"""The engine's ops, native or their reference. Tensors are addresses, sizes and strides (elements):
a caller that has a torch tensor hands over ``data_ptr()``, and keeps it alive."""

from __future__ import annotations

from typing import Protocol

from . import reference_engine as reference
from .switch import NATIVE
from .tables import Dtype, Isa

if NATIVE:
    from . import _native


def isa() -> Isa:
    """What the engine's ops run on now."""
    return Isa(_native.isa()) if NATIVE else Isa.PLAIN


def limit_isa(best: Isa) -> None:
    """For tests and comparisons: nothing better than ``best`` from now on, in this process."""
    if NATIVE:
        _native.limit_isa(best)


class ThinLinear(Protocol):
    """A linear layer's weights, checked once."""

    def apply(
        self, x: int, rows: int, x_stride: int, out: int, out_stride: int, threads: int
    ) -> None:
        """``out[i] = x[i] . weight^T (+ bias)`` for ``rows`` rows (1..16): ``x`` ``[rows, k]`` and
        ``out`` ``[rows, n]``, of the weight's dtype, rows any distance apart, no overlap. At most
        ``threads`` threads (1..256). Lets go of the GIL from 64 KiB of weights on.

        Raises ValueError for rows, strides, addresses or threads that cannot be."""


def thin_linear(weight: int, n: int, k: int, stride: int, bias: int, dtype: Dtype) -> ThinLinear:
    """The layer ``weight`` ``[n, k]``, rows ``stride`` elements apart, with ``bias`` ``[n]`` (0:
    none), both of ``dtype``, read in place by every call.

    A row's outputs do not depend on the other rows, their number, or the threads. bf16 with
    AVX512-BF16 gives the bits of ``torch.nn.functional.linear`` for 2 and more rows (oneDNN's
    order of sums, without AMX); elsewhere fp32 sums in an order of its own, the same everywhere.

    Raises ValueError for sizes, strides or addresses that cannot be.
    """
    made = _native.ThinLinear if NATIVE else reference.ThinLinear
    return made(weight, n, k, stride, bias, dtype)
