"""Host memory that the accelerator reaches by itself: page-locked and mapped.

``PinnedRanges`` keeps which ranges are registered; ``CudaDriver`` registers them. Ranges come and
go with the arena's slabs. A block that is not wholly within one range is not covered, and is copied
the staged way.
"""

from __future__ import annotations

import bisect
import ctypes
import mmap
import threading
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from ..errors import DeviceError

_PORTABLE_AND_MAPPED = 0x01 | 0x02


class Registrar(Protocol):
    """Raises DeviceError, with the driver's reason, when it refuses."""

    def register(self, base: int, length: int) -> None:
        """Lock ``length`` bytes at ``base`` and let the device reach them at the same address."""

    def unregister(self, base: int) -> None: ...


class PinnedRanges:
    """The registered ranges, whole memory pages each. Thread-safe."""

    def __init__(self, registrar: Registrar) -> None:
        self._registrar = registrar
        self._lock = threading.Lock()
        # Disjoint, sorted; replaced as a whole, so that readers need no lock.
        self._ranges: list[tuple[int, int]] = []
        self._bounds = np.empty((2, 0), dtype=np.int64)

    def pin(self, base: int, length: int) -> None:
        """Raises DeviceError when it cannot be; then nothing has changed.

        ``base`` and ``base + length`` are rounded inwards to memory pages: what shares a page with
        somebody else's memory is not ours to register.
        """
        start = -(-base // mmap.PAGESIZE) * mmap.PAGESIZE
        stop = (base + length) // mmap.PAGESIZE * mmap.PAGESIZE
        if stop <= start:
            return
        with self._lock:
            for other in self._ranges:
                assert stop <= other[0] or other[1] <= start, (base, length, other)
            self._registrar.register(start, stop - start)
            bisect.insort(self._ranges, (start, stop))
            self._publish()

    def unpin(self, base: int, length: int) -> None:
        """End every registration that touches the range; nobody may copy there any more.

        Raises DeviceError when the driver refuses; the range is forgotten nevertheless."""
        with self._lock:
            gone = [r for r in self._ranges if r[0] < base + length and base < r[1]]
            self._ranges = [r for r in self._ranges if r not in gone]
            self._publish()
            for start, _ in gone:
                self._registrar.unregister(start)

    def close(self) -> None:
        """End every registration."""
        self.unpin(0, 1 << 63)

    @property
    def pinned_bytes(self) -> int:
        return sum(stop - start for start, stop in self._ranges)

    def numbers(self, addresses: NDArray[np.int64]) -> NDArray[np.int64]:
        """For each address the number of the range it lies in, or -1: int64 ``[n]``."""
        starts, stops = self._bounds
        found = np.searchsorted(starts, addresses, side="right") - 1
        inside = (found >= 0) & (addresses < stops[found]) if len(starts) else found >= 0
        return np.where(inside, found, -1)

    def covers(self, addresses: NDArray[np.int64], length: int) -> bool:
        """Whether ``length`` bytes at each address lie within one range."""
        first = self.numbers(addresses)
        return bool((first >= 0).all() and (first == self.numbers(addresses + length - 1)).all())

    def check(self) -> None:
        with self._lock:
            for one, other in zip(self._ranges, self._ranges[1:], strict=False):
                assert one[0] < one[1] <= other[0] < other[1], (one, other)
            assert self._bounds.T.tolist() == [list(r) for r in self._ranges]

    def _publish(self) -> None:
        self._bounds = np.array(self._ranges, dtype=np.int64).reshape(-1, 2).T.copy()


class CudaDriver:
    """Registers through the driver's interface rather than the runtime's: a refusal there would
    stay behind as the runtime's "last error" and fail the next kernel launch, whoever's it is."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        try:
            self._cuda = ctypes.CDLL("libcuda.so.1")
        except OSError as error:
            raise DeviceError(f"no CUDA driver: {error}") from error

    def register(self, base: int, length: int) -> None:
        with torch.cuda.device(self._device):
            # A new thread has no context until it asks the runtime for something.
            torch.cuda.current_stream().query()
            size, flags = ctypes.c_size_t(length), ctypes.c_uint(_PORTABLE_AND_MAPPED)
            self._call("cuMemHostRegister_v2", ctypes.c_void_p(base), size, flags)
            reached = ctypes.c_uint64()
            pointer = ctypes.byref(reached)
            zero = ctypes.c_uint(0)
            try:
                self._call("cuMemHostGetDevicePointer_v2", pointer, ctypes.c_void_p(base), zero)
                if reached.value != base:
                    raise DeviceError(f"the device sees host address {base:#x} elsewhere")
            except DeviceError:
                self._call("cuMemHostUnregister", ctypes.c_void_p(base))
                raise

    def unregister(self, base: int) -> None:
        with torch.cuda.device(self._device):
            torch.cuda.current_stream().query()
            self._call("cuMemHostUnregister", ctypes.c_void_p(base))

    def _call(self, name: str, *arguments: object) -> None:
        code = getattr(self._cuda, name)(*arguments)
        if code:
            text = ctypes.c_char_p()
            self._cuda.cuGetErrorString(code, ctypes.byref(text))
            reason = (text.value or b"unknown error").decode(errors="replace")
            raise DeviceError(f"{name}: {reason} ({code})")
