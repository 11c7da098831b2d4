"""Paged attention on a CPU: native beside torch, and beside what the machine can do at most.

    python -m benchmark.micro.attention [--rounds 7] [--threads 1 2] [--json FILE]

Every case is one layer of a model in bf16, from the paged pool to the output, in one interleaved
run with torch's form of it (``plugin/cpu_kernels.py``). Layers take turns, so that keys and values
come from memory and not from a cache. The floor is the larger of what the operations (4 x dim for
each key that a head's row sees) and the bytes (each key and value of the pool once) cost at the
rates that loops of ``vdpbf16ps`` and of reads reach between the rounds, on one thread, times the
threads; the share is the floor over the fastest round. One thread is timed by its own processor
time, which leaves out what others took of it; several by the clock.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sgl_kernel_ext import ops, reference_attention
from sgl_kernel_ext.attention import Geometry, Integers, Pool, SlotTable
from sgl_kernel_ext.tables import Dtype
from sglang_memserve.plugin import cpu_kernels

from benchmark.harness import report, spread
from benchmark.micro.peak import Peak

PAGE = 16
COLD_BYTES = 96 << 20


@dataclass(frozen=True)
class Model:
    name: str
    q_heads: int
    kv_heads: int
    dim: int

    @property
    def token_bytes(self) -> int:
        return 2 * 2 * self.kv_heads * self.dim


SMOL = Model("SmolLM2-135M", 9, 3, 64)
LLAMA = Model("Llama-3-8B", 32, 8, 128)
# (new tokens, tokens) of each request
EXTENDS = {
    "1,550 new": (1550, 1550),
    "4,000 new": (4000, 4000),
    "16 new after 1,536": (16, 1552),
    "16 new after 3,984": (16, 4000),
}
DECODES = [(streams, length) for length in (100, 1550, 4000) for streams in (1, 8)]


class Rig:
    """Layers of one model with requests of one length in random pages."""

    def __init__(self, model: Model, streams: int, new: int, length: int) -> None:
        self.model, self.new, self.length, self.streams = model, new, length, streams
        generator = torch.Generator().manual_seed(1)
        pages = -(-length // PAGE) * streams
        slots = pages * PAGE
        layers = max(1, min(24, COLD_BYTES // (slots * model.token_bytes)))
        shape = (slots, model.kv_heads, model.dim)
        some = torch.randn(shape, generator=generator).bfloat16()
        self.keys = [some.clone() for _ in range(layers)]
        self.values = [some.flip(0).contiguous() for _ in range(layers)]
        order = torch.randperm(pages, generator=generator)
        all_slots = (order[:, None] * PAGE + torch.arange(PAGE)).view(streams, -1)
        self.table = all_slots[:, :length].int().contiguous()
        self.slots = [row.long() for row in self.table]
        rows = (streams * new, model.q_heads, model.dim)
        self.query = torch.randn(rows, generator=generator).bfloat16()
        self.out = torch.empty(rows, dtype=torch.bfloat16)
        self.scale = model.dim**-0.5
        self.attentions = [self._layer(*both) for both in zip(self.keys, self.values, strict=True)]
        table = SlotTable(self.table.data_ptr(), 4, streams, length, length)
        lengths, news = [length] * streams, [new] * streams
        self.plan = ops.attention_plan(table, list(range(streams)), lengths, news, Integers())
        self.group = cpu_kernels.group_for_decode(self.slots)
        self._turn = 0

    def _layer(self, keys: torch.Tensor, values: torch.Tensor) -> Any:
        model = self.model
        geometry = Geometry(
            slots=len(keys),
            q_heads=model.q_heads,
            kv_heads=model.kv_heads,
            qk_dim=model.dim,
            v_dim=model.dim,
            dtype=Dtype.BF16,
            scale=self.scale,
        )
        key = Pool(keys.data_ptr(), keys.stride(0), keys.stride(1))
        value = Pool(values.data_ptr(), values.stride(0), values.stride(1))
        return ops.paged_attention(key, value, geometry)

    def _next_layer(self) -> int:
        self._turn = (self._turn + 1) % len(self.keys)
        return self._turn

    def native(self) -> None:
        model = self.model
        row = model.q_heads * model.dim
        self.attentions[self._next_layer()].attend(
            self.plan,
            self.query.data_ptr(),
            row,
            0,
            0,
            0,
            0,
            self.out.data_ptr(),
            row,
            0,
            torch.get_num_threads(),
        )

    def torch(self) -> None:
        layer = self._next_layer()
        keys, values = self.keys[layer], self.values[layer]
        if self.new == 1:
            for group in self.group:
                rows = self.query[group.rows]
                self.out[group.rows] = cpu_kernels.attend_decode(
                    rows, keys, values, group, self.scale
                )
            return
        key = cpu_kernels.gather(keys, self.slots[0], torch.bfloat16)
        value = cpu_kernels.gather(values, self.slots[0], torch.bfloat16)
        self.out = cpu_kernels.attend_causal(
            self.query, key, value, self.scale, cpu_kernels.Masks()
        )

    @property
    def operations(self) -> int:
        """Of the attended area alone: 2 for each product and sum, in scores and in values."""
        seen = self.new * (self.length - self.new) + self.new * (self.new + 1) // 2
        return self.streams * seen * self.model.q_heads * 4 * self.model.dim

    @property
    def bytes(self) -> int:
        rows = 2 * self.query.numel() * self.query.element_size()
        return self.streams * self.length * self.model.token_bytes + rows

    def errors(self) -> dict[str, float]:
        """Relative to float64: the norm of what is wrong over that of what is right."""
        rows = self.query[-16:].contiguous()
        model, slots = self.model, self.slots[-1].numpy()
        layer = reference_attention.Attention(
            Pool(self.keys[0].data_ptr(), model.kv_heads * model.dim, model.dim),
            Pool(self.values[0].data_ptr(), model.kv_heads * model.dim, model.dim),
            Geometry(
                len(self.keys[0]),
                model.q_heads,
                model.kv_heads,
                model.dim,
                model.dim,
                Dtype.BF16,
                self.scale,
            ),
        )
        right, _ = layer.attended(
            rows.view(torch.uint16).numpy(),
            slots,
            self.keys[0].view(torch.uint16).numpy(),
            self.values[0].view(torch.uint16).numpy(),
        )
        found = {}
        for name, run in (("native", self.native), ("torch", self.torch)):
            run()
            wrong = self.out[-16:].double().numpy() - right
            found[name] = round(float(np.linalg.norm(wrong) / np.linalg.norm(right)), 5)
        return found


def interleaved(
    cases: dict[str, Callable[[], object]], rounds: int, clock_s: Callable[[], float]
) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for round_ in range(rounds + 1):
        for name, run in cases.items():
            start = clock_s()
            run()
            if round_:  # the first one touches the memory
                seconds[name].append(clock_s() - start)
    return seconds


def measured(rig: Rig, peak: Peak, threads: int, rounds: int) -> dict[str, Any]:
    torch.set_num_threads(threads)
    repeats = max(1, min(len(rig.keys), int(4e9 // max(rig.operations, rig.bytes * 40))))

    def repeated(run: Callable[[], None]) -> Callable[[], None]:
        def together() -> None:
            for _ in range(repeats):
                run()

        return together

    cases: dict[str, Callable[[], object]] = {
        "native": repeated(rig.native),
        "torch": repeated(rig.torch),
        "peak": peak.measure,
    }
    clock_s = time.thread_time if threads == 1 else time.perf_counter
    seconds = interleaved(cases, rounds, clock_s)
    native = [one / repeats for one in seconds["native"]]
    portable = [one / repeats for one in seconds["torch"]]
    floor = max(rig.operations / peak.operations_per_s, rig.bytes / peak.bytes_per_s) / threads
    return {
        "operations": rig.operations,
        "bytes": rig.bytes,
        "floor_ms": round(1e3 * floor, 4),
        "native_ms": spread([1e3 * one for one in native], 3),
        "torch_ms": spread([1e3 * one for one in portable], 3),
        "native_over_torch": spread(
            [ours / its for ours, its in zip(native, portable, strict=True)], 3
        ),
        "share_of_floor": round(floor / min(native), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name contains it")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if not ops.NATIVE:
        raise SystemExit(f"no native ops to measure: {ops.WHY_NOT_NATIVE}")
    started = time.monotonic()
    peak = Peak()
    results: dict[str, Any] = {"instruction_set": ops.isa().name.lower(), "cases": {}}
    shapes = [(name, 1, new, length) for name, (new, length) in EXTENDS.items()]
    shapes += [
        (f"decode, {streams} of {length:,}", streams, 1, length) for streams, length in DECODES
    ]
    for model in (SMOL, LLAMA):
        for name, streams, new, length in shapes:
            if options.only not in f"{model.name}: {name}":
                continue
            rig = Rig(model, streams, new, length)
            for threads in options.threads:
                case = f"{model.name}: {name}, {threads} threads"
                results["cases"][case] = measured(rig, peak, threads, options.rounds)
            if new == 16 and length == 1552:
                results[f"relative_error_{model.name}"] = rig.errors()
    results["peak_gflops_per_s"] = round(peak.operations_per_s / 1e9)
    results["read_gb_per_s"] = round(peak.bytes_per_s / 1e9, 1)
    report("attention", results, started, options.json)


if __name__ == "__main__":
    main()
