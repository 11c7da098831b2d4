"""Where blocks lie: layout, arena, allocator."""

from __future__ import annotations

import ctypes
import mmap
from dataclasses import asdict, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sglang_memserve.errors import ConfigError
from sglang_memserve.memory import arena as arena_module
from sglang_memserve.memory.allocator import BlockAllocator
from sglang_memserve.memory.arena import Arena, machine_memory_bytes
from sglang_memserve.memory.layout import BlockLayout
from sglang_memserve.types import DTYPE_BYTES, BlockId, Namespace

SMOLLM = Namespace("model", "1", "bfloat16", 16, 30, 3, 64, 64, 0, 1)


def test_smollm_block_is_as_measured() -> None:
    layout = BlockLayout.of(SMOLLM)
    assert layout.block_bytes == SMOLLM.block_bytes == 368_640
    assert layout.k_bytes == layout.v_bytes == 16 * 3 * 64 * 2
    assert layout.v_offset(29) + layout.v_bytes == layout.block_bytes


def test_equal_dimensions_make_one_array() -> None:
    layout = BlockLayout(3, 4, 2, 8, 8, 2)
    block = np.arange(layout.block_bytes // 2).reshape(3, 2, 4, 2, 8)
    for layer in range(3):
        assert block[layer, 0].flat[0] * 2 == layout.k_offset(layer)
        assert block[layer, 1].flat[0] * 2 == layout.v_offset(layer)


@given(
    layers=st.integers(1, 5),
    page=st.integers(1, 64),
    heads=st.integers(1, 8),
    dims=st.tuples(st.integers(1, 256), st.integers(1, 256)),
    dtype=st.sampled_from(sorted(DTYPE_BYTES)),
)
def test_parts_tile_the_block(
    layers: int, page: int, heads: int, dims: tuple[int, int], dtype: str
) -> None:
    namespace = Namespace("m", "1", dtype, page, layers, heads, *dims, 0, 1)
    layout = BlockLayout.of(namespace)
    end = 0
    for layer in range(layers):
        assert layout.k_offset(layer) == end
        assert layout.v_offset(layer) == end + layout.k_bytes
        end = layout.v_offset(layer) + layout.v_bytes
    assert end == layout.block_bytes == namespace.block_bytes


def zeroed(field: str) -> Namespace:
    return Namespace(**{**asdict(SMOLLM), field: 0})


def test_layout_refuses_nonsense() -> None:
    with pytest.raises(ConfigError, match="KV dtype 'int3'"):
        BlockLayout.of(replace(SMOLLM, kv_dtype="int3"))
    for field in ("page_size", "num_layers", "num_kv_heads", "head_dim", "v_head_dim"):
        with pytest.raises(ConfigError, match="must be positive"):
            BlockLayout.of(zeroed(field))
    with pytest.raises(AssertionError):
        BlockLayout.of(SMOLLM).k_offset(30)


def test_arena_is_zero_aligned_and_addressed() -> None:
    with Arena(5, 1000) as arena:
        arena.check()
        assert arena.view.shape == (5, 1000) and not arena.view.any()
        assert arena.base % mmap.PAGESIZE == 0
        assert arena.nbytes == 5000
        arena.view[3, 7] = 42
        assert arena.address(3) == arena.base + 3000
        assert ctypes.c_uint8.from_address(arena.address(3) + 7).value == 42
        with pytest.raises(AssertionError):
            arena.address(5)
    assert arena.closed
    arena.close()
    with pytest.raises(AssertionError, match="closed"):
        _ = arena.view


def test_arena_outlives_its_close_for_who_still_holds_it() -> None:
    arena = Arena(2, 4096)
    held = arena.view
    arena.close()
    held[1] = 9
    assert (held[1] == 9).all()


def test_prefault_keeps_contents() -> None:
    with Arena(64, 4096) as arena:
        arena.view[:] = 7
        backed = arena.prefault()
        assert backed in (0, arena.nbytes)
        assert arena.prefault(4096, 4096) in (0, 4096)
        assert (arena.view == 7).all()


def test_arena_larger_than_the_machine_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"does not fit into .* GiB of memory"):
        Arena(machine_memory_bytes() // 4096 + 1, 4096)
    monkeypatch.setattr(arena_module, "machine_memory_bytes", lambda: 1 << 62)
    with pytest.raises(ConfigError, match="cannot map"):
        Arena(1 << 50, 4096)
    for blocks, size in ((0, 1), (1, 0), (-1, 4)):
        with pytest.raises(ConfigError, match="is empty"):
            Arena(blocks, size)


def test_where_no_more_can_be_reserved_the_arena_keeps_its_start_size(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = mmap.mmap

    def stingy(fileno: int, length: int, **options: int) -> mmap.mmap:
        if length > 1 << 20:
            raise OSError("overcommit is off")
        return real(fileno, length, **options)

    monkeypatch.setattr(mmap, "mmap", stingy)
    with Arena(16, 4096, slab_bytes=4 * 4096) as arena:
        assert arena.capacity_blocks == 16
        with pytest.raises(ConfigError, match="addresses for 16 of 4096 bytes"):
            arena.grow(17)
        arena.give_back(*arena.shrink(8))
        assert [slab.stop for slab in arena.slabs] == [4, 8]
        arena.grow(16)
        arena.check()


def test_memory_is_given_back_in_whole_pages_between_blocks_that_stay() -> None:
    with Arena(8, 3000, slab_bytes=6000, reserve_bytes=1 << 20) as arena:
        arena.reserved[:8] = 9
        start, length = arena.shrink(4)
        assert (start, length) == (3 * 4096, 3 * 4096)
        arena.give_back(start, length)
        flat = arena.reserved.reshape(-1)
        assert (flat[:12_000] == 9).all() and not flat[3 * 4096 : 24_000].any()
        assert arena.shrink(4) == (3 * 4096, 0)
        arena.close()
        arena.give_back(start, length)


def test_large_ranges_have_larger_slabs() -> None:
    with Arena(10, 4096, reserve_bytes=1 << 30, slab_bytes=4096) as arena:
        assert arena.capacity_blocks == 1 << 18
        arena.grow(1 << 18)
        assert len(arena.slabs) <= 520
        arena.check()


def test_allocator_gives_all_or_nothing() -> None:
    allocator = BlockAllocator(4)
    first = allocator.allocate(3)
    assert first == [0, 1, 2]
    assert allocator.allocate(2) is None
    assert allocator.free_blocks == 1
    assert allocator.allocate(0) == []
    allocator.free([BlockId(1)])
    allocator.check()
    assert allocator.used() == {0, 2}
    assert sorted(allocator.allocate(2) or []) == [1, 3]


def test_allocator_notices_a_double_free() -> None:
    allocator = BlockAllocator(2)
    allocator.allocate(1)
    allocator.free([BlockId(0)])
    with pytest.raises(AssertionError, match="freed twice"):
        allocator.free([BlockId(0)])
