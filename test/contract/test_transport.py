"""What every Transport does, over all implementations."""

from __future__ import annotations

import ctypes
import mmap
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress

import pytest
from sglang_memserve.errors import TransferFailed
from sglang_memserve.transfer.base import ReadState, Transport
from sglang_memserve.transfer.faulty import Faults, FaultyTransport
from sglang_memserve.transfer.loopback import LoopbackTransport
from sglang_memserve.transfer.nixl import NixlTransport
from sglang_memserve.transfer.regions import describe, understand

BLOCK = 4096
BLOCKS = 64
LIMIT_S = 20.0


class Memory:
    """Anonymous pages with an address; every block starts with its own byte."""

    def __init__(self, blocks: int = BLOCKS, first: int | None = None) -> None:
        self.map = mmap.mmap(-1, blocks * BLOCK)
        self.size = blocks * BLOCK
        self._view = ctypes.c_char.from_buffer(self.map)
        self.base = ctypes.addressof(self._view)
        if first is not None:
            for index in range(blocks):
                self.map[index * BLOCK : (index + 1) * BLOCK] = (
                    bytes([(first + index) % 256]) * BLOCK
                )

    def address(self, index: int) -> int:
        return self.base + index * BLOCK

    def block(self, index: int) -> bytes:
        return bytes(self.map[index * BLOCK : (index + 1) * BLOCK])


class Pair:
    """A holder and a reader, connected, each with ``BLOCKS`` blocks of memory."""

    def __init__(self, make: Callable[[str], Transport], stack: ExitStack) -> None:
        self.theirs, self.ours = Memory(first=1), Memory()
        self.holder = make(f"holder-{secrets.token_hex(6)}")
        stack.callback(self.holder.close)
        self.reader = make(f"reader-{secrets.token_hex(6)}")
        stack.callback(self.reader.close)
        self.holder.register(self.theirs.base, self.theirs.size)
        self.reader.register(self.ours.base, self.ours.size)
        self.peer = self.reader.connect(self.holder.metadata())

    def start(self, pairs: list[tuple[int, int]]) -> int:
        remote = [self.theirs.address(far) for far, _ in pairs]
        local = [self.ours.address(near) for _, near in pairs]
        return self.reader.read(self.peer, remote, local, BLOCK)

    def read(self, pairs: list[tuple[int, int]]) -> ReadState:
        return wait(self.reader, self.start(pairs))


def wait(transport: Transport, handle: int, limit_s: float = LIMIT_S) -> ReadState:
    until = time.monotonic() + limit_s
    while time.monotonic() < until:
        state = transport.poll(handle)
        if state is not ReadState.RUNNING:
            return state
        time.sleep(0.0002)
    raise AssertionError(f"the read did not end in {limit_s} s")


def faultless(name: str) -> Transport:
    return FaultyTransport(LoopbackTransport(name), Faults(delay=0.5), seed=1)


@pytest.fixture(
    params=[
        pytest.param(LoopbackTransport, id="loopback"),
        pytest.param(faultless, id="faulty"),
        pytest.param(NixlTransport, id="nixl"),
    ]
)
def make(request: pytest.FixtureRequest) -> Callable[[str], Transport]:
    maker: Callable[[str], Transport] = request.param
    return maker


@pytest.fixture
def pair(make: Callable[[str], Transport]) -> Iterator[Pair]:
    with ExitStack() as stack:
        yield Pair(make, stack)


def test_metadata_tell_the_name(pair: Pair) -> None:
    assert pair.reader.name_in(pair.holder.metadata()) == pair.peer


def test_metadata_under_another_name_are_refused() -> None:
    """Of NIXL, whose library has a name of its own; the agent it really belongs to is unharmed."""
    with ExitStack() as stack:
        pair = Pair(NixlTransport, stack)
        described, regions = understand(pair.holder.metadata())
        for name in ("somebody", f"{described.name}-2"):
            with pytest.raises(TransferFailed, match="came under the name"):
                pair.reader.connect(describe(name, regions, described.library))
        assert pair.read([(3, 5)]) is ReadState.DONE
        assert pair.ours.block(5) == pair.theirs.block(3)


def test_scattered_blocks_arrive_and_nothing_else_changes(pair: Pair) -> None:
    wanted = [(5, 60), (6, 61), (7, 3), (0, 4), (63, 0), (30, 31), (31, 32)]
    assert pair.read(wanted) is ReadState.DONE
    into = {near: far for far, near in wanted}
    for index in range(BLOCKS):
        expected = pair.theirs.block(into[index]) if index in into else bytes(BLOCK)
        assert pair.ours.block(index) == expected, index


def test_a_whole_region_is_one_run(pair: Pair) -> None:
    assert pair.read([(index, index) for index in range(BLOCKS)]) is ReadState.DONE
    assert bytes(pair.ours.map) == bytes(pair.theirs.map)


def test_one_source_block_may_go_to_several_places(pair: Pair) -> None:
    assert pair.read([(9, 1), (9, 2), (9, 3)]) is ReadState.DONE
    assert all(pair.ours.block(index) == pair.theirs.block(9) for index in (1, 2, 3))


def test_reads_run_side_by_side(pair: Pair) -> None:
    handles = [pair.start([(index, index)]) for index in range(8)]
    assert len(set(handles)) == 8
    assert [wait(pair.reader, handle) for handle in reversed(handles)] == [ReadState.DONE] * 8
    assert all(pair.ours.block(index) == pair.theirs.block(index) for index in range(8))


def test_both_directions(pair: Pair) -> None:
    pair.ours.map[:BLOCK] = b"x" * BLOCK
    back = pair.holder.connect(pair.reader.metadata())
    handle = pair.holder.read(back, [pair.ours.address(0)], [pair.theirs.address(9)], BLOCK)
    assert wait(pair.holder, handle) is ReadState.DONE
    assert pair.theirs.block(9) == b"x" * BLOCK


def test_connecting_again_renews(pair: Pair) -> None:
    assert pair.read([(1, 1)]) is ReadState.DONE
    pair.peer = pair.reader.connect(pair.holder.metadata())
    assert pair.read([(2, 2)]) is ReadState.DONE


def test_a_peer_that_was_disconnected_is_not_read_from(pair: Pair) -> None:
    pair.reader.disconnect(pair.peer)
    with pytest.raises(TransferFailed):
        pair.start([(0, 0)])
    pair.peer = pair.reader.connect(pair.holder.metadata())
    assert pair.read([(2, 2)]) is ReadState.DONE


def test_an_unknown_peer_is_refused(pair: Pair) -> None:
    with pytest.raises(TransferFailed):
        pair.reader.read("nobody", [pair.theirs.base], [pair.ours.base], BLOCK)


@pytest.mark.parametrize("metadata", [b"", b"\0" * 64, b"nonsense" * 100], ids=len)
def test_metadata_that_is_none_is_refused(pair: Pair, metadata: bytes) -> None:
    with pytest.raises(TransferFailed):
        pair.reader.connect(metadata)
    assert pair.read([(1, 1)]) is ReadState.DONE


def test_memory_that_is_not_registered_is_not_read(pair: Pair) -> None:
    beyond = pair.theirs.base + pair.theirs.size
    with pytest.raises(TransferFailed):
        pair.reader.read(pair.peer, [beyond], [pair.ours.base], BLOCK)
    with pytest.raises(TransferFailed):
        pair.reader.read(pair.peer, [pair.theirs.base], [pair.ours.base - BLOCK], BLOCK)
    assert pair.read([(1, 1)]) is ReadState.DONE


def halves(pair: Pair, make: Callable[[str], Transport], stack: ExitStack) -> Memory:
    """A holder whose memory is registered half by half, of which ``pair`` knows the first."""
    memory = Memory(first=100)
    pair.holder = make(f"halves-{secrets.token_hex(6)}")
    stack.callback(pair.holder.close)
    pair.theirs = memory
    pair.holder.register(memory.base, memory.size // 2)
    pair.peer = pair.reader.connect(pair.holder.metadata())
    return memory


def test_memory_that_is_registered_later_can_be_read_after_connecting_again(
    pair: Pair, make: Callable[[str], Transport]
) -> None:
    with ExitStack() as stack:
        memory = halves(pair, make, stack)
        with pytest.raises(TransferFailed):
            pair.start([(BLOCKS - 1, 0)])
        running = pair.start([(index, index) for index in range(8)])
        pair.holder.register(memory.address(BLOCKS // 2), memory.size // 2)
        assert pair.reader.connect(pair.holder.metadata()) == pair.peer
        # Neighbours on both sides of the seam are one run for the reader.
        assert pair.read([(index, index) for index in range(16, BLOCKS)]) is ReadState.DONE
        assert wait(pair.reader, running) is ReadState.DONE
        for index in (0, 7, 16, BLOCKS // 2 - 1, BLOCKS // 2, BLOCKS - 1):
            assert pair.ours.block(index) == memory.block(index), index


def test_our_own_memory_may_come_in_ranges_too(pair: Pair) -> None:
    more = Memory()
    pair.reader.unregister(pair.ours.base, pair.ours.size)
    with pytest.raises(TransferFailed):
        pair.start([(0, 0)])
    pair.ours = more
    pair.reader.register(more.base, more.size // 2)
    pair.reader.register(more.address(BLOCKS // 2), more.size // 2)
    assert pair.read([(index, index) for index in range(BLOCKS)]) is ReadState.DONE
    assert bytes(more.map) == bytes(pair.theirs.map)


def test_memory_that_was_given_back_and_came_again_is_read_as_it_is_now(
    pair: Pair, make: Callable[[str], Transport]
) -> None:
    with ExitStack() as stack:
        memory = halves(pair, make, stack)
        second = memory.address(BLOCKS // 2), memory.size // 2
        for round_ in range(3):
            pair.holder.register(*second)
            assert pair.reader.connect(pair.holder.metadata()) == pair.peer
            memory.map[-BLOCK:] = bytes([round_]) * BLOCK
            assert pair.read([(BLOCKS - 1, round_), (0, 9)]) is ReadState.DONE
            assert pair.ours.block(round_) == bytes([round_]) * BLOCK
            pair.holder.unregister(*second)
            # Who has not heard of it gets an error or bytes, and is none the worse for it.
            with suppress(TransferFailed):
                pair.read([(BLOCKS - 1, 20)])
            pair.peer = pair.reader.connect(pair.holder.metadata())
            with pytest.raises(TransferFailed):
                pair.start([(BLOCKS - 1, 20)])
            assert pair.read([(0, 9)]) is ReadState.DONE


def test_ranges_that_cannot_be_registered_or_given_back(pair: Pair) -> None:
    for base, length in (
        (pair.ours.base, BLOCK),
        (pair.ours.base - BLOCK, 2 * BLOCK),
        (pair.ours.base + pair.ours.size - 1, BLOCK),
        (1 << 20, 0),
    ):
        with pytest.raises(TransferFailed, match="cannot register"):
            pair.reader.register(base, length)
    for base, length in ((pair.ours.base, BLOCK), (pair.ours.base + BLOCK, BLOCK), (1, 1)):
        with pytest.raises(TransferFailed, match="not registered"):
            pair.reader.unregister(base, length)
    assert pair.read([(1, 1)]) is ReadState.DONE


def test_a_holder_that_closed_is_a_failure(pair: Pair) -> None:
    assert pair.read([(1, 1)]) is ReadState.DONE
    pair.holder.close()
    try:
        state = pair.read([(2, 2)])
    except TransferFailed:
        return
    assert state is ReadState.FAILED


def test_a_cancelled_read_ends_and_then_nothing_lands(pair: Pair) -> None:
    handle = pair.start([(index, index) for index in range(BLOCKS)])
    pair.reader.cancel(handle)
    assert wait(pair.reader, handle) is ReadState.FAILED
    before = bytes(pair.ours.map)
    time.sleep(0.05)
    assert bytes(pair.ours.map) == before
    pair.reader.cancel(handle)
    assert pair.read([(1, 1)]) is ReadState.DONE


def test_disconnecting_under_a_read_lets_it_end(pair: Pair) -> None:
    handle = pair.start([(index, index) for index in range(BLOCKS)])
    pair.reader.disconnect(pair.peer)
    wait(pair.reader, handle)
    with pytest.raises(TransferFailed):
        pair.start([(0, 0)])


def test_closing_twice_and_under_a_read(pair: Pair) -> None:
    pair.start([(index, index) for index in range(BLOCKS)])
    pair.reader.close()
    pair.reader.close()
    pair.holder.close()


def test_more_than_one_batch(make: Callable[[str], Transport]) -> None:
    """80 MiB: several submissions, in several segments of one batch and more."""
    blocks = 20_480
    with ExitStack() as stack:
        theirs, ours = Memory(blocks), Memory(blocks)
        theirs.map[:] = secrets.token_bytes(1 << 20) * 80
        holder, reader = make(f"h-{secrets.token_hex(6)}"), make(f"r-{secrets.token_hex(6)}")
        stack.callback(holder.close)
        stack.callback(reader.close)
        holder.register(theirs.base, theirs.size)
        reader.register(ours.base, ours.size)
        peer = reader.connect(holder.metadata())
        # Swapped halves: two runs longer than a batch.
        order = [*range(blocks // 2, blocks), *range(blocks // 2)]
        handle = reader.read(
            peer,
            [theirs.address(index) for index in order],
            [ours.address(index) for index in range(blocks)],
            BLOCK,
        )
        assert wait(reader, handle) is ReadState.DONE
        half = blocks // 2 * BLOCK
        assert ours.map[:half] == theirs.map[half:] and ours.map[half:] == theirs.map[:half]


@pytest.mark.parametrize("seed", range(5))
def test_injected_faults_end_reads_as_failed(seed: int) -> None:
    def make(name: str) -> Transport:
        return FaultyTransport(LoopbackTransport(name), Faults(midway=1.0, delay=0.5), seed)

    with ExitStack() as stack:
        pair = Pair(make, stack)
        assert pair.read([(index, index) for index in range(BLOCKS)]) is ReadState.FAILED


def test_injected_refusals() -> None:
    holder, reader = LoopbackTransport("refused-h"), LoopbackTransport("refused-r")
    try:
        with pytest.raises(TransferFailed, match="injected"):
            FaultyTransport(reader, Faults(connect=1.0), 0).connect(holder.metadata())
        with pytest.raises(TransferFailed, match="injected"):
            FaultyTransport(reader, Faults(read=1.0), 0).read("refused-h", [0], [0], 1)
    finally:
        holder.close()
        reader.close()


HOLDER = """
import ctypes, mmap, secrets, sys
from sglang_memserve.transfer.nixl import NixlTransport
memory = mmap.mmap(-1, int(sys.argv[1]))
view = ctypes.c_char.from_buffer(memory)
transport = NixlTransport("killed-" + secrets.token_hex(6))
transport.register(ctypes.addressof(view), len(memory))
print(transport.metadata().hex(), ctypes.addressof(view), flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("moment", ["before_first", "before", "during"])
def test_a_holder_that_is_killed_never_hangs_the_reader(moment: str) -> None:
    """NIXL only: another process holds the memory and dies of SIGKILL."""
    blocks = 20_480
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(blocks * BLOCK)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    reader = NixlTransport(f"reader-{secrets.token_hex(6)}")
    try:
        assert holder.stdout is not None
        # The test's own time limit bounds this line.
        metadata_hex, base_text = holder.stdout.readline().split()
        metadata, base = bytes.fromhex(metadata_hex), int(base_text)
        memory = Memory(blocks)
        reader.register(memory.base, memory.size)
        peer = reader.connect(metadata)
        remote = [base + index * BLOCK for index in range(blocks)]
        local = [memory.address(index) for index in range(blocks)]
        if moment != "before_first":
            assert wait(reader, reader.read(peer, remote[:9], local[:9], BLOCK)) is ReadState.DONE
        if moment == "during":
            handle = reader.read(peer, remote, local, BLOCK)
            holder.kill()
        else:
            holder.kill()
            holder.wait(10)
            try:
                handle = reader.read(peer, remote, local, BLOCK)
            except TransferFailed:
                return
        # What was submitted before the death may still be whole.
        wait(reader, handle)
        holder.wait(10)
        with pytest.raises(TransferFailed):
            if wait(reader, reader.read(peer, remote, local, BLOCK)) is ReadState.FAILED:
                raise TransferFailed("ended as FAILED")
        with pytest.raises(TransferFailed):
            reader.connect(metadata)
    finally:
        holder.kill()
        holder.communicate(timeout=10)
        reader.close()
