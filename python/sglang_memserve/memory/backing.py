"""Memory that the system hands over before it is needed.

A fresh mapping gets its memory at the first touch of each page, zeroed by whoever touches it: a
store into a new arena spends nine tenths of its time there, on a core that the engine's forward may
want. ``Backing`` has it done ahead, in a thread of low priority, once for every part of the arena.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import mmap
import os
import threading

log = logging.getLogger(__name__)

# Linux 5.14; Python's mmap module does not name it.
_MADV_POPULATE_WRITE = 23
# Whoever gives memory back waits for the step under way.
_STEP_BYTES = 2 << 20
# A smaller pool is not worth a thread.
WORTH_BYTES = 64 << 20
_NICENESS = 10
_CLOSE_S = 10.0


class Backing:
    """Ranges of ``memory`` to back, in the order they came. Thread-safe; the thread lives while
    there are any, and ``memory`` with it: it stays mapped until ``close``."""

    def __init__(self, memory: object) -> None:
        self._memory = memory
        self._closed = False
        self._lock = threading.Lock()
        self._ranges: list[tuple[int, int]] = []
        self._thread: threading.Thread | None = None

    def add(self, base: int, length: int) -> None:
        """Back ``length`` bytes at ``base``, soon. What they hold does not change. Nothing after
        ``close``."""
        start = -(-base // mmap.PAGESIZE) * mmap.PAGESIZE
        stop = (base + length) // mmap.PAGESIZE * mmap.PAGESIZE
        if stop <= start:
            return
        with self._lock:
            if self._closed:
                return
            self._ranges.append((start, stop))
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._run, name="memserve-backing", daemon=True
                )
                self._thread.start()

    def remove(self, base: int, length: int) -> None:
        """No byte of the range is touched after this, which waits for a step at most."""
        stop = base + length
        with self._lock:
            kept: list[tuple[int, int]] = []
            for first, last in self._ranges:
                parts = ((first, min(last, base)), (max(first, stop), last))
                kept += [part for part in parts if part[0] < part[1]]
            self._ranges = kept

    def waiting_bytes(self) -> int:
        with self._lock:
            return sum(stop - start for start, stop in self._ranges)

    def close(self) -> None:
        """Waits for a step at most; lets go of the memory."""
        with self._lock:
            self._closed = True
            self._ranges.clear()
            thread = self._thread
            # Steps are done under the lock, so there will be none.
            self._memory = None
        if thread is not None:
            thread.join(_CLOSE_S)

    def _run(self) -> None:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
        while self._step():
            pass

    def _step(self) -> bool:
        with self._lock:
            if not self._ranges:
                self._thread = None
                return False
            start, stop = self._ranges[0]
            end = min(start + _STEP_BYTES, stop)
            if not _populate(start, end - start):
                # It is backed when it is touched, as without us.
                self._ranges.clear()
            elif end == stop:
                del self._ranges[0]
            else:
                self._ranges[0] = (end, stop)
            return True


def _populate(start: int, length: int) -> bool:
    """Without the GIL. False where the kernel cannot, or has no memory left."""
    libc = ctypes.CDLL(None, use_errno=True)
    advice = ctypes.c_int(_MADV_POPULATE_WRITE)
    if libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), advice) == 0:
        return True
    code = ctypes.get_errno()
    if code != errno.EINVAL:
        log.warning("the DRAM pool's memory is not all there yet: %s", os.strerror(code))
    return False
