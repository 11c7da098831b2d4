"""The engine's native ops against their reference."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("sgl_kernel_ext")

from contract.matrices import BEST, LEVELS, ROUNDING, Matrix
from sgl_kernel_ext import ops
from sgl_kernel_ext import reference_engine as reference
from sgl_kernel_ext.tables import Dtype, Isa

if ops.NATIVE:
    from sgl_kernel_ext import _native

needs_native = pytest.mark.skipif(not ops.NATIVE, reason=f"no native ops: {ops.WHY_NOT_NATIVE}")


@pytest.fixture(autouse=True)
def all_levels_allowed() -> Iterator[None]:
    yield
    ops.limit_isa(Isa.AVX512_BF16)


@needs_native
@pytest.mark.parametrize("threads", [1, 2, 3, 8, 256])
def test_a_team_does_every_task_once(threads: int) -> None:
    for tasks in (0, 1, 2, 3, 7, 64, 1000):
        assert _native.count_tasks(threads, tasks, -1) == [1] * tasks


@needs_native
def test_a_team_survives_what_its_tasks_throw() -> None:
    for threads in (1, 2, 4):
        for failing in (0, 5, 99):
            with pytest.raises(RuntimeError, match=f"task {failing} failed as asked"):
                _native.count_tasks(threads, 100, failing)
        assert _native.count_tasks(threads, 100, -1) == [1] * 100


@needs_native
@pytest.mark.parametrize("threads", [0, 257])
def test_a_team_is_bounded(threads: int) -> None:
    with pytest.raises(ValueError, match="threads"):
        _native.count_tasks(threads, 1, -1)


@needs_native
def test_threads_that_share_a_team_each_get_their_tasks_done() -> None:
    def work() -> None:
        for turn in range(300):
            assert _native.count_tasks(3, turn % 40, -1) == [1] * (turn % 40)
            with pytest.raises(RuntimeError):
                _native.count_tasks(3, 20, turn % 20)

    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(work) for _ in range(4)]:
            done.result(60)


def probe(code: str) -> str:
    """What the code prints in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@needs_native
def test_a_forked_child_has_a_team_of_its_own() -> None:
    code = (
        "import os\n"
        "from sgl_kernel_ext import _native\n"
        "assert _native.team_helpers() == 0\n"
        "assert _native.count_tasks(3, 50, -1) == [1] * 50 and _native.team_helpers() == 2\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    before = _native.team_helpers()\n"
        "    fine = all(_native.count_tasks(2, 50, -1) == [1] * 50 for _ in range(100))\n"
        "    os._exit(0 if fine and before == 0 and _native.team_helpers() == 1 else 1)\n"
        "assert os.waitpid(child, 0)[1] == 0\n"
        "assert _native.count_tasks(3, 50, -1) == [1] * 50\n"
        "print('ended')\n"
    )
    assert probe(code) == "ended\n"


@needs_native
def test_an_idle_team_sleeps() -> None:
    code = (
        "import time\n"
        "from sgl_kernel_ext import _native\n"
        "_native.count_tasks(4, 50, -1)\n"
        "time.sleep(0.2)\n"
        "before = time.process_time()\n"
        "time.sleep(1)\n"
        "print(time.process_time() - before)\n"
    )
    assert float(probe(code)) < 0.2


@dataclass(frozen=True)
class Layer:
    weight: Matrix
    bias: Matrix | None
    x: Matrix

    @classmethod
    def random(
        cls, seed: int, rows: int, n: int, k: int, dtype: Dtype, bias: bool, gap: int = 0
    ) -> Layer:
        source = np.random.default_rng(seed)
        weight = Matrix.of(source.standard_normal((n, k)), dtype, seed % 7, gap)
        x = Matrix.of(source.standard_normal((rows, k)), dtype, seed % 5, 2 * gap)
        offsets = Matrix.of(source.standard_normal((1, n)), dtype, seed % 3) if bias else None
        return cls(weight, offsets, x)

    def run(self, make: Callable[..., ops.ThinLinear], threads: int, gap: int = 0) -> Matrix:
        weight, bias = self.weight, self.bias.address if self.bias else 0
        layer = make(weight.address, weight.rows, weight.width, weight.stride, bias, weight.dtype)
        out = Matrix.blank(self.x.rows, weight.rows, weight.dtype, 3, gap)
        layer.apply(self.x.address, self.x.rows, self.x.stride, out.address, out.stride, threads)
        assert out.others_untouched()
        return out

    def check(self, out: Matrix) -> None:
        """Within one rounding of the exact sum, and k roundings of fp32 on the way."""
        x, weight = self.x.values, self.weight.values
        exact = x @ weight.T + (self.bias.values if self.bias else 0)
        size = np.abs(x) @ np.abs(weight).T + (np.abs(self.bias.values) if self.bias else 0)
        bound = ROUNDING[out.dtype] * np.abs(exact) + 2.0**-23 * self.x.width * size + 2.0**-24
        assert (np.abs(out.values - exact) <= bound).all()


@settings(deadline=None, max_examples=150)
@given(
    seed=st.integers(0, 2**32),
    rows=st.integers(1, 16) | st.integers(17, 128),
    n=st.integers(1, 70),
    k=st.integers(1, 100) | st.sampled_from([512, 513, 600, 1023, 1024, 1056, 2100]),
    dtype=st.sampled_from(Dtype),
    bias=st.booleans(),
    gap=st.sampled_from([0, 0, 1, 5, 64]),
    threads=st.integers(1, 3),
)
def test_a_thin_linear_layer_is_right(
    seed: int, rows: int, n: int, k: int, dtype: Dtype, bias: bool, gap: int, threads: int
) -> None:
    layer = Layer.random(seed, rows, n, k, dtype, bias, gap)
    layer.check(layer.run(reference.ThinLinear, threads, gap))
    for level in LEVELS:
        ops.limit_isa(level)
        layer.check(layer.run(ops.thin_linear, threads, gap))


@pytest.mark.parametrize("dtype", Dtype)
@pytest.mark.parametrize(("n", "k"), [(100, 96), (24, 1000), (48, 2048), (7, 65)])
def test_a_row_does_not_depend_on_the_others(n: int, k: int, dtype: Dtype) -> None:
    most = 100
    whole = Layer.random(n, most, n, k, dtype, True)
    for level in LEVELS:
        ops.limit_isa(level)
        wanted = whole.run(ops.thin_linear, 1).bits
        for rows in (*range(1, 18), 32, 33, 48, 63, 64, 80):
            part = Matrix.of(whole.x.values[most - rows :], dtype, 1, 3)
            some = Layer(whole.weight, whole.bias, part).run(ops.thin_linear, 1 + rows % 3)
            assert np.array_equal(some.bits, wanted[most - rows :]), (level, rows)


def test_a_large_layer_on_several_threads() -> None:
    layer = Layer.random(1, 3, 3000, 576, Dtype.BF16, False)
    wanted = layer.run(ops.thin_linear, 1).bits
    layer.check(layer.run(ops.thin_linear, 1))
    for threads in (2, 3, 9):
        assert np.array_equal(layer.run(ops.thin_linear, threads).bits, wanted)


def why_not_onednn() -> str:
    if BEST < Isa.AVX512_BF16:
        return "no AVX512-BF16 here: other sums than oneDNN's"
    if ops.cpu_features()["amx_bf16"]:
        return "oneDNN takes AMX here, which sums in another order"
    return ""


@pytest.mark.skipif(bool(why_not_onednn()), reason=why_not_onednn())
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("n", "k"),
    [
        (960, 576),
        (576, 576),
        (576, 1536),
        (256, 2048),
        (100, 4096),
        (37, 14336),
        (17, 96),
        (5, 1025),
        (30, 1000),
        (48, 577),
        (200, 1023),
        (3, 33),
    ],
)
def test_a_thin_linear_layer_has_the_bits_of_torch(n: int, k: int, bias: bool) -> None:
    """What a cache hit leaves to compute is a few rows of what is otherwise one large product."""
    torch = pytest.importorskip("torch")
    layer = Layer.random(n, 128, n, k, Dtype.BF16, bias)
    given_bias = None
    if layer.bias:
        given_bias = torch.from_numpy(layer.bias.bits).view(torch.bfloat16)[0]
    x, weight = (torch.from_numpy(one.bits).view(torch.bfloat16) for one in (layer.x, layer.weight))
    got = layer.run(ops.thin_linear, 1).bits
    repeated = x.repeat(3, 1)
    for rows in (2, 3, 8, 16, 17, 80, 128, 300):
        out = torch.nn.functional.linear(repeated[:rows], weight, given_bias)
        wanted = out.view(torch.int16).numpy()
        assert np.array_equal(wanted, np.tile(got, (3, 1))[:rows]), rows


def linear_of(**changes: int) -> Callable[[Callable[..., ops.ThinLinear]], None]:
    def run(make: Callable[..., ops.ThinLinear]) -> None:
        layer = Layer.random(1, 2, 20, 40, Dtype.BF16, True)
        out = Matrix.blank(2, 20, Dtype.BF16)
        assert layer.bias
        given = {
            "weight": layer.weight.address,
            "n": 20,
            "k": 40,
            "stride": 40,
            "bias": layer.bias.address,
            "dtype": 0,
            "x": layer.x.address,
            "rows": 2,
            "x_stride": layer.x.stride,
            "out": out.address,
            "out_stride": 20,
            "threads": 1,
            **changes,
        }
        numbers = list(given.values())
        try:
            make(*numbers[:6]).apply(*numbers[6:])
        finally:
            assert np.isnan(out.values).all()

    return run


@pytest.mark.parametrize("make", [reference.ThinLinear, ops.thin_linear], ids=["reference", "ops"])
@pytest.mark.parametrize(
    "wrong",
    [
        {"weight": 0},
        {"weight": 4097},
        {"n": 0},
        {"n": -1},
        {"n": 2**41},
        {"k": 0},
        {"k": 2**24 + 1},
        {"stride": 39},
        {"stride": -40},
        {"stride": 2**60},
        {"bias": 4097},
        {"dtype": 3},
        {"dtype": -1},
        {"x": 0},
        {"x": 4097},
        {"rows": 0},
        {"rows": 129},
        {"rows": -1},
        {"x_stride": 39},
        {"x_stride": 2**62},
        {"out": 0},
        {"out": 4097},
        {"out_stride": 19},
        {"out_stride": -20},
        {"threads": 0},
        {"threads": 257},
    ],
    ids=str,
)
def test_a_linear_layer_that_cannot_be_is_refused(
    wrong: dict[str, int], make: Callable[..., ops.ThinLinear]
) -> None:
    with pytest.raises(ValueError):
        linear_of(**wrong)(make)
