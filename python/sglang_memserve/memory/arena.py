"""The memory all blocks lie in: one range of addresses, of which a part is in use.

The range is reserved once, as large as the pool may ever become, so that a block's address never
changes and one view serves for ever. Reserving costs addresses, not memory: a page of it is backed
when it is first touched. What is in use is a run of *slabs* from the start of the range, each a run
of whole blocks:

    | slab 0 | slab 1 | ... | slab n-1 |  reserved, not in use               |
    0                                  total_blocks                 capacity_blocks

The arena grows by slabs at the end and shrinks by giving the last ones back. A slab is what is
registered with the network at once: a registration cannot be cut in two later.
"""

from __future__ import annotations

import contextlib
import mmap
import os
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from ..errors import ConfigError, LimitExceeded

# Python's mmap module does not name these two; the first came with Linux 5.14.
_MADV_POPULATE_WRITE = 23
_MAP_NORESERVE = 0x4000
_POPULATE_STEP_BYTES = 64 << 20
_CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")

SLAB_BYTES = 64 << 20
# Each is a registration, and some 44 bytes of what every peer is told. Full-size slabs fill the
# whole range with half of them; the rest is for small steps.
MAX_SLABS = 1024


def machine_memory_bytes() -> int:
    """Memory this process may use: the machine's, or its container's limit if that is less."""
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for name in _CGROUP_LIMITS:
        with contextlib.suppress(OSError, ValueError):  # no such cgroup, or "max": no limit
            limits.append(int(Path(name).read_text()))
    return min(limit for limit in limits if limit > 0)


class Slab(NamedTuple):
    """Blocks ``first .. stop - 1``."""

    first: int
    stop: int


class Pinner(Protocol):
    """Lets a device reach ranges of memory by itself; what it cannot do it says in the log."""

    def pin(self, base: int, length: int) -> None: ...

    def unpin(self, base: int, length: int) -> None:
        """Before the range is given back; nobody uses it any more."""


class Arena:
    """``total_blocks`` blocks of ``block_bytes``, zero at first, mapped but not yet touched.

    ``reserve_bytes``: how far it may grow; the machine's memory if None. ``close()`` ends our use
    of the memory; the mapping itself goes when the last array or tensor over it does, so a late
    copy never faults. Raises ConfigError when the machine cannot hold it. Not thread-safe.
    """

    def __init__(
        self,
        total_blocks: int,
        block_bytes: int,
        *,
        reserve_bytes: int | None = None,
        slab_bytes: int = SLAB_BYTES,
    ) -> None:
        if total_blocks <= 0 or block_bytes <= 0:
            raise ConfigError(f"an arena of {total_blocks} blocks of {block_bytes} bytes is empty")
        self.total_blocks = 0
        self.block_bytes = block_bytes
        self._slabs: list[Slab] = []
        _require_memory(total_blocks * block_bytes)
        reserve = machine_memory_bytes() if reserve_bytes is None else reserve_bytes
        wanted = max(total_blocks, reserve // block_bytes)
        self.capacity_blocks, mapping = _reserve(wanted, total_blocks, block_bytes)
        # A forked child would make our pages copy-on-write and move them away from what the
        # network card has registered.
        mapping.madvise(mmap.MADV_DONTFORK)
        with contextlib.suppress(OSError):  # a kernel without transparent huge pages
            mapping.madvise(mmap.MADV_HUGEPAGE)
        self._mapping: mmap.mmap | None = mapping
        reserved_bytes = self.capacity_blocks * block_bytes
        bytes_ = np.frombuffer(mapping, dtype=np.uint8, count=reserved_bytes)
        self._base: int = bytes_.ctypes.data
        self._reserved: NDArray[np.uint8] | None = bytes_.reshape(-1, block_bytes)
        self._slab_blocks = max(1, slab_bytes // block_bytes, 2 * self.capacity_blocks // MAX_SLABS)
        self.grow(total_blocks)

    @property
    def nbytes(self) -> int:
        """Of the blocks in use."""
        return self.total_blocks * self.block_bytes

    @property
    def base(self) -> int:
        """Virtual address of block 0; a multiple of the machine's page size."""
        return self._base

    @property
    def view(self) -> NDArray[np.uint8]:
        """The blocks in use, ``uint8 [total_blocks, block_bytes]``."""
        return self.reserved[: self.total_blocks]

    @property
    def reserved(self) -> NDArray[np.uint8]:
        """All blocks there may ever be, ``uint8 [capacity_blocks, block_bytes]``; the same array
        for the arena's whole life. Only blocks in use may be written."""
        assert self._reserved is not None, "the arena is closed"
        return self._reserved

    @property
    def closed(self) -> bool:
        return self._reserved is None

    @property
    def slabs(self) -> tuple[Slab, ...]:
        return tuple(self._slabs)

    def address(self, block: int) -> int:
        assert 0 <= block < self.total_blocks, block
        return self._base + block * self.block_bytes

    def region(self, slab: Slab) -> tuple[int, int]:
        """Virtual address and length in bytes."""
        length = (slab.stop - slab.first) * self.block_bytes
        return self._base + slab.first * self.block_bytes, length

    # -- size --

    def grow(self, total_blocks: int) -> list[Slab]:
        """Use more blocks; returns the new slabs.

        Raises ConfigError beyond the machine's memory or the reserved range, LimitExceeded when so
        many slabs are not allowed."""
        assert total_blocks >= self.total_blocks, (total_blocks, self.total_blocks)
        _require_memory(total_blocks * self.block_bytes)
        if total_blocks > self.capacity_blocks:
            raise ConfigError(
                f"a DRAM pool of {total_blocks} blocks; addresses for {self.capacity_blocks} "
                f"of {self.block_bytes} bytes were reserved when it started"
            )
        starts = range(self.total_blocks, total_blocks, self._slab_blocks)
        if len(self._slabs) + len(starts) > MAX_SLABS:
            raise LimitExceeded(
                f"the DRAM pool has {len(self._slabs)} slabs and would get {len(starts)} more, "
                f"the limit is {MAX_SLABS}; grow it in larger steps"
            )
        new = [Slab(first, min(first + self._slab_blocks, total_blocks)) for first in starts]
        self._slabs += new
        self.total_blocks = total_blocks
        return new

    def slabs_above(self, total_blocks: int) -> list[Slab]:
        """The slabs that go when the arena shrinks to ``total_blocks``: those that lie wholly
        above. The first slab stays."""
        return [slab for slab in self._slabs[1:] if slab.first >= total_blocks]

    def shrink(self, total_blocks: int) -> tuple[int, int]:
        """Use no slab above ``total_blocks``, a slab's end, any more.

        Returns what is to be given back: where it begins, from the start of the range, and its
        length in bytes."""
        assert any(slab.stop == total_blocks for slab in self._slabs), total_blocks
        end = -(-self.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
        while self._slabs[-1].stop > total_blocks:
            self._slabs.pop()
        self.total_blocks = total_blocks
        # Whole pages only: the first may still hold the end of a block in use.
        start = -(-self.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
        return start, end - start

    def give_back(self, start: int, length: int) -> None:
        """Let the system have the memory of what ``shrink`` returned, before the arena grows again.

        Takes some 20 ms a gigabyte. Whoever reads there afterwards reads zeros."""
        mapping = self._mapping
        if mapping is not None and length:
            with contextlib.suppress(ValueError):  # closed by another thread: all of it is gone
                mapping.madvise(mmap.MADV_DONTNEED, start, length)

    def prefault(self, first_byte: int = 0, length: int | None = None) -> int:
        """Have the kernel back a part of the blocks in use with memory now; contents do not change.

        Returns the bytes backed: 0 where the kernel cannot do it, and the first touch does then.
        Safe beside copies in other threads.
        """
        assert self._mapping is not None, "the arena is closed"
        start = first_byte // mmap.PAGESIZE * mmap.PAGESIZE
        stop = self.nbytes if length is None else min(self.nbytes, first_byte + length)
        done = 0
        while start < stop:
            step = min(_POPULATE_STEP_BYTES, stop - start)
            try:
                self._mapping.madvise(_MADV_POPULATE_WRITE, start, step)
            except OSError:
                return done
            done += step
            start += step
        return done

    def close(self) -> None:
        self._reserved = None
        mapping, self._mapping = self._mapping, None
        if mapping is not None:
            # BufferError: somebody still holds an array over it, whose end unmaps it.
            with contextlib.suppress(BufferError):
                mapping.close()

    def __enter__(self) -> Arena:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def check(self) -> None:
        assert len(self._slabs) <= MAX_SLABS, len(self._slabs)
        assert 0 < self.total_blocks <= self.capacity_blocks
        end = 0
        for slab in self._slabs:
            assert slab.first == end < slab.stop <= end + self._slab_blocks, (slab, end)
            end = slab.stop
        assert end == self.total_blocks, (end, self.total_blocks)
        if self._reserved is not None:
            shape = (self.capacity_blocks, self.block_bytes)
            assert self._reserved.shape == shape, self._reserved.shape
            assert self._reserved.ctypes.data == self._base
            assert self._base % mmap.PAGESIZE == 0, self._base


def _require_memory(nbytes: int) -> None:
    limit = machine_memory_bytes()
    if nbytes > limit:
        raise ConfigError(
            f"a DRAM pool of {nbytes / 2**30:.1f} GiB does not fit into "
            f"{limit / 2**30:.1f} GiB of memory; give it a smaller size "
            f"(MemPool: arena_bytes; an instance: --mempool-dram)"
        )


def _reserve(wanted_blocks: int, least_blocks: int, block_bytes: int) -> tuple[int, mmap.mmap]:
    """Addresses for ``wanted_blocks``, or for ``least_blocks`` where the system does not give out
    more than it has memory for (overcommit off, a limit on the address space)."""
    for blocks in (wanted_blocks, least_blocks):
        length = -(-blocks * block_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
        try:
            return blocks, mmap.mmap(-1, length, flags=flags)
        except OSError as error:
            reason = error
    raise ConfigError(f"cannot map {length} bytes for the DRAM pool: {reason}") from reason
