"""Norms, rotary embedding, K/V writes and gated activations against their reference and torch."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

pytest.importorskip("sgl_kernel_ext")

from contract.matrices import LEVELS, REFERENCE, ROUNDING, Matrix, copy_of, random
from sgl_kernel_ext import ops
from sgl_kernel_ext import reference_engine as reference
from sgl_kernel_ext.tables import Activation, Dtype, Isa, NormForm, RotaryStyle

GAPS = st.sampled_from([0, 0, 1, 5, 64])
ROWS = st.integers(0, 9)


@pytest.fixture(autouse=True)
def all_levels_allowed() -> Iterator[None]:
    yield
    ops.limit_isa(Isa.AVX512_BF16)


def at_every_level(run: Callable[[Any], list[Matrix]]) -> list[list[Matrix]]:
    """What the reference gives, then each level of the native ops; all have the same bits."""
    results = [run(REFERENCE)]
    native = []
    for level in LEVELS:
        ops.limit_isa(level)
        native.append(run(ops))
    for got in native[1:] if ops.NATIVE else []:
        for one, other in zip(got, native[0], strict=True):
            assert np.array_equal(one.bits, other.bits)
    for matrices in [*results, *native]:
        assert all(one.others_untouched() for one in matrices)
    return [*results, *native]


def near(got: Matrix, wanted: NDArray[np.float64], slack: float) -> bool:
    """Within ``slack`` roundings of the dtype."""
    bound = slack * ROUNDING[got.dtype] * np.abs(wanted) + 2.0**-24
    return bool((np.abs(got.values - wanted) <= bound).all())


@settings(deadline=None, max_examples=120)
@given(
    seed=st.integers(0, 2**32),
    rows=ROWS,
    width=st.integers(1, 80) | st.sampled_from([576, 577, 2048, 4101]),
    dtype=st.sampled_from(Dtype),
    wide=st.booleans(),
    form=st.sampled_from(NormForm),
    added=st.booleans(),
    gap=GAPS,
    threads=st.integers(1, 3),
)
def test_a_norm_is_right(
    seed: int,
    rows: int,
    width: int,
    dtype: Dtype,
    wide: bool,
    form: NormForm,
    added: bool,
    gap: int,
    threads: int,
) -> None:
    x, held = random(seed, rows, width, dtype, gap), random(seed + 1, rows, width, dtype)
    weight = random(seed + 2, 1, width, Dtype.FP32 if wide else dtype)

    def run(source: Any) -> list[Matrix]:
        norm = source.rms_norm(weight.address, width, 1e-5, dtype, weight.dtype, form)
        out, residual = Matrix.blank(rows, width, dtype, 3, gap), copy_of(held)
        if added:
            norm.add_and_apply(
                x.address, x.stride, residual.address, residual.stride,
                out.address, out.stride, rows, threads,
            )  # fmt: skip
        else:
            norm.apply(x.address, x.stride, out.address, out.stride, rows, threads)
        return [out, residual]

    total = x.values + held.values if added else x.values
    if added and form is NormForm.GEMMA:
        total = reference.rounded(total.astype(np.float32), dtype).astype(np.float64)
    factor = weight.values + (1 if form is NormForm.GEMMA else 0)
    exact = total / np.sqrt((total**2).mean(-1, keepdims=True) + 1e-5) * factor
    for out, residual in at_every_level(run):
        assert near(residual, x.values + held.values if added else held.values, 1.01)
        assert near(out, exact, 2.01 if dtype is not Dtype.FP32 else 12 + width / 8)


@settings(deadline=None, max_examples=120)
@given(
    seed=st.integers(0, 2**32),
    rows=ROWS,
    width=st.integers(1, 100),
    dtype=st.sampled_from(Dtype),
    activation=st.sampled_from(Activation),
    gap=GAPS,
    threads=st.integers(1, 3),
)
def test_a_gate_is_right(
    seed: int,
    rows: int,
    width: int,
    dtype: Dtype,
    activation: Activation,
    gap: int,
    threads: int,
) -> None:
    x = random(seed, rows, 2 * width, dtype, gap)

    def run(source: Any) -> list[Matrix]:
        out = Matrix.blank(rows, width, dtype, 3, gap)
        source.gate(
            x.address, x.stride, out.address, out.stride, rows, width, dtype, activation, threads
        )
        return [out]

    first, second = x.values[:, :width], x.values[:, width:]
    inner = (
        first
        if activation is Activation.SILU
        else 2 * np.sqrt(2 / np.pi) * (first + 0.044715 * first**3)
    )
    exact = first / (1 + np.exp(-inner)) * second
    for (out,) in at_every_level(run):
        assert near(out, exact, 2.01 if dtype is not Dtype.FP32 else 24)


@settings(deadline=None, max_examples=120)
@given(
    seed=st.integers(0, 2**32),
    rows=ROWS,
    heads=st.tuples(st.integers(1, 5), st.integers(1, 3)),
    dims=st.sampled_from([(2, 2), (8, 4), (64, 64), (64, 32), (80, 66), (128, 128), (9, 6)]),
    dtype=st.sampled_from(Dtype),
    cache_dtype=st.sampled_from(Dtype),
    style=st.sampled_from(RotaryStyle),
    written=st.booleans(),
    gap=GAPS,
    threads=st.integers(1, 3),
)
def test_a_rotary_embedding_and_its_write_are_right(
    seed: int,
    rows: int,
    heads: tuple[int, int],
    dims: tuple[int, int],
    dtype: Dtype,
    cache_dtype: Dtype,
    style: RotaryStyle,
    written: bool,
    gap: int,
    threads: int,
) -> None:
    (q_heads, k_heads), (head_dim, rotary_dim) = heads, dims
    q_width, k_width, v_width = q_heads * head_dim, k_heads * head_dim, k_heads * 5
    chosen = np.random.default_rng(seed)
    angles = Matrix.of(chosen.uniform(-1, 1, (50, rotary_dim)), cache_dtype)
    positions = chosen.integers(0, 50, rows)
    slots = chosen.permutation(40)[:rows]
    qkv = random(seed, rows, q_width + k_width + v_width, dtype, gap)

    def run(source: Any) -> list[Matrix]:
        made = source.rotary(
            angles.address, 50, rotary_dim, head_dim, q_heads, k_heads, dtype, cache_dtype, style
        )
        own = copy_of(qkv)
        pools = [Matrix.blank(40, width, dtype, 1, gap) for width in (k_width, v_width)]
        size = own.buffer.itemsize
        k, v = own.address + q_width * size, own.address + (q_width + k_width) * size
        where = (positions.ctypes.data, rows, own.address, own.stride, k, own.stride)
        if written:
            kv = source.kv_slots(
                pools[0].address, pools[0].stride, k_width,
                pools[1].address, pools[1].stride, v_width, 40, dtype,
            )  # fmt: skip
            made.apply_and_write(*where, kv, slots.ctypes.data, v, own.stride, threads)
        else:
            made.apply(*where, threads)
        return [own, *pools]

    for own, *pools in at_every_level(run):
        check_turned(own, qkv, angles.values[positions], head_dim, q_heads + k_heads, style)
        parts = (slice(q_width, q_width + k_width), slice(q_width + k_width, None))
        for one, part in zip(pools, parts, strict=True):
            wanted = np.full((40, one.width), np.nan)
            if written:
                wanted[slots] = own.values[:, part]
            assert np.array_equal(one.values, wanted, equal_nan=True)


def check_turned(
    got: Matrix,
    before: Matrix,
    angles: NDArray[np.float64],
    head_dim: int,
    heads: int,
    style: RotaryStyle,
) -> None:
    """Pair by pair, as complex numbers; each rounding is of numbers below 2 of the pair's size."""
    half = angles.shape[1] // 2
    turns = angles[:, :half] + 1j * angles[:, half:]
    wanted = before.values.copy()
    slack = np.full(wanted.shape, 0.0)
    for head in range(heads):
        for i in range(half):
            neox = style is RotaryStyle.NEOX
            one = head * head_dim + (i if neox else 2 * i)
            two = head * head_dim + (i + half if neox else 2 * i + 1)
            pair = before.values[:, one] + 1j * before.values[:, two]
            turned = pair * turns[:, i]
            wanted[:, one], wanted[:, two] = turned.real, turned.imag
            slack[:, one] = slack[:, two] = 5 * ROUNDING[got.dtype] * np.abs(pair)
    assert (np.abs(got.values - wanted) <= slack + 2.0**-24).all()


def in_torch(one: Matrix) -> Any:
    torch = pytest.importorskip("torch")
    kinds = {Dtype.BF16: torch.bfloat16, Dtype.FP16: torch.float16, Dtype.FP32: torch.float32}
    return torch.from_numpy(one.bits).view(kinds[one.dtype])


def same_bits(got: Matrix, wanted: Any) -> bool:
    torch = pytest.importorskip("torch")
    return bool(torch.equal(in_torch(got), wanted))


needs_native = pytest.mark.skipif(not ops.NATIVE, reason=f"no native ops: {ops.WHY_NOT_NATIVE}")
needs_x86 = pytest.mark.skipif(
    platform.machine() != "x86_64", reason="torch sums in registers of another width here"
)


@needs_native
@needs_x86
@pytest.mark.parametrize("dtype", Dtype)
@pytest.mark.parametrize("form", NormForm)
def test_a_norm_has_the_bits_of_torch(dtype: Dtype, form: NormForm) -> None:
    """The steps of SGLang's forward in torch, with and without a residual."""
    torch = pytest.importorskip("torch")
    for width in (1, 7, 8, 33, 100, 576, 577, 1536, 4096, 8200):
        x, held = random(width, 5, width, dtype), random(width + 1, 5, width, dtype)
        weight = random(width + 2, 1, width, dtype)
        norm = ops.rms_norm(weight.address, width, 1e-6, dtype, dtype, form)
        for added in (False, True):
            values, residual = in_torch(x), in_torch(held)
            if added and form is NormForm.GEMMA:
                values = values + residual
            values = values.float()
            if added and form is not NormForm.GEMMA:
                values = values + residual.float()
            stored = values.to(in_torch(x).dtype)
            normed = values * torch.rsqrt(values.pow(2).mean(-1, keepdim=True) + 1e-6)
            if form is NormForm.CAST_FIRST:
                wanted = in_torch(weight) * normed.to(stored.dtype)
            elif form is NormForm.GEMMA:
                wanted = (normed * (1.0 + in_torch(weight).float())).to(stored.dtype)
            else:
                wanted = (normed * in_torch(weight)).to(stored.dtype)
            out, after = Matrix.blank(5, width, dtype), copy_of(held)
            if added:
                norm.add_and_apply(
                    x.address, x.stride, after.address, after.stride, out.address, width, 5, 1
                )
                assert same_bits(after, stored)
            else:
                norm.apply(x.address, x.stride, out.address, width, 5, 1)
            assert same_bits(out, wanted), width


@needs_native
@pytest.mark.parametrize("dtype", [Dtype.BF16, Dtype.FP16])
def test_silu_has_the_bits_of_torch_for_every_number(dtype: Dtype) -> None:
    torch = pytest.importorskip("torch")
    kind = reference.from_float(np.zeros(1, np.float32), dtype).dtype
    every = np.arange(2**16, dtype=np.uint16).view(kind)
    finite = every[np.isfinite(reference.to_float(every, dtype))]
    ones = np.ones(len(finite), np.float32)
    x = Matrix.of(np.concatenate([reference.to_float(finite, dtype), ones])[None], dtype)
    for level in LEVELS:
        ops.limit_isa(level)
        out = Matrix.blank(1, len(finite), dtype)
        ops.gate(
            x.address, x.stride, out.address, out.stride, 1, len(finite), dtype, Activation.SILU, 1
        )
        given = in_torch(x)[:, : len(finite)]
        assert same_bits(out, torch.nn.functional.silu(given))


def turned_in_torch(heads: Any, angles: Any, style: RotaryStyle) -> Any:
    torch = pytest.importorskip("torch")
    cosines, sines = angles[:, None].to(heads.dtype).chunk(2, -1)
    if style is RotaryStyle.NEOX:
        a, b = heads.chunk(2, -1)
        return torch.cat([a * cosines - b * sines, b * cosines + a * sines], -1)
    a, b = heads[..., ::2], heads[..., 1::2]
    return torch.stack([a * cosines - b * sines, b * cosines + a * sines], -1).flatten(-2)


@needs_native
@pytest.mark.parametrize("dtype", Dtype)
@pytest.mark.parametrize("style", RotaryStyle)
def test_a_rotary_embedding_has_the_bits_of_torch(dtype: Dtype, style: RotaryStyle) -> None:
    torch = pytest.importorskip("torch")
    angles, positions = random(1, 90, 64, dtype), np.arange(5, 75, 10)
    q, k = random(2, 7, 9 * 64, dtype), random(3, 7, 3 * 64, dtype)
    wanted = [
        turned_in_torch(
            in_torch(one).view(7, -1, 64), in_torch(angles)[torch.from_numpy(positions)], style
        )
        for one in (q, k)
    ]
    made = ops.rotary(angles.address, 90, 64, 64, 9, 3, dtype, dtype, style)
    made.apply(positions.ctypes.data, 7, q.address, q.stride, k.address, k.stride, 1)
    assert same_bits(q, wanted[0].reshape(7, -1)) and same_bits(k, wanted[1].reshape(7, -1))


def test_no_rows_are_fine() -> None:
    weight = random(1, 1, 8, Dtype.BF16)
    ops.rms_norm(weight.address, 8, 0.0, Dtype.BF16, Dtype.BF16, NormForm.PLAIN).apply(
        0, 8, 0, 8, 0, 1
    )
    ops.gate(0, 16, 0, 8, 0, 8, Dtype.BF16, Activation.SILU, 1)
    ops.rotary(weight.address, 1, 8, 8, 1, 1, Dtype.BF16, Dtype.BF16, RotaryStyle.NEOX).apply(
        0, 0, 0, 8, 0, 8, 1
    )


def test_many_rows_on_several_threads() -> None:
    x, weight = random(5, 300, 576, Dtype.BF16), random(6, 1, 576, Dtype.BF16)
    outs = []
    for threads in (1, 2, 7):
        out, gated = Matrix.blank(300, 576, Dtype.BF16), Matrix.blank(300, 288, Dtype.BF16)
        norm = ops.rms_norm(weight.address, 576, 1e-5, Dtype.BF16, Dtype.BF16, NormForm.PLAIN)
        norm.apply(x.address, x.stride, out.address, 576, 300, threads)
        ops.gate(
            x.address, x.stride, gated.address, 288, 300, 288, Dtype.BF16, Activation.SILU, threads
        )
        outs.append((out.bits, gated.bits))
    for one, two in outs[1:]:
        assert np.array_equal(one, outs[0][0]) and np.array_equal(two, outs[0][1])
