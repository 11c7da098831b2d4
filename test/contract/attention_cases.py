"""Pools, requests in random slots of them, and attention row by row: what tests of it share."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from sgl_kernel_ext import ops
from sgl_kernel_ext import reference_attention as reference
from sgl_kernel_ext.attention import Geometry, Integers, Pool, SlotTable
from sgl_kernel_ext.tables import Dtype, Isa

STORED = {Dtype.BF16: np.uint16, Dtype.FP16: np.float16, Dtype.FP32: np.float32}
# Relative to the largest value: rounding of the result, and for pairs of bf16 of the weights.
TOLERANCE = {Dtype.BF16: 6e-3, Dtype.FP16: 7e-4, Dtype.FP32: 2e-6}
LEVELS = [level for level in Isa if level <= ops.isa()]
needs_native = pytest.mark.skipif(not ops.NATIVE, reason=f"no native ops: {ops.WHY_NOT_NATIVE}")


IMPLEMENTATIONS = [reference, ops] if ops.NATIVE else [reference]
each_implementation = pytest.mark.parametrize(
    "made_by", IMPLEMENTATIONS, ids=lambda one: one.__name__.rsplit(".", 1)[-1]
)


def layer_of(made_by: Any, case: Case) -> Any:
    make = ops.paged_attention if made_by is ops else reference.Attention
    return make(case.keys.pool, case.values.pool, case.geometry)


def on_each_level(test: Any) -> Any:
    """With each of the instruction sets that this processor has."""
    return pytest.mark.parametrize("level", LEVELS, ids=lambda level: level.name.lower())(test)


@contextmanager
def limited_to(level: Isa) -> Iterator[None]:
    ops.limit_isa(level)
    try:
        yield
    finally:
        ops.limit_isa(Isa.AVX512_BF16)


@dataclass(frozen=True)
class Tensor:
    """``[rows, heads, dim]`` somewhere inside ``memory``, with gaps between rows and heads."""

    memory: NDArray[Any]
    view: NDArray[Any]

    @classmethod
    def filled(
        cls,
        rng: np.random.Generator,
        shape: tuple[int, int, int],
        dtype: Dtype,
        gaps: tuple[int, int] = (0, 0),
        offset: int = 0,
    ) -> Tensor:
        rows, heads, dim = shape
        head = dim + gaps[0]
        row = heads * head + gaps[1]
        values = rng.standard_normal(offset + rows * row + 1)
        memory = reference.from_floats(values, dtype)
        item = memory.itemsize
        view = np.lib.stride_tricks.as_strided(
            memory[offset:], shape, (row * item, head * item, item)
        )
        return cls(memory, view)

    @property
    def address(self) -> int:
        return int(self.view.ctypes.data)

    @property
    def row(self) -> int:
        return self.view.strides[0] // self.view.itemsize

    @property
    def pool(self) -> Pool:
        head = self.view.strides[1] // self.view.itemsize
        return Pool(self.address, self.row, head)


@dataclass
class Case:
    """A pool, requests in random slots of it, and the new rows of a batch."""

    geometry: Geometry
    keys: Tensor
    values: Tensor
    table: NDArray[Any]
    lengths: list[int]

    @classmethod
    def random(cls, seed: int, lengths: list[int], **changes: Any) -> Case:
        rng = np.random.default_rng(seed)
        source = random.Random(seed)
        fields: dict[str, Any] = {
            "q_heads": 4,
            "kv_heads": 2,
            "qk_dim": 32,
            "v_dim": 32,
            "dtype": Dtype.BF16,
        }
        fields |= changes
        slots = sum(lengths) + 5
        geometry = Geometry(slots=slots, scale=fields["qk_dim"] ** -0.5, **fields)

        def pool(dim: int) -> Tensor:
            gaps = (source.choice((0, 0, 3)), source.choice((0, 0, 5, 64)))
            shape = (slots, geometry.kv_heads, dim)
            return Tensor.filled(rng, shape, geometry.dtype, gaps, source.randrange(9))

        columns = max(lengths, default=0) + source.randrange(4)
        kind = source.choice((np.int32, np.int64))
        table = np.full((len(lengths) + 2, columns + 3), 10**6, kind)[:, :columns]
        free = iter(rng.permutation(slots))
        for row, length in enumerate(lengths):
            table[row + 1, :length] = [next(free) for _ in range(length)]
        return cls(geometry, pool(geometry.qk_dim), pool(geometry.v_dim), table, lengths)

    @property
    def slot_table(self) -> SlotTable:
        item = self.table.itemsize
        rows, columns = self.table.shape
        return SlotTable(
            int(self.table.ctypes.data), item, rows, columns, self.table.strides[0] // item
        )

    def slots_of(self, request: int) -> NDArray[np.int64]:
        return self.table[request + 1, : self.lengths[request]].astype(np.int64)

    def query(self, seed: int, rows: int, row_gap: int = 0) -> Tensor:
        shape = (rows, self.geometry.q_heads, self.geometry.qk_dim)
        rng = np.random.default_rng(seed)
        return Tensor.filled(rng, shape, self.geometry.dtype, (0, row_gap), seed % 5)


def integers(values: NDArray[Any]) -> Integers:
    return Integers(int(values.ctypes.data), values.itemsize, len(values))


def attended(
    case: Case,
    query: Tensor,
    requests: list[int],
    lengths: list[int],
    rows: list[int],
    *,
    threads: int = 1,
    made_by: Any = ops,
) -> tuple[NDArray[Any], NDArray[np.float32]]:
    """Stored ``out`` and ``lse`` of requests (by number) that have so many tokens and new rows."""
    shape = case.geometry
    plan = made_by.attention_plan(
        case.slot_table, [one + 1 for one in requests], lengths, rows, Integers()
    )
    make = ops.paged_attention if made_by is ops else reference.Attention
    layer = make(case.keys.pool, case.values.pool, shape)
    total = sum(rows)
    out = np.full((total, shape.q_heads * shape.v_dim + 3), 7, STORED[shape.dtype])
    lse = np.full((total, shape.q_heads), np.nan, np.float32)
    out_at, stride = int(out.ctypes.data), out.shape[1]
    lse_at = int(lse.ctypes.data)
    layer.attend(plan, query.address, query.row, 0, 0, 0, 0, out_at, stride, lse_at, threads)
    assert (out[:, -3:] == 7).all()
    return out[:, :-3].reshape(total, shape.q_heads, shape.v_dim), lse


def slowly(case: Case, query: Tensor, requests: list[int], rows: list[int]) -> NDArray[np.float64]:
    """Row by row, key by key."""
    shape = case.geometry
    group = shape.q_heads // shape.kv_heads
    out, at = [], 0
    keys = reference.to_floats(case.keys.view, shape.dtype)
    values = reference.to_floats(case.values.view, shape.dtype)
    queries = reference.to_floats(query.view, shape.dtype)
    for request, new in zip(requests, rows, strict=True):
        slots = case.slots_of(request)
        for row in range(new):
            position = len(slots) - new + row
            low = 0 if shape.window < 0 else max(0, position - shape.window)
            seen = slots[low : position + 1] if shape.causal else slots
            for head in range(shape.q_heads):
                weights = []
                for slot in seen:
                    score = float(queries[at + row, head] @ keys[slot, head // group])
                    score *= shape.scale
                    if shape.softcap:
                        score = shape.softcap * math.tanh(score / shape.softcap)
                    weights.append(math.exp(score))
                total = sum(weights) or 1.0
                out.append(
                    sum(
                        (
                            weight / total * values[slot, head // group]
                            for slot, weight in zip(seen, weights, strict=True)
                        ),
                        np.zeros(shape.v_dim),
                    )
                )
        at += new
    return np.array(out).reshape(sum(rows), shape.q_heads, shape.v_dim)


def close(case: Case, got: NDArray[Any], right: NDArray[np.float64]) -> None:
    wrong = np.abs(reference.to_floats(got, case.geometry.dtype) - right)
    scale = max(1.0, float(np.abs(right).max(initial=0)))
    assert wrong.max(initial=0) <= TOLERANCE[case.geometry.dtype] * scale * 1.5
