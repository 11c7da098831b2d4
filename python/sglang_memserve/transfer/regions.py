"""Registered memory: which ranges a transport has registered, and what a peer is told of them.

A network cannot read across the end of a registration, even where the next one begins there. Blocks
never lie across it, but neighbours that are merged might: ``segments_within`` keeps them apart.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from ..errors import TransferFailed
from ..protocol import UNDECODABLE
from .plan import Addresses, Segments, segments

MAX_REGIONS = 4096


class Registration(NamedTuple):
    """``serial`` differs for every registration of one transport: the same range that was given
    back and registered again is another one, whose keys are others."""

    base: int
    length: int
    serial: int

    @property
    def end(self) -> int:
        return self.base + self.length


class Description(msgspec.Struct, frozen=True):
    """A transport's metadata: its name, its registrations, and what its library says of itself."""

    name: str
    regions: list[tuple[int, int, int]]
    library: bytes


class Regions:
    """Disjoint ranges, in order of their address."""

    def __init__(self, known: Iterable[tuple[int, int, int]] = ()) -> None:
        """Raises TransferFailed for ranges that overlap or are empty."""
        self._regions = sorted(Registration(*region) for region in known)
        if len(self._regions) > MAX_REGIONS:
            raise TransferFailed(f"{len(self._regions)} regions, the limit is {MAX_REGIONS}")
        end = 0
        for region in self._regions:
            if region.base < end or region.length <= 0:
                raise TransferFailed(f"regions overlap or are empty at {region.base:#x}")
            end = region.end
        self._next_serial = 1

    def __iter__(self) -> Iterator[Registration]:
        return iter(self._regions)

    def add(self, base: int, length: int) -> None:
        """Raises TransferFailed for a range that overlaps another or is empty."""
        place = bisect_right(self._regions, base, key=lambda region: region.base)
        near = self._regions[max(0, place - 1) : place + 1]
        overlaps = any(base < other.end and other.base < base + length for other in near)
        if length <= 0 or overlaps or len(self._regions) >= MAX_REGIONS:
            raise TransferFailed(
                f"cannot register {length} bytes at {base:#x}: empty, or registered already, "
                f"or more than {MAX_REGIONS} regions"
            )
        insort(self._regions, Registration(base, length, self._next_serial))
        self._next_serial += 1

    def remove(self, base: int, length: int) -> None:
        """Raises TransferFailed for a range that was not added as it is."""
        found = self.find(base)
        if found is None or (found.base, found.length) != (base, length):
            raise TransferFailed(f"{length} bytes at {base:#x} are not registered")
        self._regions.remove(found)

    def clear(self) -> None:
        self._regions.clear()

    def find(self, address: int) -> Registration | None:
        place = bisect_right(self._regions, address, key=lambda region: region.base)
        if place and address < self._regions[place - 1].end:
            return self._regions[place - 1]
        return None

    def covers(self, address: int, length: int) -> bool:
        """Whether the range lies within one region."""
        found = self.find(address)
        return found is not None and address + length <= found.end

    def places(self, addresses: Addresses, length: int) -> npt.NDArray[np.intp]:
        """The number of the region that holds ``length`` bytes from each address; -1 for none."""
        if not self._regions:
            return np.full(len(addresses), -1, dtype=np.intp)
        bases = np.array([region.base for region in self._regions], dtype=np.uint64)
        lengths = np.array([region.length for region in self._regions], dtype=np.uint64)
        found = np.searchsorted(bases, addresses, side="right") - 1
        # Below the first region the difference wraps around, and is more than any length.
        into = addresses - bases[found]
        inside = (found >= 0) & (lengths[found] >= length) & (into <= lengths[found] - length)
        return np.where(inside, found, -1)

    def replaces_any(self, older: Regions) -> bool:
        """Whether a range of ``older`` is part of another registration now. Ranges that are new or
        gone replace nothing."""
        # Of two ranges that overlap, one holds an end of the other.
        pairs = [(self, region) for region in older] + [(older, region) for region in self]
        return any(
            others.find(address) not in (None, region)
            for others, region in pairs
            for address in (region.base, region.end - 1)
        )


def segments_within(
    remote: Sequence[int],
    local: Sequence[int],
    block_bytes: int,
    max_bytes: int,
    far: Regions,
    near: Regions,
) -> Segments:
    """``plan.segments`` that lie within one region on either side.

    Raises TransferFailed for a block that a region does not cover."""
    there, here = np.array(remote, dtype=np.uint64), np.array(local, dtype=np.uint64)
    far_of, near_of = far.places(there, block_bytes), near.places(here, block_bytes)
    if (far_of < 0).any():
        raise TransferFailed(f"the peer has not registered {there[far_of < 0][0]:#x}")
    if (near_of < 0).any():
        raise TransferFailed(f"our destination {here[near_of < 0][0]:#x} is not registered")
    borders = (np.diff(far_of) != 0) | (np.diff(near_of) != 0)
    return segments(there, here, block_bytes, max_bytes, borders)


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Description)


def describe(name: str, regions: Regions, library: bytes) -> bytes:
    return _encoder.encode(Description(name, [(*region,) for region in regions], library))


def understand(metadata: bytes) -> tuple[Description, Regions]:
    """Raises TransferFailed for bytes that ``describe`` does not make."""
    try:
        described = _decoder.decode(metadata)
    except UNDECODABLE as error:
        raise TransferFailed(f"this is no transport's metadata: {error}") from error
    return described, Regions(described.regions)
