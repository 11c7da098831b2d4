"""Every op in plain Python and numpy: the oracle of the native ones, and their stand-in."""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Sequence
from hashlib import sha256

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from .tables import RowTable, Sha, Store

MOST_THREADS = 256
_ADDRESS_LIMIT = 2**64


def copy_rows(
    to: RowTable,
    source: RowTable,
    rows_to: NDArray[np.int64],
    rows_from: NDArray[np.int64],
    threads: int = 1,
    store: Store = Store.AUTOMATIC,
) -> None:
    """As ``ops.copy_rows``; one thread, with the GIL."""
    if not 1 <= threads <= MOST_THREADS:
        raise ValueError(f"threads must be in 1..{MOST_THREADS}, got {threads}")
    _check_copy(to, source, rows_to, rows_from)
    for tensor in range(len(to)):
        _rows(to, tensor)[rows_to] = _rows(source, tensor)[rows_from]


def _check_copy(
    to: RowTable, source: RowTable, rows_to: NDArray[np.int64], rows_from: NDArray[np.int64]
) -> None:
    if rows_to.shape != rows_from.shape or rows_to.ndim != 1:
        raise ValueError("destination and source rows differ in number")
    if not np.array_equal(to.row_bytes, source.row_bytes):
        raise ValueError("the two sides differ in tensors or in bytes of a row")
    for table in (to, source):
        for tensor in range(len(table)):
            _check_tensor(table, tensor)
    for rows, table in ((rows_to, to), (rows_from, source)):
        limit = int(table.rows.min()) if len(table) else 2**63 - 1
        if len(rows) and (rows.min() < 0 or rows.max() >= limit):
            raise IndexError(f"a row is not in 0..{limit - 1}")
    if len(np.unique(rows_to)) != len(rows_to):
        raise ValueError("a destination row is named twice")


def _check_tensor(table: RowTable, tensor: int) -> None:
    pointer, stride = int(table.pointers[tensor]), int(table.strides_bytes[tensor])
    row, rows = int(table.row_bytes[tensor]), int(table.rows[tensor])
    if rows < 0 or row <= 0 or stride < row:
        raise ValueError(f"tensor {tensor}: rows of {row} bytes, {stride} apart, {rows} of them")
    span = rows * stride
    if span >= 2**63 or pointer + span >= _ADDRESS_LIMIT or (pointer == 0 and span):
        raise ValueError(f"tensor {tensor}: its memory does not fit the address space")


def _rows(table: RowTable, tensor: int) -> NDArray[np.uint8]:
    """One tensor as ``uint8 [rows, row_bytes]`` over its own memory."""
    rows, row = int(table.rows[tensor]), int(table.row_bytes[tensor])
    stride = int(table.strides_bytes[tensor])
    if rows == 0:
        return np.empty((0, row), dtype=np.uint8)
    span = (rows - 1) * stride + row
    memory = (ctypes.c_uint8 * span).from_address(int(table.pointers[tensor]))
    flat: NDArray[np.uint8] = np.ctypeslib.as_array(memory)
    return as_strided(flat, shape=(rows, row), strides=(stride, 1))


def page_keys(
    tokens: Sequence[int] | NDArray[np.integer],
    page_size: int,
    seed: bytes = b"",
    sha: Sha = Sha.PLAIN,
) -> list[bytes]:
    """As ``ops.page_keys``, with the standard library's SHA-256."""
    if page_size <= 0:
        raise ValueError(f"page size must be positive, got {page_size}")
    if len(seed) not in (0, 32):
        raise ValueError(f"a parent digest has 32 bytes, not {len(seed)}")
    try:
        packed = array("I", list(tokens))
    except (OverflowError, TypeError) as error:
        raise ValueError(f"token ids must be integers in 0..4294967295: {error}") from error
    keys: list[bytes] = []
    parent = seed
    for start in range(0, len(packed) // page_size * page_size, page_size):
        page = packed[start : start + page_size]
        parent = sha256(parent + page.tobytes()).digest()
        keys.append(parent)
    return keys
