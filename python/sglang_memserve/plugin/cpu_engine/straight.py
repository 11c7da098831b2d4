"""A whole forward through a llama-class model without SGLang's modules between the operations.

Walking 30 layers of modules in Python costs 15 ms a pass of a model whose weights are read in 8.
So, from the embedding to the last norm:

- Up to 128 rows, as decoding and what a cache hit leaves have: one native call a layer.
- More rows: the same native ops, with torch's products between them.

These are the ops of SGLang's own way, in the same order, so that the results are the same, bit for
bit. Everything else takes SGLang's way: adapters, captured hidden states, several ranks, embeddings
as input, a quantised or otherwise changed layer.
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
from sglang.srt.models.qwen3 import (
    Qwen3Attention,
    Qwen3DecoderLayer,
    Qwen3MLP,
    Qwen3Model,
)
from sglang.srt.runtime_context import get_parallel

from ..attention import MemServeCpuAttention
from .fused_ops import gate, prepared_norm, prepared_rotary
from .linears import MOST_ROWS, ThinLinearMethod

if TYPE_CHECKING:
    from sgl_kernel_ext.attention import AttentionPlan, PagedAttention
    from sgl_kernel_ext.engine import DecoderLayer, RmsNorm, Rotary
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch

    from ...kernels import Native

# Layers of these classes are alike in what they compute, but for the norms of heads that Qwen3 has.
_KINDS = {
    LlamaModel: (LlamaDecoderLayer, LlamaAttention, LlamaMLP),
    Qwen2Model: (Qwen2DecoderLayer, Qwen2Attention, Qwen2MLP),
    Qwen3Model: (Qwen3DecoderLayer, Qwen3Attention, Qwen3MLP),
}


@dataclass(frozen=True, slots=True)
class _Layer:
    """SGLang's layer, its native parts, and the op that is all of it; ``head_norms`` of q and k."""

    module: Any
    input_norm: RmsNorm
    head_norms: tuple[RmsNorm, RmsNorm] | None
    rotary: Rotary
    attention: PagedAttention
    post_norm: RmsNorm
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
    """Let passes go straight through ``model``; the reason why not, where they cannot."""
    body: Any = getattr(model, "model", None)
    problem = _problem(body)
    if problem is None:
        body.forward = StraightThrough(body, native)
    return problem


def _problem(body: Any) -> str | None:
    """Why the layers of ``body`` are not such as ``StraightThrough`` knows."""
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
    for norm in (layer.input_layernorm, layer.post_attention_layernorm, *_head_norms_of(layer)):
        if not _is(norm, RMSNorm):
            return f"a norm is a {type(norm).__name__}"
    return None


def _linears_of(layer: Any) -> tuple[Any, Any, Any, Any]:
    attention, mlp = layer.self_attn, layer.mlp
    return attention.qkv_proj, attention.o_proj, mlp.gate_up_proj, mlp.down_proj


def _head_norms_of(layer: Any) -> tuple[Any, ...]:
    attention = layer.self_attn
    return (attention.q_norm, attention.k_norm) if _is(attention, Qwen3Attention) else ()


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
        *_head_norms_of(layer),
    ):
        yield module._parameters, "weight"
        if module._parameters.get("bias") is not None:
            yield module._parameters, "bias"


def _is(thing: object, kind: type) -> bool:
    # Not a subclass of it: that may compute something else.
    return type(thing) is kind


class StraightThrough:
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
            backend = get_attn_backend()
            most_rows = MOST_ROWS if backend.decoding else 0
            if self._same_bits:
                most_rows = self._native.MOST_THIN_ROWS
            few = len(input_ids) <= most_rows
            way = self._in_a_call_a_layer if few else self._part_by_part
            return way(input_ids, positions, backend)
        return self._long_way(
            input_ids, positions, forward_batch, input_embeds, pp_proxy_tensors=pp_proxy_tensors
        )

    def _takes(
        self, input_ids: torch.Tensor, positions: torch.Tensor, forward_batch: ForwardBatch
    ) -> bool:
        return (
            len(input_ids) > 0
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
        """Whether this pass can go straight; layers are made anew when weights have moved."""
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
        return bool(self._layers)

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
        modules = (layer.input_layernorm, layer.post_attention_layernorm, *_head_norms_of(layer))
        norms = [prepared_norm(norm, self._dtype) for norm in modules]
        rotary = prepared_rotary(
            attention.rotary_emb, attention.q_size, attention.kv_size, self._dtype
        )
        if parts is None or rotary is None or None in linears or None in norms:
            return None
        qkv, output, gate_up, down = (linear for linear in linears if linear is not None)
        first_norm, second_norm, *of_heads = (norm for norm in norms if norm is not None)
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
            *of_heads,
        )
        head_norms = (of_heads[0], of_heads[1]) if of_heads else None
        return _Layer(layer, first_norm, head_norms, rotary, parts[1], second_norm, op)

    def _in_a_call_a_layer(
        self, input_ids: torch.Tensor, positions: torch.Tensor, backend: MemServeCpuAttention
    ) -> torch.Tensor:
        rows, threads = len(input_ids), torch.get_num_threads()
        hidden = self._body.embed_tokens(input_ids).contiguous()
        residual = torch.empty_like(hidden)
        width = hidden.shape[1]
        where = (hidden.data_ptr(), width, residual.data_ptr(), width)
        at_positions = positions.data_ptr()
        for number in range(len(self._layers)):
            layer, plan = self._ready(number, backend)
            run = layer.op.apply if number else layer.op.apply_first
            run(plan, *where, at_positions, rows, threads)
        assert self._last_norm is not None
        _add_and_norm(self._last_norm, hidden, residual)
        return hidden

    def _part_by_part(
        self, input_ids: torch.Tensor, positions: torch.Tensor, backend: MemServeCpuAttention
    ) -> torch.Tensor:
        rows, threads = len(input_ids), torch.get_num_threads()
        hidden = self._body.embed_tokens(input_ids).contiguous()
        residual = hidden.clone()
        for number in range(len(self._layers)):
            layer, _ = self._ready(number, backend)
            attention, mlp = layer.module.self_attn, layer.module.mlp
            if number:
                _add_and_norm(layer.input_norm, hidden, residual)
            else:
                width = hidden.shape[1]
                where = hidden.data_ptr(), width
                layer.input_norm.apply(*where, *where, rows, threads)
            qkv = _product(attention.qkv_proj, hidden)
            first_k, first_v = attention.q_size, attention.q_size + attention.kv_size
            q, k, v = qkv[:, :first_k], qkv[:, first_k:first_v], qkv[:, first_v:]
            if layer.head_norms is not None:
                q = _norm_heads(layer.head_norms[0], q, attention.head_dim)
                k = _norm_heads(layer.head_norms[1], k, attention.head_dim)
            turned = q.data_ptr(), q.stride(0), k.data_ptr(), k.stride(0)
            layer.rotary.apply(positions.data_ptr(), rows, *turned, threads)
            attended = backend.attend_natively(attention.attn, q, k, v)
            hidden = _product(attention.o_proj, attended)
            _add_and_norm(layer.post_norm, hidden, residual)
            gated = gate(_product(mlp.gate_up_proj, hidden), self._native.Activation.SILU)
            assert gated is not None, f"layer {number}: a gate of {hidden.dtype}"
            hidden = _product(mlp.down_proj, gated)
        assert self._last_norm is not None
        _add_and_norm(self._last_norm, hidden, residual)
        return hidden

    def _ready(self, number: int, backend: MemServeCpuAttention) -> tuple[_Layer, AttentionPlan]:
        """A layer whose pages are there, and the plan of its attention."""
        layer = self._layers[number]
        # Waits for the layer's pages where they are being restored.
        parts = backend.native_parts(layer.module.self_attn.attn, self._dtype)
        assert parts is not None, f"layer {number} has no native attention in this pass"
        plan, attention = parts
        if attention is not layer.attention:
            # SGLang has given the pool other memory.
            made = self._made(layer.module, backend)
            assert made is not None, f"layer {number} has no native form any more"
            layer = self._layers[number] = made
        return layer, plan


def _product(linear: Any, x: torch.Tensor) -> torch.Tensor:
    """Of SGLang's linear layer, without what its module does around it for several ranks."""
    product: torch.Tensor = linear.quant_method.apply(linear, x, linear.bias)
    return product


def _norm_heads(norm: RmsNorm, heads: torch.Tensor, head_dim: int) -> torch.Tensor:
    """``[rows, heads * head_dim]``, of each head by itself."""
    each = heads.reshape(-1, head_dim)
    where = each.data_ptr(), head_dim
    norm.apply(*where, *where, len(each), torch.get_num_threads())
    return each.view(len(heads), -1)


def _add_and_norm(norm: RmsNorm, hidden: torch.Tensor, residual: torch.Tensor) -> None:
    """``residual`` becomes the sum, ``hidden`` its norm; both ``[rows, width]``, contiguous."""
    rows, width = hidden.shape
    to = hidden.data_ptr(), width
    norm.add_and_apply(*to, residual.data_ptr(), width, *to, rows, torch.get_num_threads())
