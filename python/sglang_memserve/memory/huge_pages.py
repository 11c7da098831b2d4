"""Large memory pages for memory that somebody else allocated: the engine's pool on a CPU.

A copy of scattered rows of a few KiB touches a new 4 KiB page with every row, and finding out where
that lies takes as long as copying it: with 2 MiB pages gathers are a quarter faster.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os

# Linux 6.1; Python's mmap module does not name it.
_MADV_COLLAPSE = 25
# The kernel has no such advice, no free large page, or is busy with these ones.
_NOT_NOW = {errno.EINVAL, errno.ENOMEM, errno.EAGAIN, errno.EBUSY}


def prefer(base: int, length: int) -> bool:
    """Put ``[base, base + length)`` into 2 MiB pages as far as it has such; no byte changes.

    Memory that is in small pages already is moved at once, which takes a second or two a GiB, where
    the kernel can; else when it finds the time. False where it has no large pages for this range.
    """
    start = -(-base // mmap.PAGESIZE) * mmap.PAGESIZE
    stop = (base + length) // mmap.PAGESIZE * mmap.PAGESIZE
    if stop <= start or not hasattr(mmap, "MADV_HUGEPAGE"):
        return False
    if not _advise(start, stop - start, mmap.MADV_HUGEPAGE):
        return False
    _advise(start, stop - start, _MADV_COLLAPSE)
    return True


def _advise(start: int, length: int, advice: int) -> bool:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), advice) == 0:
        return True
    error = ctypes.get_errno()
    assert error in _NOT_NOW, (os.strerror(error), hex(start), length, advice)
    return False
