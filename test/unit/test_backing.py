from __future__ import annotations

import ctypes
import mmap
import time
from collections.abc import Iterator

import pytest
from sglang_memserve.memory import backing
from sglang_memserve.memory.backing import Backing

MEGA = 1 << 20
LIMIT_S = 20.0


class Fresh:
    """Memory that nobody has touched."""

    def __init__(self, length: int) -> None:
        self.map = mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.length = length
        self._first = ctypes.c_char.from_buffer(self.map)
        self.base = ctypes.addressof(self._first)

    def backed_pages(self) -> int:
        pages = self.length // mmap.PAGESIZE
        told = (ctypes.c_ubyte * pages)()
        libc = ctypes.CDLL(None, use_errno=True)
        code = libc.mincore(ctypes.c_void_p(self.base), ctypes.c_size_t(self.length), told)
        assert code == 0, ctypes.get_errno()
        return sum(value & 1 for value in told)

    def close(self) -> None:
        del self._first
        self.map.close()


@pytest.fixture
def fresh() -> Iterator[Fresh]:
    memory = Fresh(16 * MEGA)
    yield memory
    memory.close()


def settle(work: Backing) -> None:
    until = time.monotonic() + LIMIT_S
    while work.waiting_bytes():
        assert time.monotonic() < until
        time.sleep(0.005)
    work.close()


def test_memory_is_there_before_it_is_touched(fresh: Fresh) -> None:
    fresh.map[5 * MEGA] = 7
    work = Backing()
    work.add(fresh.base, fresh.length)
    settle(work)
    assert fresh.backed_pages() == fresh.length // mmap.PAGESIZE
    assert fresh.map[5 * MEGA] == 7 and fresh.map[:MEGA] == bytes(MEGA)


def test_what_was_removed_is_not_touched(fresh: Fresh, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []
    gate = [False]

    def populate(start: int, length: int) -> bool:
        asked.append((start - fresh.base, length))
        while not gate[0]:
            time.sleep(0.001)
        return True

    monkeypatch.setattr(backing, "_populate", populate)
    work = Backing()
    work.add(fresh.base, fresh.length)
    while not asked:
        time.sleep(0.001)
    gate[0] = True
    # Between the first step and the last: whichever step is under way ends before this returns.
    work.remove(fresh.base + 8 * MEGA, 4 * MEGA)
    before = len(asked)
    settle(work)
    touched = {offset // MEGA for offset, _ in asked[before:]}
    assert not touched & {8, 9, 10, 11}
    assert sum(length for _, length in asked) >= fresh.length - 4 * MEGA


def test_closing_ends_it_at_once(fresh: Fresh, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def populate(start: int, length: int) -> bool:
        asked.append(start)
        time.sleep(0.05)
        return True

    monkeypatch.setattr(backing, "_populate", populate)
    work = Backing()
    work.add(fresh.base, fresh.length)
    work.close()
    assert len(asked) <= 2 and work.waiting_bytes() == 0


def test_a_kernel_that_cannot_leaves_it_to_the_first_touch(
    fresh: Fresh, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backing, "_populate", lambda start, length: False)
    work = Backing()
    work.add(fresh.base, fresh.length)
    settle(work)
    assert fresh.backed_pages() == 0
