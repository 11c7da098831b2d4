"""Names of element types on both sides."""

from __future__ import annotations

import torch
from sgl_kernel_ext.tables import Dtype

_DTYPES = {
    torch.bfloat16: Dtype.BF16,
    torch.float16: Dtype.FP16,
    torch.float32: Dtype.FP32,
}


def dtype_of(tensor: torch.Tensor) -> Dtype | None:
    """None for one that no native op knows, or that is not in host memory."""
    return _DTYPES.get(tensor.dtype) if tensor.device.type == "cpu" else None
