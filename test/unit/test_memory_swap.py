"""Which row goes where, which tensors are refused, and what a device pool picks."""

from __future__ import annotations

import logging
import time

import numpy as np
import pytest
import torch
from oracle.pages import PagedPool
from sglang_memserve.errors import ConfigError, CopyStalled
from sglang_memserve.memory import huge_pages, swap
from sglang_memserve.memory.arena import Arena
from sglang_memserve.memory.copies.base import PoolTensors, RowPlan, neighbours
from sglang_memserve.memory.copies.choice import Ways, for_accelerator
from sglang_memserve.memory.copies.staged import StagedCopies
from sglang_memserve.memory.copies.streams import wait
from sglang_memserve.memory.layout import BlockLayout
from sglang_memserve.memory.swap import DevicePool

LAYOUT = BlockLayout(3, 4, 2, 8, 8, 2)


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
    assert RowPlan.of([], [], limit_to=5, limit_from=5).runs == []


def test_neighbours_end_where_their_group_does() -> None:
    numbers = np.array([3, 4, 5, 6, 8, 9])
    assert list(neighbours(numbers)) == [(0, 4), (4, 6)]
    assert list(neighbours(numbers, np.array([0, 0, 1, 1, 1, 1]))) == [(0, 2), (2, 4), (4, 6)]
    assert list(neighbours(numbers[:0], numbers[:0])) == []


def test_wrong_tensors_are_refused() -> None:
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
            DevicePool(LAYOUT, [good] * 3, [good, tensor, good])
    with pytest.raises(ConfigError, match="3 layers"):
        DevicePool(LAYOUT, [good] * 2, [good] * 2)


@pytest.mark.parametrize("ops", ["native", "portable"])
def test_pool_on_a_cpu(ops: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With native code where it is built, and without."""
    if ops == "portable":
        monkeypatch.setattr(swap, "native", lambda: None)
    paged = PagedPool.random(LAYOUT, 9, seed=1, lead=1)
    pool = DevicePool(LAYOUT, paged.k, paged.v)
    assert not pool.is_accelerator and pool.num_pages == 9
    with Arena(4, LAYOUT.block_bytes) as arena:
        pool.pin(arena.base, arena.nbytes)
        assert pool.pinned_bytes == 0
        pool.gather(arena, [1, 3], [7, 2])
        assert bytes(arena.view[1]) == paged.block_of(7)
        assert bytes(arena.view[3]) == paged.block_of(2)
        pool.scatter(arena, [1], [0])
        load = pool.begin_scatter(arena, [3], [1])
        for layer in range(pool.num_layers):
            load.layer(layer)
            load.admit(layer)
        load.finish()
        assert paged.block_of(0) == paged.block_of(7)
        assert paged.block_of(1) == paged.block_of(2)
        pool.unpin(arena.base, arena.nbytes)
    pool.close()


def test_without_a_driver_copies_are_staged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Tensors that say they are on a GPU, on a machine without a CUDA driver."""
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA driver")
    paged = PagedPool.random(LAYOUT, 9, seed=1)
    tensors = PoolTensors(LAYOUT, paged.k, paged.v)
    tensors.device = torch.device("cuda", 0)
    monkeypatch.setattr(
        "sglang_memserve.memory.copies.choice.TorchStreams", lambda device: _NoStreams()
    )
    with caplog.at_level(logging.WARNING):
        copies, pins = for_accelerator(tensors, Ways())
    assert isinstance(copies, StagedCopies) and pins is None
    assert len(caplog.records) == 1 and "libcuda.so.1" in caplog.text


class _NoStreams:
    def stream(self) -> None: ...


class Event:
    """Comes after it was asked for so many times."""

    def __init__(self, asked: int) -> None:
        self.left = asked

    def query(self) -> bool:
        self.left -= 1
        return self.left < 0


def test_waits_for_every_event() -> None:
    events = [Event(0), Event(3), Event(1)]
    wait(events, timeout_s=30.0)
    assert all(event.left < 0 for event in events)


def test_a_wait_has_an_end() -> None:
    start = time.monotonic()
    with pytest.raises(CopyStalled, match="1 of 2 steps"):
        wait([Event(0), Event(1 << 60)], timeout_s=0.02)
    assert time.monotonic() - start >= 0.02


def test_huge_pages_change_no_byte() -> None:
    """Any range may be asked for; whether the kernel has them is its own business."""
    data = torch.arange(1 << 19)
    if not huge_pages.prefer(data.data_ptr(), data.nbytes):
        pytest.skip("a kernel without transparent huge pages")
    assert torch.equal(data, torch.arange(1 << 19))
    assert not huge_pages.prefer(4096 * 7 + 1, 4096)
    # Nothing is mapped there, so nothing is done.
    assert not huge_pages.prefer(1 << 46, 1 << 22)
