"""A decoder layer in one call against its parts, called one after another, and its reference."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

pytest.importorskip("sgl_kernel_ext")

from contract.matrices import LEVELS, Matrix
from sgl_kernel_ext import ops, reference_attention, reference_decoder, reference_engine
from sgl_kernel_ext.attention import Geometry, Integers, Pool, SlotTable
from sgl_kernel_ext.tables import Activation, Dtype, Isa, NormForm, RotaryStyle

REFERENCE = SimpleNamespace(
    rms_norm=reference_engine.RmsNorm,
    thin_linear=reference_engine.ThinLinear,
    rotary=reference_engine.Rotary,
    gate=reference_engine.gate,
    attention_plan=reference_attention.attention_plan,
    paged_attention=reference_attention.Attention,
    decoder_layer=reference_decoder.DecoderLayer,
)
SOURCES = [pytest.param(REFERENCE, id="reference"), pytest.param(ops, id="ops")]
WIDTH, INNER, Q_HEADS, KV_HEADS, DIM, SLOTS, POSITIONS = 48, 40, 4, 2, 16, 60, 32
Q, KV = Q_HEADS * DIM, KV_HEADS * DIM
QKV = Q + 2 * KV


@pytest.fixture(autouse=True)
def all_levels_allowed() -> Iterator[None]:
    yield
    ops.limit_isa(Isa.AVX512_BF16)


@dataclass
class Model:
    """The tensors of one layer, of a pool with what was computed before, and of a batch."""

    dtype: Dtype
    weights: dict[str, Matrix]
    pools: list[Matrix]
    hidden: Matrix
    residual: Matrix
    table: NDArray[np.int32]
    lengths: list[int]
    written: NDArray[np.int64]
    positions: NDArray[np.int64]
    head_norms: bool

    @classmethod
    def random(
        cls, seed: int, requests: int, dtype: Dtype, gap: int = 0, head_norms: bool = False
    ) -> Model:
        chosen = np.random.default_rng(seed)

        def filled(rows: int, width: int, scale: float = 1.0) -> Matrix:
            return Matrix.of(scale * chosen.standard_normal((rows, width)), dtype, seed % 3, gap)

        shapes = {
            "input_norm": (1, WIDTH),
            "qkv": (QKV, WIDTH),
            "o": (WIDTH, Q),
            "post_norm": (1, WIDTH),
            "gate_up": (2 * INNER, WIDTH),
            "down": (WIDTH, INNER),
            "q_norm": (1, DIM),
            "k_norm": (1, DIM),
            "cache": (POSITIONS, DIM),
        }
        weights = {
            name: Matrix.of(chosen.standard_normal(shape) / shape[1] ** 0.5, dtype)
            for name, shape in shapes.items()
        }
        weights["cache"] = Matrix.of(chosen.uniform(-1, 1, shapes["cache"]), dtype)
        lengths = [int(one) for one in chosen.integers(1, 1 + SLOTS // max(requests, 4), requests)]
        order = iter(chosen.permutation(SLOTS))
        table = np.full((requests, POSITIONS), -1, np.int32)
        for request, length in enumerate(lengths):
            table[request, :length] = [next(order) for _ in range(length)]
        last = [int(table[request, length - 1]) for request, length in enumerate(lengths)]
        return cls(
            dtype,
            weights,
            [filled(SLOTS, KV) for _ in range(2)],
            filled(requests, WIDTH),
            filled(requests, WIDTH),
            table,
            lengths,
            np.array(last, np.int64),
            np.array(lengths, np.int64) - 1,
            head_norms,
        )

    def copy(self) -> Model:
        changed = {
            name: Matrix(one.buffer.copy(), one.offset, one.rows, one.width, one.stride, one.dtype)
            for name, one in (("hidden", self.hidden), ("residual", self.residual))
        }
        pools = [
            Matrix(one.buffer.copy(), one.offset, one.rows, one.width, one.stride, one.dtype)
            for one in self.pools
        ]
        return Model(**{**self.__dict__, **changed, "pools": pools})

    def plan(self, source: Any) -> Any:
        requests, columns = self.table.shape
        return source.attention_plan(
            SlotTable(self.table.ctypes.data, 4, requests, columns, columns),
            list(range(requests)),
            self.lengths,
            [1] * requests,
            Integers(self.written.ctypes.data, 8, requests),
        )

    def parts(self, source: Any) -> dict[str, Any]:
        weights, dtype = self.weights, self.dtype

        def linear(name: str) -> Any:
            one = weights[name]
            return source.thin_linear(one.address, one.rows, one.width, one.stride, 0, dtype)

        def norm(name: str) -> Any:
            one = weights[name]
            return source.rms_norm(one.address, one.width, 1e-5, dtype, dtype, NormForm.PLAIN)

        pools = [Pool(one.address, one.stride, DIM) for one in self.pools]
        return {
            "input_norm": norm("input_norm"),
            "qkv": linear("qkv"),
            "rotary": source.rotary(
                weights["cache"].address, POSITIONS, DIM, DIM, Q_HEADS, KV_HEADS, dtype, dtype,
                RotaryStyle.NEOX,
            ),
            "attention": source.paged_attention(
                *pools, Geometry(SLOTS, Q_HEADS, KV_HEADS, DIM, DIM, dtype, DIM**-0.5)
            ),
            "o": linear("o"),
            "post_norm": norm("post_norm"),
            "gate_up": linear("gate_up"),
            "down": linear("down"),
            "activation": Activation.SILU,
            "q_norm": norm("q_norm") if self.head_norms else None,
            "k_norm": norm("k_norm") if self.head_norms else None,
        }  # fmt: skip

    def results(self) -> list[Matrix]:
        return [self.hidden, self.residual, *self.pools]


def where(model: Model) -> tuple[int, int, int, int]:
    return (
        model.hidden.address,
        model.hidden.stride,
        model.residual.address,
        model.residual.stride,
    )


def in_one_call(model: Model, source: Any, first: bool, threads: int) -> None:
    layer = source.decoder_layer(*model.parts(source).values())
    call = layer.apply_first if first else layer.apply
    plan = model.plan(source)
    rows = model.hidden.rows
    call(plan, *where(model), model.positions.ctypes.data, rows, threads)


def part_by_part(model: Model, first: bool) -> None:
    """As a model's forward would call the ops."""
    parts, rows, dtype = model.parts(ops), model.hidden.rows, model.dtype
    hidden, hidden_stride = where(model)[:2]
    if first:
        model.residual.view[:] = model.hidden.view
        parts["input_norm"].apply(hidden, hidden_stride, hidden, hidden_stride, rows, 1)
    else:
        parts["input_norm"].add_and_apply(*where(model), hidden, hidden_stride, rows, 1)
    qkv, attended = Matrix.blank(rows, QKV, dtype), Matrix.blank(rows, Q, dtype)
    size = qkv.buffer.itemsize
    k, v = qkv.address + Q * size, qkv.address + (Q + KV) * size
    parts["qkv"].apply(hidden, rows, hidden_stride, qkv.address, QKV, 1)
    for name, first_head, heads in (("q_norm", qkv.address, Q_HEADS), ("k_norm", k, KV_HEADS)):
        for row in range(rows if model.head_norms else 0):
            each = (first_head + row * QKV * size, DIM)
            parts[name].apply(*each, *each, heads, 1)
    parts["rotary"].apply(model.positions.ctypes.data, rows, qkv.address, QKV, k, QKV, 1)
    parts["attention"].attend(
        model.plan(ops), qkv.address, QKV, k, QKV, v, QKV, attended.address, Q, 0, 1
    )
    parts["o"].apply(attended.address, rows, Q, hidden, hidden_stride, 1)
    parts["post_norm"].add_and_apply(*where(model), hidden, hidden_stride, rows, 1)
    gate_up, gated = Matrix.blank(rows, 2 * INNER, dtype), Matrix.blank(rows, INNER, dtype)
    parts["gate_up"].apply(hidden, rows, hidden_stride, gate_up.address, 2 * INNER, 1)
    ops.gate(
        gate_up.address, 2 * INNER, gated.address, INNER, rows, INNER, dtype, Activation.SILU, 1
    )
    parts["down"].apply(gated.address, rows, INNER, hidden, hidden_stride, 1)


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**32),
    requests=st.integers(1, 16) | st.integers(17, 60),
    dtype=st.sampled_from(Dtype),
    gap=st.sampled_from([0, 0, 3, 64]),
    first=st.booleans(),
    head_norms=st.booleans(),
    threads=st.integers(1, 3),
)
def test_a_layer_is_its_parts(
    seed: int, requests: int, dtype: Dtype, gap: int, first: bool, head_norms: bool, threads: int
) -> None:
    given_model = Model.random(seed, requests, dtype, gap, head_norms)
    wanted = given_model.copy()
    in_one_call(wanted, REFERENCE, first, 1)
    for level in LEVELS:
        ops.limit_isa(level)
        fused, split = given_model.copy(), given_model.copy()
        in_one_call(fused, ops, first, threads)
        part_by_part(split, first)
        for got, other, right in zip(
            fused.results(), split.results(), wanted.results(), strict=True
        ):
            assert got.others_untouched() and np.array_equal(got.bits, other.bits)
            # A dozen roundings after one another; bf16's are of 1 in 256.
            slack = {Dtype.BF16: 2.0**-4, Dtype.FP16: 2.0**-7, Dtype.FP32: 2.0**-16}[dtype]
            assert np.abs(got.values - right.values).max() <= slack * np.abs(right.values).max()


@pytest.mark.parametrize("source", SOURCES)
def test_a_row_does_not_depend_on_the_others(source: Any) -> None:
    together = Model.random(3, 7, Dtype.BF16)
    for row in range(7):
        alone = together.copy()
        for one in ("hidden", "residual"):
            part = getattr(alone, one)
            start = part.offset + row * part.stride
            setattr(alone, one, Matrix(part.buffer, start, 1, part.width, part.stride, part.dtype))
        alone.table, alone.lengths = alone.table[row : row + 1].copy(), [alone.lengths[row]]
        alone.written = alone.written[row : row + 1].copy()
        alone.positions = alone.positions[row : row + 1].copy()
        whole = together.copy()
        in_one_call(alone, source, False, 1)
        in_one_call(whole, source, False, 2)
        assert np.array_equal(alone.hidden.bits[0], whole.hidden.bits[row])
        assert np.array_equal(alone.residual.bits[0], whole.residual.bits[row])


def beyond_positions(model: Model) -> None:
    model.positions[0] = POSITIONS


def beyond_the_pool(model: Model) -> None:
    model.table[0, model.lengths[0] - 1] = model.written[0] = SLOTS


def below_the_pool(model: Model) -> None:
    model.written[0] = -1


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("spoil", [beyond_positions, beyond_the_pool, below_the_pool])
def test_what_is_out_of_bounds_writes_nothing(source: Any, spoil: Callable[[Model], None]) -> None:
    model = Model.random(5, 3, Dtype.BF16)
    spoil(model)
    before = [one.bits for one in model.results()]
    with pytest.raises(IndexError):
        in_one_call(model, source, False, 1)
    for one, bits in zip(model.results(), before, strict=True):
        assert np.array_equal(one.bits, bits)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize(
    "wrong",
    [
        {"hidden": 0},
        {"hidden": 4097},
        {"hidden_stride": WIDTH - 1},
        {"residual": 0},
        {"residual_stride": -1},
        {"positions": 0},
        {"rows": 0},
        {"rows": 2},
        {"rows": 129},
        {"threads": 0},
        {"threads": 257},
    ],
    ids=str,
)
def test_a_call_that_cannot_be_is_refused(source: Any, wrong: dict[str, int]) -> None:
    model = Model.random(6, 3, Dtype.BF16)
    before = [one.bits for one in model.results()]
    call = {
        **dict(
            zip(
                ("hidden", "hidden_stride", "residual", "residual_stride"),
                where(model),
                strict=True,
            )
        ),
        "positions": model.positions.ctypes.data,
        "rows": 3,
        "threads": 1,
        **wrong,
    }
    layer = source.decoder_layer(*model.parts(source).values())
    with pytest.raises(ValueError):
        layer.apply(model.plan(source), *call.values())
    for one, bits in zip(model.results(), before, strict=True):
        assert np.array_equal(one.bits, bits)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize(
    "name",
    [
        "input_norm",
        "qkv",
        "rotary",
        "attention",
        "o",
        "post_norm",
        "gate_up",
        "down",
        "q_norm",
        "k_norm",
    ],
)
def test_parts_that_do_not_fit_are_refused(source: Any, name: str) -> None:
    model, other = (Model.random(7, 2, dtype, 0, True) for dtype in (Dtype.BF16, Dtype.FP32))
    parts = model.parts(source)
    source.decoder_layer(*parts.values())
    swapped = {**parts, name: other.parts(source)[name]}
    with pytest.raises(ValueError):
        source.decoder_layer(*swapped.values())
    for one, instead in (("qkv", "gate_up"), ("o", "down"), ("gate_up", "qkv"), ("down", "o")):
        with pytest.raises(ValueError):
            source.decoder_layer(*{**parts, one: parts[instead]}.values())
    for wrong in ({"activation": 2}, {"q_norm": None}, {"q_norm": parts["input_norm"]}):
        with pytest.raises(ValueError):
            source.decoder_layer(*{**parts, **wrong}.values())
