"""Every way of copying pages, one contract: against loops that cannot be wrong.

The Triton kernels run in Triton's interpreter, on a device whose streams take any order that their
events allow (``lazy_device``).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from contract.lazy_device import LazyStreams
from oracle.pages import PagedPool, random_layout
from sglang_memserve.kernels import native
from sglang_memserve.memory.arena import Arena
from sglang_memserve.memory.copies.base import Copies, PoolTensors
from sglang_memserve.memory.copies.choice import ChosenCopies, Way, Ways
from sglang_memserve.memory.copies.cpu import CpuCopies, copy_rows_reference
from sglang_memserve.memory.copies.direct import DirectCopies
from sglang_memserve.memory.copies.moves import PageMoves, move_pages
from sglang_memserve.memory.copies.native import NativeCopies
from sglang_memserve.memory.copies.packed import PackedCopies
from sglang_memserve.memory.copies.staged import StagedCopies
from sglang_memserve.memory.copies.streams import Streams
from sglang_memserve.memory.layout import BlockLayout
from sglang_memserve.memory.pinning import PinnedRanges
from triton.runtime.interpreter import InterpretedFunction

PAGES = 23
BLOCKS = 17
# Small, so that copies take several slices.
SLICE_BLOCKS = 3

INTERPRETED = InterpretedFunction(move_pages.fn)


class NoDriver:
    """Registers anything."""

    def register(self, base: int, length: int) -> None: ...

    def unregister(self, base: int) -> None: ...


def pinned(arena: Arena) -> PinnedRanges:
    ranges = PinnedRanges(NoDriver())
    # Whole memory pages, whatever the size of the arena.
    ranges.pin(arena.base, -(-arena.nbytes // 4096) * 4096)
    return ranges


def make_native(tensors: PoolTensors, arena: Arena, streams: LazyStreams) -> Copies:
    ops = native()
    if ops is None:
        pytest.skip("native code is not built here, or is switched off")
    return NativeCopies(tensors, ops)


def make_staged(tensors: PoolTensors, arena: Arena, streams: Streams) -> Copies:
    return StagedCopies(tensors, streams, SLICE_BLOCKS * tensors.layout.block_bytes)


def make_direct(tensors: PoolTensors, arena: Arena, streams: Streams) -> Copies:
    return DirectCopies(tensors, PageMoves(tensors, INTERPRETED), streams, programs=5)


def make_packed(tensors: PoolTensors, arena: Arena, streams: Streams) -> Copies:
    moves = PageMoves(tensors, INTERPRETED)
    size = SLICE_BLOCKS * tensors.layout.block_bytes
    return PackedCopies(tensors, moves, streams, pinned(arena), size)


def make_chosen(tensors: PoolTensors, arena: Arena, streams: Streams) -> Copies:
    by_way = {
        Way.DIRECT: make_direct(tensors, arena, streams),
        Way.PACKED: make_packed(tensors, arena, streams),
    }
    return ChosenCopies(Ways(), by_way, make_staged(tensors, arena, streams), pinned(arena))


Make = Callable[[PoolTensors, Arena, LazyStreams], Copies]
WAYS: dict[str, Make] = {
    "cpu": lambda tensors, arena, streams: CpuCopies(tensors),
    "cpu eager": lambda tensors, arena, streams: CpuCopies(tensors, copy_rows_reference),
    "native": make_native,
    "staged": make_staged,
    "direct": make_direct,
    "packed": make_packed,
    "chosen": make_chosen,
}
LAYOUTS = [
    BlockLayout(3, 4, 2, 8, 8, 2),
    BlockLayout(2, 4, 3, 8, 4, 2),
    BlockLayout(2, 1, 1, 3, 1, 1),
    BlockLayout(1, 16, 2, 5, 7, 4),
]
PAIRS = {
    "none": ([], []),
    "one": ([3], [5]),
    "neighbours": (list(range(4, 12)), list(range(9, 17))),
    "two runs": ([1, 2, 3, 4, 10, 11, 12, 13], [8, 7, 6, 5, 4, 3, 2, 1]),
    "all": (list(range(BLOCKS)), random.Random(1).sample(range(PAGES), BLOCKS)),
    "scattered": ([0, 2, 4, 6, 16], [22, 0, 21, 1, 20]),
    "backwards": (list(range(BLOCKS - 1, -1, -1)), list(range(BLOCKS))),
}


@pytest.fixture(params=WAYS, ids=str)
def make(request: pytest.FixtureRequest) -> Make:
    return WAYS[request.param]


@pytest.fixture
def streams() -> LazyStreams:
    return LazyStreams(3)


def filled_arena(blocks: int, layout: BlockLayout) -> Arena:
    arena = Arena(blocks, layout.block_bytes)
    arena.view[:] = np.random.default_rng(7).integers(0, 256, arena.view.shape, dtype=np.uint8)
    return arena


@pytest.fixture(params=LAYOUTS, ids=str)
def arena(request: pytest.FixtureRequest) -> Iterator[Arena]:
    with filled_arena(BLOCKS, request.param) as made:
        yield made


@pytest.fixture
def pool(request: pytest.FixtureRequest, arena: Arena) -> PagedPool:
    layout: BlockLayout = request.node.callspec.params["arena"]
    return PagedPool.random(layout, PAGES, seed=11)


def check_gather(
    copies: Copies, pool: PagedPool, arena: Arena, blocks: list[int], pages: list[int]
) -> None:
    expected = arena.view.copy()
    for block, page in zip(blocks, pages, strict=True):
        expected[block] = np.frombuffer(pool.block_of(page), dtype=np.uint8)
    held = pool.blocks()
    copies.gather(arena, blocks, torch.tensor(pages, dtype=torch.int64))
    assert (arena.view == expected).all()
    assert pool.blocks() == held


def check_scatter(
    copies: Copies,
    pool: PagedPool,
    arena: Arena,
    blocks: list[int],
    pages: list[int],
) -> None:
    expected = pool.blocks()
    for block, page in zip(blocks, pages, strict=True):
        expected[page] = bytes(arena.view[block])
    before = arena.view.copy()
    copies.scatter(arena, blocks, torch.tensor(pages, dtype=torch.int64))
    assert pool.blocks() == expected
    assert (arena.view == before).all()


def check_load(
    copies: Copies,
    pool: PagedPool,
    arena: Arena,
    blocks: list[int],
    pages: list[int],
    streams: LazyStreams,
) -> None:
    """Each layer has landed by the time the forward gets to it."""
    layout = pool.layout
    expected = pool.blocks()
    for block, page in zip(blocks, pages, strict=True):
        expected[page] = bytes(arena.view[block])
    load = copies.begin_load(arena, blocks, torch.tensor(pages, dtype=torch.int64))
    seen: list[int] = []

    def forward(layer: int) -> None:
        at = slice(layer * layout.layer_bytes, (layer + 1) * layout.layer_bytes)
        for page in pages:
            assert pool.layer_of(page, layer) == expected[page][at], (page, layer)
        seen.append(layer)

    for layer in range(layout.num_layers):
        load.layer(layer)
        load.admit(layer)
        streams.forward.run(lambda layer=layer: forward(layer))  # type: ignore[misc]
        streams.run_some()
    load.finish()
    load.finish()
    assert pool.blocks() == expected
    streams.run_all()
    assert seen == list(range(layout.num_layers))


@pytest.mark.parametrize("pairs", PAIRS, ids=str)
def test_gather(
    make: Make, pool: PagedPool, arena: Arena, streams: LazyStreams, pairs: str
) -> None:
    check_gather(make(pool.tensors(), arena, streams), pool, arena, *PAIRS[pairs])


@pytest.mark.parametrize("pairs", PAIRS, ids=str)
def test_scatter(
    make: Make, pool: PagedPool, arena: Arena, streams: LazyStreams, pairs: str
) -> None:
    check_scatter(make(pool.tensors(), arena, streams), pool, arena, *PAIRS[pairs])


@pytest.mark.parametrize("pairs", PAIRS, ids=str)
def test_load(make: Make, pool: PagedPool, arena: Arena, streams: LazyStreams, pairs: str) -> None:
    check_load(make(pool.tensors(), arena, streams), pool, arena, *PAIRS[pairs], streams)


@pytest.mark.parametrize("seed", range(12))
def test_random_geometries_and_orders(make: Make, seed: int) -> None:
    source = random.Random(seed)
    layout = random_layout(source)
    streams = LazyStreams(seed)
    pages, blocks = source.randint(1, 12), source.randint(1, 12)
    pool = PagedPool.random(layout, pages, seed, lead=source.randint(0, 3))
    with filled_arena(blocks, layout) as arena:
        copies = make(pool.tensors(), arena, streams)
        for check in (check_gather, check_scatter):
            count = source.randint(0, min(pages, blocks))
            some = source.sample(range(blocks), count), source.sample(range(pages), count)
            check(copies, pool, arena, *some)
        check_load(copies, pool, arena, *some, streams)


def test_one_page_to_many_blocks_and_back(make: Make, streams: LazyStreams) -> None:
    """Sources may be named twice."""
    layout = LAYOUTS[0]
    pool = PagedPool.random(layout, PAGES, seed=5)
    with filled_arena(BLOCKS, layout) as arena:
        copies = make(pool.tensors(), arena, streams)
        check_gather(copies, pool, arena, [0, 5, 6], [3, 3, 3])
        check_scatter(copies, pool, arena, [9, 9, 9], [0, 22, 4])


def test_a_layer_leaves_the_others_alone(make: Make, streams: LazyStreams) -> None:
    layout = LAYOUTS[0]
    pool = PagedPool.random(layout, PAGES, seed=5)
    with filled_arena(BLOCKS, layout) as arena:
        before = pool.blocks()
        load = make(pool.tensors(), arena, streams).begin_load(arena, [0, 1], [4, 9])
        load.layer(0)
        load.finish()
        one = layout.layer_bytes
        assert pool.block_of(4) == bytes(arena.view[0][:one]) + before[4][one:]
        assert pool.block_of(9) == bytes(arena.view[1][:one]) + before[9][one:]
        assert pool.block_of(5) == before[5]


def test_two_copies_at_a_time(make: Make, streams: LazyStreams) -> None:
    """A load and another that begins before the first has ended."""
    layout = LAYOUTS[1]
    pool = PagedPool.random(layout, PAGES, seed=5)
    with filled_arena(BLOCKS, layout) as arena:
        copies = make(pool.tensors(), arena, streams)
        one = copies.begin_load(arena, list(range(8)), list(range(8)))
        other = copies.begin_load(arena, list(range(8, 16)), list(range(15, 23)))
        for layer in range(layout.num_layers):
            one.layer(layer)
            other.layer(layer)
        other.finish()
        one.finish()
        for index in range(8):
            assert pool.block_of(index) == bytes(arena.view[index])
            assert pool.block_of(15 + index) == bytes(arena.view[8 + index])


@pytest.mark.parametrize(
    ("blocks", "pages"),
    [([0, 1], [0]), ([BLOCKS], [0]), ([-1], [0]), ([0], [PAGES]), ([0], [-1])],
)
def test_what_would_corrupt_is_refused(
    make: Make, streams: LazyStreams, blocks: list[int], pages: list[int]
) -> None:
    pool = PagedPool.random(LAYOUTS[0], PAGES, seed=5)
    with filled_arena(BLOCKS, LAYOUTS[0]) as arena:
        copies = make(pool.tensors(), arena, streams)
        held, before = pool.blocks(), arena.view.copy()
        for verb in (copies.gather, copies.scatter, copies.begin_load):
            with pytest.raises(AssertionError):
                verb(arena, blocks, pages)
        with pytest.raises(AssertionError, match="named twice"):
            copies.gather(arena, [1, 1], [0, 1])
        with pytest.raises(AssertionError, match="named twice"):
            copies.scatter(arena, [0, 1], [1, 1])
        with pytest.raises(AssertionError):
            copies.begin_load(arena, [0], [0]).layer(LAYOUTS[0].num_layers)
        streams.run_all()
        assert pool.blocks() == held and (arena.view == before).all()


def test_blocks_that_are_not_pinned_are_staged(streams: LazyStreams) -> None:
    layout = BlockLayout(2, 16, 4, 16, 16, 2)
    assert layout.block_bytes % 4096 == 0
    pool = PagedPool.random(layout, PAGES, seed=5)
    used: list[str] = []

    class Noted:
        def __init__(self, name: str, copies: Copies) -> None:
            self._name, self._copies = name, copies

        def __getattr__(self, verb: str) -> object:
            used.append(self._name)
            return getattr(self._copies, verb)

    with filled_arena(BLOCKS, layout) as arena:
        tensors = pool.tensors()
        ranges = PinnedRanges(NoDriver())
        direct = Noted("direct", make_direct(tensors, arena, streams))
        staged = Noted("staged", make_staged(tensors, arena, streams))
        copies = ChosenCopies(Ways(Way.DIRECT, Way.DIRECT), {Way.DIRECT: direct}, staged, ranges)  # type: ignore[dict-item, arg-type]
        check_gather(copies, pool, arena, [1, 2], [3, 4])
        ranges.pin(arena.address(0), 4 * layout.block_bytes)
        check_gather(copies, pool, arena, [1, 3], [5, 6])
        check_scatter(copies, pool, arena, [3, 4], [5, 6])
        check_load(copies, pool, arena, [0, 1], [5, 6], streams)
        ranges.unpin(arena.address(0), 4 * layout.block_bytes)
        check_load(copies, pool, arena, [0, 1], [7, 8], streams)
    assert used == ["staged", "direct", "staged", "direct", "staged"]
