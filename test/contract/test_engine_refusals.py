"""What norms, rotary embedding, K/V writes and gates refuse, and that nothing is written then."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("sgl_kernel_ext")

from contract.matrices import REFERENCE, Matrix, random
from sgl_kernel_ext import ops
from sgl_kernel_ext.tables import Dtype

SOURCES = [pytest.param(REFERENCE, id="reference"), pytest.param(ops, id="ops")]


class Given:
    """A small rotary embedding with its pool; ``run`` with some numbers changed."""

    def __init__(self) -> None:
        self.angles = random(1, 20, 8, Dtype.FP32)
        self.qkv = random(2, 3, 4 * 8, Dtype.BF16)
        self.pools = [Matrix.blank(6, 8, Dtype.BF16) for _ in range(2)]
        self.positions, self.slots = np.array([0, 19, 4]), np.array([5, 0, 2])
        self.before = self.qkv.bits

    def run(self, source: Any, **changes: int) -> None:
        rotary = {
            "cache": self.angles.address,
            "positions": 20,
            "rotary_dim": 8,
            "head_dim": 8,
            "q_heads": 2,
            "k_heads": 1,
            "dtype": 0,
            "cache_dtype": 2,
            "style": 0,
        }
        pool = {
            "pool_k": self.pools[0].address,
            "pool_k_stride": 8,
            "k_width": 8,
            "pool_v": self.pools[1].address,
            "pool_v_stride": 8,
            "v_width": 8,
            "slots": 6,
            "pool_dtype": 0,
        }
        call = {
            "where": self.positions.ctypes.data,
            "rows": 3,
            "q": self.qkv.address,
            "q_stride": 32,
            "k": self.qkv.address + 32,
            "k_stride": 32,
            "to": self.slots.ctypes.data,
            "v": self.qkv.address + 48,
            "v_stride": 32,
            "threads": 1,
        }
        for name, value in changes.items():
            part = next(one for one in (rotary, pool, call) if name in one)
            part[name] = value
        kv = source.kv_slots(*pool.values())
        numbers = list(call.values())
        source.rotary(*rotary.values()).apply_and_write(*numbers[:6], kv, *numbers[6:])

    def untouched(self) -> bool:
        blank = all(np.isnan(one.values).all() for one in self.pools)
        return blank and np.array_equal(self.qkv.bits, self.before)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("number", [-1, 20, 2**31, 2**62, -(2**63), 2**63 - 1])
def test_a_position_or_slot_out_of_bounds_writes_nothing(source: Any, number: int) -> None:
    one, other = Given(), Given()
    one.positions[1] = other.slots[1] = number
    for each in (one, other):
        with pytest.raises(IndexError):
            each.run(source)
        assert each.untouched()


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize(
    "wrong",
    [
        {"cache": 0},
        {"cache": 4098},
        {"positions": 0},
        {"positions": 2**50},
        {"rotary_dim": 7},
        {"rotary_dim": 10},
        {"rotary_dim": 0},
        {"rotary_dim": 1026, "head_dim": 1026},
        {"head_dim": 2**17},
        {"q_heads": 0},
        {"q_heads": 5},
        {"k_heads": -1},
        {"k_heads": 2},
        {"dtype": 4},
        {"dtype": 1},
        {"cache_dtype": 3},
        {"style": 2},
        {"pool_k": 0},
        {"pool_k_stride": 7},
        {"k_width": 0},
        {"k_width": 4},
        {"pool_v": 4097},
        {"v_width": 9},
        {"slots": 0},
        {"pool_dtype": 1},
        {"where": 0},
        {"where": 4097},
        {"to": 0},
        {"rows": -1},
        {"q": 0},
        {"q_stride": 15},
        {"k_stride": -32},
        {"v": 4097},
        {"v_stride": 7},
        {"threads": 0},
        {"threads": 257},
    ],
    ids=str,
)
def test_what_cannot_be_turned_or_written_is_refused(source: Any, wrong: dict[str, int]) -> None:
    given_one = Given()
    with pytest.raises(ValueError):
        given_one.run(source, **wrong)
    assert given_one.untouched()


@pytest.mark.parametrize("source", SOURCES)
def test_the_small_rotary_embedding_is_otherwise_accepted(source: Any) -> None:
    fine = Given()
    fine.run(source)
    assert not fine.untouched()


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize(
    "wrong",
    [
        {"weight": 0},
        {"weight": 4097},
        {"width": 0},
        {"width": 2**25},
        {"eps": -1.0},
        {"eps": float("nan")},
        {"eps": float("inf")},
        {"dtype": 3},
        {"weight_dtype": 1},
        {"form": 3},
        {"x": 0},
        {"x_stride": 7},
        {"out": 4097},
        {"out_stride": -8},
        {"rows": -1},
        {"rows": 2**62},
        {"threads": 0},
    ],
    ids=str,
)
def test_a_norm_that_cannot_be_is_refused(source: Any, wrong: dict[str, Any]) -> None:
    x, weight, out = (
        random(1, 2, 8, Dtype.BF16),
        random(2, 1, 8, Dtype.BF16),
        Matrix.blank(2, 8, Dtype.BF16),
    )
    made = {
        "weight": weight.address,
        "width": 8,
        "eps": 1e-5,
        "dtype": 0,
        "weight_dtype": 0,
        "form": 0,
    }
    call = {
        "x": x.address,
        "x_stride": 8,
        "out": out.address,
        "out_stride": 8,
        "rows": 2,
        "threads": 1,
    }
    for name, value in wrong.items():
        (made if name in made else call)[name] = value
    with pytest.raises(ValueError):
        source.rms_norm(*made.values()).apply(*call.values())
    assert np.isnan(out.values).all()


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize(
    "wrong",
    [
        {"x": 0},
        {"x_stride": 15},
        {"out": 4097},
        {"out_stride": 7},
        {"rows": -1},
        {"width": 0},
        {"width": 2**31},
        {"dtype": 3},
        {"activation": 2},
        {"threads": 0},
    ],
    ids=str,
)
def test_a_gate_that_cannot_be_is_refused(source: Any, wrong: dict[str, int]) -> None:
    x, out = random(1, 2, 16, Dtype.BF16), Matrix.blank(2, 8, Dtype.BF16)
    call = {
        "x": x.address,
        "x_stride": 16,
        "out": out.address,
        "out_stride": 8,
        "rows": 2,
        "width": 8,
        "dtype": 0,
        "activation": 0,
        "threads": 1,
        **wrong,
    }
    with pytest.raises(ValueError):
        source.gate(*call.values())
    assert np.isnan(out.values).all()
