"""What one core can do at most: loops of ``vdpbf16ps`` and of reads, built of ``peak.cpp``."""

from __future__ import annotations

import ctypes
import shutil
import statistics
import subprocess
import tempfile
from pathlib import Path

import numpy as np


class Peak:
    """Rates of one thread: medians of those measured so far."""

    def __init__(self) -> None:
        compiler = shutil.which("c++") or "c++"
        source = Path(__file__).with_name("peak.cpp")
        with tempfile.TemporaryDirectory() as folder:
            built = Path(folder) / "peak.so"
            command = [compiler, "-O3", "-shared", "-fPIC", "-o", str(built), str(source)]
            subprocess.run(command, check=True, timeout=120)
            self._library = ctypes.CDLL(str(built))
        self._library.pairs_s.restype = self._library.read_s.restype = ctypes.c_double
        self._memory = np.ones(256 << 20, np.uint8)
        self._operations: list[float] = []
        self._bytes: list[float] = []

    def measure(self) -> None:
        steps = 4000
        seconds = self._library.pairs_s(ctypes.c_size_t(steps), 100)
        self._operations.append(steps * 24 * 64 / seconds)
        address, size = self._memory.ctypes.data, self._memory.nbytes
        seconds = self._library.read_s(ctypes.c_void_p(address), ctypes.c_size_t(size))
        self._bytes.append(size / seconds)

    @property
    def operations_per_s(self) -> float:
        return statistics.median(self._operations)

    @property
    def bytes_per_s(self) -> float:
        return statistics.median(self._bytes)
