"""The native side of the CPU attention: plans of forward passes, and layers prepared for calls.

What does not change between passes is kept in a ``_Layer``, so that a layer's call is little
Python. It is made anew when SGLang hands out another buffer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from sglang.srt.layers.radix_attention import AttentionType
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool
from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sgl_kernel_ext.attention import AttentionPlan, Integers, PagedAttention
    from sglang.srt.layers.radix_attention import RadixAttention

    from ..kernels import Native

# Values are those of the native package's ``Dtype``.
_DTYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
_INTEGERS = (torch.int32, torch.int64)
_DIM_STEP, _MOST_DIM, _MOST_GROUP = 16, 512, 192


@dataclass(frozen=True, slots=True)
class Batch:
    """Requests of a forward pass: rows of ``req_to_token``, tokens of each, and new ones of these.

    ``written``: slots of all new tokens; None where SGLang names none.
    """

    requests: Sequence[int]
    lengths: Sequence[int]
    rows: Sequence[int]
    written: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class _Layer:
    """``attention`` is None where the layer does not fit native code."""

    layer: RadixAttention
    attention: PagedAttention | None
    keys: torch.Tensor
    values: torch.Tensor
    translated: bool
    # Whether the pool's rows are plain memory, which the native call may write itself.
    writable: bool


class NativeAttention:
    """Of one backend. ``plan`` once a pass, then ``attend`` once a layer."""

    def __init__(self, native: Native, table: torch.Tensor, pool: object) -> None:
        self._native, self._table, self._pool = native, table, pool
        self._layers: dict[int, _Layer] = {}
        self._plan: AttentionPlan | None = None
        self._swa_plan: AttentionPlan | None = None
        self._rows = 0
        self._written = False

    def plan(self, batch: Batch) -> None:
        """Raises IndexError for requests or lengths beyond the table."""
        table, written = self._table, batch.written
        self._rows = sum(batch.rows)
        self._written = (
            written is not None
            and written.dtype in _INTEGERS
            and written.is_contiguous()
            and len(written) == self._rows
        )
        self._swa_plan = None
        self._plan = self._native.attention_plan(
            self._native.SlotTable(
                table.data_ptr(),
                table.element_size(),
                table.shape[0],
                table.shape[1],
                table.stride(0),
            ),
            batch.requests,
            batch.lengths,
            batch.rows,
            self._integers(written if self._written else None),
        )

    def _integers(self, tensor: torch.Tensor | None) -> Integers:
        if tensor is None:
            return self._native.Integers()
        return self._native.Integers(tensor.data_ptr(), tensor.element_size(), tensor.numel())

    def prepare(
        self, layer: RadixAttention, dtype: torch.dtype, keys: torch.Tensor, values: torch.Tensor
    ) -> bool:
        """Whether ``layer`` can be computed natively over these buffers."""
        known = self._layers.get(layer.layer_id)
        if (
            known is None
            or known.layer is not layer
            or known.keys is not keys
            or known.values is not values
        ):
            known = self._make(layer, dtype, keys, values)
            self._layers[layer.layer_id] = known
        return known.attention is not None

    def writes(self, layer: RadixAttention) -> bool:
        """Whether ``attend`` can write this pass's rows of ``layer``; else SGLang's pool has to."""
        return self._written and self._layers[layer.layer_id].writable

    def _make(
        self, layer: RadixAttention, dtype: torch.dtype, keys: torch.Tensor, values: torch.Tensor
    ) -> _Layer:
        if not _fits(layer, dtype, keys, values):
            return _Layer(layer, None, keys, values, translated=False, writable=False)
        native, pool = self._native, self._pool
        translated = False
        if isinstance(pool, SWAKVPool):
            translated = pool.layers_mapping[layer.layer_id][1]
            pool = pool.swa_kv_pool if translated else pool.full_kv_pool
        window = layer.sliding_window_size
        geometry = native.Geometry(
            slots=len(keys),
            q_heads=layer.tp_q_head_num,
            kv_heads=keys.shape[1],
            qk_dim=layer.qk_head_dim,
            v_dim=layer.v_head_dim,
            dtype=native.Dtype(_DTYPES[keys.dtype]),
            scale=float(layer.scaling),
            softcap=max(float(layer.logit_cap), 0.0),
            window=-1 if window is None else window,
            causal=layer.attn_type == AttentionType.DECODER,
        )
        attention = native.paged_attention(
            native.Pool(keys.data_ptr(), keys.stride(0), keys.stride(1)),
            native.Pool(values.data_ptr(), values.stride(0), values.stride(1)),
            geometry,
        )
        return _Layer(layer, attention, keys, values, translated, _is_plain(pool))

    def parts(self, layer: RadixAttention) -> tuple[AttentionPlan, PagedAttention] | None:
        """What a call of a prepared layer is made of, for an op that contains the attention; None
        where native code cannot compute it, or SGLang's pool has to write its rows."""
        prepared = self._layers[layer.layer_id]
        if prepared.attention is None or not self.writes(layer):
            return None
        assert self._plan is not None
        plan = self._translated_plan() if prepared.translated else self._plan
        return plan, prepared.attention

    def attend(
        self,
        layer: RadixAttention,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
    ) -> torch.Tensor:
        """``[rows, q_heads * v_dim]`` of a prepared layer; writes ``k`` and ``v`` where given.

        Raises IndexError for slots beyond the pool, ValueError for tensors that do not fit.
        """
        prepared = self._layers[layer.layer_id]
        assert prepared.attention is not None and self._plan is not None
        plan = self._translated_plan() if prepared.translated else self._plan
        query = _rows(q, layer.tp_q_head_num * layer.qk_head_dim)
        if len(query) != self._rows:
            raise ValueError(f"{len(query)} rows of queries in a batch of {self._rows}")
        out = query.new_empty(self._rows, layer.tp_q_head_num * layer.v_head_dim)
        new_keys, key_stride, new_values, value_stride = 0, 0, 0, 0
        if k is not None and v is not None:
            heads = prepared.keys.shape[1]
            k, v = _rows(k, heads * layer.qk_head_dim), _rows(v, heads * layer.v_head_dim)
            if not len(k) == len(v) == self._rows or k.dtype != q.dtype or v.dtype != q.dtype:
                raise ValueError(f"keys {k.shape} {k.dtype} and values {v.shape} {v.dtype}")
            new_keys, key_stride = k.data_ptr(), k.stride(0)
            new_values, value_stride = v.data_ptr(), v.stride(0)
        prepared.attention.attend(
            plan,
            query.data_ptr(),
            query.stride(0),
            new_keys,
            key_stride,
            new_values,
            value_stride,
            out.data_ptr(),
            out.stride(0),
            0,
            torch.get_num_threads(),
        )
        return out

    def _translated_plan(self) -> AttentionPlan:
        if self._swa_plan is None:
            assert self._plan is not None and isinstance(self._pool, SWAKVPool)
            mapping = self._pool.full_to_swa_index_mapping
            assert mapping is not None and mapping.dtype in _INTEGERS and mapping.is_contiguous()
            self._swa_plan = self._plan.translated(
                mapping.data_ptr(), mapping.element_size(), mapping.numel()
            )
        return self._swa_plan


def _rows(tensor: torch.Tensor, width: int) -> torch.Tensor:
    """``[rows, width]``, contiguous in the last dimension."""
    if tensor.dim() != 2 or tensor.shape[1] != width:
        tensor = tensor.reshape(-1, width)
    # A tensor of one row may have any stride: it is never used, but it is checked.
    if tensor.stride(1) != 1 or tensor.stride(0) < width:
        tensor = tensor.clone(memory_format=torch.contiguous_format)
    return tensor


def _fits(
    layer: RadixAttention, dtype: torch.dtype, keys: torch.Tensor, values: torch.Tensor
) -> bool:
    plain = (
        dtype in _DTYPES
        and keys.dtype == values.dtype == dtype
        and keys.dim() == values.dim() == 3
        and keys.shape[:2] == values.shape[:2]
        and keys.stride(2) == values.stride(2) == 1
        and keys.device.type == "cpu"
    )
    if not plain or keys.shape[2] != layer.qk_head_dim or values.shape[2] != layer.v_head_dim:
        return False
    dims = (layer.qk_head_dim, layer.v_head_dim)
    if any(dim % _DIM_STEP or not 0 < dim <= _MOST_DIM for dim in dims):
        return False
    heads, kv_heads = layer.tp_q_head_num, keys.shape[1]
    if heads % kv_heads or heads // kv_heads > _MOST_GROUP:
        return False
    windowed = layer.sliding_window_size is not None and layer.sliding_window_size >= 0
    # Refused by the backend, not computed as something else.
    return layer.attn_type == AttentionType.DECODER or not (windowed or layer.logit_cap > 0)


def _is_plain(pool: object) -> bool:
    # Subclasses may keep rows in another way.
    return (
        isinstance(pool, MHATokenToKVPool)
        and type(pool) is MHATokenToKVPool
        and pool.store_dtype == pool.dtype
        and not pool.is_quantized_kv_cache
        and pool.kv_cache_layout == "nhd"
    )
