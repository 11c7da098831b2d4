"""Native ops against what the machine can do. Writes one JSON object.

    python benchmark/micro/kernels.py [--blocks 10 100 500] [--rounds 15] [--json FILE]

Page moves: blocks of SmolLM2 (60 rows of 6 KiB) in random order, between a device pool in memory
and an arena, against one memcpy of the same bytes with the same threads. A copy reads and writes
each byte once, so the floor is twice the bytes over the memory's bandwidth; memcpy is that floor in
practice. Page keys: 8,000 tokens in pages of 16, that is 1,000 SHA-256 compressions of 64 bytes,
each waiting for the one before.
"""

from __future__ import annotations

import argparse
import ctypes
import random
import statistics
import time
from array import array
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from sgl_kernel_ext import ops, reference
from sgl_kernel_ext.tables import RowTable, Sha, Store

from benchmark.harness import report, spread

TENSORS, ROW_BYTES = 60, 6144
BLOCK_BYTES = TENSORS * ROW_BYTES


def interleaved(cases: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for round_ in range(rounds + 1):
        for name, run in cases.items():
            start = time.perf_counter()
            run()
            if round_:  # the first one touches the memory
                seconds[name].append(time.perf_counter() - start)
    return seconds


class Memcpy:
    """One copy of ``size`` bytes, cut in ``threads`` parts."""

    def __init__(self, size: int, threads: int) -> None:
        self._to, self._from = np.ones(size, np.uint8), np.ones(size, np.uint8)
        self._step = size // threads
        self._pool = ThreadPoolExecutor(threads)
        self._parts = range(threads)

    def _part(self, part: int) -> None:
        offset = part * self._step
        to, source = self._to.ctypes.data + offset, self._from.ctypes.data + offset
        ctypes.memmove(to, source, self._step)

    def __call__(self) -> None:
        if len(self._parts) == 1:
            self._part(0)
        else:
            list(self._pool.map(self._part, self._parts))


def moves(blocks: int, threads: int, rounds: int) -> dict[str, Any]:
    """Ratios of bytes per second to memcpy's."""
    total = 2 * blocks
    pool = [np.ones((total, ROW_BYTES), np.uint8) for _ in range(TENSORS)]
    arena = np.ones((total, TENSORS, ROW_BYTES), np.uint8)
    pages = RowTable.of_arrays(pool)
    columns = RowTable.of_arrays([arena[:, tensor] for tensor in range(TENSORS)])
    order = np.random.default_rng(1)
    some, others = order.permutation(total)[:blocks], order.permutation(total)[:blocks]
    memcpy = Memcpy(blocks * BLOCK_BYTES, threads)
    seconds = interleaved(
        {
            "memcpy": memcpy,
            "gather": lambda: ops.copy_rows(columns, pages, some, others, threads),
            "scatter": lambda: ops.copy_rows(pages, columns, some, others, threads),
            "gather_cached": lambda: ops.copy_rows(
                columns, pages, some, others, threads, Store.CACHED
            ),
            "scatter_cached": lambda: ops.copy_rows(
                pages, columns, some, others, threads, Store.CACHED
            ),
            "gather_numpy": lambda: reference.copy_rows(columns, pages, some, others),
        },
        rounds,
    )
    base = seconds.pop("memcpy")
    gigabytes = blocks * BLOCK_BYTES / 1e9
    result: dict[str, Any] = {"memcpy_gb_per_s": round(gigabytes / statistics.median(base), 1)}
    for name, samples in seconds.items():
        result[name] = spread([ours / it for ours, it in zip(base, samples, strict=True)], 2)
    return result


def keys(rounds: int) -> dict[str, Any]:
    """Microseconds."""
    source = random.Random(1)
    ids = [source.randrange(150_000) for _ in range(8000)]
    packed = array("q", ids)
    seconds = interleaved(
        {
            "list": lambda: ops.page_keys(ids, 16),
            "array": lambda: ops.page_keys(packed, 16),
            "list_plain_sha": lambda: ops.page_keys(ids, 16, b"", Sha.PLAIN),
            "python": lambda: reference.page_keys(ids, 16),
        },
        10 * rounds,
    )
    return {name: spread([1e6 * one for one in samples], 1) for name, samples in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--blocks", type=int, nargs="+", default=[10, 100, 500])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if not ops.NATIVE:
        raise SystemExit(f"no native ops to measure: {ops.WHY_NOT_NATIVE}")
    started = time.monotonic()
    results = {
        "features": ops.cpu_features(),
        "page_moves_over_memcpy": {
            f"{blocks} blocks, {threads} threads": moves(blocks, threads, options.rounds)
            for blocks in options.blocks
            for threads in options.threads
        },
        "page_keys_us": keys(options.rounds),
    }
    report("kernels", results, started, options.json)


if __name__ == "__main__":
    main()
