"""Pages between a device pool in host memory and blocks, against memcpy of the same bytes.

Everything runs on one thread, in turns, and the thread's own processor time counts, so that other
work on the machine costs little but cache and bandwidth. memcpy is one call over
contiguous memory of the same total. Each repetition uses other pages than the one before, so that
small copies do not find their bytes in the cache. "contiguous": neighbouring pages to neighbouring
blocks; "scattered": both in random order.

    python benchmark/micro/copies.py [--pages 1 10 100 1000] [--repeat 15] [--json FILE]
"""

from __future__ import annotations

import argparse
import ctypes
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sglang_memserve.kernels import native
from sglang_memserve.memory.arena import Arena
from sglang_memserve.memory.copies.base import Copies, PoolTensors
from sglang_memserve.memory.copies.cpu import CpuCopies
from sglang_memserve.memory.copies.native import NativeCopies
from sglang_memserve.memory.layout import BlockLayout

from benchmark.harness import report

# SmolLM2-135M in bf16: 368,640 bytes a page of 16 tokens, rows of 6,144 bytes.
LAYOUT = BlockLayout(
    num_layers=30, page_size_tokens=16, num_kv_heads=3, head_dim=64, v_head_dim=64, element_bytes=2
)
MIN_SECONDS = 0.002

Run = Callable[[list[int], list[int]], None]


def make_pool(pages: int) -> PoolTensors:
    def tensors() -> list[torch.Tensor]:
        shape = (pages * LAYOUT.page_size_tokens, LAYOUT.num_kv_heads, LAYOUT.head_dim)
        return [torch.zeros(shape, dtype=torch.bfloat16) for _ in range(LAYOUT.num_layers)]

    made = PoolTensors(LAYOUT, tensors(), tensors())
    # As DevicePool does with the engine's tensors.
    made.prefer_huge_pages()
    return made


def contenders(tensors: PoolTensors, arena: Arena) -> dict[str, Run]:
    flat = np.ones(arena.nbytes, dtype=np.uint8)

    def memcpy(blocks: list[int], pages: list[int]) -> None:
        # The lowest block leaves room for all: runs start at random places that have it.
        first, nbytes = min(blocks), len(blocks) * arena.block_bytes
        first = min(first, arena.total_blocks - len(blocks))
        offset = first * arena.block_bytes
        ctypes.memmove(arena.base + offset, flat.ctypes.data + offset, nbytes)

    ways: dict[str, Copies] = {"torchscript": CpuCopies(tensors)}
    ops = native()
    if ops is not None:
        ways["native"] = NativeCopies(tensors, ops)
    runs: dict[str, Run] = {"memcpy": memcpy}
    for name, copies in ways.items():
        runs[f"{name} gather"] = lambda b, p, c=copies: c.gather(arena, b, p)  # type: ignore[misc]
        runs[f"{name} scatter"] = lambda b, p, c=copies: c.scatter(arena, b, p)  # type: ignore[misc]
    return runs


def places(source: random.Random, order: str, count: int, total: int) -> list[int]:
    if order == "scattered":
        return source.sample(range(total), count)
    first = source.randint(0, total - count)
    return list(range(first, first + count))


def compare(runs: dict[str, Run], total: int, count: int, order: str, repeat: int) -> Any:
    source = random.Random(count)
    calls = max(1, round(MIN_SECONDS / (count * LAYOUT.block_bytes / 5e9)))
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeat):
        pairs = [
            (places(source, order, count, total), places(source, order, count, total))
            for _ in range(calls)
        ]
        names = list(runs)
        source.shuffle(names)
        for name in names:
            start = time.thread_time()
            for blocks, pages in pairs:
                runs[name](blocks, pages)
            seconds[name].append((time.thread_time() - start) / calls)
    nbytes = count * LAYOUT.block_bytes
    ratios = {
        name: round(
            statistics.median(
                copy / own for copy, own in zip(seconds["memcpy"], seconds[name], strict=True)
            ),
            3,
        )
        for name in runs
        if name != "memcpy"
    }
    gigabytes = {name: round(nbytes / statistics.median(s) / 1e9, 2) for name, s in seconds.items()}
    return {
        "pages": count,
        "order": order,
        "bytes": nbytes,
        "over_memcpy": ratios,
        "gb_per_s": gigabytes,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--pages", type=int, nargs="+", default=[1, 10, 100, 1000])
    parser.add_argument("--repeat", type=int, default=15)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    started_s = time.monotonic()
    torch.set_num_threads(1)
    total = max(options.pages)
    tensors = make_pool(total)
    with Arena(total, LAYOUT.block_bytes) as arena:
        arena.view[:] = 0
        runs = contenders(tensors, arena)
        everything = list(range(total))
        for run in runs.values():
            run(everything, everything)
        results = [
            compare(runs, total, count, order, options.repeat)
            for count in options.pages
            for order in ("contiguous", "scattered")
        ]
    report("micro/copies", {"threads": 1, "cases": results}, started_s, options.json)


if __name__ == "__main__":
    main()
