"""The ops to call: native where they were built and are not switched off, else the reference.

``MEMSERVE_NATIVE=0``, read when this module is imported, turns all native ops off.
``WHY_NOT_NATIVE`` says why the reference runs; None where native ops do.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from . import reference
from .tables import RowTable, Store

SWITCH = "MEMSERVE_NATIVE"


def _why_not_native() -> str | None:
    if os.environ.get(SWITCH, "1") == "0":
        return f"{SWITCH}=0"
    try:
        from . import _native  # noqa: F401
    except ImportError as error:
        return f"they are not built here ({error})"
    return None


WHY_NOT_NATIVE = _why_not_native()
NATIVE = WHY_NOT_NATIVE is None

if NATIVE:
    from . import _native

Rows = Sequence[int] | NDArray[np.int64]


def row_table(
    pointers: Sequence[int],
    strides_bytes: Sequence[int],
    row_bytes: Sequence[int],
    rows: Sequence[int],
    owners: Sequence[object] = (),
) -> RowTable:
    """``RowTable.of``: where the rows of one side of a copy lie. Make it once, use it often."""
    return RowTable.of(pointers, strides_bytes, row_bytes, rows, owners)


def copy_rows(
    to: RowTable,
    source: RowTable,
    rows_to: Rows,
    rows_from: Rows,
    threads: int = 1,
    store: Store = Store.AUTOMATIC,
) -> None:
    """For every tensor t and every i: ``to[t][rows_to[i]] = source[t][rows_from[i]]``.

    Rows are int64 ``[n]``, in any order. Everything is checked before a byte moves. Lets go of the
    GIL; at most ``threads`` threads (1..256), the caller's included, and one more only for each
    megabyte. The memory of the two tables must not overlap.

    Raises IndexError for a row beyond its table's limits, and ValueError where the tables differ in
    tensors or in bytes of a row, the rows differ in number, or a destination is named twice.
    """
    to_array = np.ascontiguousarray(rows_to, dtype=np.int64)
    from_array = np.ascontiguousarray(rows_from, dtype=np.int64)
    if not NATIVE:
        reference.copy_rows(to, source, to_array, from_array, threads, store)
        return
    if to_array.ndim != 1 or from_array.ndim != 1:
        raise ValueError("destination and source rows differ in number")
    _native.copy_rows(
        to.pointers,
        to.strides_bytes,
        source.pointers,
        source.strides_bytes,
        to.row_bytes,
        source.row_bytes,
        to.rows,
        source.rows,
        to_array,
        from_array,
        threads,
        store,
    )
