"""Pages between a GPU's pool and pinned blocks: each way, against one cudaMemcpyAsync of the bytes.

Bytes per second of stores (device to blocks) and loads (blocks to device), ways and memcpy in
turns; then how much of a layer-wise load a forward hides: matrix products on another stream, as
long in all as the load alone, layer by layer behind the layer's pages. Runs where torch, Triton and
numpy are, with PYTHONPATH=python; nothing else of the project's packages is needed.

    python benchmark/gpu/copies.py [--pages 1 10 100 1000] [--repeat 15] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from sglang_memserve.memory.arena import Arena
from sglang_memserve.memory.copies.base import Copies, PoolTensors
from sglang_memserve.memory.copies.choice import Way
from sglang_memserve.memory.copies.direct import DirectCopies
from sglang_memserve.memory.copies.moves import PageMoves
from sglang_memserve.memory.copies.packed import PackedCopies
from sglang_memserve.memory.copies.staged import StagedCopies
from sglang_memserve.memory.copies.streams import TorchStreams
from sglang_memserve.memory.layout import BlockLayout
from sglang_memserve.memory.pinning import CudaDriver, PinnedRanges

GEOMETRIES = {
    # 368,640 bytes a page of 16 tokens, and 2 MiB.
    "smollm2-135m": BlockLayout(30, 16, 3, 64, 64, 2),
    "llama-3-8b": BlockLayout(32, 16, 8, 128, 128, 2),
}
PROGRAMS = (8, 16, 32, 64, 128, 256)


@dataclass(frozen=True)
class Rig:
    layout: BlockLayout
    tensors: PoolTensors
    arena: Arena
    ways: dict[Way, Copies]
    flat: torch.Tensor
    """As many bytes as the arena has, on the device."""


@contextmanager
def rig(layout: BlockLayout, pages: int) -> Iterator[Rig]:
    shape = (pages * layout.page_size_tokens, layout.num_kv_heads, layout.head_dim)

    def buffers() -> list[torch.Tensor]:
        made = torch.ones((layout.num_layers, *shape), dtype=torch.bfloat16, device="cuda")
        return list(made.unbind())

    tensors = PoolTensors(layout, buffers(), buffers())
    moves, streams = PageMoves(tensors), TorchStreams(tensors.device)
    pins = PinnedRanges(CudaDriver(tensors.device))
    ways: dict[Way, Copies] = {
        Way.DIRECT: DirectCopies(tensors, moves, streams),
        Way.PACKED: PackedCopies(tensors, moves, streams, pins),
        Way.STAGED: StagedCopies(tensors, streams),
    }
    with Arena(pages, layout.block_bytes, reserve_bytes=pages * layout.block_bytes) as arena:
        arena.view[:] = 0
        pins.pin(arena.base, arena.nbytes)
        flat = torch.ones(arena.nbytes, dtype=torch.uint8, device="cuda")
        yield Rig(layout, tensors, arena, ways, flat)
        torch.cuda.synchronize()
        pins.close()


def timed(run: Callable[[], None]) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def throughput(at: Rig, count: int, repeat: int) -> dict[str, Any]:
    source = random.Random(count)
    total = at.arena.total_blocks
    nbytes = count * at.layout.block_bytes
    host = torch.from_numpy(at.arena.view).view(-1)[:nbytes]
    runs: dict[str, Callable[[list[int], list[int]], None]] = {
        "store memcpy": lambda b, p: void(host.copy_(at.flat[:nbytes], non_blocking=True)),
        "load memcpy": lambda b, p: void(at.flat[:nbytes].copy_(host, non_blocking=True)),
    }
    for way, copies in at.ways.items():
        runs[f"store {way.value}"] = lambda b, p, d=copies: d.gather(at.arena, b, p)  # type: ignore[misc]
        runs[f"load {way.value}"] = lambda b, p, d=copies: d.scatter(at.arena, b, p)  # type: ignore[misc]
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeat + 1):
        blocks, pages = source.sample(range(total), count), source.sample(range(total), count)
        for name, run in runs.items():
            took = timed(partial(run, blocks, pages))
            # The first turn compiles and warms up.
            if turn:
                seconds[name].append(took)
    rates = {name: round(nbytes / statistics.median(s) / 1e9, 2) for name, s in seconds.items()}
    return {"pages": count, "bytes": nbytes, "gb_per_s": rates}


def void(_: object) -> None: ...


def programs(at: Rig, count: int, repeat: int) -> dict[str, dict[str, float]]:
    """Direct copies by the number of programs that share the work."""
    moves, streams = PageMoves(at.tensors), TorchStreams(at.tensors.device)
    order = random.Random(1).sample(range(at.arena.total_blocks), count)
    found: dict[str, dict[str, float]] = {}
    for number in PROGRAMS:
        copies = DirectCopies(at.tensors, moves, streams, number)
        verbs = {"store": copies.gather, "load": copies.scatter}
        found[str(number)] = {}
        for name, verb in verbs.items():
            samples = [timed(partial(verb, at.arena, order, order)) for _ in range(repeat + 1)]
            rate = count * at.layout.block_bytes / statistics.median(samples[1:]) / 1e9
            found[str(number)][name] = round(rate, 2)
    return found


def overlap(at: Rig, way: Way, count: int, repeat: int) -> dict[str, float]:
    """Milliseconds of a load, of a forward as long, and of both at once, layer behind layer."""
    order = random.Random(2).sample(range(at.arena.total_blocks), count)
    copies, layers = at.ways[way], at.layout.num_layers
    matrix = torch.randn(2048, 2048, dtype=torch.bfloat16, device="cuda")
    product = torch.empty_like(matrix)

    def load() -> None:
        copies.scatter(at.arena, order, order)

    def compute(products: int) -> None:
        for _ in range(products):
            torch.mm(matrix, matrix, out=product)

    def forward(products: int) -> None:
        for _ in range(layers):
            compute(products)

    def both(products: int) -> None:
        transfer = copies.begin_load(at.arena, order, order)
        for layer in range(layers):
            transfer.layer(layer)
            transfer.admit(layer)
            compute(products)
        transfer.finish()

    load_s = statistics.median(timed(load) for _ in range(repeat))
    one_s = statistics.median(timed(lambda: forward(1)) for _ in range(repeat))
    products = max(1, round(load_s / one_s))
    both(products)
    samples: dict[str, list[float]] = {"load": [], "forward": [], "both": []}
    for _ in range(repeat):
        samples["load"].append(timed(load))
        samples["forward"].append(timed(lambda: forward(products)))
        samples["both"].append(timed(lambda: both(products)))
    ms = {name: round(statistics.median(s) * 1e3, 3) for name, s in samples.items()}
    # 1: the shorter of the two costs nothing; 0: one runs after the other.
    hidden = (ms["load"] + ms["forward"] - ms["both"]) / min(ms["load"], ms["forward"])
    return {**{f"{name}_ms": value for name, value in ms.items()}, "hidden": round(hidden, 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--pages", type=int, nargs="+", default=[1, 10, 100, 1000])
    parser.add_argument("--repeat", type=int, default=15)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("no CUDA device here: nothing measured")
    results: dict[str, Any] = {}
    for name, layout in GEOMETRIES.items():
        most = max(options.pages)
        with rig(layout, most) as at:
            results[name] = {
                "throughput": [throughput(at, count, options.repeat) for count in options.pages],
                "direct_by_programs": programs(at, min(most, 200), options.repeat),
                "overlap": {
                    way.value: overlap(at, way, min(most, 200), options.repeat) for way in Way
                },
            }
    text = json.dumps(
        {
            "benchmark": "gpu/copies",
            "command": " ".join(["python", *sys.argv]),
            "machine": {
                "gpu": torch.cuda.get_device_name(),
                "torch": torch.__version__,
                "cuda": torch.version.cuda,
            },
            "results": results,
        },
        indent=2,
    )
    print(text)
    if options.json is not None:
        options.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
