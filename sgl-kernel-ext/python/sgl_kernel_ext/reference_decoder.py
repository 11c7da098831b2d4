"""A decoder layer as its parts, called one after another."""

from __future__ import annotations

import numpy as np

from . import reference_engine as engine
from .reference_attention import Attention, Plan
from .tables import MOST_THIN_ROWS, Activation, Dtype


class DecoderLayer:
    """As ``ops.decoder_layer``."""

    def __init__(
        self,
        input_norm: engine.RmsNorm,
        qkv: engine.ThinLinear,
        rotary: engine.Rotary,
        attention: Attention,
        o: engine.ThinLinear,
        post_norm: engine.RmsNorm,
        gate_up: engine.ThinLinear,
        down: engine.ThinLinear,
        activation: int,
        q_norm: engine.RmsNorm | None = None,
        k_norm: engine.RmsNorm | None = None,
    ) -> None:
        shape, width = attention.geometry, input_norm.width
        self._q, self._k = shape.q_heads * shape.qk_dim, shape.kv_heads * shape.qk_dim
        self._attended, v = shape.q_heads * shape.v_dim, shape.kv_heads * shape.v_dim
        equal = (
            (post_norm.width, qkv.k, o.n, gate_up.k, down.n, width),
            (qkv.n, self._q + self._k + v),
            (o.k, self._attended),
            (gate_up.n, 2 * down.k),
            (rotary.heads, (shape.q_heads, shape.kv_heads, shape.qk_dim)),
            (input_norm.dtype, post_norm.dtype, qkv.dtype, o.dtype, gate_up.dtype, down.dtype),
            (rotary.dtype, shape.dtype, qkv.dtype),
        )
        if (q_norm is None) != (k_norm is None):
            raise ValueError("a decoder layer with a norm of q heads or of k heads alone")
        for norm in (q_norm, k_norm):
            if norm is not None and (norm.width, norm.dtype) != (shape.qk_dim, qkv.dtype):
                raise ValueError(f"heads of {shape.qk_dim} with a norm of {norm.width}")
        self._q_norm, self._k_norm = q_norm, k_norm
        if any(len(set(group)) != 1 for group in equal):
            raise ValueError(f"a decoder layer of parts that do not fit each other: {equal}")
        self._input_norm, self._post_norm, self._rotary = input_norm, post_norm, rotary
        self._qkv, self._o, self._gate_up, self._down = qkv, o, gate_up, down
        self._attention, self._activation = attention, Activation(activation)
        self._width, self._dtype = width, qkv.dtype

    def apply(
        self,
        plan: Plan,
        hidden: int,
        hidden_stride: int,
        residual: int,
        residual_stride: int,
        positions: int,
        rows: int,
        threads: int,
    ) -> None:
        where = (hidden, hidden_stride, residual, residual_stride)
        self._check(plan, *where, positions, rows, threads)
        self._input_norm.add_and_apply(*where, hidden, hidden_stride, rows, threads)
        self._rest(plan, *where, positions, rows, threads)

    def apply_first(
        self,
        plan: Plan,
        hidden: int,
        hidden_stride: int,
        residual: int,
        residual_stride: int,
        positions: int,
        rows: int,
        threads: int,
    ) -> None:
        where = (hidden, hidden_stride, residual, residual_stride)
        self._check(plan, *where, positions, rows, threads)
        first = engine.matrix(hidden, rows, self._width, hidden_stride, self._dtype)
        engine.matrix(residual, rows, self._width, residual_stride, self._dtype)[:] = first
        self._input_norm.apply(hidden, hidden_stride, hidden, hidden_stride, rows, threads)
        self._rest(plan, *where, positions, rows, threads)

    def _check(
        self,
        plan: Plan,
        hidden: int,
        hidden_stride: int,
        residual: int,
        residual_stride: int,
        positions: int,
        rows: int,
        threads: int,
    ) -> None:
        engine.check_threads(threads)
        engine.check_size("rows", rows, MOST_THIN_ROWS)
        engine.check_rows("hidden", hidden, rows, self._width, hidden_stride, self._dtype)
        engine.check_rows("residual", residual, rows, self._width, residual_stride, self._dtype)
        if plan.rows != rows:
            raise ValueError(f"a plan of {plan.rows} rows for {rows}")
        engine.indices("position", positions, rows, self._rotary.positions)
        self._attention.check(plan, 1, 1)

    def _rest(
        self,
        plan: Plan,
        hidden: int,
        hidden_stride: int,
        residual: int,
        residual_stride: int,
        positions: int,
        rows: int,
        threads: int,
    ) -> None:
        qkv, attended = self._buffer(rows, self._qkv.n), self._buffer(rows, self._attended)
        gate_up, gated = self._buffer(rows, self._gate_up.n), self._buffer(rows, self._down.k)
        at, stride, size = qkv.ctypes.data, self._qkv.n, qkv.itemsize
        k, v = at + self._q * size, at + (self._q + self._k) * size
        self._qkv.apply(hidden, rows, hidden_stride, at, stride, threads)
        for norm, heads, of in (
            (self._q_norm, self._rotary.heads[0], at),
            (self._k_norm, self._rotary.heads[1], k),
        ):
            for row in range(rows if norm is not None else 0):
                assert norm is not None
                where = (of + row * stride * size, norm.width)
                norm.apply(*where, *where, heads, threads)
        self._rotary.apply(positions, rows, at, stride, k, stride, threads)
        self._attention.attend(
            plan, at, stride, k, stride, v, stride, attended.ctypes.data, self._attended, 0, threads
        )
        self._o.apply(attended.ctypes.data, rows, self._attended, hidden, hidden_stride, threads)
        self._post_norm.add_and_apply(
            hidden, hidden_stride, residual, residual_stride, hidden, hidden_stride, rows, threads
        )
        between, width = self._gate_up.n, self._down.k
        self._gate_up.apply(hidden, rows, hidden_stride, gate_up.ctypes.data, between, threads)
        engine.gate(
            gate_up.ctypes.data, between, gated.ctypes.data, width,
            rows, width, self._dtype, self._activation, threads,
        )  # fmt: skip
        self._down.apply(gated.ctypes.data, rows, width, hidden, hidden_stride, threads)

    def _buffer(self, rows: int, width: int) -> engine.Stored:
        return np.zeros((rows, width), np.float32 if self._dtype is Dtype.FP32 else np.uint16)
