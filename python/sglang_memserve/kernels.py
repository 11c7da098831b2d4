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
    from sgl_kernel_ext import attention, tables
    from sgl_kernel_ext.attention import AttentionPlan, PagedAttention
    from sgl_kernel_ext.engine import DecoderLayer, KvSlots, RmsNorm, Rotary, ThinLinear
    from sgl_kernel_ext.tables import RowTable

    Rows = Sequence[int] | NDArray[np.int64]

logger = logging.getLogger(__name__)


class RadixTreeCore(Protocol):
    """The native radix tree. Instances are numbers; tiers are bits, 1 for HBM and 2 for DRAM. Page
    keys are signed 64-bit integers; others raise ValueError. One thread's at a time."""

    def match_tiers(self, keys: Sequence[int]) -> list[tuple[int, int, int, int]]:
        """(instance, leading pages in any tier, in HBM, in DRAM) for each with the first page."""

    def store(self, instance: int, keys: Sequence[int], parent: int | None, tier: int) -> int:
        """0 when done; else why not, and nothing is changed: 1 a page is named twice, 2 the parent
        is one of the pages, 3 the tree is full."""

    def remove(self, instance: int, keys: Sequence[int], tier: int) -> None: ...

    def clear(self, instance: int) -> None: ...

    def dump(self, instance: int) -> list[tuple[list[int], int | None, int]]:
        """(keys, parent, tiers) of each run the instance holds, parents first."""

    def node_at(self, place: int) -> tuple[list[int], int | None, list[tuple[int, int]]] | None:
        """(keys, parent, [(instance, tiers)]) for ``0 <= place < capacity``; None: a free place."""

    def holders(self, key: int) -> list[tuple[int, int]]:
        """(instance, tiers)"""

    def counts(self, instance: int) -> tuple[int, int]:
        """Pages in HBM and in DRAM."""

    def check(self) -> str | None:
        """The first broken invariant, in words."""

    @property
    def capacity(self) -> int: ...

    @property
    def nodes(self) -> int: ...

    @property
    def pages(self) -> int: ...

    @property
    def rings(self) -> int: ...

    @property
    def nbytes(self) -> int: ...


class Native(Protocol):
    """What ``sgl_kernel_ext.ops`` offers; see there for shapes, units and errors."""

    MOST_THIN_ROWS: int

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

    def radix_tree(self, max_pages: int, position_limit: int = ...) -> RadixTreeCore: ...

    def thin_linear(
        self, weight: int, n: int, k: int, stride: int, bias: int, dtype: tables.Dtype
    ) -> ThinLinear: ...

    SlotTable: type[attention.SlotTable]
    Integers: type[attention.Integers]
    Pool: type[attention.Pool]
    Geometry: type[attention.Geometry]
    Dtype: type[tables.Dtype]
    NormForm: type[tables.NormForm]
    RotaryStyle: type[tables.RotaryStyle]
    Activation: type[tables.Activation]

    def attention_plan(
        self,
        table: attention.SlotTable,
        requests: Sequence[int],
        lengths: Sequence[int],
        rows: Sequence[int],
        written: attention.Integers,
    ) -> AttentionPlan: ...

    def paged_attention(
        self, key: attention.Pool, value: attention.Pool, geometry: attention.Geometry
    ) -> PagedAttention: ...

    def merge_state(
        self,
        out_a: int,
        lse_a: int,
        out_b: int,
        lse_b: int,
        out: int,
        lse: int,
        rows: int,
        dim: int,
        dtype: tables.Dtype,
    ) -> None: ...

    def rms_norm(
        self,
        weight: int,
        width: int,
        eps: float,
        dtype: tables.Dtype,
        weight_dtype: tables.Dtype,
        form: tables.NormForm,
    ) -> RmsNorm: ...

    def kv_slots(
        self,
        k: int,
        k_stride: int,
        k_width: int,
        v: int,
        v_stride: int,
        v_width: int,
        slots: int,
        dtype: tables.Dtype,
    ) -> KvSlots: ...

    def rotary(
        self,
        cache: int,
        positions: int,
        rotary_dim: int,
        head_dim: int,
        q_heads: int,
        k_heads: int,
        dtype: tables.Dtype,
        cache_dtype: tables.Dtype,
        style: tables.RotaryStyle,
    ) -> Rotary: ...

    def decoder_layer(
        self,
        input_norm: RmsNorm,
        qkv: ThinLinear,
        rotary: Rotary,
        attention: PagedAttention,
        o: ThinLinear,
        post_norm: RmsNorm,
        gate_up: ThinLinear,
        down: ThinLinear,
        activation: tables.Activation,
        q_norm: RmsNorm | None = None,
        k_norm: RmsNorm | None = None,
    ) -> DecoderLayer: ...

    def gate(
        self,
        x: int,
        x_stride: int,
        out: int,
        out_stride: int,
        rows: int,
        width: int,
        dtype: tables.Dtype,
        activation: tables.Activation,
        threads: int,
    ) -> None: ...


@functools.cache
def native() -> Native | None:
    """The native ops; None where they are switched off, not built, or built from older sources,
    which the log says once."""
    try:
        ops: ModuleType = importlib.import_module("sgl_kernel_ext.ops")
    except ImportError as error:
        reason: str | None = f"sgl-kernel-ext is not installed ({error})"
    else:
        reason = _why_not(ops)
        if reason is None:
            return cast(Native, ops)
    logger.warning("no native code, portable code runs in its place: %s", reason)
    return None


def _why_not(ops: ModuleType) -> str | None:
    if not ops.NATIVE:
        return str(ops.WHY_NOT_NATIVE)
    expected = {*vars(Native), *Native.__annotations__}
    missing = sorted(n for n in expected if not n.startswith("_") and not hasattr(ops, n))
    if missing:
        return f"sgl-kernel-ext is older than this package and has no {', '.join(missing)}"
    return None
