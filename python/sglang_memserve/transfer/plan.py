"""What one read submits: blocks become segments, segments become batches. Pure."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Addresses = npt.NDArray[np.uint64]
# One row for each: the peer's address, our address, bytes.
Segments = npt.NDArray[np.uint64]


def segments(
    remote: Addresses,
    local: Addresses,
    block_bytes: int,
    max_bytes: int,
    borders: npt.NDArray[np.bool_],
) -> Segments:
    """Blocks in order, neighbours on both sides merged into segments of at most ``max_bytes``, but
    never across a border: ``borders[i]`` says that block ``i + 1`` does not go on from block ``i``.

    Segments hold whole blocks; a block larger than ``max_bytes`` is a segment of its own.
    """
    assert len(remote) == len(local), (len(remote), len(local))
    if len(remote) == 0:
        return np.empty((0, 3), dtype=np.uint64)
    breaks = (np.diff(remote) != block_bytes) | (np.diff(local) != block_bytes) | borders
    most_blocks = max(1, max_bytes // block_bytes)
    starts = np.concatenate(([0], np.flatnonzero(breaks) + 1))
    counts = np.diff(starts, append=len(remote))
    if counts.max() > most_blocks:
        of_run = np.repeat(starts, counts)
        starts = np.flatnonzero((np.arange(len(remote)) - of_run) % most_blocks == 0)
        counts = np.diff(starts, append=len(remote))
    lengths = counts.astype(np.uint64) * np.uint64(block_bytes)
    return np.column_stack((remote[starts], local[starts], lengths))


def batches(parts: Segments, max_bytes: int) -> list[Segments]:
    """Segments in order in lists of at most ``max_bytes``, but at least one segment each."""
    ends = np.cumsum(parts[:, 2])
    result: list[Segments] = []
    first, done = 0, 0
    while first < len(parts):
        stop = max(first + 1, int(np.searchsorted(ends, done + max_bytes, side="right")))
        result.append(parts[first:stop])
        first, done = stop, int(ends[stop - 1])
    return result


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
