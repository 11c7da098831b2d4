"""The engine's ops against torch and against what the machine can do. Writes one JSON object.

    python -m benchmark.micro.engine_ops [--rounds 5] [--threads 1 2] [--json FILE]

Linear layers: the weights come from memory at every call (copies of them, 256 MiB together, take
turns), as in a decode step. The floor is the longer of one pass of ``memchr`` over as many bytes
and 2 r n k operations for r rows at the rate of a loop of ``vdpbf16ps``, on one thread. Between the
products: everything is in the caches, as after the product before; the floor is one ``memmove`` of
half of the bytes that are read and written, as it does both.

Times are the shortest of a round's samples (others use the machine too); ``over_torch`` is torch's
time over ours, and ``of_floor`` the floor's.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from sgl_kernel_ext import ops

from benchmark.harness import report
from benchmark.micro.peak import Peak

LAYERS = {
    "qkv 960x576": (960, 576),
    "o 576x576": (576, 576),
    "gate_up 3072x576": (3072, 576),
    "down 576x1536": (576, 1536),
    "lm_head 49152x576": (49152, 576),
    "8B qkv 6144x4096": (6144, 4096),
    "8B down 4096x14336": (4096, 14336),
}
ROWS = (1, 2, 4, 8, 16, 24, 32, 64, 128)
COLD_BYTES = 256 << 20
EPS = 1e-5
HEADS, KV_HEADS, DIM, HIDDEN, INNER = 9, 3, 64, 576, 1536
MOST_COPIES = 400

_libc = ctypes.CDLL(None)
_libc.memchr.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
_libc.memchr.restype = ctypes.c_void_p


@dataclass(frozen=True)
class Case:
    """Ways to do one thing, and what it moves and computes."""

    ours: Callable[[], object]
    torch: Callable[[], object]
    floor: Callable[[], object]
    bytes: int
    operations: int


def shortest(ways: list[Callable[[], object]], rounds: int, repeats: int) -> list[list[float]]:
    """Seconds: for each way, the shortest of ``repeats`` samples of each round, interleaved."""
    taken: list[list[float]] = [[] for _ in ways]
    for round_ in range(rounds + 1):
        best = [float("inf")] * len(ways)
        for _ in range(repeats):
            for index, way in enumerate(ways):
                start = time.perf_counter()
                way()
                best[index] = min(best[index], time.perf_counter() - start)
        if round_:  # the first one touches the memory
            for index, seconds in enumerate(best):
                taken[index].append(seconds)
    return taken


def measured(
    case: Case, rounds: int, repeats: int, peak_operations_per_s: float = float("inf")
) -> dict[str, Any]:
    ours, others, moved = shortest([case.ours, case.torch, case.floor], rounds, repeats)
    computed = case.operations / peak_operations_per_s
    floor = [max(one, computed) for one in moved]
    return {
        "us": round(1e6 * min(ours), 2),
        "bytes": case.bytes,
        "operations": case.operations,
        "floor_us": round(1e6 * min(floor), 2),
        "gb_per_s": round(case.bytes / min(ours) / 1e9, 1),
        "gflop_per_s": round(case.operations / min(ours) / 1e9, 1),
        "over_torch": round(statistics.median(b / a for a, b in zip(ours, others, strict=True)), 2),
        "of_floor": round(statistics.median(f / a for a, f in zip(ours, floor, strict=True)), 2),
    }


@functools.cache
def cold(copies: int, n: int, k: int) -> torch.Tensor:
    """Weights in which no byte is 1, so that ``memchr`` reads them all."""
    weights: torch.Tensor = torch.randn(copies, n, k, dtype=torch.bfloat16) / k**0.5
    plain = weights.view(torch.uint8)
    plain[plain == 1] = 2
    return weights


def linear(n: int, k: int, rows: int, threads: int) -> Case:
    size = n * k * 2
    copies = max(1, min(MOST_COPIES, COLD_BYTES // size))
    weights = cold(copies, n, k)
    layers = [
        ops.thin_linear(one.data_ptr(), n, k, k, 0, ops.Dtype.BF16) for one in weights.unbind()
    ]
    x, out = torch.randn(rows, k).bfloat16(), torch.empty(rows, n, dtype=torch.bfloat16)
    # A third of the copies apart: what one way has read is out of the caches for the next.
    ours, theirs, read = (
        itertools.cycle([(third * copies // 3 + i) % copies for i in range(copies)])
        for third in range(3)
    )

    def run() -> None:
        layers[next(ours)].apply(x.data_ptr(), rows, k, out.data_ptr(), n, threads)

    return Case(
        ours=run,
        torch=lambda: torch.nn.functional.linear(x, weights[next(theirs)]),
        floor=lambda: _libc.memchr(weights[next(read)].data_ptr(), 1, size),
        bytes=size,
        operations=2 * rows * n * k,
    )


def copying(total: int) -> Callable[[], object]:
    source, to = torch.zeros(total, dtype=torch.uint8), torch.zeros(total, dtype=torch.uint8)
    return lambda: ctypes.memmove(to.data_ptr(), source.data_ptr(), total // 2)


def norm(rows: int, threads: int) -> Case:
    x, weight = torch.randn(rows, HIDDEN).bfloat16(), torch.randn(HIDDEN).bfloat16()
    held, out = x.clone(), torch.empty_like(x)
    made = ops.rms_norm(
        weight.data_ptr(), HIDDEN, EPS, ops.Dtype.BF16, ops.Dtype.BF16, ops.NormForm.PLAIN
    )

    def in_torch() -> torch.Tensor:
        total = x.float() + held.float()
        kept = total.to(torch.bfloat16)
        scale = torch.rsqrt(total.pow(2).mean(-1, keepdim=True) + EPS)
        result: torch.Tensor = (total * scale * weight).to(torch.bfloat16)
        return result if kept is not None else kept

    moved = 4 * x.numel() * 2
    return Case(
        ours=lambda: made.add_and_apply(
            x.data_ptr(), HIDDEN, held.data_ptr(), HIDDEN, out.data_ptr(), HIDDEN, rows, threads
        ),
        torch=in_torch,
        floor=copying(moved),
        bytes=moved,
        operations=5 * x.numel(),
    )


def rope(rows: int, threads: int) -> Case:
    width = (HEADS + 2 * KV_HEADS) * DIM
    q_width, k_width = HEADS * DIM, KV_HEADS * DIM
    qkv = torch.randn(rows, width).bfloat16()
    cache = torch.randn(8192, DIM).bfloat16()
    positions, slots = torch.randint(0, 8192, (rows,)), torch.randperm(4096)[:rows]
    pools = torch.zeros(2, 4096, k_width, dtype=torch.bfloat16)
    bf16 = ops.Dtype.BF16
    made = ops.rotary(
        cache.data_ptr(), 8192, DIM, DIM, HEADS, KV_HEADS, bf16, bf16, ops.RotaryStyle.NEOX
    )
    kv = ops.kv_slots(
        pools[0].data_ptr(), k_width, k_width, pools[1].data_ptr(), k_width, k_width, 4096, bf16
    )

    def turned(heads: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
        a, b = heads.view(rows, -1, DIM).chunk(2, -1)
        return torch.cat([a * cosines - b * sines, b * cosines + a * sines], -1)

    def in_torch() -> None:
        cosines, sines = cache.index_select(0, positions).unsqueeze(1).chunk(2, -1)
        turned(qkv[:, :q_width], cosines, sines)
        k = turned(qkv[:, q_width : q_width + k_width], cosines, sines)
        pools[0][slots] = k.view(rows, k_width)
        pools[1][slots] = qkv[:, q_width + k_width :]

    k, v = qkv.data_ptr() + 2 * q_width, qkv.data_ptr() + 2 * (q_width + k_width)
    moved = 2 * rows * (2 * (q_width + k_width) + 3 * k_width + DIM)
    return Case(
        ours=lambda: made.apply_and_write(
            positions.data_ptr(), rows, qkv.data_ptr(), width, k, width,
            kv, slots.data_ptr(), v, width, threads,
        ),
        torch=in_torch,
        floor=copying(moved),
        bytes=moved,
        operations=3 * rows * (q_width + k_width),
    )  # fmt: skip


def silu(rows: int, threads: int) -> Case:
    x, out = torch.randn(rows, 2 * INNER).bfloat16(), torch.empty(rows, INNER).bfloat16()
    moved = 2 * (x.numel() + out.numel())
    return Case(
        ours=lambda: ops.gate(
            x.data_ptr(), 2 * INNER, out.data_ptr(), INNER, rows, INNER,
            ops.Dtype.BF16, ops.Activation.SILU, threads,
        ),
        torch=lambda: torch.nn.functional.silu(x[:, :INNER]) * x[:, INNER:],
        floor=copying(moved),
        bytes=moved,
        operations=20 * out.numel(),
    )  # fmt: skip


BETWEEN = {"residual + norm": norm, "rotary + K/V write": rope, "silu and multiply": silu}


def linears(options: argparse.Namespace, threads: int) -> Iterator[tuple[str, dict[str, Any]]]:
    peak = Peak()
    for name, (n, k) in LAYERS.items():
        for rows in ROWS:
            peak.measure()
            case = linear(n, k, rows, threads)
            repeats = 4 if n * k > 1 << 24 else 12
            rate = peak.operations_per_s
            yield f"{name}, {rows} rows", measured(case, options.rounds, repeats, rate)
        cold.cache_clear()


def between(options: argparse.Namespace, threads: int) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, make in BETWEEN.items():
        for rows in (1, 8, 512):
            case = make(rows, threads)
            yield f"{name}, {rows} rows", measured(case, options.rounds, 10)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if not ops.NATIVE:
        raise SystemExit(f"no native ops to measure: {ops.WHY_NOT_NATIVE}")
    started = time.monotonic()
    torch.manual_seed(1)
    results: dict[str, Any] = {"isa": ops.isa().name}
    for threads in options.threads:
        torch.set_num_threads(threads)
        results[f"linear, {threads} threads"] = dict(linears(options, threads))
        results[f"between, {threads} threads"] = dict(between(options, threads))
    report("engine_ops", results, started, options.json)


if __name__ == "__main__":
    main()
