"""What one read submits: every block once, merged where that is allowed."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sglang_memserve.errors import TransferFailed
from sglang_memserve.transfer.plan import batches
from sglang_memserve.transfer.regions import Regions, segments_within


@given(
    st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), max_size=40),
    st.integers(1, 40),
    st.lists(st.integers(1, 31), max_size=3, unique=True),
    st.lists(st.integers(1, 31), max_size=3, unique=True),
)
def test_segments_and_batches_cover_each_block_once(
    pairs: list[tuple[int, int]], max_blocks: int, far_cuts: list[int], near_cuts: list[int]
) -> None:
    """Blocks 0 to 31 on either side, in regions that end at the cuts."""
    size = 16
    far, near = regions_of(1000, size, far_cuts), regions_of(9000, size, near_cuts)
    remote = [1000 + place * size for place, _ in pairs]
    local = [9000 + place * size for _, place in pairs]
    limit = max_blocks * size
    lists = batches(segments_within(remote, local, size, limit, far, near), limit)
    parts = [(*row,) for batch in lists for row in batch.tolist()]
    covered = [
        (there + offset, here + offset)
        for there, here, length in parts
        for offset in range(0, length, size)
    ]
    assert covered == list(zip(remote, local, strict=True))
    assert all(length <= limit for *_, length in parts)
    assert all(len(batch) and batch[:, 2].sum() <= limit for batch in lists)
    assert all(far.covers(there, size) and near.covers(here, size) for there, here, size in parts)
    for (there, here, length), following in itertools.pairwise(parts):
        if (there + length, here + length) == following[:2]:
            # Two that lie together are two because of a border or the limit.
            border = not (far.covers(there, length + size) and near.covers(here, length + size))
            assert border or length + size > limit


def regions_of(base: int, size: int, cuts: list[int]) -> Regions:
    places = [0, *sorted(cuts), 32]
    return Regions(
        (base + first * size, (stop - first) * size, serial)
        for serial, (first, stop) in enumerate(itertools.pairwise(places))
        if first < stop
    )


@pytest.mark.parametrize(("remote", "local"), [(996, 9000), (1504, 9000), (1500, 9000)])
def test_blocks_outside_the_regions_are_refused(remote: int, local: int) -> None:
    far, near = regions_of(1000, 16, []), regions_of(9000, 16, [])
    for args, text in [
        ((remote, local), "the peer has not registered"),
        ((1000, remote + 8000), "our destination"),
    ]:
        with pytest.raises(TransferFailed, match=text):
            segments_within([1000, args[0]], [9000, args[1]], 16, 64, far, near)
