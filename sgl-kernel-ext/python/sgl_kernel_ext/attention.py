"""What paged attention is handed, and what it gives back.

A plan is made once a forward pass and serves all layers; a ``PagedAttention`` is made once a layer
and serves all passes. Both are made by ``ops``; tensors are addresses and strides in elements,
whose memory the caller keeps alive.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from .tables import Dtype


@dataclass(frozen=True, slots=True)
class Integers:
    """``count`` signed integers of ``itemsize`` bytes (4 or 8), side by side."""

    address: int = 0
    itemsize: int = 8
    count: int = 0


@dataclass(frozen=True, slots=True)
class SlotTable:
    """SGLang's ``req_to_token``: ``[rows, columns]`` integers of ``itemsize`` bytes, rows
    ``stride`` integers apart; a row holds the slots of one request's tokens, by position."""

    address: int
    itemsize: int
    rows: int
    columns: int
    stride: int


@dataclass(frozen=True, slots=True)
class Pool:
    """Keys or values of all slots: ``[slots, kv_heads, dim]``, contiguous in the last dimension."""

    address: int
    slot_stride: int
    head_stride: int


@dataclass(frozen=True, slots=True)
class Geometry:
    """One layer. Dims are multiples of 16, up to 512; ``q_heads`` a multiple of ``kv_heads``.

    Scores are ``scale * q . k``, and with ``softcap`` c > 0 then ``c * tanh(score / c)``. A causal
    row sees itself and up to ``window`` tokens before (-1: all of them); another one sees all
    tokens of its request.
    """

    slots: int
    q_heads: int
    kv_heads: int
    qk_dim: int
    v_dim: int
    dtype: Dtype
    scale: float
    softcap: float = 0.0
    window: int = -1
    causal: bool = True


class AttentionPlan(Protocol):
    """Where the tokens of a batch's requests lie."""

    def translated(self, address: int, itemsize: int, count: int) -> AttentionPlan:
        """The same for a pool with slots of its own: ``map[slot]`` for each slot, of a map given as
        ``Integers``. Slots below 0 stay so. Raises IndexError for one beyond the map."""

    @property
    def rows(self) -> int:
        """New tokens of the batch."""


class PagedAttention(Protocol):
    """Attention of one layer over its pool."""

    def attend(
        self,
        plan: AttentionPlan,
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
    ) -> None:
        """Write the new rows' keys and values to the pool, then attend.

        Addresses: ``query [rows, q_heads, qk_dim]``; ``key [rows, kv_heads, qk_dim]`` and ``value
        [rows, kv_heads, v_dim]``, both 0 where nothing is to be written; ``out [rows, q_heads,
        v_dim]``; ``lse [rows, q_heads]`` fp32, contiguous: the natural logarithm of the sum of each
        row's exp(score), or 0 where it is not wanted. The strides are of rows, in elements; heads
        lie side by side. A row that sees nothing gets 0, and -inf as its ``lse``.

        What a row gets does not depend, bit for bit, on the rows beside it, on ``threads``
        (1..256), or on how many of its request's tokens are new (as long as values are finite: one
        that is not reaches rows up to 63 positions before its own). Lets go of the GIL.

        Raises IndexError for slots beyond the pool and ValueError for what does not fit; then
        nothing has been read or written.
        """
