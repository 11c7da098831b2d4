"""Paged attention in numpy, in fp64, a request and head at a time: the oracle of the native one."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from .attention import AttentionPlan, Geometry, Integers, Pool, SlotTable
from .tables import Dtype

Floats = NDArray[np.float64]
Stored = NDArray[Any]
"""Numbers as tensors keep them; bf16 as its bits, in uint16."""
_BITS = {Dtype.BF16: np.uint16, Dtype.FP16: np.float16, Dtype.FP32: np.float32}


def _memory(address: int, shape: tuple[int, ...], strides: tuple[int, ...], dtype: type) -> Stored:
    """An array over the memory at ``address``; strides in elements."""
    itemsize = np.dtype(dtype).itemsize
    if 0 in shape:
        return np.empty(shape, dtype)
    last = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    memory = (ctypes.c_uint8 * ((last + 1) * itemsize)).from_address(address)
    flat: Stored = np.ctypeslib.as_array(memory).view(dtype)
    return as_strided(flat, shape, tuple(stride * itemsize for stride in strides), writeable=True)


def _integers(given: Integers) -> NDArray[np.int64]:
    if given.itemsize not in (4, 8):
        raise ValueError(f"integers have 4 or 8 bytes, not {given.itemsize}")
    kind = np.int32 if given.itemsize == 4 else np.int64
    return _memory(given.address, (given.count,), (1,), kind).astype(np.int64)


def to_floats(stored: Stored, dtype: Dtype) -> Floats:
    if dtype == Dtype.BF16:
        stored = (stored.astype(np.uint32) << 16).view(np.float32)
    return stored.astype(np.float64)


def from_floats(values: Floats, dtype: Dtype) -> Stored:
    """Rounded to nearest, ties to even."""
    if dtype != Dtype.BF16:
        return values.astype(_BITS[dtype])
    bits = values.astype(np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


@dataclass(frozen=True, slots=True)
class Plan:
    """``slots`` of each request, and how many of its tokens are ``new``."""

    slots: tuple[NDArray[np.int64], ...]
    new: tuple[int, ...]
    written: NDArray[np.int64]

    @property
    def rows(self) -> int:
        return sum(self.new)

    def translated(self, address: int, itemsize: int, count: int) -> Plan:
        table = _integers(Integers(address, itemsize, count))

        def mapped(slots: NDArray[np.int64]) -> NDArray[np.int64]:
            if len(slots) and slots.max() >= count:
                raise IndexError(f"slot {slots.max()} is not in 0..{count} - 1")
            return np.where(slots < 0, -1, table[np.maximum(slots, 0)] if count else -1)

        slots = tuple(mapped(one) for one in self.slots)
        return replace(self, slots=slots, written=mapped(self.written))


def attention_plan(
    table: SlotTable,
    requests: Sequence[int],
    lengths: Sequence[int],
    rows: Sequence[int],
    written: Integers,
) -> Plan:
    """As ``ops.attention_plan``."""
    if not len(requests) == len(lengths) == len(rows):
        raise ValueError("requests, lengths and rows differ in number")
    if table.stride < table.columns or table.itemsize not in (4, 8):
        raise ValueError("such a table of slots cannot be")
    if min(rows, default=0) < 0:
        raise ValueError(f"a request has no {min(rows)} rows")
    slots = []
    for request, length in zip(requests, lengths, strict=True):
        if not 0 <= request < table.rows or not 0 <= length <= table.columns:
            raise IndexError(f"request {request} of {length} tokens is beyond the table")
        first = table.address + request * table.stride * table.itemsize
        slots.append(_integers(Integers(first, table.itemsize, length)))
    if written.count not in (0, sum(rows)):
        raise ValueError(f"{sum(rows)} new tokens are written to {written.count} slots")
    every = [*slots, _integers(written)]
    if any(len(one) and (one.max() >= 2**31 or one.min() < -(2**31)) for one in every):
        raise IndexError("a slot is beyond any pool")
    return Plan(tuple(slots), tuple(rows), every[-1])


@dataclass(frozen=True, slots=True)
class Attention:
    key: Pool
    value: Pool
    geometry: Geometry

    def __post_init__(self) -> None:
        shape = self.geometry
        if shape.kv_heads <= 0 or shape.q_heads <= 0 or shape.q_heads % shape.kv_heads:
            raise ValueError(f"{shape.q_heads} heads cannot share {shape.kv_heads}")
        for dim in (shape.qk_dim, shape.v_dim):
            if dim <= 0 or dim % 16 or dim > 512:
                raise ValueError(f"a dim of {dim}: a multiple of 16 up to 512 is wanted")
        for pool, dim in ((self.key, shape.qk_dim), (self.value, shape.v_dim)):
            least = (shape.kv_heads - 1) * pool.head_stride + dim
            if pool.head_stride < dim or pool.slot_stride < least or pool.address == 0:
                raise ValueError(f"{pool} overlaps itself, or cannot lie there")
        if (
            not np.isfinite([shape.scale, shape.softcap]).all()
            or min(shape.scale, shape.softcap) < 0
        ):
            raise ValueError("scale and softcap must be finite and not below 0")

    def attend(
        self,
        plan: AttentionPlan,
        query: int,
        query_stride: int,
        key: int,
        key_stride: int,
        value: int,
        value_stride: int,
        out: int,
        out_stride: int,
        lse: int,
        threads: int,
        /,
    ) -> None:
        """As ``PagedAttention.attend``; one thread, with the GIL."""
        assert isinstance(plan, Plan)
        shape, kind = self.geometry, _BITS[self.geometry.dtype]
        if not 1 <= threads <= 256:
            raise ValueError(f"threads must be in 1..256, got {threads}")
        self.check(plan, key, value)

        def rows_at(address: int, stride: int, heads: int, dim: int) -> Stored:
            if plan.rows and (address == 0 or stride < heads * dim):
                raise ValueError(f"rows of {heads} x {dim} cannot lie {stride} apart there")
            return _memory(address, (plan.rows, heads, dim), (stride, dim, 1), kind)

        queries = rows_at(query, query_stride, shape.q_heads, shape.qk_dim)
        outs = rows_at(out, out_stride, shape.q_heads, shape.v_dim)
        lses = _memory(lse, (plan.rows, shape.q_heads), (shape.q_heads, 1), np.float32)
        keys, values = self._pool(self.key, shape.qk_dim), self._pool(self.value, shape.v_dim)
        if key and plan.rows:
            keys[plan.written] = rows_at(key, key_stride, shape.kv_heads, shape.qk_dim)
            values[plan.written] = rows_at(value, value_stride, shape.kv_heads, shape.v_dim)
        start = 0
        for slots, new in zip(plan.slots, plan.new, strict=True):
            stop = start + new
            got, sums = self.attended(queries[start:stop], slots, keys, values)
            outs[start:stop] = from_floats(got, shape.dtype)
            if lse:
                lses[start:stop] = sums
            start = stop

    def _pool(self, pool: Pool, dim: int) -> Stored:
        shape = (self.geometry.slots, self.geometry.kv_heads, dim)
        strides = (pool.slot_stride, pool.head_stride, 1)
        return _memory(pool.address, shape, strides, _BITS[self.geometry.dtype])

    def _visible(self, rows: int, length: int) -> NDArray[np.bool_]:
        if not self.geometry.causal:
            return np.ones((rows, length), bool)
        position = np.arange(length - rows, length)[:, None]
        behind = position - np.arange(length)[None]
        seen = behind >= 0
        return seen if self.geometry.window < 0 else seen & (behind <= self.geometry.window)

    def check(self, plan: Plan, key: int, value: int) -> None:
        if (key == 0) != (value == 0):
            raise ValueError("keys and values are written together or not at all")
        if key and len(plan.written) != plan.rows:
            raise ValueError("the plan does not say where new rows are written")
        read = [plan.written] if key else []
        for slots, new in zip(plan.slots, plan.new, strict=True):
            if self.geometry.causal and new > len(slots):
                raise ValueError("a request has more rows than tokens")
            read.append(slots[self._visible(new, len(slots)).any(0)])
        for slots in read:
            if len(slots) and (slots.min() < 0 or slots.max() >= self.geometry.slots):
                raise IndexError(f"a slot is not in 0..{self.geometry.slots} - 1")

    def attended(
        self, query: Stored, slots: NDArray[np.int64], keys: Stored, values: Stored
    ) -> tuple[Floats, Floats]:
        shape = self.geometry
        seen = self._visible(len(query), len(slots))
        slots = np.where(seen.any(0), slots, 0)
        group = shape.q_heads // shape.kv_heads
        rows = to_floats(query, shape.dtype)
        out = np.zeros((len(query), shape.q_heads, shape.v_dim))
        sums = np.full((len(query), shape.q_heads), -np.inf)
        if not seen.any():
            return out, sums
        for head in range(shape.q_heads):
            of_keys = to_floats(keys[slots, head // group], shape.dtype)
            of_values = to_floats(values[slots, head // group], shape.dtype)
            scores = rows[:, head] @ of_keys.T * shape.scale
            if shape.softcap > 0:
                scores = shape.softcap * np.tanh(scores / shape.softcap)
            scores = np.where(seen, scores, -np.inf)
            top = scores.max(1, keepdims=True)
            weights = np.exp(scores - top)
            total = weights.sum(1, keepdims=True)
            out[:, head] = weights / total @ of_values
            sums[:, head] = (top + np.log(total))[:, 0]
        return out, sums


def merge_state(
    out_a: int,
    lse_a: int,
    out_b: int,
    lse_b: int,
    out: int,
    lse: int,
    rows: int,
    dim: int,
    dtype: Dtype,
) -> None:
    """As ``ops.merge_state``."""
    kind = _BITS[dtype]
    if rows * dim and not all((out_a, lse_a, out_b, lse_b, out, lse)):
        raise ValueError("there is nothing at address 0")
    outs = [to_floats(_memory(at, (rows, dim), (dim, 1), kind), dtype) for at in (out_a, out_b)]
    sums = [_memory(at, (rows,), (1,), np.float32).astype(np.float64) for at in (lse_a, lse_b)]
    top = np.maximum(*sums)
    shift = np.where(np.isneginf(top), 0, top)
    parts = [np.exp(one - shift) for one in sums]
    total = parts[0] + parts[1]
    shares = [np.divide(part, total, out=np.zeros_like(part), where=total > 0) for part in parts]
    merged = np.zeros((rows, dim))
    for share, one in zip(shares, outs, strict=True):
        merged += np.where(share[:, None] > 0, share[:, None] * one, 0.0)
    _memory(out, (rows, dim), (dim, 1), kind)[:] = from_floats(merged, dtype)
    with np.errstate(divide="ignore"):
        _memory(lse, (rows,), (1,), np.float32)[:] = shift + np.log(total)
