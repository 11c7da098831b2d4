"""The ops to call: native where they were built and are not switched off, else the reference.

``MEMSERVE_NATIVE=0``, read when this module is imported, turns all native ops off.
``WHY_NOT_NATIVE`` says why the reference runs; None where native ops do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from . import reference
from .attention import Geometry as Geometry
from .attention import Integers as Integers
from .attention import Pool as Pool
from .attention import SlotTable as SlotTable
from .attention_ops import attention_plan as attention_plan
from .attention_ops import merge_state as merge_state
from .attention_ops import paged_attention as paged_attention
from .engine import DecoderLayer as DecoderLayer
from .engine import KvSlots as KvSlots
from .engine import RmsNorm as RmsNorm
from .engine import Rotary as Rotary
from .engine import ThinLinear as ThinLinear
from .engine import decoder_layer as decoder_layer
from .engine import gate as gate
from .engine import isa as isa
from .engine import kv_slots as kv_slots
from .engine import limit_isa as limit_isa
from .engine import rms_norm as rms_norm
from .engine import rotary as rotary
from .engine import thin_linear as thin_linear
from .switch import NATIVE as NATIVE
from .switch import WHY_NOT_NATIVE as WHY_NOT_NATIVE
from .tables import MOST_THIN_ROWS as MOST_THIN_ROWS
from .tables import Activation as Activation
from .tables import Dtype as Dtype
from .tables import NormForm as NormForm
from .tables import RotaryStyle as RotaryStyle
from .tables import RowTable, Sha, Store

if TYPE_CHECKING:
    from ._native import RadixTree

if NATIVE:
    from . import _native

Rows = Sequence[int] | NDArray[np.int64]
Tokens = Sequence[int] | NDArray[np.integer]


def cpu_features() -> dict[str, bool]:
    """Which of the instruction sets that ops choose among this processor has."""
    return _native.cpu_features() if NATIVE else {}


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


def page_keys(
    tokens: Tokens, page_size: int, seed: bytes = b"", sha: Sha = Sha.AUTOMATIC
) -> list[bytes]:
    """Chained SHA-256 digests of all whole pages of ``tokens``, 32 bytes each; the rest has none.

    Each is ``SHA-256(digest before || the page's ids as little-endian uint32)``; the first goes on
    from ``seed``, 32 bytes or none. Fastest for lists, tuples and buffers of 32- or 64-bit integers
    (``array.array``, numpy). Lets go of the GIL while it hashes.

    Raises ValueError for an id that is no integer in 0..2**32 - 1, another length of ``seed``, a
    page size that is not positive, and for ``Sha.INSTRUCTIONS`` where there are none.
    """
    if not NATIVE:
        return reference.page_keys(tokens, page_size, seed, sha)
    return _native.page_keys(tokens, page_size, seed, sha)


def radix_tree(max_pages: int, position_limit: int = 1 << 30) -> RadixTree:
    """An empty merged tree of at most ``max_pages`` pages. Its oracle is the router's
    ``global_tree.GlobalTree``, which also takes its place where there are no native ops.

    ``position_limit`` is for tests: how far positions in a run may drift before they are numbered
    anew. Raises RuntimeError where there are no native ops, ValueError for impossible sizes.
    """
    if not NATIVE:
        raise RuntimeError(f"no native radix tree: {WHY_NOT_NATIVE}")
    return _native.RadixTree(max_pages, position_limit)
