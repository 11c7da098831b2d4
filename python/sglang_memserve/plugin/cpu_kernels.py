"""Attention over paged K/V on a CPU, in plain torch. Imports no SGLang.

Everything goes through torch's flash kernel for the CPU with *grouped heads folded into rows*: the
query heads that share a K/V head read the same K and V, so ``[rows, q_heads, dim]`` is presented
as ``kv_heads`` heads of ``rows * group`` rows. K and V are then never repeated, and the decode of
one token is one small matrix product instead of ``group`` memory-bound ones (7x at 1,500 tokens).

New rows after a cached prefix are two calls without a mask, merged by their log-sum-exp:

    keys    [0 ........ prefix) [prefix ........ prefix + new)
    new     every row sees all | causal, top-left aligned

A mask would cost a read of ``new * length`` values, and SGLang's ``torch_native`` pads the rows to
the whole length: 0.5, 0.6 and 22 ms for 16 rows after 1,500 tokens (9 heads over 3, dim 64).

Windows, soft caps and values of another width than keys take ``attend_tiled``: fp32, tile by tile.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

_TILE_ROWS = 128

# Short requests are decoded together: a call costs as much as about 250 padded tokens.
_MAX_GROUPED_TOKENS = 1024
_MIN_ALLOWED_PADDING = 64


@dataclass(frozen=True, slots=True)
class Extend:
    """New rows ``[start, stop)`` of the batch; ``slots`` of the prefix, then of the new tokens."""

    start: int
    stop: int
    prefix: int
    slots: torch.Tensor


@dataclass(frozen=True, slots=True)
class DecodeGroup:
    """Requests decoded in one call.

    ``rows`` ``[n]``: which rows of the batch. ``slots`` ``[n * longest]``: padded with any slot.
    ``mask`` ``[n, 1, 1, longest]``: 0 or -inf; None when nothing is padded.
    """

    rows: torch.Tensor
    slots: torch.Tensor
    mask: torch.Tensor | None


def flash(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    *,
    causal: bool = False,
    mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``[batch, heads, rows, dim]`` in, the same and the fp32 log-sum-exp ``[batch, heads, rows]``
    out. Any strides; the last dimension must be contiguous."""
    # The operator behind scaled_dot_product_attention, which does not hand out the log-sum-exp.
    result: tuple[torch.Tensor, torch.Tensor] = (
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, causal, attn_mask=mask, scale=scale
        )
    )
    return result


def gather(buffer: torch.Tensor, slots: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``[len(slots), kv_heads, dim]``; ``index_select`` is 10x faster here than indexing."""
    return buffer.index_select(0, slots).to(dtype)


def attend_new(
    query: torch.Tensor,
    prefix_key: torch.Tensor,
    prefix_value: torch.Tensor,
    new_key: torch.Tensor,
    new_value: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Causal attention of new tokens over a prefix (may be empty) and themselves.

    ``query`` ``[new, q_heads, dim]``, the others ``[prefix or new, kv_heads, dim]``.
    """
    new, q_heads, dim = query.shape
    kv_heads = new_key.shape[1]
    group = q_heads // kv_heads
    grouped = query.view(new, kv_heads, group, dim).permute(1, 2, 0, 3)
    # A stride of 0 over the group repeats K and V without copying them.
    own_key = new_key.permute(1, 0, 2).unsqueeze(1).expand(-1, group, -1, -1)
    own_value = new_value.permute(1, 0, 2).unsqueeze(1).expand(-1, group, -1, -1)
    own, own_lse = flash(grouped, own_key, own_value, scale, causal=True)
    if prefix_key.shape[0] == 0:
        return own.permute(2, 0, 1, 3).reshape(new, q_heads, dim)
    before, before_lse = attend_all(query, prefix_key, prefix_value, scale)
    share = torch.sigmoid(before_lse.view_as(own_lse) - own_lse).unsqueeze(-1)
    merged = torch.lerp(own.float(), before.view(kv_heads, group, new, dim).float(), share)
    return merged.to(query.dtype).permute(2, 0, 1, 3).reshape(new, q_heads, dim)


def attend_all(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Every row over every key. ``[1, kv_heads, group * rows, dim]`` (group before row) and its
    log-sum-exp ``[1, kv_heads, group * rows]``."""
    rows, q_heads, dim = query.shape
    kv_heads = key.shape[1]
    folded = query.view(rows, kv_heads, q_heads // kv_heads, dim).permute(1, 2, 0, 3)
    return flash(
        folded.reshape(1, kv_heads, -1, dim),
        key.permute(1, 0, 2).unsqueeze(0),
        value.permute(1, 0, 2).unsqueeze(0),
        scale,
    )


def attend_bidirectional(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
) -> torch.Tensor:
    """Every row over every key, as ``[rows, q_heads, dim]``."""
    rows, q_heads, dim = query.shape
    out, _ = attend_all(query, key, value, scale)
    kv_heads = key.shape[1]
    return out.view(kv_heads, -1, rows, dim).permute(2, 0, 1, 3).reshape(rows, q_heads, dim)


def attend_decode(
    query: torch.Tensor,
    key_buffer: torch.Tensor,
    value_buffer: torch.Tensor,
    group: DecodeGroup,
    scale: float,
) -> torch.Tensor:
    """One token of each request in ``group``. ``query`` and the result ``[n, q_heads, dim]``."""
    count, q_heads, dim = query.shape
    kv_heads = key_buffer.shape[1]
    shape = (count, -1, kv_heads, dim)
    key = gather(key_buffer, group.slots, query.dtype).view(shape).transpose(1, 2)
    value = gather(value_buffer, group.slots, query.dtype).view(shape).transpose(1, 2)
    mask = None if group.mask is None else group.mask.to(query.dtype)
    out, _ = flash(query.view(count, kv_heads, -1, dim), key, value, scale, mask=mask)
    return out.reshape(count, q_heads, dim)


def attend_tiled(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    *,
    window: int | None = None,
    softcap: float = 0.0,
) -> torch.Tensor:
    """The general form, in fp32: the rows are the last tokens of ``key``'s sequence.

    A row at position p sees keys ``max(0, p - window) ... p``. ``softcap`` c > 0 turns a score s
    into ``c * tanh(s / c)``. ``value`` may be of another width than ``key``; result
    ``[rows, q_heads, v_dim]``.
    """
    rows, q_heads, dim = query.shape
    length, kv_heads, v_dim = value.shape
    out = query.new_empty(rows, q_heads, v_dim)
    first = length - rows
    for start in range(0, rows, _TILE_ROWS):
        stop = min(start + _TILE_ROWS, rows)
        low = 0 if window is None else max(0, first + start - window)
        high = first + stop
        keys = key[low:high].permute(1, 2, 0).float()
        folded = query[start:stop].view(stop - start, kv_heads, -1, dim).permute(1, 2, 0, 3)
        scores = torch.matmul(folded.float() * scale, keys.unsqueeze(1))
        if softcap > 0:
            scores = softcap * torch.tanh(scores / softcap)
        scores.masked_fill_(~_visible(first + start, first + stop, low, high, window), -torch.inf)
        values = value[low:high].permute(1, 0, 2).float()
        tile = torch.matmul(scores.softmax(-1), values.unsqueeze(1))
        out[start:stop] = tile.permute(2, 0, 1, 3).reshape(stop - start, q_heads, v_dim)
    return out


def _visible(start: int, stop: int, low: int, high: int, window: int | None) -> torch.Tensor:
    rows = torch.arange(start, stop).unsqueeze(1)
    keys = torch.arange(low, high).unsqueeze(0)
    causal = keys <= rows
    return causal if window is None else causal & (keys >= rows - window)


def group_for_decode(slots: list[torch.Tensor]) -> list[DecodeGroup]:
    """Put requests of similar length together; each request's ``slots`` is what its token sees."""
    order = sorted(range(len(slots)), key=lambda row: len(slots[row]), reverse=True)
    groups: list[list[int]] = []
    for row in order:
        longest = len(slots[groups[-1][0]]) if groups else 0
        allowed = max(_MIN_ALLOWED_PADDING, longest // 4)
        if groups and longest <= _MAX_GROUPED_TOKENS and longest - len(slots[row]) <= allowed:
            groups[-1].append(row)
        else:
            groups.append([row])
    return [_pad(rows, [slots[row] for row in rows]) for rows in groups]


def _pad(rows: list[int], slots: list[torch.Tensor]) -> DecodeGroup:
    lengths = [len(item) for item in slots]
    longest = max(lengths)
    if min(lengths) == longest:
        return DecodeGroup(torch.tensor(rows), torch.cat(slots), None)
    # Slot 0 is SGLang's padding slot: always readable, never meaningful.
    padded = slots[0].new_zeros(len(rows), longest)
    mask = torch.full((len(rows), 1, 1, longest), -torch.inf)
    for index, item in enumerate(slots):
        padded[index, : len(item)] = item
        mask[index, ..., : len(item)] = 0
    return DecodeGroup(torch.tensor(rows), padded.view(-1), mask)
