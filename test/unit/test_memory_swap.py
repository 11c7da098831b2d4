"""Copies between device pages and blocks, against loops that cannot be wrong."""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from sglang_memserve.errors import ConfigError
from sglang_memserve.memory import swap
from sglang_memserve.memory.arena import Arena
from sglang_memserve.memory.layout import BlockLayout
from sglang_memserve.memory.swap import DevicePool, RowPlan

PAGES = 23
BLOCKS = 17
LAYOUTS = [
    BlockLayout(3, 4, 2, 8, 8, 2),
    BlockLayout(2, 4, 3, 8, 4, 2),
    BlockLayout(2, 1, 1, 3, 1, 1),
    BlockLayout(1, 16, 2, 5, 7, 4),
]
DTYPES = {1: torch.float8_e4m3fn, 2: torch.bfloat16, 4: torch.float32}


def random_pool(layout: BlockLayout, extra_slots: int = 1) -> DevicePool:
    slots = PAGES * layout.page_size_tokens + (extra_slots if layout.page_size_tokens > 1 else 0)

    def buffer(dim: int) -> torch.Tensor:
        shape = (slots, layout.num_kv_heads, dim * layout.element_bytes)
        raw = torch.randint(0, 256, shape, dtype=torch.uint8)
        return raw.view(DTYPES[layout.element_bytes])

    k = [buffer(layout.head_dim) for _ in range(layout.num_layers)]
    v = [buffer(layout.v_head_dim) for _ in range(layout.num_layers)]
    pool = DevicePool(layout, k, v)
    pool.buffers = (k, v)  # type: ignore[attr-defined]
    return pool


def page_bytes(pool: DevicePool, layer: int, which: int, page: int) -> bytes:
    size = pool.layout.page_size_tokens
    buffer = pool.buffers[which][layer]  # type: ignore[attr-defined]
    return bytes(buffer[page * size : (page + 1) * size].contiguous().view(torch.uint8).numpy())


def block_of(pool: DevicePool, page: int) -> bytes:
    """What a block holds of ``page``: layer by layer, K before V."""
    return b"".join(
        page_bytes(pool, layer, which, page) for layer in range(pool.num_layers) for which in (0, 1)
    )


@pytest.fixture(params=LAYOUTS, ids=str)
def layout(request: pytest.FixtureRequest) -> BlockLayout:
    chosen: BlockLayout = request.param
    return chosen


@pytest.fixture
def arena(layout: BlockLayout) -> Iterator[Arena]:
    with Arena(BLOCKS, layout.block_bytes) as made:
        made.view[:] = np.random.default_rng(7).integers(0, 256, made.view.shape, dtype=np.uint8)
        yield made


@pytest.fixture(params=["direct", "staged", "eager"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "eager":
        monkeypatch.setattr(swap, "copy_rows", swap.copy_rows_reference)
    if request.param == "staged":
        # Small enough for several pieces.
        monkeypatch.setattr(swap, "STAGING_BYTES", 200)
    chosen: str = request.param
    return chosen


PAIRS = {
    "none": ([], []),
    "one": ([3], [5]),
    "neighbours": (list(range(4, 12)), list(range(9, 17))),
    "two runs": ([1, 2, 3, 4, 10, 11, 12, 13], [8, 7, 6, 5, 4, 3, 2, 1]),
    "all": (list(range(BLOCKS)), random.Random(1).sample(range(PAGES), BLOCKS)),
    "scattered": ([0, 2, 4, 6, 16], [22, 0, 21, 1, 20]),
    "backwards": (list(range(BLOCKS - 1, -1, -1)), list(range(BLOCKS))),
}


@pytest.fixture(params=PAIRS, ids=str)
def pairs(request: pytest.FixtureRequest) -> tuple[list[int], list[int]]:
    return PAIRS[request.param]


def test_gather(
    layout: BlockLayout, arena: Arena, way: str, pairs: tuple[list[int], list[int]]
) -> None:
    blocks, pages = pairs
    pool = random_pool(layout)
    pool.is_accelerator = way == "staged"
    expected = arena.view.copy()
    for block, page in zip(blocks, pages, strict=True):
        expected[block] = np.frombuffer(block_of(pool, page), dtype=np.uint8)
    pool.gather(arena, blocks, torch.tensor(pages, dtype=torch.int64))
    assert (arena.view == expected).all()


@pytest.mark.parametrize("layer_wise", [True, False])
def test_scatter(
    layout: BlockLayout,
    arena: Arena,
    way: str,
    pairs: tuple[list[int], list[int]],
    layer_wise: bool,
) -> None:
    blocks, pages = pairs
    pool = random_pool(layout)
    pool.is_accelerator = way == "staged"
    expected = [block_of(pool, page) for page in range(PAGES)]
    for block, page in zip(blocks, pages, strict=True):
        expected[page] = bytes(arena.view[block])
    before = arena.view.copy()
    if layer_wise:
        transfer = pool.begin_scatter(arena, blocks, torch.tensor(pages, dtype=torch.int64))
        for layer in range(pool.num_layers):
            transfer.layer(layer)
    else:
        pool.scatter(arena, blocks, pages)
    assert [block_of(pool, page) for page in range(PAGES)] == expected
    assert (arena.view == before).all()


def test_a_layer_leaves_the_others_alone() -> None:
    layout = LAYOUTS[0]
    with Arena(BLOCKS, layout.block_bytes) as arena:
        pool = random_pool(layout)
        before = [block_of(pool, page) for page in range(PAGES)]
        pool.begin_scatter(arena, [0, 1], [4, 9]).layer(1)
        after = block_of(pool, 4)
        one = layout.layer_bytes
        assert after[:one] == before[4][:one]
        assert after[one : 2 * one] == bytes(one)
        assert after[2 * one :] == before[4][2 * one :]
        assert block_of(pool, 5) == before[5]


def test_round_trip_moves_pages() -> None:
    layout = LAYOUTS[1]
    with Arena(BLOCKS, layout.block_bytes) as arena:
        one, other = random_pool(layout), random_pool(layout)
        one.gather(arena, range(8), range(8))
        other.scatter(arena, range(8), range(15, 23))
        for index in range(8):
            assert block_of(other, 15 + index) == block_of(one, index)


def test_plan_refuses_what_would_corrupt() -> None:
    limits = {"limit_to": 4, "limit_from": 4}
    for to, source in (([1, 1], [0, 1]), ([4], [0]), ([-1], [0]), ([0], [4]), ([0], [-1])):
        with pytest.raises(AssertionError):
            RowPlan.of(to, source, **limits)
    with pytest.raises(AssertionError):
        RowPlan.of([0, 1], [0], **limits)


def test_plan_finds_runs() -> None:
    plan = RowPlan.of([9, 8, 7, 6, 3, 2, 1, 0], list(range(8)), limit_to=10, limit_from=8)
    assert plan.rows_to.tolist() == [0, 1, 2, 3, 6, 7, 8, 9]
    assert plan.rows_from.tolist() == [7, 6, 5, 4, 3, 2, 1, 0]
    assert plan.runs == [0, 4, 0, 4, 8, 6]
    assert RowPlan.of([0, 2, 4], [0, 1, 2], limit_to=5, limit_from=5).runs == []


def test_wrong_tensors_are_refused() -> None:
    layout = LAYOUTS[0]
    good = torch.zeros(16, 2, 8, dtype=torch.bfloat16)
    bad = [
        torch.zeros(16, 2, 4, dtype=torch.bfloat16),
        torch.zeros(16, 2, 8, dtype=torch.float32),
        torch.zeros(16, 2, 16, dtype=torch.bfloat16)[:, :, ::2],
        torch.zeros(2, 16, 8, dtype=torch.bfloat16).transpose(0, 1),
        torch.zeros(16, 2, 8, dtype=torch.bfloat16, device="meta"),
    ]
    for tensor in bad:
        with pytest.raises(ConfigError, match="is not a contiguous"):
            DevicePool(layout, [good] * 3, [good, tensor, good])
    with pytest.raises(ConfigError, match="3 layers"):
        DevicePool(layout, [good] * 2, [good] * 2)


def test_tensors_at_an_odd_offset() -> None:
    layout = BlockLayout(1, 2, 1, 4, 4, 2)
    storage = torch.arange(1 + 2 * 2 * 4 * 3, dtype=torch.int16).view(torch.bfloat16)
    k = storage[1 : 1 + 24].view(6, 1, 4)
    v = storage[25:49].view(6, 1, 4)
    pool = DevicePool(layout, [k], [v])
    with Arena(2, layout.block_bytes) as arena:
        pool.gather(arena, [1], [2])
        expected = [*range(17, 25), *range(41, 49)]
        assert arena.view[1].view(np.int16).tolist() == expected


def test_waits_for_every_event() -> None:
    class Event:
        waited = False

        def synchronize(self) -> None:
            self.waited = True

    events = [Event(), Event()]
    random_pool(LAYOUTS[0]).wait(events)
    assert all(event.waited for event in events)
