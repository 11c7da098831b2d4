"""Copies on a real GPU: every way, against the loops of ``oracle.pages``.

What can be known without a device is in ``test/contract/test_copies.py``; here are streams, the
driver's pinning, and kernels as they are compiled. ``pytest test/gpu`` runs on a machine that has
torch, Triton, numpy and pytest only.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from oracle.pages import PagedPool, random_layout
from sglang_memserve.errors import DeviceError
from sglang_memserve.memory.arena import Arena
from sglang_memserve.memory.copies.base import Copies
from sglang_memserve.memory.copies.choice import Way, Ways
from sglang_memserve.memory.copies.direct import DirectCopies
from sglang_memserve.memory.copies.moves import PageMoves
from sglang_memserve.memory.copies.packed import PackedCopies
from sglang_memserve.memory.copies.staged import StagedCopies
from sglang_memserve.memory.copies.streams import TorchStreams
from sglang_memserve.memory.layout import BlockLayout
from sglang_memserve.memory.pinning import CudaDriver, PinnedRanges
from sglang_memserve.memory.swap import DevicePool

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("no CUDA device here", allow_module_level=True)

SMOLLM2 = BlockLayout(30, 16, 3, 64, 64, 2)
LLAMA_8B = BlockLayout(32, 16, 8, 128, 128, 2)
ODD = BlockLayout(3, 5, 3, 7, 9, 1)
LAYOUTS = [SMOLLM2, LLAMA_8B, ODD]
PAGES = 40
BLOCKS = 32
SLOW_CYCLES = 400_000_000


def device() -> torch.device:
    return torch.device("cuda", torch.cuda.device_count() - 1)


def new_stream() -> Any:
    stream: Any = torch.cuda.Stream
    return stream(device())


def sleep_on_device() -> None:
    sleep: Any = torch.cuda._sleep
    sleep(SLOW_CYCLES)


@pytest.fixture
def pins() -> Iterator[PinnedRanges]:
    ranges = PinnedRanges(CudaDriver(device()))
    yield ranges
    torch.cuda.synchronize(device())
    ranges.close()


def whole_pages(arena: Arena) -> int:
    return -(-arena.nbytes // 4096) * 4096


@pytest.fixture(params=LAYOUTS, ids=["smollm2", "llama-8b", "odd"])
def layout(request: pytest.FixtureRequest) -> BlockLayout:
    chosen: BlockLayout = request.param
    return chosen


@pytest.fixture
def arena(layout: BlockLayout, pins: PinnedRanges) -> Iterator[Arena]:
    with Arena(BLOCKS, layout.block_bytes, reserve_bytes=1 << 30) as made:
        made.view[:] = np.random.default_rng(7).integers(0, 256, made.view.shape, dtype=np.uint8)
        pins.pin(made.base, whole_pages(made))
        yield made
        torch.cuda.synchronize(device())
        pins.close()


@pytest.fixture(params=list(Way), ids=lambda way: str(way.value))
def make(request: pytest.FixtureRequest, pins: PinnedRanges) -> Callable[[PagedPool], Copies]:
    def made(pool: PagedPool) -> Copies:
        tensors, streams = pool.tensors(), TorchStreams(device())
        size = 5 * pool.layout.block_bytes
        if request.param is Way.STAGED:
            return StagedCopies(tensors, streams, size)
        if request.param is Way.DIRECT:
            return DirectCopies(tensors, PageMoves(tensors), streams)
        return PackedCopies(tensors, PageMoves(tensors), streams, pins, size)

    return made


def pairs(seed: int, count: int) -> tuple[list[int], list[int]]:
    source = random.Random(seed)
    return source.sample(range(BLOCKS), count), source.sample(range(PAGES), count)


@pytest.mark.parametrize("count", [0, 1, 7, BLOCKS])
def test_gather(
    make: Callable[[PagedPool], Copies], arena: Arena, layout: BlockLayout, count: int
) -> None:
    pool = PagedPool.random(layout, PAGES, seed=1, device=str(device()))
    blocks, pages = pairs(count, count)
    expected = arena.view.copy()
    for block, page in zip(blocks, pages, strict=True):
        expected[block] = np.frombuffer(pool.block_of(page), dtype=np.uint8)
    make(pool).gather(arena, blocks, torch.tensor(pages, dtype=torch.int64))
    assert (arena.view == expected).all()


@pytest.mark.parametrize("count", [0, 1, 7, BLOCKS])
def test_scatter_and_load(
    make: Callable[[PagedPool], Copies], arena: Arena, layout: BlockLayout, count: int
) -> None:
    pool = PagedPool.random(layout, PAGES, seed=1, device=str(device()))
    copies = make(pool)
    for seed in (1, 2):
        blocks, pages = pairs(seed, count)
        expected = pool.blocks()
        for block, page in zip(blocks, pages, strict=True):
            expected[page] = bytes(arena.view[block])
        if seed == 1:
            copies.scatter(arena, blocks, pages)
        else:
            load = copies.begin_load(arena, blocks, pages)
            for layer in range(layout.num_layers):
                load.layer(layer)
            load.finish()
        assert pool.blocks() == expected


@pytest.mark.parametrize("seed", range(10))
def test_random_geometries(make: Callable[[PagedPool], Copies], seed: int) -> None:
    source = random.Random(seed)
    layout = random_layout(source)
    pool = PagedPool.random(layout, PAGES, seed, str(device()), lead=source.randint(0, 3))
    pins = PinnedRanges(CudaDriver(device()))
    with Arena(BLOCKS, layout.block_bytes, reserve_bytes=1 << 24) as arena:
        pins.pin(arena.base, whole_pages(arena))
        copies = make(pool)
        if isinstance(copies, PackedCopies):
            copies.pins = pins
        blocks, pages = pairs(seed, 20)
        before = pool.blocks()
        copies.gather(arena, blocks, pages)
        for block, page in zip(blocks, pages, strict=True):
            assert bytes(arena.view[block]) == before[page]
        _, others = pairs(seed + 100, 20)
        copies.scatter(arena, blocks, others)
        for block, page in zip(blocks, others, strict=True):
            assert pool.block_of(page) == bytes(arena.view[block])
        torch.cuda.synchronize(device())
        pins.close()


def test_forward_waits_for_its_own_layer_only(
    make: Callable[[PagedPool], Copies], arena: Arena, layout: BlockLayout
) -> None:
    """The forward's stream gets layer 0 although layer 1 was never started."""
    pool = PagedPool.random(layout, PAGES, seed=1, device=str(device()))
    blocks, pages = pairs(3, 12)
    load = make(pool).begin_load(arena, blocks, pages)
    forward = new_stream()
    load.layer(0)
    with torch.cuda.stream(forward):
        load.admit(0)
        seen = pool.k[0].clone()
    forward.synchronize()
    size = layout.page_size_tokens
    for block, page in zip(blocks, pages, strict=True):
        got = seen[page * size : (page + 1) * size].cpu().view(torch.uint8).numpy().tobytes()
        assert got == bytes(arena.view[block][: layout.k_bytes])
    load.finish()


def test_forward_does_wait(arena: Arena, layout: BlockLayout) -> None:
    """A load that is held up on the device: what the forward queues meanwhile sees its bytes."""
    pool = PagedPool.random(layout, PAGES, seed=1, device=str(device()))
    tensors = pool.tensors()
    copies = DirectCopies(tensors, PageMoves(tensors), TorchStreams(device()))
    blocks, pages = pairs(3, 12)
    copies.begin_load(arena, [], []).finish()
    copies._loads.run(sleep_on_device)
    load = copies.begin_load(arena, blocks, pages)
    forward = new_stream()
    seen = []
    for layer in range(layout.num_layers):
        load.layer(layer)
        with torch.cuda.stream(forward):
            load.admit(layer)
            seen.append((pool.k[layer].clone(), pool.v[layer].clone()))
    assert not forward.query(), "the thread waited, and the test shows nothing"
    forward.synchronize()
    size = layout.page_size_tokens
    for block, page in zip(blocks, pages, strict=True):
        slots = slice(page * size, (page + 1) * size)
        got = b"".join(
            half[slots].cpu().view(torch.uint8).numpy().tobytes() for both in seen for half in both
        )
        assert got == bytes(arena.view[block])
    load.finish()


def test_stores_and_loads_beside_a_forward(
    make: Callable[[PagedPool], Copies], arena: Arena, layout: BlockLayout
) -> None:
    """Two threads that copy while the device computes."""
    pool = PagedPool.random(layout, PAGES, seed=1, device=str(device()))
    copies = make(pool)
    expected = pool.blocks()

    def back_and_forth(blocks: range, pages: range, to: range) -> None:
        for _ in range(5):
            copies.gather(arena, blocks, pages)
            copies.scatter(arena, blocks, to)

    work = [
        (range(0, 8), range(0, 8), range(8, 16)),
        (range(8, 16), range(16, 24), range(24, 32)),
    ]
    matrix = torch.randn(1024, 1024, device=device())
    with ThreadPoolExecutor(len(work)) as threads:
        running = [threads.submit(back_and_forth, *arguments) for arguments in work]
        while not all(each.done() for each in running):
            matrix = torch.nn.functional.normalize(matrix @ matrix)
            torch.cuda.synchronize(device())
        for each in running:
            each.result(60)
    for _, pages, to in work:
        for page, copy in zip(pages, to, strict=True):
            assert pool.block_of(copy) == expected[page]


def test_a_refusal_of_the_driver_harms_nobody(pins: PinnedRanges) -> None:
    with Arena(4, 1 << 20, reserve_bytes=1 << 24) as arena:
        pins.pin(arena.base, arena.nbytes)
        with pytest.raises(DeviceError, match=r"cuMemHostRegister.*already"):
            CudaDriver(device()).register(arena.base, arena.nbytes)
        # The runtime must not have kept the error for the next launch.
        assert torch.ones(8, device=device()).sum().item() == 8
        pins.unpin(arena.base, arena.nbytes)
        with pytest.raises(DeviceError, match="cuMemHostUnregister"):
            CudaDriver(device()).unregister(arena.base)
        assert torch.ones(8, device=device()).sum().item() == 8


@pytest.mark.parametrize("way", list(Way), ids=lambda way: str(way.value))
def test_pool_over_an_arena_that_grows(way: Way, caplog: pytest.LogCaptureFixture) -> None:
    """Slabs come and go; what is not pinned is staged; seams between slabs do not matter."""
    layout = SMOLLM2
    paged = PagedPool.random(layout, PAGES, seed=1, device=str(device()))
    pool = DevicePool(layout, paged.k, paged.v, Ways(way, way))
    held = paged.blocks()
    with (
        Arena(8, layout.block_bytes, reserve_bytes=1 << 30, slab_bytes=4 * layout.block_bytes) as a,
        caplog.at_level(logging.WARNING),
    ):
        for slab in a.slabs:
            pool.pin(*a.region(slab))
        assert pool.pinned_bytes == a.nbytes
        new = a.grow(16)
        pool.gather(a, range(16), range(16))
        assert [bytes(block) for block in a.view] == held[:16]
        for slab in new:
            pool.pin(*a.region(slab))
        pool.gather(a, range(15, -1, -1), range(16, 32))
        assert [bytes(block) for block in a.view] == held[31:15:-1]
        pool.scatter(a, range(16), range(20, 36))
        assert [paged.block_of(page) for page in range(20, 36)] == held[31:15:-1]
        for slab in new:
            pool.unpin(*a.region(slab))
        a.shrink(8)
        assert pool.pinned_bytes == a.nbytes
        pool.scatter(a, range(8), range(8))
        assert [paged.block_of(page) for page in range(8)] == held[31:23:-1]
        assert not caplog.records
        pool.close()
        assert pool.pinned_bytes == 0


def test_a_thread_without_a_context_pins_and_copies() -> None:
    """Threads start on device 0 and without a context of their own."""
    layout = SMOLLM2
    paged = PagedPool.random(layout, PAGES, seed=1, device=str(device()))
    pool = DevicePool(layout, paged.k, paged.v)
    held = paged.blocks()

    def run() -> None:
        with Arena(8, layout.block_bytes, reserve_bytes=1 << 30) as arena:
            pool.pin(arena.base, arena.nbytes)
            assert pool.pinned_bytes == arena.nbytes
            pool.gather(arena, range(8), range(8))
            assert [bytes(block) for block in arena.view] == held[:8]
            pool.close()

    with ThreadPoolExecutor(1) as thread:
        thread.submit(run).result(120)
