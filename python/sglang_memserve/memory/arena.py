"""The memory all blocks lie in: one anonymous mapping, so that one registration covers it."""

from __future__ import annotations

import contextlib
import mmap
import os
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from ..errors import ConfigError

# Linux 5.14; Python's mmap module does not name it.
_MADV_POPULATE_WRITE = 23
_POPULATE_STEP_BYTES = 64 << 20
_CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def machine_memory_bytes() -> int:
    """Memory this process may use: the machine's, or its container's limit if that is less."""
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for name in _CGROUP_LIMITS:
        with contextlib.suppress(OSError, ValueError):  # no such cgroup, or "max": no limit
            limits.append(int(Path(name).read_text()))
    return min(limit for limit in limits if limit > 0)


class Arena:
    """``total_blocks`` blocks of ``block_bytes``, zero at first, mapped but not yet touched.

    ``view`` is ``uint8 [total_blocks, block_bytes]``. ``close()`` ends our use of the memory; the
    mapping itself goes when the last array or tensor over it does, so a late copy never faults.
    Raises ConfigError when the machine cannot hold it.
    """

    def __init__(self, total_blocks: int, block_bytes: int) -> None:
        if total_blocks <= 0 or block_bytes <= 0:
            raise ConfigError(f"an arena of {total_blocks} blocks of {block_bytes} bytes is empty")
        self.total_blocks = total_blocks
        self.block_bytes = block_bytes
        limit = machine_memory_bytes()
        if self.nbytes > limit:
            raise ConfigError(
                f"a DRAM pool of {self.nbytes / 2**30:.1f} GiB does not fit into "
                f"{limit / 2**30:.1f} GiB of memory; give --mempool-dram a smaller size"
            )
        length = -(-self.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
        try:
            mapping = mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            raise ConfigError(f"cannot map {length} bytes for the DRAM pool: {error}") from error
        # A forked child would make our pages copy-on-write and move them away from what the
        # network card has registered.
        mapping.madvise(mmap.MADV_DONTFORK)
        with contextlib.suppress(OSError):  # a kernel without transparent huge pages
            mapping.madvise(mmap.MADV_HUGEPAGE)
        self._mapping: mmap.mmap | None = mapping
        bytes_ = np.frombuffer(mapping, dtype=np.uint8, count=self.nbytes)
        self._base: int = bytes_.ctypes.data
        self._view: NDArray[np.uint8] | None = bytes_.reshape(total_blocks, block_bytes)

    @property
    def nbytes(self) -> int:
        return self.total_blocks * self.block_bytes

    @property
    def base(self) -> int:
        """Virtual address of block 0; a multiple of the machine's page size."""
        return self._base

    @property
    def view(self) -> NDArray[np.uint8]:
        assert self._view is not None, "the arena is closed"
        return self._view

    @property
    def closed(self) -> bool:
        return self._view is None

    def address(self, block: int) -> int:
        assert 0 <= block < self.total_blocks, block
        return self._base + block * self.block_bytes

    def prefault(self, first_byte: int = 0, length: int | None = None) -> int:
        """Have the kernel back a part of the arena with memory now; contents do not change.

        Returns the bytes backed: 0 where the kernel cannot do it, and the first touch does then.
        Safe beside copies in other threads.
        """
        assert self._mapping is not None, "the arena is closed"
        start = first_byte // mmap.PAGESIZE * mmap.PAGESIZE
        stop = min(len(self._mapping), self.nbytes if length is None else first_byte + length)
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
        self._view = None
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
        if self._view is not None:
            assert self._view.shape == (self.total_blocks, self.block_bytes), self._view.shape
            assert self._view.ctypes.data == self._base
            assert self._base % mmap.PAGESIZE == 0, self._base
