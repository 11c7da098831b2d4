"""Paged attention against its reference, the reference against loops that cannot be wrong, and rows
against themselves in other company: bit for bit."""

from __future__ import annotations

import sys
import threading
import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("sgl_kernel_ext")

from contract.attention_cases import (
    LEVELS,
    STORED,
    TOLERANCE,
    Case,
    Tensor,
    attended,
    close,
    each_implementation,
    integers,
    layer_of,
    limited_to,
    needs_native,
    on_each_level,
    slowly,
)
from sgl_kernel_ext import reference_attention as reference
from sgl_kernel_ext.attention import Integers
from sgl_kernel_ext.tables import Dtype, Isa

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


@needs_native
def test_nan_stays_nan() -> None:
    case = Case.random(1, [5], dtype=Dtype.FP32)
    case.values.view[case.slots_of(0)[0]] = np.nan
    case.keys.view[case.slots_of(0)[1], 0] = np.nan
    for level in LEVELS:
        with limited_to(level):
            out, _ = attended(case, case.query(1, 5), [0], [5], [5])
        assert np.isnan(out).all()


@needs_native
def test_others_run_while_it_attends() -> None:
    case = Case.random(2, [1500], q_heads=8, kv_heads=1, qk_dim=128, v_dim=128)
    query = case.query(1, 1500)
    ended = threading.Event()

    def work() -> None:
        try:
            for _ in range(3):
                attended(case, query, [0], [1500], [1500])
        finally:
            ended.set()

    switch = sys.getswitchinterval()
    # Nobody is asked to hand the GIL over: a call that kept it would stop this thread for good.
    sys.setswitchinterval(1000)
    turns = 0
    try:
        worker = threading.Thread(target=work)
        worker.start()
        limit = time.monotonic() + 60
        while not ended.is_set() and time.monotonic() < limit:
            turns += 1
            time.sleep(0)
        worker.join(60)
    finally:
        sys.setswitchinterval(switch)
    assert ended.is_set() and turns > 1
