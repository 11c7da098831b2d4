"""A whole forward of few rows through a llama-class model, a native call a layer.

Decoding is bound by reading the weights, 8 ms a token for a model of 270 MB; walking 30 layers of
modules in Python costs another 4. Up to ``MOST_ROWS`` rows therefore take the way below: the same
native ops in the same order, so that the results are those of the way through SGLang's layers, bit
for bit. Everything else takes SGLang's own way: more rows, adapters, captured hidden states,
several ranks, embeddings as input, a quantised or otherwise changed layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.layers.activation import SiluAndMul
from sglang.srt.layers.layernorm import RMSNorm
from sglang.srt.layers.vocab_parallel_embedding import VocabParallelEmbedding
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.model_executor.forward_context import get_attn_backend
from sglang.srt.models.llama import LlamaAttention, LlamaDecoderLayer, LlamaMLP, LlamaModel
from sglang.srt.models.qwen2 import (
    Qwen2Attention,
    Qwen2DecoderLayer,
    Qwen2MLP,
    Qwen2Model,
)
from sglang.srt.runtime_context import get_parallel

from ..attention import MemServeCpuAttention
from .fused_ops import prepared_norm, prepared_rotary
from .linears import MOST_ROWS, ThinLinearMethod

if TYPE_CHECKING:
    from sgl_kernel_ext.attention import PagedAttention
    from sgl_kernel_ext.engine import DecoderLayer, RmsNorm
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch

    from ...kernels import Native

# Layers of these classes are alike in what they compute.
_KINDS = {
    LlamaModel: (LlamaDecoderLayer, LlamaAttention, LlamaMLP),
    Qwen2Model: (Qwen2DecoderLayer, Qwen2Attention, Qwen2MLP),
}


@dataclass(frozen=True, slots=True)
class _Layer:
    """One layer: SGLang's attention module, and the native op with the attention it was made of."""

    module: Any
    attention: PagedAttention
    op: DecoderLayer


@dataclass(frozen=True, slots=True)
class _Held:
    """A module's tensor whose memory has been handed to an op, by its place in the module: asking
    modules for their attributes 200 times a token would take longer than a layer."""

    tensors: Mapping[str, torch.Tensor | None]
    name: str
    tensor: torch.Tensor
    address: int

    @classmethod
    def of(cls, tensors: Mapping[str, torch.Tensor | None], name: str) -> _Held:
        tensor = tensors[name]
        assert tensor is not None, name
        return cls(tensors, name, tensor, tensor.data_ptr())

    def is_as_it_was(self) -> bool:
        return self.tensors.get(self.name) is self.tensor and self.tensor.data_ptr() == self.address


def install(model: torch.nn.Module, native: Native) -> str | None:
    """Let few rows take the short way through ``model``; the reason why not, where they cannot."""
    body: Any = getattr(model, "model", None)
    problem = _problem(body)
    if problem is None:
        body.forward = FewRows(body, native)
    return problem


def _problem(body: Any) -> str | None:
    """Why the layers of ``body`` are not such as ``FewRows`` knows."""
    if type(body) not in _KINDS:
        return f"{type(body).__name__} is none of {', '.join(kind.__name__ for kind in _KINDS)}"
    if get_parallel().tp_size != 1:
        # Sums of ranks are made between the ops.
        return "the model is spread over tensor-parallel ranks"
    if not (body.pp_group.is_first_rank and body.pp_group.is_last_rank):
        return "the model is spread over pipeline ranks"
    if not len(body.layers):
        return "the model has no layers"
    if not _is(body.embed_tokens, VocabParallelEmbedding) or not _is(body.norm, RMSNorm):
        return "its embedding or last norm is of another kind"
    for layer in body.layers:
        problem = _problem_of_layer(layer, _KINDS[type(body)])
        if problem is not None:
            return problem
    return None


def _problem_of_layer(layer: Any, kinds: tuple[type, type, type]) -> str | None:
    layer_kind, attention_kind, mlp_kind = kinds
    if not _is(layer, layer_kind):
        return f"a layer is a {type(layer).__name__}"
    attention, mlp = layer.self_attn, layer.mlp
    if not _is(attention, attention_kind) or not _is(mlp, mlp_kind):
        return "a layer's attention or MLP is of another kind"
    if not _is(mlp.act_fn, SiluAndMul):
        return f"its activation is {type(mlp.act_fn).__name__}"
    for linear in _linears_of(layer):
        if not _is(linear.quant_method, ThinLinearMethod):
            return f"a linear layer is computed by {type(linear.quant_method).__name__}"
    for norm in (layer.input_layernorm, layer.post_attention_layernorm):
        if not _is(norm, RMSNorm):
            return f"a norm is a {type(norm).__name__}"
    return None


def _linears_of(layer: Any) -> tuple[Any, Any, Any, Any]:
    attention, mlp = layer.self_attn, layer.mlp
    return attention.qkv_proj, attention.o_proj, mlp.gate_up_proj, mlp.down_proj


def _tensors_of(layer: Any) -> Iterator[tuple[Mapping[str, torch.Tensor | None], str]]:
    attention, mlp = layer.self_attn, layer.mlp
    yield attention.rotary_emb._buffers, "cos_sin_cache"
    for module in (
        layer.input_layernorm,
        attention.qkv_proj,
        attention.o_proj,
        layer.post_attention_layernorm,
        mlp.gate_up_proj,
        mlp.down_proj,
    ):
        yield module._parameters, "weight"
        if module._parameters.get("bias") is not None:
            yield module._parameters, "bias"


def _is(thing: object, kind: type) -> bool:
    # Not a subclass of it: that may compute something else.
    return type(thing) is kind


class FewRows:
    """Takes the place of a model body's ``forward``."""

    def __init__(self, body: Any, native: Native) -> None:
        self._body, self._native = body, native
        self._long_way: Callable[..., Any] = body.forward
        self._original = self._parts()
        # Dictionaries of modules, which fill up when somebody wants to hear of their calls.
        self._listeners = [
            hooks
            for module in body.modules()
            if module is not body
            for hooks in (module._forward_hooks, module._forward_pre_hooks)
        ]
        self._layers: list[_Layer] = []
        self._last_norm: RmsNorm | None = None
        self._same_bits = False
        # One that has moved, so that the first forward prepares.
        self._held = [_Held({}, "", body.norm.weight, 0)]

    def __call__(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        forward_batch: ForwardBatch,
        input_embeds: torch.Tensor | None = None,
        pp_proxy_tensors: Any = None,
    ) -> Any:
        """``[rows, hidden]``, normed: what SGLang's forward of the body returns."""
        ids_alone = input_embeds is None and pp_proxy_tensors is None
        if ids_alone and self._takes(input_ids, positions, forward_batch):
            return self._forward(input_ids, positions)
        return self._long_way(
            input_ids, positions, forward_batch, input_embeds, pp_proxy_tensors=pp_proxy_tensors
        )

    def _takes(
        self, input_ids: torch.Tensor, positions: torch.Tensor, forward_batch: ForwardBatch
    ) -> bool:
        return (
            0 < len(input_ids) <= MOST_ROWS
            and forward_batch.forward_mode in (ForwardMode.DECODE, ForwardMode.EXTEND)
            and forward_batch.spec_info is None
            and positions.dim() == 1
            and positions.dtype == torch.int64
            and positions.is_contiguous()
            and len(positions) == len(input_ids)
            and not self._body.layers_to_capture
            and self._parts() == self._original
            and not any(self._listeners)
            and self._prepare()
        )

    def _parts(self) -> tuple[int, ...]:
        """What adapters replace in every layer alike, by identity."""
        layer = self._body.layers[0]
        parts = (
            layer,
            layer.self_attn,
            layer.self_attn.qkv_proj,
            layer.self_attn.o_proj,
            layer.mlp,
            layer.mlp.gate_up_proj,
            layer.mlp.down_proj,
            self._body.embed_tokens,
        )
        return tuple(map(id, parts))

    def _prepare(self) -> bool:
        """Whether this pass can go the short way; layers are made anew when weights have moved."""
        backend = get_attn_backend()
        if not isinstance(backend, MemServeCpuAttention):
            return False
        body = self._body
        # What holds for one layer and pass holds for all layers of the pass.
        first = body.layers[0].self_attn.attn
        if backend.native_parts(first, self._dtype) is None:
            return False
        if not all(held.is_as_it_was() for held in self._held):
            self._held = [
                _Held.of(tensors, name)
                for layer in body.layers
                for tensors, name in _tensors_of(layer)
            ] + [_Held.of(body.norm._parameters, "weight")]
            self._last_norm = prepared_norm(body.norm, self._dtype)
            layers = [self._made(layer, backend) for layer in body.layers]
            whole = self._last_norm is not None and None not in layers
            self._layers = [layer for layer in layers if layer is not None] if whole else []
            self._same_bits = all(
                linear.quant_method.thin.same_bits
                for layer in body.layers
                for linear in _linears_of(layer)
            )
        return bool(self._layers) and (backend.decoding or self._same_bits)

    @property
    def _dtype(self) -> torch.dtype:
        dtype: torch.dtype = self._body.embed_tokens.weight.dtype
        return dtype

    def _made(self, layer: Any, backend: MemServeCpuAttention) -> _Layer | None:
        attention = layer.self_attn
        parts = backend.native_parts(attention.attn, self._dtype)
        linears = [
            linear.quant_method.thin.of(linear.weight, linear.bias) for linear in _linears_of(layer)
        ]
        norms = [
            prepared_norm(norm, self._dtype)
            for norm in (layer.input_layernorm, layer.post_attention_layernorm)
        ]
        rotary = prepared_rotary(
            attention.rotary_emb, attention.q_size, attention.kv_size, self._dtype
        )
        if parts is None or rotary is None or None in linears or None in norms:
            return None
        qkv, output, gate_up, down = (linear for linear in linears if linear is not None)
        first_norm, second_norm = (norm for norm in norms if norm is not None)
        op = self._native.decoder_layer(
            first_norm,
            qkv,
            rotary,
            parts[1],
            output,
            second_norm,
            gate_up,
            down,
            self._native.Activation.SILU,
        )
        return _Layer(attention.attn, parts[1], op)

    def _forward(self, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        rows, threads = len(input_ids), torch.get_num_threads()
        backend = get_attn_backend()
        hidden = self._body.embed_tokens(input_ids).contiguous()
        residual = torch.empty_like(hidden)
        width = hidden.shape[1]
        where = (hidden.data_ptr(), width, residual.data_ptr(), width)
        at_positions = positions.data_ptr()
        for number, layer in enumerate(self._layers):
            # Waits for the layer's pages where they are being restored.
            parts = backend.native_parts(layer.module, self._dtype)
            assert parts is not None, f"layer {number} has no native attention in this pass"
            plan, attention = parts
            if attention is not layer.attention:
                layer = self._made_again(number, backend)
            run = layer.op.apply if number else layer.op.apply_first
            run(plan, *where, at_positions, rows, threads)
        assert self._last_norm is not None
        self._last_norm.add_and_apply(
            hidden.data_ptr(),
            width,
            residual.data_ptr(),
            width,
            hidden.data_ptr(),
            width,
            rows,
            threads,
        )
        return hidden

    def _made_again(self, number: int, backend: MemServeCpuAttention) -> _Layer:
        """SGLang has given the pool other memory."""
        layer = self._made(self._body.layers[number], backend)
        assert layer is not None, f"layer {number} has no native form any more"
        self._layers[number] = layer
        return layer
