"""Native ops against their reference, and the reference against loops that cannot be wrong."""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
import sys
import threading
import time
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

pytest.importorskip("sgl_kernel_ext")

from sgl_kernel_ext import ops, reference
from sgl_kernel_ext.tables import RowTable, Sha, Store

Bytes = NDArray[np.uint8]
WAYS_OF_SHA = [Sha.AUTOMATIC, Sha.PLAIN]
if ops.NATIVE and ops.cpu_features()["sha"]:
    WAYS_OF_SHA.append(Sha.INSTRUCTIONS)


@dataclass(frozen=True)
class Implementation:
    name: str
    copy_rows: Callable[..., None]


REFERENCE = Implementation("reference", reference.copy_rows)
IMPLEMENTATIONS = [REFERENCE]
if ops.NATIVE:
    IMPLEMENTATIONS.append(Implementation("native", ops.copy_rows))


@pytest.fixture(params=IMPLEMENTATIONS, ids=lambda one: one.name)
def implementation(request: pytest.FixtureRequest) -> Implementation:
    chosen: Implementation = request.param
    return chosen


@dataclass(frozen=True)
class Side:
    """Tensors in one buffer each, somewhere inside it, with gaps between rows."""

    buffers: list[Bytes]
    offsets: list[int]
    strides: list[int]
    row_bytes: list[int]
    rows: list[int]

    @classmethod
    def random(cls, source: random.Random, row_bytes: list[int], least_rows: int) -> Side:
        offsets = [source.randrange(130) for _ in row_bytes]
        strides = [size + source.choice((0, 0, 1, 7, 64)) for size in row_bytes]
        rows = [least_rows + source.randrange(3) for _ in row_bytes]
        filler = np.random.default_rng(source.getrandbits(32))
        buffers = [
            filler.integers(0, 256, offset + stride * count + 64, dtype=np.uint8)
            for offset, stride, count in zip(offsets, strides, rows, strict=True)
        ]
        return cls(buffers, offsets, strides, row_bytes, rows)

    def table(self) -> RowTable:
        pointers = [
            buffer.ctypes.data + offset
            for buffer, offset in zip(self.buffers, self.offsets, strict=True)
        ]
        return RowTable.of(pointers, self.strides, self.row_bytes, self.rows, self.buffers)

    def start(self, tensor: int, row: int) -> int:
        return self.offsets[tensor] + row * self.strides[tensor]

    def copies(self) -> list[Bytes]:
        return [buffer.copy() for buffer in self.buffers]


def moved(to: Side, source: Side, pairs: list[tuple[int, int]]) -> list[Bytes]:
    """What the destination's buffers hold after the copy, byte by byte."""
    wanted = to.copies()
    for tensor, size in enumerate(to.row_bytes):
        for row_to, row_from in pairs:
            for byte in range(size):
                at = to.start(tensor, row_to) + byte
                wanted[tensor][at] = source.buffers[tensor][source.start(tensor, row_from) + byte]
    return wanted


@settings(deadline=None, max_examples=120)
@given(
    seed=st.integers(0, 2**32),
    row_bytes=st.lists(st.sampled_from([1, 2, 8, 63, 64, 65, 512, 700, 1024]), max_size=4),
    least=st.integers(0, 9),
    threads=st.integers(1, 3),
    store=st.sampled_from(Store),
)
def test_copies_what_was_asked_and_nothing_else(
    seed: int, row_bytes: list[int], least: int, threads: int, store: Store
) -> None:
    source = random.Random(seed)
    rows_to = source.sample(range(least), source.randint(0, least))
    pairs = [(row, source.randrange(least)) for row in rows_to]
    side_from = Side.random(source, row_bytes, least)
    side_to = Side.random(source, row_bytes, least)
    wanted, before = moved(side_to, side_from, pairs), side_to.copies()
    to, where = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    for one in IMPLEMENTATIONS:
        for buffer, first in zip(side_to.buffers, before, strict=True):
            buffer[:] = first
        one.copy_rows(
            side_to.table(),
            side_from.table(),
            np.array(to, dtype=np.int64),
            np.array(where, dtype=np.int64),
            threads,
            store,
        )
        for got, expected in zip(side_to.buffers, wanted, strict=True):
            assert np.array_equal(got, expected), one.name


@pytest.mark.parametrize("dtype", [np.uint8, np.float16, np.float32, np.int64])
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_a_copy_of_many_megabytes(
    implementation: Implementation, dtype: type[np.generic], threads: int
) -> None:
    """Enough for several threads and for streaming stores, shaped as a pool and its blocks."""
    rng = np.random.default_rng(3)
    layers, pages, words = 6, 90, 3072 // np.dtype(dtype).itemsize
    pool = [rng.integers(0, 99, (pages, words)).astype(dtype) for _ in range(layers)]
    blocks = np.zeros((pages, layers, words), dtype=dtype)
    columns = [blocks[:, layer] for layer in range(layers)]
    to, where = rng.permutation(pages)[:80], rng.permutation(pages)[:80]
    implementation.copy_rows(
        RowTable.of_arrays(columns), RowTable.of_arrays(pool), to, where, threads
    )
    for layer in range(layers):
        assert np.array_equal(blocks[to, layer], pool[layer][where])
    untouched = np.setdiff1d(np.arange(pages), to)
    assert not blocks[untouched].any()


def two_tables() -> tuple[RowTable, RowTable, Bytes]:
    to, source = np.zeros((4, 16), np.uint8), np.ones((8, 16), np.uint8)
    return RowTable.of_arrays([to]), RowTable.of_arrays([source]), to


def rows(*numbers: int) -> NDArray[np.int64]:
    return np.array(numbers, dtype=np.int64)


@pytest.mark.parametrize(
    ("to", "where"),
    [
        (rows(0, 4), rows(0, 1)),
        (rows(0, -1), rows(0, 1)),
        (rows(0, 1), rows(0, 8)),
        (rows(0, 1), rows(-1, 0)),
        (rows(0, 2**62), rows(0, 1)),
        (rows(0, -(2**63)), rows(0, 1)),
        (rows(0, 1), rows(2**63 - 1, 0)),
    ],
)
def test_a_row_out_of_bounds_moves_nothing(
    implementation: Implementation, to: NDArray[np.int64], where: NDArray[np.int64]
) -> None:
    table, source, memory = two_tables()
    with pytest.raises(IndexError):
        implementation.copy_rows(table, source, to, where)
    assert not memory.any()


@pytest.mark.parametrize("to", [rows(1, 1), rows(3, 2, 3), rows(2, 0, 1, 2)])
def test_a_destination_named_twice_is_refused(
    implementation: Implementation, to: NDArray[np.int64]
) -> None:
    table, source, memory = two_tables()
    with pytest.raises(ValueError, match="twice"):
        implementation.copy_rows(table, source, to, np.zeros(len(to), np.int64))
    assert not memory.any()


def test_rows_that_do_not_pair_are_refused(implementation: Implementation) -> None:
    table, source, memory = two_tables()
    for to, where in ((rows(0, 1), rows(0)), (rows(0).reshape(1, 1), rows(0).reshape(1, 1))):
        with pytest.raises(ValueError, match="differ in number"):
            implementation.copy_rows(table, source, to, where)
    assert not memory.any()


@pytest.mark.parametrize("threads", [0, 257])
def test_threads_are_bounded(implementation: Implementation, threads: int) -> None:
    table, source, _ = two_tables()
    with pytest.raises(ValueError, match="threads"):
        implementation.copy_rows(table, source, rows(0), rows(0), threads)


@pytest.mark.parametrize(
    ("pointer", "stride", "size", "count"),
    [
        (0, 16, 16, 4),
        (4096, 8, 16, 4),
        (4096, 16, 0, 4),
        (4096, -16, -16, 4),
        (4096, 16, 16, -1),
        (4096, 2**40, 16, 2**40),
        (2**64 - 64, 16, 16, 5),
    ],
)
def test_a_table_that_cannot_be_is_refused(
    implementation: Implementation, pointer: int, stride: int, size: int, count: int
) -> None:
    table = RowTable.of([pointer], [stride], [size], [count])
    with pytest.raises(ValueError, match=r"tensor 0|address space"):
        implementation.copy_rows(table, table, rows(0), rows(1))


def test_tables_that_do_not_fit_each_other_are_refused(implementation: Implementation) -> None:
    table, source, _ = two_tables()
    wide = RowTable.of_arrays([np.zeros((8, 17), np.uint8)])
    two = RowTable.of_arrays([np.zeros((8, 16), np.uint8)] * 2)
    for other in (wide, two, source.part(0, 0)):
        with pytest.raises(ValueError, match="differ in tensors or in bytes"):
            implementation.copy_rows(table, other, rows(0), rows(0))


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_arbitrary_rows_are_copied_or_refused(data: st.DataObject) -> None:
    """Near and far beyond the limits: both implementations refuse the same, and write the same."""
    near = st.integers(-2, 10) | st.sampled_from([2**31, 2**32, 2**62, -(2**63), 2**63 - 1])
    pairs = data.draw(st.lists(st.tuples(near, near), max_size=6))
    outcomes = []
    for one in IMPLEMENTATIONS:
        table, source, memory = two_tables()
        to, where = rows(*[pair[0] for pair in pairs]), rows(*[pair[1] for pair in pairs])
        try:
            one.copy_rows(table, source, to, where)
            outcomes.append(("done", memory.tobytes()))
        except (IndexError, ValueError) as error:
            outcomes.append((type(error).__name__, memory.tobytes()))
            assert not memory.any()
    assert len(set(outcomes)) == 1, outcomes


def test_tables_cannot_be_changed_nor_made_of_nonsense() -> None:
    table, _, _ = two_tables()
    with pytest.raises(ValueError, match="read-only"):
        table.pointers[0] = 0
    with pytest.raises(ValueError, match="differ in length"):
        RowTable.of([1, 2], [1], [1], [1])
    for pointer, count in ((-1, 1), (2**64, 1), (1, 2**63)):
        with pytest.raises(ValueError, match="64 bits"):
            RowTable.of([pointer], [1], [1], [count])
    with pytest.raises(ValueError, match="gaps"):
        RowTable.of_arrays([np.zeros((4, 8, 8), np.uint8)[:, :, :4]])


@pytest.mark.skipif(not ops.NATIVE, reason=f"no native ops: {ops.WHY_NOT_NATIVE}")
def test_others_run_while_it_copies() -> None:
    source, to = np.ones((64, 1 << 20), np.uint8), np.zeros((64, 1 << 20), np.uint8)
    tables = RowTable.of_arrays([to]), RowTable.of_arrays([source])
    every = np.arange(64)
    ended = threading.Event()

    def copy() -> None:
        try:
            for _ in range(5):
                ops.copy_rows(*tables, every, every)
        finally:
            ended.set()

    switch = sys.getswitchinterval()
    # Nobody is asked to hand the GIL over: a copy that kept it would stop this thread for good.
    sys.setswitchinterval(1000)
    turns = 0
    try:
        worker = threading.Thread(target=copy)
        worker.start()
        limit = time.monotonic() + 60
        while not ended.is_set() and time.monotonic() < limit:
            turns += 1
            time.sleep(0)
        worker.join(60)
    finally:
        sys.setswitchinterval(switch)
    assert ended.is_set() and turns > 1 and to.all()


@settings(deadline=None, max_examples=150)
@given(
    ids=st.lists(st.integers(0, 2**32 - 1), max_size=90),
    page_size=st.integers(1, 40),
    seed=st.just(b"") | st.binary(min_size=32, max_size=32),
)
def test_page_keys_are_a_chain_of_sha256(ids: list[int], page_size: int, seed: bytes) -> None:
    wanted, parent = [], seed
    for start in range(0, len(ids) - page_size + 1, page_size):
        page = b"".join(token.to_bytes(4, "little") for token in ids[start : start + page_size])
        parent = hashlib.sha256(parent + page).digest()
        wanted.append(parent)
    assert reference.page_keys(ids, page_size, seed) == wanted
    for sha in WAYS_OF_SHA:
        assert ops.page_keys(ids, page_size, seed, sha) == wanted


@pytest.mark.parametrize("page_size", [1, 5, 6, 13, 14, 16, 64, 1000])
def test_page_keys_of_every_padding(page_size: int) -> None:
    ids = [random.Random(page_size).randrange(2**32) for _ in range(3 * page_size)]
    for sha in WAYS_OF_SHA:
        assert ops.page_keys(ids, page_size, b"", sha) == reference.page_keys(ids, page_size)


@pytest.mark.parametrize("kind", ["i", "I", "l", "L", "q", "Q"])
def test_token_ids_come_in_arrays(kind: str) -> None:
    ids = [0, 1, 2**31 - 1, 7, 151_000]
    plain = reference.page_keys(ids, 2)
    packed = array(kind, ids)
    scattered = np.array([[one, 0] for one in ids], dtype=packed.typecode)[:, 0]
    for tokens in (packed, np.array(packed), memoryview(packed)):
        assert ops.page_keys(tokens, 2) == plain
    assert ops.page_keys(scattered, 2) == plain
    scalars: list[Any] = [np.int64(one) for one in ids]
    assert ops.page_keys(scalars, 2) == plain
    assert ops.page_keys(np.array([1, 2], np.uint16), 1) == reference.page_keys([1, 2], 1)
    assert ops.page_keys(range(6), 2) == ops.page_keys(list(range(6)), 2)


@pytest.mark.parametrize(
    "tokens",
    [
        [-1],
        [2**32],
        [2**63],
        [2**70],
        [1.0],
        ["1"],
        [None],
        5,
        None,
        array("q", [1, -1]),
        array("q", [2**32]),
        array("i", [-(2**31)]),
        array("Q", [2**64 - 1]),
        np.array([0.5, 1]),
    ],
)
def test_what_is_no_token_id_is_refused(tokens: Any) -> None:
    with pytest.raises(ValueError, match="token ids must be integers"):
        ops.page_keys(tokens, 1)


def test_page_keys_refuse_other_nonsense() -> None:
    for page_size in (0, -1):
        with pytest.raises(ValueError, match="page size"):
            ops.page_keys([1], page_size)
    for length in (1, 31, 33):
        with pytest.raises(ValueError, match="32 bytes"):
            ops.page_keys([1], 1, bytes(length))
    assert ops.page_keys([1, 2], 2**62) == [] == ops.page_keys([], 1)


class Shrinks:
    """An id whose conversion empties the list it is in."""

    def __init__(self, tokens: list[Any]) -> None:
        self._tokens = tokens

    def __index__(self) -> int:
        self._tokens.clear()
        return 3


def test_a_list_that_changes_while_it_is_read_is_survived() -> None:
    tokens: list[Any] = [1, 2]
    tokens += [Shrinks(tokens), *range(10_000)]
    assert ops.page_keys(tokens, 1)[:2] == reference.page_keys([1, 2], 1)


def probe(native: str) -> str:
    code = (
        "import logging; logging.basicConfig()\n"
        "from sglang_memserve import kernels\n"
        "print(kernels.native() is not None, kernels.native() is kernels.native())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "MEMSERVE_NATIVE": native},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_the_switch_turns_native_ops_off_and_says_so_once() -> None:
    said = probe("0")
    assert said.startswith("False True") and said.count("no native code") == 1
    assert "MEMSERVE_NATIVE=0" in said
    if ops.NATIVE:
        assert probe("1") == "True True\n"
