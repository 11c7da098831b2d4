"""The only door to native code: the package ``sgl-kernel-ext``, where it is built.

A caller asks ``native()``; where that is None it runs its own portable code, which does the same
more slowly. ``MEMSERVE_NATIVE=0`` in the environment turns all native ops off.
"""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Protocol, cast

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from sgl_kernel_ext.tables import RowTable

    Rows = Sequence[int] | NDArray[np.int64]

logger = logging.getLogger(__name__)


class Native(Protocol):
    """What ``sgl_kernel_ext.ops`` offers; see there for shapes, units and errors."""

    def row_table(
        self,
        pointers: Sequence[int],
        strides_bytes: Sequence[int],
        row_bytes: Sequence[int],
        rows: Sequence[int],
        owners: Sequence[object] = (),
    ) -> RowTable: ...

    def copy_rows(
        self, to: RowTable, source: RowTable, rows_to: Rows, rows_from: Rows, threads: int = 1
    ) -> None: ...

    def page_keys(
        self, tokens: Sequence[int], page_size: int, seed: bytes = b""
    ) -> list[bytes]: ...


@functools.cache
def native() -> Native | None:
    """The native ops; None where they are switched off or not built, which the log says once."""
    try:
        ops: ModuleType = importlib.import_module("sgl_kernel_ext.ops")
    except ImportError as error:
        reason = f"sgl-kernel-ext is not installed ({error})"
    else:
        if ops.NATIVE:
            return cast(Native, ops)
        reason = str(ops.WHY_NOT_NATIVE)
    logger.warning("no native code, portable code runs in its place: %s", reason)
    return None
