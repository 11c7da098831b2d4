"""Paged attention against its reference, the reference against loops that cannot be wrong, and rows
against themselves in other company: bit for bit."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

pytest.importorskip("sgl_kernel_ext")

from sgl_kernel_ext import ops
from sgl_kernel_ext import reference_attention as reference
from sgl_kernel_ext.attention import Geometry, Integers, Pool, SlotTable
from sgl_kernel_ext.tables import Dtype, Isa

STORED = {Dtype.BF16: np.uint16, Dtype.FP16: np.float16, Dtype.FP32: np.float32}
# Relative to the largest value: rounding of the result, and for pairs of bf16 of the weights.
TOLERANCE = {Dtype.BF16: 6e-3, Dtype.FP16: 7e-4, Dtype.FP32: 2e-6}
LEVELS = [level for level in Isa if level <= ops.isa()]
needs_native = pytest.mark.skipif(not ops.NATIVE, reason=f"no native ops: {ops.WHY_NOT_NATIVE}")


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


GEOMETRIES = st.fixed_dictionaries(
    {
        "q_heads": st.just(6),
        "kv_heads": st.sampled_from([1, 2, 3, 6]),
        "qk_dim": st.sampled_from([16, 32, 48, 64, 80]),
        "v_dim": st.sampled_from([16, 32, 48, 64, 80]),
        "dtype": st.sampled_from(Dtype),
        "softcap": st.sampled_from([0.0, 0.0, 2.0]),
        "window": st.sampled_from([-1, -1, 0, 1, 15, 16, 40, 100]),
        "causal": st.sampled_from([True, True, True, False]),
    }
)
PARTS = st.lists(st.tuples(st.integers(0, 90), st.integers(0, 40)), min_size=1, max_size=4)


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**20), geometry=GEOMETRIES, parts=PARTS)
def test_the_reference_is_what_loops_say(
    seed: int, geometry: dict[str, Any], parts: list[tuple[int, int]]
) -> None:
    parts = [(prefix // 6, new // 6) for prefix, new in parts]
    case = Case.random(seed, [prefix + new for prefix, new in parts], **geometry)
    rows = [new for _, new in parts]
    query = case.query(seed, sum(rows))
    numbers = list(range(len(parts)))
    got, _ = attended(case, query, numbers, case.lengths, rows, made_by=reference)
    close(case, got, slowly(case, query, numbers, rows))


@needs_native
@on_each_level
@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**20),
    geometry=GEOMETRIES,
    parts=PARTS,
    threads=st.integers(1, 3),
)
def test_random_layouts(
    level: Isa, seed: int, geometry: dict[str, Any], parts: list[tuple[int, int]], threads: int
) -> None:
    case = Case.random(seed, [prefix + new for prefix, new in parts], **geometry)
    rows = [new for _, new in parts]
    query = case.query(seed, sum(rows), row_gap=seed % 3 * 8)
    where = (case, query, list(range(len(parts))), case.lengths, rows)
    right, right_lse = attended(*where, made_by=reference)
    with limited_to(level):
        got, lse = attended(*where, threads=threads)
    close(case, got, reference.to_floats(right, case.geometry.dtype))
    np.testing.assert_allclose(lse, right_lse, atol=2e-4, rtol=2e-5)


@needs_native
@on_each_level
@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**20), geometry=GEOMETRIES, data=st.data())
def test_a_row_is_the_same_bits_in_any_company(
    level: Isa, seed: int, geometry: dict[str, Any], data: st.DataObject
) -> None:
    """Whole prompts once, on one thread; then some of their rows again, as a batch may have them:
    after a cached prefix, as a decode step, beside others, on several threads."""
    geometry |= {"causal": True}
    lengths = data.draw(
        st.lists(st.sampled_from([1, 63, 64, 130, 500, 1100]), min_size=1, max_size=3)
    )
    case = Case.random(seed, lengths, **geometry)
    queries = [case.query(seed + number, length) for number, length in enumerate(lengths)]
    with limited_to(level):
        alone = [
            attended(case, query, [number], [length], [length])
            for number, (query, length) in enumerate(zip(queries, lengths, strict=True))
        ]
    batch = data.draw(st.lists(st.integers(0, len(lengths) - 1), min_size=1, max_size=5))
    ends = [data.draw(st.integers(1, lengths[number]), label="end") for number in batch]
    news = [min(end, data.draw(st.sampled_from([1, 1, 2, 17, 300]))) for end in ends]
    parts = list(zip(batch, ends, news, strict=True))
    stored = np.concatenate([queries[one].view[end - new : end] for one, end, new in parts])
    query = Tensor(stored, stored)
    threads = data.draw(st.integers(1, 3), label="threads")
    with limited_to(level):
        got, lse = attended(case, query, batch, ends, news, threads=threads)
    start = 0
    for one, end, new in parts:
        out_alone, lse_alone = alone[one]
        assert got[start : start + new].tobytes() == out_alone[end - new : end].tobytes()
        assert lse[start : start + new].tobytes() == lse_alone[end - new : end].tobytes()
        start += new


@needs_native
@pytest.mark.parametrize("threads", [2, 5])
def test_a_long_decode_is_shared_by_threads_without_changing_it(threads: int) -> None:
    case = Case.random(1, [5000, 2048, 513], q_heads=9, kv_heads=3, qk_dim=64, v_dim=64)
    query = case.query(2, 3)
    where = (case, query, [0, 1, 2], case.lengths, [1, 1, 1])
    out, lse = attended(*where)
    for _ in range(5):
        shared, shared_lse = attended(*where, threads=threads)
        assert shared.tobytes() == out.tobytes() and shared_lse.tobytes() == lse.tobytes()


IMPLEMENTATIONS = [reference, ops] if ops.NATIVE else [reference]
each_implementation = pytest.mark.parametrize(
    "made_by", IMPLEMENTATIONS, ids=lambda one: one.__name__.rsplit(".", 1)[-1]
)


def layer_of(made_by: Any, case: Case) -> Any:
    make = ops.paged_attention if made_by is ops else reference.Attention
    return make(case.keys.pool, case.values.pool, case.geometry)


@each_implementation
@pytest.mark.parametrize("dtype", list(Dtype))
def test_new_rows_are_written_and_seen(made_by: Any, dtype: Dtype) -> None:
    case = Case.random(3, [20, 70], dtype=dtype, kv_heads=2, v_dim=48)
    rows, shape = [4, 70], case.geometry
    rng = np.random.default_rng(5)
    new_keys = Tensor.filled(rng, (74, 2, 32), dtype, (0, 5))
    new_values = Tensor.filled(rng, (74, 2, 48), dtype, (0, 1))
    query = case.query(6, 74)
    written = np.concatenate([case.slots_of(0)[16:], case.slots_of(1)])
    plan = made_by.attention_plan(case.slot_table, [1, 2], [20, 70], rows, integers(written))
    before = case.keys.view.copy(), case.values.view.copy()
    out = np.zeros((74, 4, 48), STORED[dtype])
    layer_of(made_by, case).attend(
        plan,
        query.address,
        query.row,
        new_keys.address,
        new_keys.row,
        new_values.address,
        new_values.row,
        int(out.ctypes.data),
        4 * 48,
        0,
        2,
    )
    for pool, new, old in (
        (case.keys, new_keys, before[0]),
        (case.values, new_values, before[1]),
    ):
        assert np.array_equal(pool.view[written], new.view)
        others = np.setdiff1d(np.arange(shape.slots), written)
        assert np.array_equal(pool.view[others], old[others])
    close(case, out, slowly(case, query, [0, 1], rows))


@each_implementation
def test_slots_of_another_pool(made_by: Any) -> None:
    """As SGLang's pool for layers with a window: slots of its own, and none for old tokens."""
    case = Case.random(8, [90], window=20, kv_heads=2)
    own = case.slots_of(0)
    names = np.random.default_rng(1).permutation(200)[:90]
    case.table[1, :90] = names
    mapping = np.full(200, 10**7, np.int64)
    mapping[names] = own
    mapping[names[:60]] = -1
    query = case.query(9, 8)
    plan = made_by.attention_plan(case.slot_table, [1], [90], [8], integers(names[82:]))
    there = plan.translated(int(mapping.ctypes.data), 8, 200)
    out = np.zeros((8, 4, 32), np.uint16)
    arguments = (query.address, query.row, 0, 0, 0, 0, int(out.ctypes.data), 128, 0, 1)
    layer_of(made_by, case).attend(there, *arguments)
    case.table[1, :90] = own
    close(case, out, slowly(case, query, [0], [8]))
    everything = replace(case, geometry=replace(case.geometry, window=-1))
    with pytest.raises(IndexError):
        layer_of(made_by, everything).attend(there, *arguments)
    with pytest.raises(IndexError):
        plan.translated(int(mapping.ctypes.data), 8, int(names.max()))


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_arbitrary_slots_are_read_or_refused(data: st.DataObject) -> None:
    """Both implementations refuse the same, with nothing written, and compute the same."""
    odd = st.sampled_from([-1, 0, 3, 15, 16, 17, 2**31 - 1, 2**31, 2**40, -(2**31), -(2**63)])
    length = data.draw(st.integers(1, 12))
    slots = data.draw(st.lists(st.integers(0, 15) | odd, min_size=length, max_size=length))
    new = data.draw(st.integers(0, length))
    written = np.array(data.draw(st.lists(st.integers(0, 15) | odd, min_size=new, max_size=new)))
    written = written.astype(np.int64)
    window = data.draw(st.sampled_from([-1, 0, 3]))
    outcomes = []
    for made_by in IMPLEMENTATIONS:
        case = Case.random(4, [11], window=window, q_heads=2)
        case.table = np.zeros((3, 12), np.int64)
        case.table[1, :length] = slots
        query, out = case.query(1, new), np.zeros((new, 2, 32), np.uint16)
        fresh = Tensor.filled(np.random.default_rng(0), (new, 2, 32), Dtype.BF16)
        before = case.keys.memory.copy()
        try:
            plan = made_by.attention_plan(case.slot_table, [1], [length], [new], integers(written))
            layer_of(made_by, case).attend(
                plan,
                query.address,
                query.row,
                fresh.address,
                64,
                fresh.address,
                64,
                int(out.ctypes.data),
                64,
                0,
                1,
            )
            outcomes.append("done")
        except IndexError:
            outcomes.append("refused")
            assert not out.any() and np.array_equal(case.keys.memory, before)
    assert len(set(outcomes)) == 1, outcomes


@each_implementation
@pytest.mark.parametrize(
    ("requests", "lengths", "rows", "wrong"),
    [
        ([3], [1], [1], IndexError),
        ([-1], [1], [1], IndexError),
        ([2**40], [1], [1], IndexError),
        ([1], [-1], [1], IndexError),
        ([1], [2**40], [1], IndexError),
        ([1], [4], [-1], ValueError),
        ([1], [4], [], ValueError),
        ([1, 1], [4], [1], ValueError),
    ],
)
def test_plans_that_cannot_be(
    made_by: Any, requests: list[int], lengths: list[int], rows: list[int], wrong: type[Exception]
) -> None:
    case = Case.random(1, [10])
    with pytest.raises(wrong):
        made_by.attention_plan(case.slot_table, requests, lengths, rows, Integers())


@each_implementation
def test_what_does_not_fit_is_refused(made_by: Any) -> None:
    case = Case.random(1, [10])
    table = case.slot_table
    some = np.zeros(3, np.int64)
    with pytest.raises(ValueError, match="written to 3 slots"):
        made_by.attention_plan(table, [1], [10], [2], integers(some))
    with pytest.raises(ValueError, match="4 or 8 bytes"):
        made_by.attention_plan(table, [1], [10], [3], replace(integers(some), itemsize=2))
    for odd in (replace(table, stride=1), replace(table, itemsize=3)):
        with pytest.raises(ValueError, match=r"table|bytes"):
            made_by.attention_plan(odd, [1], [10], [1], Integers())
    impossible: list[dict[str, Any]] = [
        {"qk_dim": 24},
        {"v_dim": 0},
        {"qk_dim": 528},
        {"kv_heads": 3},
        {"q_heads": 0},
        {"scale": math.inf},
        {"softcap": -1.0},
    ]
    for changes in impossible:
        with pytest.raises(ValueError):
            layer_of(made_by, replace(case, geometry=replace(case.geometry, **changes)))
    overlapping = replace(case.keys.pool, slot_stride=40)
    for pool in (overlapping, replace(case.keys.pool, address=0)):
        make = ops.paged_attention if made_by is ops else reference.Attention
        with pytest.raises(ValueError, match=r"overlap|lie at"):
            make(pool, case.values.pool, case.geometry)
    layer = layer_of(made_by, case)
    query, out = case.query(1, 2), np.zeros((2, 4, 32), np.uint16)
    q, o = query.address, int(out.ctypes.data)
    short = made_by.attention_plan(table, [1], [1], [2], Integers())
    plan = made_by.attention_plan(table, [1], [10], [2], Integers())
    for bad_plan, arguments in (
        (short, (q, 128, 0, 0, 0, 0, o, 128, 0, 1)),
        (plan, (q, 128, 0, 0, 0, 0, o, 128, 0, 0)),
        (plan, (q, 128, 0, 0, 0, 0, o, 128, 0, 257)),
        (plan, (q, 127, 0, 0, 0, 0, o, 128, 0, 1)),
        (plan, (q, 128, 0, 0, 0, 0, o, 100, 0, 1)),
        (plan, (0, 128, 0, 0, 0, 0, o, 128, 0, 1)),
        (plan, (q, 128, 0, 0, 0, 0, 0, 128, 0, 1)),
        (plan, (q, 128, q, 64, 0, 0, o, 128, 0, 1)),
        (plan, (q, 128, q, 64, q, 64, o, 128, 0, 1)),
    ):
        with pytest.raises(ValueError):
            layer.attend(bad_plan, *arguments)
    assert not out.any()


@each_implementation
def test_nothing_to_do_and_nothing_to_see(made_by: Any) -> None:
    case = Case.random(1, [0, 5], causal=False)
    empty = made_by.attention_plan(case.slot_table, [], [], [], Integers())
    layer_of(made_by, case).attend(empty, 0, 128, 0, 0, 0, 0, 0, 128, 0, 1)
    out, lse = attended(case, case.query(1, 3), [0, 1], [0, 5], [2, 1], made_by=made_by)
    assert not out[:2].any() and out[2].any()
    assert np.isneginf(lse[:2]).all() and np.isfinite(lse[2]).all()


@each_implementation
@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 2**20),
    length=st.integers(0, 700),
    share=st.floats(0, 1),
    dtype=st.sampled_from(Dtype),
)
def test_two_parts_merged_are_the_whole(
    made_by: Any, seed: int, length: int, share: float, dtype: Dtype
) -> None:
    """The keys split anywhere between two holders; each attends to its own, wherever rows are."""
    case = Case.random(seed, [length], dtype=dtype, causal=False, qk_dim=64, v_dim=48)
    query = case.query(seed, 5)
    whole, whole_lse = attended(case, query, [0], [length], [5], made_by=reference)
    cut = round(length * share)
    slots = case.table[1].copy()
    out_a, lse_a = attended(case, query, [0], [cut], [5], made_by=made_by)
    case.table[1, : length - cut] = slots[cut:length]
    out_b, lse_b = attended(case, query, [0], [length - cut], [5], made_by=made_by)
    out_a, out_b = np.ascontiguousarray(out_a), np.ascontiguousarray(out_b)
    addresses = [int(one.ctypes.data) for one in (out_a, lse_a, out_b, lse_b)]
    made_by.merge_state(*addresses, *addresses[:2], 5 * 4, 48, dtype)
    right = reference.to_floats(whole, dtype)
    wrong = np.abs(reference.to_floats(out_a, dtype) - right).max(initial=0)
    assert wrong <= 2 * TOLERANCE[dtype] * max(1.0, float(np.abs(right).max(initial=0)))
    np.testing.assert_allclose(lse_a, whole_lse, atol=3e-4, rtol=3e-5)


@each_implementation
def test_a_merge_from_nowhere_is_refused(made_by: Any) -> None:
    some = np.zeros(64, np.float32)
    at = int(some.ctypes.data)
    for wrong in range(6):
        addresses = [at] * 6
        addresses[wrong] = 0
        with pytest.raises(ValueError):
            made_by.merge_state(*addresses, 2, 4, Dtype.FP32)


@needs_native
def test_nan_stays_nan() -> None:
    case = Case.random(1, [5], dtype=Dtype.FP32)
    case.values.view[case.slots_of(0)[0]] = np.nan
    case.keys.view[case.slots_of(0)[1], 0] = np.nan
    for level in LEVELS:
        with limited_to(level):
            out, _ = attended(case, case.query(1, 5), [0], [5], [5])
        assert np.isnan(out).all()
