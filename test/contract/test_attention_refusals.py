"""What paged attention refuses: slots, plans, layers and calls that cannot be. Nothing is read or
written then."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("sgl_kernel_ext")

from contract.attention_cases import (
    IMPLEMENTATIONS,
    Case,
    Tensor,
    each_implementation,
    integers,
    layer_of,
)
from sgl_kernel_ext import ops
from sgl_kernel_ext import reference_attention as reference
from sgl_kernel_ext.attention import Integers
from sgl_kernel_ext.tables import Dtype


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
def test_a_merge_from_nowhere_is_refused(made_by: Any) -> None:
    some = np.zeros(64, np.float32)
    at = int(some.ctypes.data)
    for wrong in range(6):
        addresses = [at] * 6
        addresses[wrong] = 0
        with pytest.raises(ValueError):
            made_by.merge_state(*addresses, 2, 4, Dtype.FP32)
