"""SGLang's fused operations, computed natively: norms, rotary embedding, gated activations.

Registered with SGLang's own mechanism for out-of-tree platforms, for exact classes: a subclass that
computes something else keeps its own forward. Each function below is bound to SGLang's module; what
it cannot compute goes to the module's ``forward_native``, whose roundings the native ops keep.

As on CUDA, ``residual`` and the heads that are turned are changed in place.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from sglang.kernels.fused_op import BaseFusedOp
from sglang.srt.layers.activation import GeluAndMul, SiluAndMul
from sglang.srt.layers.layernorm import GemmaRMSNorm, RMSNorm
from sglang.srt.layers.rotary_embedding.base import (
    LinearScalingRotaryEmbedding,
    RotaryEmbedding,
)
from sglang.srt.layers.rotary_embedding.rope_variant import (
    DynamicNTKScalingRotaryEmbedding,
    Llama3RotaryEmbedding,
)
from sglang.srt.layers.rotary_embedding.yarn import YaRNScalingRotaryEmbedding

from ...kernels import native
from .dtypes import dtype_of

if TYPE_CHECKING:
    from sgl_kernel_ext.engine import RmsNorm, Rotary

_PREPARED = "_memserve_prepared"
_ROTARIES = (
    RotaryEmbedding,
    LinearScalingRotaryEmbedding,
    DynamicNTKScalingRotaryEmbedding,
    Llama3RotaryEmbedding,
    YaRNScalingRotaryEmbedding,
)


def register(platform_key: str) -> None:
    """Called once in a scheduler on our platform, before it builds a model."""
    register_one = BaseFusedOp.register_oot_forward
    register_one(RMSNorm, rms_norm, platform_key)
    register_one(GemmaRMSNorm, gemma_rms_norm, platform_key)
    register_one(SiluAndMul, silu_and_mul, platform_key)
    register_one(GeluAndMul, gelu_and_mul, platform_key)
    for kind in _ROTARIES:
        # A class that turns its heads in another way says so by a forward of its own.
        if kind.forward_native is RotaryEmbedding.forward_native:
            register_one(kind, turn, platform_key)


# -- norms --


def prepared_norm(self: Any, dtype: torch.dtype) -> RmsNorm | None:
    """The native norm of SGLang's ``RMSNorm`` or ``GemmaRMSNorm``, made anew when its weight has
    moved; None where it computes something else."""
    ops, weight = native(), self.weight
    assert ops is not None
    gemma = isinstance(self, GemmaRMSNorm)
    if not gemma and (
        self.variance_size_override is not None
        or self.fp32_residual
        or self.override_orig_dtype is not None
    ):
        return None
    where = (weight.data_ptr(), dtype)
    known = self.__dict__.get(_PREPARED)
    if known is not None and known[0] == where:
        found: RmsNorm | None = known[1]
        return found
    made = None
    form = ops.NormForm.PLAIN
    if gemma:
        form = ops.NormForm.GEMMA
    elif self.cast_x_before_out_mul:
        form = ops.NormForm.CAST_FIRST
    kind, weight_kind = dtype_of(torch.empty(0, dtype=dtype)), dtype_of(weight)
    if kind is not None and weight.dtype in (dtype, torch.float32) and weight_kind is not None:
        eps = float(self.variance_epsilon)
        made = ops.rms_norm(weight.data_ptr(), weight.numel(), eps, kind, weight_kind, form)
    self.__dict__[_PREPARED] = (where, made)
    return made


def _norm(
    self: Any, x: torch.Tensor, residual: torch.Tensor | None
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None:
    if not _is_rows(x) or x.shape[1] != self.weight.numel():
        return None
    if residual is not None and (
        residual.shape != x.shape or residual.dtype != x.dtype or not _is_rows(residual)
    ):
        return None
    norm = prepared_norm(self, x.dtype)
    if norm is None:
        return None
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    rows, threads = x.shape[0], torch.get_num_threads()
    if residual is None:
        norm.apply(x.data_ptr(), x.stride(0), out.data_ptr(), out.stride(0), rows, threads)
        return out
    norm.add_and_apply(
        x.data_ptr(),
        x.stride(0),
        residual.data_ptr(),
        residual.stride(0),
        out.data_ptr(),
        out.stride(0),
        rows,
        threads,
    )
    return out, residual


def rms_norm(
    self: Any,
    x: torch.Tensor,
    residual: torch.Tensor | None = None,
    post_residual_addition: torch.Tensor | None = None,
    quant_linear: torch.nn.Module | None = None,
) -> Any:
    """``RMSNorm.forward``. ``x`` ``[rows, hidden]``."""
    if post_residual_addition is None:
        done = _norm(self, x, residual)
        if done is not None:
            return done
    return self.forward_native(x, residual, post_residual_addition, quant_linear)


def gemma_rms_norm(
    self: Any,
    x: torch.Tensor,
    residual: torch.Tensor | None = None,
    post_residual_addition: torch.Tensor | None = None,
) -> Any:
    """``GemmaRMSNorm.forward``."""
    if post_residual_addition is None:
        done = _norm(self, x, residual)
        if done is not None:
            return done
    return self.forward_native(x, residual, post_residual_addition)


# -- gated activations --


def silu_and_mul(self: Any, x: torch.Tensor) -> torch.Tensor:
    """``SiluAndMul.forward``. ``[..., 2n]`` to ``[..., n]``."""
    ops = native()
    assert ops is not None
    done = gate(x, ops.Activation.SILU)
    return self.forward_native(x) if done is None else done


def gelu_and_mul(self: Any, x: torch.Tensor) -> torch.Tensor:
    """``GeluAndMul.forward``; the exact form stays torch's."""
    ops = native()
    assert ops is not None
    done = gate(x, ops.Activation.GELU_TANH) if self.approximate == "tanh" else None
    return self.forward_native(x) if done is None else done


def gate(x: torch.Tensor, activation: Any) -> torch.Tensor | None:
    """``[..., 2n]`` to ``[..., n]``; None where it is not ours to compute."""
    ops, dtype = native(), dtype_of(x)
    if dtype is None or x.numel() == 0 or x.shape[-1] % 2 or not x.is_contiguous():
        return None
    assert ops is not None
    width = x.shape[-1] // 2
    out = x.new_empty(*x.shape[:-1], width)
    ops.gate(
        x.data_ptr(),
        2 * width,
        out.data_ptr(),
        width,
        out.numel() // width,
        width,
        dtype,
        activation,
        torch.get_num_threads(),
    )
    return out


# -- rotary embedding --


def prepared_rotary(self: Any, q_width: int, k_width: int, dtype: torch.dtype) -> Rotary | None:
    """The native rotary embedding of SGLang's module for heads that lie side by side, made anew
    when its cache was replaced; None where it computes something else."""
    ops, cache = native(), self.cos_sin_cache
    assert ops is not None
    if hasattr(self, "sin_cos_cache"):
        return None
    where = (cache.data_ptr(), len(cache), q_width, k_width, dtype)
    known = self.__dict__.get(_PREPARED)
    if known is not None and known[0] == where:
        found: Rotary | None = known[1]
        return found
    made = None
    kind, cache_kind = dtype_of(torch.empty(0, dtype=dtype)), dtype_of(cache)
    size = self.head_size
    whole = q_width % size == k_width % size == 0
    # Another dtype of the cache would make torch's results another dtype's, too.
    if kind is not None and cache.dtype == dtype and cache.is_contiguous() and whole:
        assert cache_kind is not None
        made = ops.rotary(
            cache.data_ptr(),
            len(cache),
            self.rotary_dim,
            size,
            q_width // size,
            k_width // size,
            kind,
            cache_kind,
            ops.RotaryStyle.NEOX if self.is_neox_style else ops.RotaryStyle.INTERLEAVED,
        )
    self.__dict__[_PREPARED] = (where, made)
    return made


def turn(
    self: Any,
    positions: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    offsets: torch.Tensor | None = None,
    fused_set_kv_buffer_arg: Any = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``RotaryEmbedding.forward``: ``query`` and ``key`` ``[rows, heads * head_size]``, in place.

    Raises IndexError for a position beyond the cache."""
    plain = (
        offsets is None
        and fused_set_kv_buffer_arg is None
        and positions.dim() == 1
        and positions.dtype == torch.int64
        and positions.is_contiguous()
        and key is not None
        and _is_rows(query)
        and _is_rows(key)
        and query.dtype == key.dtype
        and len(query) == len(key) == len(positions)
    )
    rotary = prepared_rotary(self, query.shape[1], key.shape[1], query.dtype) if plain else None
    if rotary is None:
        done: tuple[torch.Tensor, torch.Tensor] = self.forward_native(
            positions, query, key, offsets, fused_set_kv_buffer_arg
        )
        return done
    rotary.apply(
        positions.data_ptr(),
        len(positions),
        query.data_ptr(),
        query.stride(0),
        key.data_ptr(),
        key.stride(0),
        torch.get_num_threads(),
    )
    return query, key


def _is_rows(tensor: torch.Tensor) -> bool:
    return (
        tensor.dim() == 2
        and tensor.numel() > 0
        and tensor.stride(1) == 1
        and tensor.stride(0) >= tensor.shape[1]
        and tensor.device.type == "cpu"
    )
