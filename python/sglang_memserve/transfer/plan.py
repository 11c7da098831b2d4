"""What one read submits: blocks become segments, segments become batches. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple


class Segment(NamedTuple):
    """``length`` bytes from the peer's address ``remote`` to our address ``local``."""

    remote: int
    local: int
    length: int


def segments(
    remote: Sequence[int], local: Sequence[int], block_bytes: int, max_bytes: int
) -> Iterator[Segment]:
    """Blocks in order, neighbours on both sides merged into segments of at most ``max_bytes``.

    Segments hold whole blocks; a block larger than ``max_bytes`` is a segment of its own.
    """
    pairs = iter(zip(remote, local, strict=True))
    first = next(pairs, None)
    if first is None:
        return
    start = first
    length = block_bytes
    for far, near in pairs:
        adjacent = far == start[0] + length and near == start[1] + length
        if adjacent and length + block_bytes <= max_bytes:
            length += block_bytes
            continue
        yield Segment(*start, length)
        start, length = (far, near), block_bytes
    yield Segment(*start, length)


def batches(parts: Iterator[Segment], max_bytes: int) -> Iterator[list[Segment]]:
    """Segments in order in lists of at most ``max_bytes``, but at least one segment each."""
    batch: list[Segment] = []
    total = 0
    for part in parts:
        if batch and total + part.length > max_bytes:
            yield batch
            batch, total = [], 0
        batch.append(part)
        total += part.length
    if batch:
        yield batch
