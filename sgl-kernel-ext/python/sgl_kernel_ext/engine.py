"""The engine's ops, native or their reference. Tensors are addresses, sizes and strides (elements):
a caller that has a torch tensor hands over ``data_ptr()``, and keeps it alive."""

from __future__ import annotations

from typing import Any, Protocol

from . import reference_decoder
from . import reference_engine as reference
from .attention import AttentionPlan, PagedAttention
from .switch import NATIVE
from .tables import Activation, Dtype, Isa, NormForm, RotaryStyle

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
        """``out[i] = x[i] . weight^T (+ bias)`` for ``rows`` rows (1..128): ``x`` ``[rows, k]`` and
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


class RmsNorm(Protocol):
    """A norm's weight, checked once. Rows are ``[rows, width]`` of the norm's dtype, any distance
    apart. Let go of the GIL from 16,384 elements on. Raise ValueError for what cannot be."""

    def apply(
        self, x: int, x_stride: int, out: int, out_stride: int, rows: int, threads: int
    ) -> None:
        """``out = norm(x) * weight``; ``out`` may be ``x``."""

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
        """``residual += x; out = norm(residual) * weight``, where the norm is of the sum before it
        is rounded (``NormForm.GEMMA``: after). ``out`` may be ``x``, not ``residual``."""


def rms_norm(
    weight: int, width: int, eps: float, dtype: Dtype, weight_dtype: Dtype, form: NormForm
) -> RmsNorm:
    """``x / sqrt(mean(x ** 2) + eps)`` over rows of ``width``, times ``weight`` ``[width]``, which
    is of the activations' dtype or fp32. On x86-64 it has the bits of SGLang's ``forward_native``.

    Raises ValueError for sizes, addresses, dtypes or an eps that cannot be.
    """
    made = _native.RmsNorm if NATIVE else reference.RmsNorm
    return made(weight, width, eps, dtype, weight_dtype, form)


class KvSlots(Protocol):
    """One layer's pool of K and V, checked once."""

    def write(
        self, slots: int, rows: int, k: int, k_stride: int, v: int, v_stride: int, threads: int
    ) -> None:
        """``pool[slots[i]] = k[i], v[i]``; ``slots`` int64 ``[rows]``. Where two rows name one
        slot, what it holds afterwards is not defined. Raises IndexError for a slot beyond the pool
        before anything is written, ValueError for what cannot be."""


def kv_slots(
    k: int,
    k_stride: int,
    k_width: int,
    v: int,
    v_stride: int,
    v_width: int,
    slots: int,
    dtype: Dtype,
) -> KvSlots:
    """K ``[slots, k_width]`` and V ``[slots, v_width]`` of one layer (widths are heads times their
    size), a token's rows ``k_stride`` and ``v_stride`` elements apart."""
    made = _native.KvSlots if NATIVE else reference.KvSlots
    return made(k, k_stride, k_width, v, v_stride, v_width, slots, dtype)


class Rotary(Protocol):
    """A rotary embedding, checked once. ``positions`` int64 ``[rows]``; ``q`` and ``k``
    ``[rows, heads * head_dim]`` are turned in place. Raise IndexError for a position beyond the
    cache (or a slot beyond the pool) before anything is written, ValueError for what cannot be."""

    def apply(
        self, positions: int, rows: int, q: int, q_stride: int, k: int, k_stride: int, threads: int
    ) -> None: ...

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
        """Also writes the turned k, and v, to the pool, as ``KvSlots.write``."""


def rotary(
    cache: int,
    positions: int,
    rotary_dim: int,
    head_dim: int,
    q_heads: int,
    k_heads: int,
    dtype: Dtype,
    cache_dtype: Dtype,
    style: RotaryStyle,
) -> Rotary:
    """``cache`` ``[positions, rotary_dim]``: cosines, then sines, contiguous, as SGLang's
    ``RotaryEmbedding.cos_sin_cache``. The first ``rotary_dim`` numbers (even, at most 1,024) of
    each head are turned, with the roundings and bits of its ``forward_native``.

    SGLang may replace its cache by a longer one: make another ``Rotary`` then.
    """
    # Each takes the pools of its own kind only, and there is one kind in a process.
    made: Any = _native.Rotary if NATIVE else reference.Rotary
    turning: Rotary = made(
        cache, positions, rotary_dim, head_dim, q_heads, k_heads, dtype, cache_dtype, style
    )
    return turning


def gate(
    x: int,
    x_stride: int,
    out: int,
    out_stride: int,
    rows: int,
    width: int,
    dtype: Dtype,
    activation: Activation,
    threads: int,
) -> None:
    """``out = activation(x[:, :width]) * x[:, width:]`` for ``x`` ``[rows, 2 * width]``, the first
    factor rounded before the product: SGLang's ``SiluAndMul`` (with its bits in bf16 and fp16) and
    ``GeluAndMul("tanh")`` (more exact far below 0 than torch, which adds 1 to a tanh near -1).

    Raises ValueError for what cannot be.
    """
    run = _native.gate if NATIVE else reference.gate
    run(x, x_stride, out, out_stride, rows, width, dtype, activation, threads)


class DecoderLayer(Protocol):
    """One layer, for 1 to 128 rows of new tokens.

    ``hidden`` and ``residual`` ``[rows, width]`` of the layer's dtype, any distance apart, are read
    and written: what comes out as ``hidden`` is the output of the MLP, which the next layer (or the
    last norm, ``RmsNorm.add_and_apply``) adds to ``residual``. ``positions`` int64 ``[rows]``; the
    plan says which slots the rows' keys and values are written to, and which are read. The bits
    are those of the parts called one after another. Lets go of the GIL.

    Raises IndexError for positions and slots beyond their limits, ValueError for what does not fit;
    then nothing has been written.
    """

    def apply(
        self,
        plan: AttentionPlan,
        hidden: int,
        hidden_stride: int,
        residual: int,
        residual_stride: int,
        positions: int,
        rows: int,
        threads: int,
    ) -> None: ...

    def apply_first(
        self,
        plan: AttentionPlan,
        hidden: int,
        hidden_stride: int,
        residual: int,
        residual_stride: int,
        positions: int,
        rows: int,
        threads: int,
    ) -> None:
        """The model's first layer: ``residual`` is only written, it starts as ``hidden``."""


def decoder_layer(
    input_norm: RmsNorm,
    qkv: ThinLinear,
    rotary: Rotary,
    attention: PagedAttention,
    o: ThinLinear,
    post_norm: RmsNorm,
    gate_up: ThinLinear,
    down: ThinLinear,
    activation: Activation,
    q_norm: RmsNorm | None = None,
    k_norm: RmsNorm | None = None,
) -> DecoderLayer:
    """A llama-class layer of parts that were made by this module: norm, q/k/v (rows of q heads, k
    heads, v heads), norms of each head of q and of k (Qwen3; both or neither), rotary embedding,
    causal attention that writes k and v first, output, norm, gate and up (rows of one, then of the
    other), activation, down. It takes copies of the parts; the tensors they name must stay.

    Raises ValueError where the parts do not fit each other.
    """
    made: Any = _native.DecoderLayer if NATIVE else reference_decoder.DecoderLayer
    layer: DecoderLayer = made(
        input_norm,
        qkv,
        rotary,
        attention,
        o,
        post_norm,
        gate_up,
        down,
        activation,
        q_norm,
        k_norm,
    )
    return layer
