"""The ops of paged attention, as ``ops`` offers them."""

from __future__ import annotations

from collections.abc import Sequence

from . import reference_attention
from .attention import AttentionPlan, Geometry, Integers, PagedAttention, Pool, SlotTable
from .switch import NATIVE
from .tables import Dtype

if NATIVE:
    from . import _native


def attention_plan(
    table: SlotTable,
    requests: Sequence[int],
    lengths: Sequence[int],
    rows: Sequence[int],
    written: Integers = Integers(),  # noqa: B008 (frozen)
) -> AttentionPlan:
    """A forward pass over requests ``requests[i]`` (rows of ``table``) of ``lengths[i]`` tokens, of
    which the last ``rows[i]`` are new; the batch's rows are the new tokens of all, in order.
    ``written`` holds the slots of all new tokens. Everything is copied.

    Raises IndexError for requests and lengths beyond the table, ValueError for impossible sizes.
    """
    if not NATIVE:
        return reference_attention.attention_plan(table, requests, lengths, rows, written)
    return _native.AttentionPlan(
        table.address,
        table.itemsize,
        table.rows,
        table.columns,
        table.stride,
        requests,
        lengths,
        rows,
        written.address,
        written.itemsize,
        written.count,
    )


def paged_attention(key: Pool, value: Pool, geometry: Geometry) -> PagedAttention:
    """A layer over its pool, both of ``geometry.slots`` slots.

    bf16 is computed in pairs where the processor has instructions for that (scores and sums are
    fp32, the weights of values bf16), everything else in fp32. Raises ValueError for a geometry or
    a pool that cannot be.
    """
    if not NATIVE:
        return reference_attention.Attention(key, value, geometry)
    return _native.PagedAttention(
        key.address,
        key.slot_stride,
        key.head_stride,
        value.address,
        value.slot_stride,
        value.head_stride,
        geometry.slots,
        geometry.q_heads,
        geometry.kv_heads,
        geometry.qk_dim,
        geometry.v_dim,
        geometry.dtype,
        geometry.scale,
        geometry.softcap,
        geometry.window,
        geometry.causal,
    )


def merge_state(
    out_a: int,
    lse_a: int,
    out_b: int,
    lse_b: int,
    out: int,
    lse: int,
    rows: int,
    dim: int,
    dtype: Dtype,
) -> None:
    """Two attentions of the same rows over different keys become the attention over all of them.

    Addresses of contiguous memory: each ``out [rows, dim]`` of ``dtype`` with its ``lse [rows]``,
    fp32 natural logarithms. The results may lie over inputs. A part that saw no key (-inf) counts
    for nothing. Lets go of the GIL. Raises ValueError for addresses that cannot be.
    """
    where = (out_a, lse_a, out_b, lse_b, out, lse, rows, dim, dtype)
    if NATIVE:
        _native.merge_state(*where)
    else:
        reference_attention.merge_state(*where)
