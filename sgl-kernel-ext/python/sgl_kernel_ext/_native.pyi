from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

def cpu_features() -> dict[str, bool]: ...
def copy_rows(
    to_pointers: NDArray[np.uint64],
    to_strides: NDArray[np.int64],
    from_pointers: NDArray[np.uint64],
    from_strides: NDArray[np.int64],
    to_row_bytes: NDArray[np.int64],
    from_row_bytes: NDArray[np.int64],
    to_limits: NDArray[np.int64],
    from_limits: NDArray[np.int64],
    rows_to: NDArray[np.int64],
    rows_from: NDArray[np.int64],
    threads: int,
    store: int,
) -> None: ...
def page_keys(
    tokens: Sequence[int] | NDArray[np.integer], page_size: int, seed: bytes, sha: int
) -> list[bytes]: ...
def isa() -> int: ...
def limit_isa(best: int) -> None: ...
def team_helpers() -> int: ...
def count_tasks(threads: int, tasks: int, failing: int) -> list[int]: ...

class ThinLinear:
    def __init__(self, weight: int, n: int, k: int, stride: int, bias: int, dtype: int) -> None: ...
    def apply(
        self, x: int, rows: int, x_stride: int, out: int, out_stride: int, threads: int
    ) -> None: ...

class RmsNorm:
    def __init__(
        self, weight: int, width: int, eps: float, dtype: int, weight_dtype: int, form: int
    ) -> None: ...
    def apply(
        self, x: int, x_stride: int, out: int, out_stride: int, rows: int, threads: int
    ) -> None: ...
    def add_and_apply(
        self,
        x: int,
        x_stride: int,
        residual: int,
        residual_stride: int,
        out: int,
        out_stride: int,
        rows: int,
        threads: int,
    ) -> None: ...

class KvSlots:
    def __init__(
        self,
        k: int,
        k_stride: int,
        k_width: int,
        v: int,
        v_stride: int,
        v_width: int,
        slots: int,
        dtype: int,
    ) -> None: ...
    def write(
        self, slots: int, rows: int, k: int, k_stride: int, v: int, v_stride: int, threads: int
    ) -> None: ...

class Rotary:
    def __init__(
        self,
        cache: int,
        positions: int,
        rotary_dim: int,
        head_dim: int,
        q_heads: int,
        k_heads: int,
        dtype: int,
        cache_dtype: int,
        style: int,
    ) -> None: ...
    def apply(
        self, positions: int, rows: int, q: int, q_stride: int, k: int, k_stride: int, threads: int
    ) -> None: ...
    def apply_and_write(
        self,
        positions: int,
        rows: int,
        q: int,
        q_stride: int,
        k: int,
        k_stride: int,
        kv: KvSlots,
        slots: int,
        v: int,
        v_stride: int,
        threads: int,
    ) -> None: ...

class DecoderLayer:
    def __init__(
        self,
        input_norm: RmsNorm,
        qkv: ThinLinear,
        rotary: Rotary,
        attention: PagedAttention,
        o: ThinLinear,
        post_norm: RmsNorm,
        gate_up: ThinLinear,
        down: ThinLinear,
        activation: int,
    ) -> None: ...
    def apply(
        self,
        plan: AttentionPlan,
        hidden: int,
        hidden_stride: int,
        residual: int,
        residual_stride: int,
        positions: int,
        rows: int,
        threads: int,
    ) -> None: ...
    def apply_first(
        self,
        plan: AttentionPlan,
        hidden: int,
        hidden_stride: int,
        residual: int,
        residual_stride: int,
        positions: int,
        rows: int,
        threads: int,
    ) -> None: ...

def gate(
    x: int,
    x_stride: int,
    out: int,
    out_stride: int,
    rows: int,
    width: int,
    dtype: int,
    activation: int,
    threads: int,
) -> None: ...

class RadixTree:
    def __init__(self, max_pages: int, position_limit: int = ...) -> None: ...
    def match_tiers(self, keys: Sequence[int]) -> list[tuple[int, int, int, int]]: ...
    def store(self, instance: int, keys: Sequence[int], parent: int | None, tier: int) -> int: ...
    def remove(self, instance: int, keys: Sequence[int], tier: int) -> None: ...
    def clear(self, instance: int) -> None: ...
    def dump(self, instance: int) -> list[tuple[list[int], int | None, int]]: ...
    def node_at(self, place: int) -> tuple[list[int], int | None, list[tuple[int, int]]] | None: ...
    def holders(self, key: int) -> list[tuple[int, int]]: ...
    def counts(self, instance: int) -> tuple[int, int]: ...
    def check(self) -> str | None: ...
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

class AttentionPlan:
    def __init__(
        self,
        table: int,
        itemsize: int,
        rows: int,
        columns: int,
        stride: int,
        requests: Sequence[int],
        lengths: Sequence[int],
        new_rows: Sequence[int],
        written: int,
        written_itemsize: int,
        written_count: int,
    ) -> None: ...
    def translated(self, address: int, itemsize: int, count: int) -> AttentionPlan: ...
    @property
    def rows(self) -> int: ...

class PagedAttention:
    def __init__(
        self,
        key: int,
        key_slot: int,
        key_head: int,
        value: int,
        value_slot: int,
        value_head: int,
        slots: int,
        q_heads: int,
        kv_heads: int,
        qk_dim: int,
        v_dim: int,
        dtype: int,
        scale: float,
        softcap: float,
        window: int,
        causal: bool,
    ) -> None: ...
    def attend(
        self,
        plan: object,
        query: int,
        query_stride: int,
        key: int,
        key_stride: int,
        value: int,
        value_stride: int,
        out: int,
        out_stride: int,
        lse: int,
        threads: int,
        /,
    ) -> None: ...

def merge_state(
    out_a: int,
    lse_a: int,
    out_b: int,
    lse_b: int,
    out: int,
    lse: int,
    rows: int,
    dim: int,
    dtype: int,
) -> None: ...
