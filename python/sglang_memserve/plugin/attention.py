"""SGLang's attention backend ``memserve_cpu``: only new rows are computed, never the prefix's.

Built once a scheduler through SGLang's registry. A forward pass is planned once
(``init_forward_metadata``) and the plan serves all layers; lengths come from the CPU copies that
SGLang keeps, so no layer waits for a device.

K and V are read through ``get_key_buffer(layer)`` and ``get_value_buffer(layer)``: they block
until a layer that is being restored from MemPool has arrived.

Layers are computed natively where that is built and fits them (``native_attention``), else in torch
(``cpu_kernels``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.layers.attention.attention_registry import (
    ATTENTION_BACKENDS,
    register_attention_backend,
)
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.layers.radix_attention import AttentionType
from sglang.srt.mem_cache.memory_pool import KVWriteLoc
from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool

from ..kernels import native
from . import ATTENTION_BACKEND
from . import cpu_kernels as kernels
from .cpu_kernels import DecodeGroup, Extend, Masks
from .native_attention import Batch, NativeAttention

if TYPE_CHECKING:
    from sgl_kernel_ext.attention import AttentionPlan, PagedAttention
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from sglang.srt.model_executor.model_runner import ModelRunner


def register() -> None:
    """Make the backend known to SGLang. Safe to call twice."""
    if ATTENTION_BACKEND not in ATTENTION_BACKENDS:
        register_attention_backend(ATTENTION_BACKEND)(MemServeCpuAttention)


class MemServeCpuAttention(AttentionBackend):
    """Decoder self-attention on a CPU; also encoder-only models.

    Raises NotImplementedError, when the model is loaded or at its first request, for what it
    cannot compute: latent attention (MLA), cross attention, attention sinks, speculative trees.
    """

    def __init__(self, model_runner: ModelRunner) -> None:
        super().__init__()
        if model_runner.use_mla_backend:
            raise NotImplementedError(
                f"attention backend {ATTENTION_BACKEND} has no latent attention (MLA)"
            )
        if model_runner.model_config.is_encoder_decoder:
            raise NotImplementedError(
                f"attention backend {ATTENTION_BACKEND} has no cross attention"
            )
        self.device = model_runner.device
        self.req_to_token_pool = model_runner.req_to_token_pool
        self.token_to_kv_pool = model_runner.token_to_kv_pool
        ops = native()
        self._native = (
            None
            if ops is None
            else NativeAttention(ops, self.req_to_token_pool.req_to_token, self.token_to_kv_pool)
        )
        self.decoding = False
        self._supported_layers: set[int] = set()
        self._batch = Batch((), (), (), None)
        self._slots: list[torch.Tensor] | None = None
        self._extends: list[tuple[int, int, int]] = []
        self._masks = Masks()
        self._swa_write_slots: torch.Tensor | None = None
        self._swa_slots: list[torch.Tensor] | None = None
        self._decode_groups: dict[tuple[int | None, bool], list[DecodeGroup]] = {}

    def support_triton(self) -> bool:
        return False

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        """Plan the forward pass: which slots each request reads."""
        if forward_batch.spec_info is not None:
            raise NotImplementedError(
                f"attention backend {ATTENTION_BACKEND} has no speculative decoding"
            )
        lengths = _seq_lens(forward_batch)
        requests = forward_batch.req_pool_indices.tolist()
        self._extends = []
        self._masks = Masks()
        self.decoding = forward_batch.forward_mode.is_decode_or_idle()
        if self.decoding:
            rows = [1] * len(requests)
        else:
            rows = [int(new) for new in forward_batch.extend_seq_lens_cpu]
            start = 0
            for prefix, new in zip(forward_batch.extend_prefix_lens_cpu, rows, strict=True):
                self._extends.append((start, start + new, int(prefix)))
                start += new
        self._batch = Batch(requests, lengths, rows, forward_batch.out_cache_loc)
        self._slots = None
        self._decode_groups = {}
        self._swa_slots = None
        self._swa_write_slots = None
        if self._has_swa_pool() and forward_batch.out_cache_loc is not None:
            self._swa_write_slots = self.token_to_kv_pool.translate_loc_from_full_to_swa(
                forward_batch.out_cache_loc
            )
        if self._native is not None:
            self._native.plan(self._batch)

    def forward_extend(
        self,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool = True,
        **kwargs: Any,
    ) -> torch.Tensor:
        self._require_supported(layer, kwargs)
        done = self._attend_natively(q, k, v, layer, forward_batch, save_kv_cache)
        if done is not None:
            return done
        self._write(k, v, layer, forward_batch, save_kv_cache)
        query = q.view(-1, layer.tp_q_head_num, layer.qk_head_dim)
        out = q.new_empty(query.shape[0], layer.tp_q_head_num, layer.v_head_dim)
        slots = self._layer_slots(layer)
        for (start, stop, prefix), request_slots in zip(self._extends, slots, strict=True):
            if stop > start:
                part = Extend(start, stop, prefix, request_slots)
                out[start:stop] = self._extend(query[start:stop], k, v, layer, part)
        return out.view(query.shape[0], -1)

    def forward_decode(
        self,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool = True,
        **kwargs: Any,
    ) -> torch.Tensor:
        self._require_supported(layer, kwargs)
        done = self._attend_natively(q, k, v, layer, forward_batch, save_kv_cache)
        if done is not None:
            return done
        self._write(k, v, layer, forward_batch, save_kv_cache)
        query = q.reshape(-1, layer.tp_q_head_num, layer.qk_head_dim)
        keys, values = self._buffers(layer)
        if not _fits_flash(layer):
            out = q.new_empty(query.shape[0], layer.tp_q_head_num, layer.v_head_dim)
            for row, slots in enumerate(self._layer_slots(layer)):
                seen = _last(slots, _window(layer))
                out[row : row + 1] = kernels.attend_tiled(
                    query[row : row + 1],
                    kernels.gather(keys, seen, q.dtype),
                    kernels.gather(values, seen, q.dtype),
                    layer.scaling,
                    softcap=layer.logit_cap,
                )
            return out.view(query.shape[0], -1)
        out = torch.empty_like(query)
        for group in self._groups(layer):
            rows = query if len(group.rows) == len(query) == 1 else query[group.rows]
            out[group.rows] = kernels.attend_decode(rows, keys, values, group, layer.scaling)
        return out.view(query.shape[0], -1)

    def native_parts(
        self, layer: RadixAttention, dtype: torch.dtype
    ) -> tuple[AttentionPlan, PagedAttention] | None:
        """This pass's plan and ``layer``'s attention, for a native op that contains it; None where
        there is none. Blocks until a layer that is being restored has arrived."""
        if self._native is None:
            return None
        self._require_supported(layer, {})
        if not self._native.prepare(layer, dtype, *self._buffers(layer)):
            return None
        return self._native.parts(layer)

    def attend_natively(
        self, layer: RadixAttention, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> torch.Tensor:
        """``[rows, q_heads * v_dim]`` of a layer that ``native_parts`` has for this pass; ``k`` and
        ``v`` are written to the pool."""
        assert self._native is not None
        return self._native.attend(layer, q, k, v)

    def _attend_natively(
        self,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool,
    ) -> torch.Tensor | None:
        """``[rows, q_heads * v_dim]``; None where torch has to compute it."""
        if self._native is None:
            return None
        keys, values = self._buffers(layer)
        if not self._native.prepare(layer, q.dtype, keys, values):
            return None
        if not self._native.writes(layer) or not save_kv_cache:
            self._write(k, v, layer, forward_batch, save_kv_cache)
            k = v = None
        return self._native.attend(layer, q, k, v)

    def _extend(
        self,
        query: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        layer: RadixAttention,
        part: Extend,
    ) -> torch.Tensor:
        keys, values = self._buffers(layer)
        window = _window(layer)
        bidirectional = layer.attn_type == AttentionType.ENCODER_ONLY
        if bidirectional and window is None and _fits_flash(layer):
            return kernels.attend_bidirectional(
                query,
                kernels.gather(keys, part.slots, query.dtype),
                kernels.gather(values, part.slots, query.dtype),
                layer.scaling,
            )
        if bidirectional:
            raise NotImplementedError(
                f"attention backend {ATTENTION_BACKEND} has no windowed or capped encoder"
            )
        if not _fits_flash(layer) or (window is not None and len(part.slots) > window + 1):
            # Positions before the first row's window are read by nobody.
            seen = part.slots if window is None else part.slots[max(0, part.prefix - window) :]
            return kernels.attend_tiled(
                query,
                kernels.gather(keys, seen, query.dtype),
                kernels.gather(values, seen, query.dtype),
                layer.scaling,
                window=window,
                softcap=layer.logit_cap,
            )
        # The new rows' K and V are at hand, unless the cache keeps them in fewer bits: then what
        # is attended to must not depend on which rows were cached.
        if part.prefix == 0 and k is not None and v is not None and keys.dtype == query.dtype:
            seen_key, seen_value = k[part.start : part.stop], v[part.start : part.stop]
        else:
            seen_key = kernels.gather(keys, part.slots, query.dtype)
            seen_value = kernels.gather(values, part.slots, query.dtype)
        return kernels.attend_causal(query, seen_key, seen_value, layer.scaling, self._masks)

    def _write(
        self,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool,
    ) -> None:
        if save_kv_cache and k is not None and v is not None:
            where = KVWriteLoc(forward_batch.out_cache_loc, self._swa_write_slots)
            self.token_to_kv_pool.set_kv_buffer(layer, where, k, v)

    def _buffers(self, layer: RadixAttention) -> tuple[torch.Tensor, torch.Tensor]:
        pool = self.token_to_kv_pool
        return pool.get_key_buffer(layer.layer_id), pool.get_value_buffer(layer.layer_id)

    def _has_swa_pool(self) -> bool:
        return isinstance(self.token_to_kv_pool, SWAKVPool)

    def _is_swa_layer(self, layer: RadixAttention) -> bool:
        return self._has_swa_pool() and self.token_to_kv_pool.layers_mapping[layer.layer_id][1]

    def _layer_slots(self, layer: RadixAttention) -> list[torch.Tensor]:
        """Slots of each request in the pool that holds this layer."""
        if self._slots is None:
            table = self.req_to_token_pool.req_to_token
            self._slots = [
                table[request, :length].long()
                for request, length in zip(self._batch.requests, self._batch.lengths, strict=True)
            ]
        if not self._is_swa_layer(layer):
            return self._slots
        if self._swa_slots is None:
            translate = self.token_to_kv_pool.translate_loc_from_full_to_swa
            self._swa_slots = [translate(slots).long() for slots in self._slots]
        return self._swa_slots

    def _groups(self, layer: RadixAttention) -> list[DecodeGroup]:
        key = (_window(layer), self._is_swa_layer(layer))
        if key not in self._decode_groups:
            seen = [_last(slots, key[0]) for slots in self._layer_slots(layer)]
            self._decode_groups[key] = kernels.group_for_decode(seen)
        return self._decode_groups[key]

    def _require_supported(self, layer: RadixAttention, kwargs: dict[str, Any]) -> None:
        unknown = sorted(name for name, value in kwargs.items() if value is not None)
        if unknown:
            raise NotImplementedError(
                f"attention backend {ATTENTION_BACKEND} does not know {', '.join(unknown)}"
            )
        if layer.layer_id in self._supported_layers:
            return
        problem = None
        if layer.is_cross_attention:
            problem = "cross attention"
        elif layer.attn_type == AttentionType.DECODER_BIDIRECTIONAL:
            problem = "bidirectional decoder attention"
        elif layer.xai_temperature_len > 0:
            problem = "attention temperature by position"
        elif layer.logit_cap > 0 and layer.logit_capping_method != "tanh":
            problem = f"logit capping by {layer.logit_capping_method}"
        if problem is not None:
            raise NotImplementedError(f"attention backend {ATTENTION_BACKEND} has no {problem}")
        self._supported_layers.add(layer.layer_id)


def _seq_lens(forward_batch: ForwardBatch) -> list[int]:
    lengths = forward_batch.seq_lens_cpu
    if lengths is None:
        lengths = forward_batch.seq_lens
    return [int(length) for length in lengths.tolist()]


def _window(layer: RadixAttention) -> int | None:
    """How many tokens before its own a row sees; None for all of them."""
    size = layer.sliding_window_size
    return None if size is None or size < 0 else size


def _last(slots: torch.Tensor, window: int | None) -> torch.Tensor:
    return slots if window is None else slots[-(window + 1) :]


def _fits_flash(layer: RadixAttention) -> bool:
    return layer.qk_head_dim == layer.v_head_dim and not layer.logit_cap > 0
