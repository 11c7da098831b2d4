"""All layers of a decode step, one native call a layer, against the same steps in torch and against
one pass over the weights. Writes one JSON object.

    python -m benchmark.micro.engine_layers [--rounds 12] [--threads 1 2] [--json FILE]

SmolLM2's 30 layers with random weights (212 MB, from memory at every step), without embedding, last
norm, head and sampling. ``torch`` is what SGLang's forward does in torch, without its Python: the
norms in fp32, ``linear``, and ``scaled_dot_product_attention`` over gathered K and V. The floor is
one pass of ``memchr`` over as many bytes as the weights have, on one thread. Ratios are of
interleaved samples.
"""

from __future__ import annotations

import argparse
import ctypes
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from sgl_kernel_ext import ops
from sgl_kernel_ext.attention import Geometry, Integers, Pool, SlotTable

from benchmark.harness import report, spread

LAYERS, WIDTH, INNER, Q_HEADS, KV_HEADS, DIM = 30, 576, 1536, 9, 3, 64
Q, KV, EPS, POSITIONS = Q_HEADS * DIM, KV_HEADS * DIM, 1e-5, 8192
SHAPES = {
    "qkv": (Q + 2 * KV, WIDTH),
    "o": (WIDTH, Q),
    "gate_up": (2 * INNER, WIDTH),
    "down": (WIDTH, INNER),
}
CASES = ((1, 64), (1, 1550), (8, 300))

_libc = ctypes.CDLL(None)
_libc.memchr.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]


@dataclass(frozen=True)
class Layer:
    weights: dict[str, torch.Tensor]
    norms: torch.Tensor
    pools: torch.Tensor

    @classmethod
    def random(cls, slots: int) -> Layer:
        return cls(
            {name: torch.randn(n, k).bfloat16() / k**0.5 for name, (n, k) in SHAPES.items()},
            torch.ones(2, WIDTH, dtype=torch.bfloat16),
            torch.randn(2, slots, KV_HEADS, DIM).bfloat16(),
        )

    def native(self, rotary: ops.Rotary) -> ops.DecoderLayer:
        bf16 = ops.Dtype.BF16
        linears = {
            name: ops.thin_linear(one.data_ptr(), *SHAPES[name], SHAPES[name][1], 0, bf16)
            for name, one in self.weights.items()
        }
        first, second = (
            ops.rms_norm(one.data_ptr(), WIDTH, EPS, bf16, bf16, ops.NormForm.PLAIN)
            for one in self.norms.unbind()
        )
        keys, values = (Pool(one.data_ptr(), KV, DIM) for one in self.pools.unbind())
        shape = Geometry(self.pools.shape[1], Q_HEADS, KV_HEADS, DIM, DIM, bf16, DIM**-0.5)
        attention = ops.paged_attention(keys, values, shape)
        return ops.decoder_layer(
            first, linears["qkv"], rotary, attention, linears["o"],
            second, linears["gate_up"], linears["down"], ops.Activation.SILU,
        )  # fmt: skip


class Step:
    """One token for each of ``rows`` requests of ``length`` tokens."""

    def __init__(self, rows: int, length: int, threads: int) -> None:
        self.rows, self.length, self.threads = rows, length, threads
        self.layers = [Layer.random(rows * length) for _ in range(LAYERS)]
        self.cache = torch.randn(POSITIONS, DIM).bfloat16()
        self.table = torch.arange(rows * length, dtype=torch.int32).view(rows, length)
        self.written = self.table[:, -1].long().contiguous()
        self.positions = torch.full((rows,), length - 1)
        self.start = torch.randn(rows, WIDTH).bfloat16()
        self.hidden, self.residual = self.start.clone(), self.start.clone()
        bf16 = ops.Dtype.BF16
        self.rotary = ops.rotary(
            self.cache.data_ptr(), POSITIONS, DIM, DIM, Q_HEADS, KV_HEADS, bf16, bf16,
            ops.RotaryStyle.NEOX,
        )  # fmt: skip
        self.native = [one.native(self.rotary) for one in self.layers]
        self.bytes = sum(n * k * 2 for n, k in SHAPES.values()) * LAYERS
        self.zeros = torch.zeros(self.bytes, dtype=torch.uint8)

    def in_ours(self) -> None:
        rows, length = self.rows, self.length
        plan = ops.attention_plan(
            SlotTable(self.table.data_ptr(), 4, rows, length, length),
            list(range(rows)),
            [length] * rows,
            [1] * rows,
            Integers(self.written.data_ptr(), 8, rows),
        )
        self.hidden.copy_(self.start)
        where = (self.hidden.data_ptr(), WIDTH, self.residual.data_ptr(), WIDTH)
        rest = (self.positions.data_ptr(), rows, self.threads)
        self.native[0].apply_first(plan, *where, *rest)
        for layer in self.native[1:]:
            layer.apply(plan, *where, *rest)

    def in_torch(self) -> None:
        hidden, residual = self.start, torch.zeros_like(self.start)
        for layer in self.layers:
            hidden, residual = _norm(hidden, residual, layer.norms[0])
            qkv = torch.nn.functional.linear(hidden, layer.weights["qkv"])
            attended = self._attend(qkv, layer.pools)
            hidden = torch.nn.functional.linear(attended, layer.weights["o"])
            hidden, residual = _norm(hidden, residual, layer.norms[1])
            both = torch.nn.functional.linear(hidden, layer.weights["gate_up"])
            gated = torch.nn.functional.silu(both[:, :INNER]) * both[:, INNER:]
            hidden = torch.nn.functional.linear(gated, layer.weights["down"])

    def _attend(self, qkv: torch.Tensor, pools: torch.Tensor) -> torch.Tensor:
        cosines, sines = self.cache.index_select(0, self.positions).unsqueeze(1).chunk(2, -1)
        a, b = qkv[:, : Q + KV].view(self.rows, -1, DIM).chunk(2, -1)
        turned = torch.cat([a * cosines - b * sines, b * cosines + a * sines], -1)
        pools[0][self.written] = turned[:, Q_HEADS:]
        pools[1][self.written] = qkv[:, Q + KV :].view(self.rows, KV_HEADS, DIM)
        shape = (self.rows, self.length, KV_HEADS, DIM)
        keys, values = (
            one.index_select(0, self.table.view(-1)).view(shape).transpose(1, 2)
            for one in pools.unbind()
        )
        query = turned[:, :Q_HEADS].reshape(self.rows, KV_HEADS, -1, DIM)
        out = torch.nn.functional.scaled_dot_product_attention(query, keys, values)
        return out.reshape(self.rows, Q)

    def floor(self) -> None:
        _libc.memchr(self.zeros.data_ptr(), 1, self.bytes)


def _norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    total = x.float() + residual.float()
    scale = torch.rsqrt(total.pow(2).mean(-1, keepdim=True) + EPS)
    return (total * scale * weight).to(x.dtype), total.to(x.dtype)


def measured(step: Step, rounds: int) -> dict[str, Any]:
    ways: list[Callable[[], None]] = [step.in_ours, step.in_torch, step.floor]
    taken: list[list[float]] = [[] for _ in ways]
    for round_ in range(rounds + 1):
        for way, seconds in zip(ways, taken, strict=True):
            start = time.perf_counter()
            way()
            if round_:  # the first one touches the memory
                seconds.append(time.perf_counter() - start)
    ours, others, floor = taken
    return {
        "ms": spread([1e3 * one for one in ours], 2),
        "torch_ms": spread([1e3 * one for one in others], 2),
        "floor_ms": round(1e3 * min(floor), 2),
        "over_torch": spread([b / a for a, b in zip(ours, others, strict=True)], 2),
        "of_floor_at_the_shortest": round(min(floor) / min(ours), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=12)
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
        for rows, length in CASES:
            name = f"{rows} rows of {length} tokens, {threads} threads"
            results[name] = measured(Step(rows, length, threads), options.rounds)
    report("engine_layers", results, started, options.json)


if __name__ == "__main__":
    main()
