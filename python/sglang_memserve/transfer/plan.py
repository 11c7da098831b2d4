"""What one read submits: blocks become segments, segments become batches. Pure."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np


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
    assert len(remote) == len(local), (len(remote), len(local))
    if not remote:
        return
    far = np.array(remote, dtype=np.uint64)
    near = np.array(local, dtype=np.uint64)
    adjacent = (np.diff(far) == block_bytes) & (np.diff(near) == block_bytes)
    starts = [0, *(np.flatnonzero(~adjacent) + 1).tolist(), len(remote)]
    most_blocks = max(1, max_bytes // block_bytes)
    for first, stop in itertools.pairwise(starts):
        for start in range(first, stop, most_blocks):
            count = min(most_blocks, stop - start)
            yield Segment(remote[start], local[start], count * block_bytes)


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


def first_outside(
    addresses: Sequence[int], block_bytes: int, memory: Sequence[tuple[int, int]]
) -> int | None:
    """The first of ``addresses`` at which no block of ``memory`` begins.

    ``memory``: (address, bytes) of disjoint ranges, each of whole blocks from its start on."""
    ranges = sorted(memory)
    if not ranges or min(addresses) < 0:
        return addresses[0] if not ranges else min(addresses)
    bases = np.array([base for base, _ in ranges], dtype=np.uint64)
    blocks = np.array([length // block_bytes for _, length in ranges], dtype=np.uint64)
    found = np.array(addresses, dtype=np.uint64)
    place = np.searchsorted(bases, found, side="right") - 1
    # Where no range begins below, the difference wraps around and is refused all the same.
    into = found - bases[place]
    good = (place >= 0) & (into % block_bytes == 0) & (into // block_bytes < blocks[place])
    wrong = np.flatnonzero(~good)
    return addresses[int(wrong[0])] if len(wrong) else None
