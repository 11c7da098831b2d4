"""Linear layers of few rows: the weights are read in place at the memory's speed.

``install`` gives each plain linear layer of a loaded model, and the embedding that serves as its
head, a quant method of ours, which SGLang asks for the product (``SRTPlatform.post_load_model``).
More rows, other dtypes and everything quantised go to SGLang's own method as before. A row's bits
do not depend on which of the two computes it where the processor has AVX512-BF16 and no AMX.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch
from sglang.srt.layers.quantization.unquant import (
    UnquantizedEmbeddingMethod,
    UnquantizedLinearMethod,
)

from .dtypes import dtype_of

if TYPE_CHECKING:
    from sgl_kernel_ext.engine import ThinLinear

    from ...kernels import Native

MOST_ROWS = 16


class Weighted(Protocol):
    """What we use of a layer."""

    weight: torch.Tensor


class Thin:
    """A layer's product for few rows, prepared anew when its weights have moved."""

    def __init__(self, native: Native) -> None:
        self._native = native
        self._prepared: ThinLinear | None = None
        self._of: tuple[int, int, tuple[int, ...]] = (0, 0, ())

    def apply(
        self, weight: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor | None:
        """``x`` ``[rows, k]`` times ``weight`` ``[n, k]``; None where it is not ours to compute."""
        if x.dim() != 2 or not 0 < x.shape[0] <= MOST_ROWS or x.stride(1) != 1:
            return None
        prepared = self.of(weight, bias)
        if prepared is None or x.dtype != weight.dtype or x.shape[1] != weight.shape[1]:
            return None
        rows = x.shape[0]
        out = x.new_empty(rows, weight.shape[0])
        prepared.apply(
            x.data_ptr(),
            rows,
            x.stride(0),
            out.data_ptr(),
            out.stride(0),
            torch.get_num_threads(),
        )
        return out

    def of(self, weight: torch.Tensor, bias: torch.Tensor | None) -> ThinLinear | None:
        """None where the weights are not such as we read."""
        where = (weight.data_ptr(), 0 if bias is None else bias.data_ptr(), weight.stride())
        if self._of != where:
            self._prepared = self._prepare(weight, bias)
            self._of = where
        return self._prepared

    def _prepare(self, weight: torch.Tensor, bias: torch.Tensor | None) -> ThinLinear | None:
        dtype = dtype_of(weight)
        if dtype is None or weight.dim() != 2 or weight.stride(1) != 1:
            return None
        if bias is not None and (bias.dtype != weight.dtype or not bias.is_contiguous()):
            return None
        n, k = weight.shape
        return self._native.thin_linear(
            weight.data_ptr(),
            n,
            k,
            weight.stride(0),
            0 if bias is None else bias.data_ptr(),
            dtype,
        )


class ThinLinearMethod(UnquantizedLinearMethod):
    """Of one layer."""

    def __init__(self, native: Native) -> None:
        super().__init__()
        self.thin = Thin(native)

    def apply(
        self, layer: Weighted, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        out = self.thin.apply(layer.weight, x, bias)
        return super().apply(layer, x, bias) if out is None else out


class ThinHeadMethod(UnquantizedEmbeddingMethod):
    """Of one embedding. SGLang asks it for logits because it is none of SGLang's own methods."""

    def __init__(self, native: Native) -> None:
        super().__init__()
        self.thin = Thin(native)

    def apply(
        self, layer: Weighted, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        # As SGLang's logits processor does where there is no method.
        x = x.to(layer.weight.dtype)
        out = self.thin.apply(layer.weight, x, bias)
        return super().apply(layer, x, bias) if out is None else out


def install(model: torch.nn.Module, native: Native) -> int:
    """How many layers have our method now."""
    head_in_fp32 = any(
        getattr(module, "use_fp32_lm_head", False)
        or getattr(module, "use_fp32_lm_head_output", False)
        for module in model.modules()
    )
    count = 0
    for module in model.modules():
        kind = type(getattr(module, "quant_method", None))
        if kind is UnquantizedLinearMethod:
            module.quant_method = ThinLinearMethod(native)
        elif kind is UnquantizedEmbeddingMethod and not head_in_fp32:
            module.quant_method = ThinHeadMethod(native)
        else:
            continue
        count += 1
    return count
