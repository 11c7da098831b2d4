"""SGLang's fused operations and linear layers with our native ones in their place."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("sglang")

from sgl_kernel_ext.ops import isa, limit_isa  # noqa: E402
from sgl_kernel_ext.tables import Isa  # noqa: E402
from sglang.srt.layers.activation import GeluAndMul, SiluAndMul  # noqa: E402
from sglang.srt.layers.layernorm import GemmaRMSNorm, RMSNorm  # noqa: E402
from sglang.srt.layers.quantization.unquant import (  # noqa: E402
    UnquantizedEmbeddingMethod,
    UnquantizedLinearMethod,
)
from sglang.srt.layers.rotary_embedding.base import RotaryEmbedding  # noqa: E402
from sglang_memserve.kernels import native  # noqa: E402
from sglang_memserve.plugin.cpu_engine import fused_ops, linears, straight  # noqa: E402

pytestmark = pytest.mark.skipif(native() is None, reason="no native code")

WIDTH = 96
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def numbers(*shape: int, dtype: Any = torch.bfloat16, seed: int = 0) -> Any:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def weighted(module: Any, dtype: Any) -> Any:
    module.weight.data = numbers(WIDTH, dtype=dtype, seed=7)
    return module


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize(
    ("kind", "ours", "settings"),
    [
        (RMSNorm, fused_ops.rms_norm, {}),
        (RMSNorm, fused_ops.rms_norm, {"cast_x_before_out_mul": True}),
        (GemmaRMSNorm, fused_ops.gemma_rms_norm, {}),
    ],
)
def test_norms_give_the_bits_of_the_native_forward(
    kind: Any, ours: Any, settings: dict[str, bool], with_residual: bool, dtype: Any
) -> None:
    norm = weighted(kind(WIDTH, **settings), dtype)
    x = numbers(5, WIDTH, dtype=dtype)
    residual = numbers(5, WIDTH, dtype=dtype, seed=1) if with_residual else None
    wanted = norm.forward_native(x.clone(), None if residual is None else residual.clone())
    found = ours(norm, x, residual)
    if residual is None:
        assert torch.equal(found, wanted)
    else:
        assert torch.equal(found[0], wanted[0]) and torch.equal(found[1], wanted[1])


def test_a_norm_follows_its_weight() -> None:
    norm = weighted(RMSNorm(WIDTH), torch.bfloat16)
    x = numbers(3, WIDTH)
    before = fused_ops.rms_norm(norm, x)
    norm.weight.data.mul_(2)
    assert torch.equal(fused_ops.rms_norm(norm, x), 2 * before)
    norm.weight.data = norm.weight.data.clone() * 2
    assert torch.equal(fused_ops.rms_norm(norm, x), 4 * before)


@pytest.mark.parametrize(
    ("settings", "call"),
    [
        ({"var_hidden_size": WIDTH // 2}, {}),
        ({"fp32_residual": True}, {"residual": 1}),
        ({}, {"post_residual_addition": 2, "residual": 1}),
    ],
)
def test_other_norms_keep_their_own_forward(settings: Any, call: dict[str, int]) -> None:
    norm = weighted(RMSNorm(WIDTH, **settings), torch.bfloat16)
    x = numbers(3, WIDTH)
    extra = {name: numbers(3, WIDTH, seed=seed) for name, seed in call.items()}
    wanted = norm.forward_native(x, **{name: tensor.clone() for name, tensor in extra.items()})
    found = fused_ops.rms_norm(norm, x, **extra)
    for a, b in zip(found, wanted, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 64), (7, 192), (2, 3, 64)])
def test_silu_and_mul_gives_the_bits_of_the_native_forward(shape: Any, dtype: Any) -> None:
    x = numbers(*shape, dtype=dtype)
    op = SiluAndMul()
    assert torch.equal(fused_ops.silu_and_mul(op, x), op.forward_native(x))


@pytest.mark.parametrize("approximate", ["tanh", "none"])
def test_gelu_and_mul_is_that_of_the_native_forward(approximate: str) -> None:
    x = numbers(7, 192)
    op = GeluAndMul(approximate)
    found, wanted = fused_ops.gelu_and_mul(op, x), op.forward_native(x)
    torch.testing.assert_close(found, wanted, rtol=2**-7, atol=2**-8)


@pytest.mark.parametrize("neox", [True, False])
@pytest.mark.parametrize("rotary_dim", [32, 16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_turned_heads_are_those_of_the_native_forward(
    neox: bool, rotary_dim: int, dtype: Any
) -> None:
    rotary = RotaryEmbedding(32, rotary_dim, 128, 10000, neox, dtype)
    both = numbers(9, 4 * 32 + 2 * 32, dtype=dtype)
    positions = torch.tensor([0, 1, 2, 127, 5, 5, 64, 3, 100])
    query, key = both[:, : 4 * 32], both[:, 4 * 32 :]
    wanted = rotary.forward_native(positions, query.clone(), key.clone())
    found = fused_ops.turn(rotary, positions, query, key)
    assert torch.equal(found[0], wanted[0]) and torch.equal(found[1], wanted[1])


def test_a_position_beyond_the_cache_is_refused() -> None:
    rotary = RotaryEmbedding(32, 32, 128, 10000, True, torch.bfloat16)
    with pytest.raises(IndexError):
        fused_ops.turn(rotary, torch.tensor([128]), numbers(1, 64), numbers(1, 32))


def plain_layer(method: Any) -> Any:
    layer = torch.nn.Module()
    layer.quant_method = method
    layer.weight = torch.nn.Parameter(numbers(48, WIDTH), requires_grad=False)
    return layer


@pytest.mark.parametrize("rows", [1, 2, 16, 17, 64])
def test_products_are_those_of_torch(rows: int) -> None:
    ops = native()
    assert ops is not None
    model = torch.nn.ModuleList([plain_layer(UnquantizedLinearMethod())])
    assert linears.install(model, ops) == 1
    layer, x, bias = model[0], numbers(rows, WIDTH, seed=3), numbers(48, seed=4)
    for given in (None, bias):
        found = layer.quant_method.apply(layer, x, given)
        wanted = torch.nn.functional.linear(x, layer.weight, given)
        torch.testing.assert_close(found, wanted, rtol=2**-7, atol=2**-6)


def test_products_of_other_shapes_and_dtypes_are_left_to_torch() -> None:
    ops = native()
    assert ops is not None
    model = torch.nn.ModuleList([plain_layer(UnquantizedLinearMethod())])
    linears.install(model, ops)
    layer = model[0]
    method = layer.quant_method
    assert method.thin.apply(layer.weight, numbers(2, 3, WIDTH), None) is None
    assert method.thin.apply(layer.weight, numbers(2, WIDTH, dtype=torch.float32), None) is None
    assert method.thin.apply(layer.weight.t(), numbers(2, 48), None) is None
    assert method.apply(layer, numbers(2, 3, WIDTH)).shape == (2, 3, 48)


def test_products_with_other_sums_take_no_part_in_prompts() -> None:
    ops = native()
    assert ops is not None
    best = isa()
    limit_isa(Isa.PLAIN)
    try:
        model = torch.nn.ModuleList([plain_layer(UnquantizedLinearMethod())])
        linears.install(model, ops)
        layer = model[0]
        x = numbers(4, WIDTH, seed=3)
        found = layer.quant_method.apply(layer, x)
        assert not layer.quant_method.thin.same_bits
        assert layer.quant_method.thin.apply(layer.weight, x, None) is None
        assert torch.equal(found, torch.nn.functional.linear(x, layer.weight))
    finally:
        limit_isa(best)


def test_weights_that_moved_are_read_where_they_are() -> None:
    ops = native()
    assert ops is not None
    model = torch.nn.ModuleList([plain_layer(UnquantizedLinearMethod())])
    linears.install(model, ops)
    layer, x = model[0], numbers(2, WIDTH)
    before = layer.quant_method.apply(layer, x)
    layer.weight.data = layer.weight.data * 2
    assert torch.equal(layer.quant_method.apply(layer, x), 2 * before)


def test_a_head_that_is_computed_in_fp32_stays_so() -> None:
    ops = native()
    assert ops is not None
    model = torch.nn.ModuleList([plain_layer(UnquantizedEmbeddingMethod())])
    model.use_fp32_lm_head = True
    assert linears.install(model, ops) == 0
    model.use_fp32_lm_head = False
    assert linears.install(model, ops) == 1
    assert isinstance(model[0].quant_method, UnquantizedEmbeddingMethod)


def test_a_model_of_another_kind_keeps_its_forward() -> None:
    ops = native()
    assert ops is not None
    model = torch.nn.Module()
    model.model = torch.nn.Linear(2, 2)
    problem = straight.install(model, ops)
    assert problem is not None and "Linear is none of LlamaModel, Qwen2Model, Qwen3Model" in problem
