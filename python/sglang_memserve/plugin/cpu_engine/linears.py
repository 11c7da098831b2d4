"""Linear layers of few rows: the weights are read in place, at up to the memory's speed.

``install`` gives each plain linear layer of a loaded model, and the embedding that serves as its
head, a quant method of ours, which SGLang asks for the product (``SRTPlatform.post_load_model``).
More rows, other dtypes and everything quantised go to SGLang's own method as before.

A cache hit leaves few rows of a prompt to compute, where a miss leaves many, and must not change
the answer. So where torch's products sum in another order than ours, which is tried out for each
shape of weights at first use, ours are used for decoding alone. With AVX512-BF16 and without AMX
they give the same bits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch
from sglang.srt.layers.quantization.unquant import (
    UnquantizedEmbeddingMethod,
    UnquantizedLinearMethod,
)
from sglang.srt.model_executor.forward_context import get_attn_backend, has_forward_context

from ..attention import MemServeCpuAttention
from .dtypes import dtype_of

if TYPE_CHECKING:
    from sgl_kernel_ext.engine import ThinLinear

    from ...kernels import Native

# Up to which our products pay where torch's sums are others. Where they are the same, both run on
# bf16's own instructions, and ours pay as long as torch packs the weights anew: ``MOST_THIN_ROWS``.
MOST_ROWS = 16
# Enough for torch to compute them as it computes a prompt through a whole layer.
_MANY_ROWS = 256
_MANY_OUTPUTS = 4096


class Weighted(Protocol):
    """What we use of a layer."""

    weight: torch.Tensor


class SameBits:
    """Of which weights our products have the bits of torch's; by shape, as torch decides by it."""

    def __init__(self, native: Native) -> None:
        self._native = native
        self._found: dict[tuple[torch.Size, torch.dtype], bool] = {}

    def of(self, weight: torch.Tensor) -> bool:
        key = (weight.shape, weight.dtype)
        if key not in self._found:
            self._found[key] = self._try(*key)
        return self._found[key]

    def _try(self, shape: torch.Size, dtype: torch.dtype) -> bool:
        # The second half of every sum takes the first away again, so that nothing but what was
        # rounded on the way is left: another order of sums shows in almost every product.
        n, half = min(shape[0], _MANY_OUTPUTS), shape[1] // 2
        source = torch.Generator().manual_seed(half)
        weight = torch.zeros(n, shape[1], dtype=dtype)
        x = torch.zeros(_MANY_ROWS, shape[1], dtype=dtype)
        weight[:, :half] = torch.randn(n, half, generator=source).to(dtype)
        weight[:, half : 2 * half] = -weight[:, :half]
        x[:, :half] = torch.randn(_MANY_ROWS, half, generator=source).to(dtype)
        x[:, half : 2 * half] = x[:, :half]
        thin = prepare(self._native, weight, None)
        if thin is None:
            return False
        wanted = torch.nn.functional.linear(x, weight)
        most = self._native.MOST_THIN_ROWS
        found = x.new_empty(most, n)
        for rows in (1, MOST_ROWS, most):
            _run(thin, x[:rows], found)
            if not torch.equal(found[:rows], wanted[:rows]):
                return False
        return True


class Thin:
    """A layer's product for few rows, prepared anew when its weights have moved.

    ``same_bits``: whether it may take the place of torch's in a part of a prompt.
    """

    def __init__(self, native: Native, same: SameBits) -> None:
        self.same_bits = False
        self._native, self._same = native, same
        self._prepared: ThinLinear | None = None
        self._of: tuple[int, int, tuple[int, ...]] = (0, 0, ())

    def apply(
        self, weight: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor | None:
        """``x`` ``[rows, k]`` times ``weight`` ``[n, k]``; None where it is not ours to compute."""
        most = self._native.MOST_THIN_ROWS
        if x.dim() != 2 or not 0 < x.shape[0] <= most or x.stride(1) != 1:
            return None
        prepared = self.of(weight, bias)
        if prepared is None or x.dtype != weight.dtype or x.shape[1] != weight.shape[1]:
            return None
        if not self.same_bits and (x.shape[0] > MOST_ROWS or not _decoding()):
            return None
        out = x.new_empty(x.shape[0], weight.shape[0])
        _run(prepared, x, out)
        return out

    def of(self, weight: torch.Tensor, bias: torch.Tensor | None) -> ThinLinear | None:
        """None where the weights are not such as we read."""
        where = (weight.data_ptr(), 0 if bias is None else bias.data_ptr(), weight.stride())
        if self._of != where:
            self._prepared = prepare(self._native, weight, bias)
            self.same_bits = self._prepared is not None and self._same.of(weight)
            self._of = where
        return self._prepared


def prepare(native: Native, weight: torch.Tensor, bias: torch.Tensor | None) -> ThinLinear | None:
    """None where the weights are not such as we read."""
    dtype = dtype_of(weight)
    if dtype is None or weight.dim() != 2 or weight.stride(1) != 1:
        return None
    if bias is not None and (bias.dtype != weight.dtype or not bias.is_contiguous()):
        return None
    n, k = weight.shape
    where = 0 if bias is None else bias.data_ptr()
    return native.thin_linear(weight.data_ptr(), n, k, weight.stride(0), where, dtype)


def _run(thin: ThinLinear, x: torch.Tensor, out: torch.Tensor) -> None:
    threads = torch.get_num_threads()
    thin.apply(x.data_ptr(), x.shape[0], x.stride(0), out.data_ptr(), out.stride(0), threads)


class ThinLinearMethod(UnquantizedLinearMethod):
    """Of one layer."""

    def __init__(self, native: Native, same: SameBits) -> None:
        super().__init__()
        self.thin = Thin(native, same)

    def apply(
        self, layer: Weighted, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        out = self.thin.apply(layer.weight, x, bias)
        return super().apply(layer, x, bias) if out is None else out


class ThinHeadMethod(UnquantizedEmbeddingMethod):
    """Of one embedding. SGLang asks it for logits because it is none of SGLang's own methods."""

    def __init__(self, native: Native, same: SameBits) -> None:
        super().__init__()
        self.thin = Thin(native, same)

    def apply(
        self, layer: Weighted, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        # As SGLang's logits processor does where there is no method.
        x = x.to(layer.weight.dtype)
        out = self.thin.apply(layer.weight, x, bias)
        return super().apply(layer, x, bias) if out is None else out


def _decoding() -> bool:
    """Whether the pass under way computes one token of each request."""
    if not has_forward_context():
        return False
    backend = get_attn_backend()
    return isinstance(backend, MemServeCpuAttention) and backend.decoding


def install(model: torch.nn.Module, native: Native) -> int:
    """How many layers have our method now."""
    head_in_fp32 = any(
        getattr(module, "use_fp32_lm_head", False)
        or getattr(module, "use_fp32_lm_head_output", False)
        for module in model.modules()
    )
    count, same = 0, SameBits(native)
    for module in model.modules():
        kind = type(getattr(module, "quant_method", None))
        if kind is UnquantizedLinearMethod:
            module.quant_method = ThinLinearMethod(native, same)
        elif kind is UnquantizedEmbeddingMethod and not head_in_fp32:
            module.quant_method = ThinHeadMethod(native, same)
        else:
            continue
        count += 1
    return count
