"""64-bit checksums of blocks: against bytes that were damaged on the way, not against an enemy."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence

import xxhash

UNKNOWN = 0
"""Stands for a block whose checksum nobody computed."""


def checksum_of(memory: memoryview | ctypes.Array[ctypes.c_char]) -> int:
    """XXH3 of contiguous ``memory``; never UNKNOWN. Releases the GIL."""
    value: int = xxhash.xxh3_64_intdigest(memory)
    return value or 1


def block_checksum(address: int, length: int) -> int:
    """Of ``length`` bytes of this process's memory, which the caller keeps mapped."""
    return checksum_of((ctypes.c_char * length).from_address(address))


def block_checksums(addresses: Iterable[int], length: int) -> list[int]:
    return [block_checksum(address, length) for address in addresses]


def first_damaged(addresses: Sequence[int], length: int, checksums: Sequence[int]) -> int | None:
    """Index of the first block that has not its checksum; UNKNOWN passes."""
    for index, (address, checksum) in enumerate(zip(addresses, checksums, strict=True)):
        if checksum != UNKNOWN and block_checksum(address, length) != checksum:
            return index
    return None
