"""Attention over paged K/V on a CPU, in plain torch. Imports no SGLang.

Everything goes through torch's flash kernel for the CPU, and K and V are never repeated for the
query heads that share them. A batch of new rows gives each of those heads the same K and V by a
stride of 0; a decode step *folds the heads into rows*, so that one token is one small matrix
product instead of several memory-bound ones (7x at 1,500 tokens).

New rows after a cached prefix are one call over the whole length with an additive mask:

    keys    [0 ........ prefix) [prefix ........ prefix + new)
    new     every row sees all | row i sees i + 1 of them

Splitting it into two calls without a mask, merged by their log-sum-exp, is up to 20 % faster (16
rows after 1,500 tokens: 0.53 and 0.58 ms; 512 rows: 16 and 19 ms), but rounds differently from
the prefill without a cache, and greedy answers then drift apart after some tens of tokens. The
masked call runs the same sums in the same order as the causal call that a whole prompt takes, so
a cache hit gives the same bits. That holds as long as a call has not 1, 2 or 3 rows in its last
block of rows (torch then takes another matrix product): hence ``_ROW_MULTIPLE``.

Windows, soft caps and values of another width than keys take ``attend_tiled``: fp32, tile by tile.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

_ROW_MULTIPLE = 4
# Bounds a mask's memory; SGLang's default chunk on the CPU platform, so usually the only tile.
_MASKED_ROWS = 512
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
) -> torch.Tensor:
    """``[batch, heads, rows, dim]`` in and out. Any strides; the last dimension contiguous."""
    # The operator behind scaled_dot_product_attention: called by name, so that a case it cannot
    # do is an error and not a silent change to the slow form.
    out: torch.Tensor = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, causal, attn_mask=mask, scale=scale
    )[0]
    return out


def gather(buffer: torch.Tensor, slots: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``[len(slots), kv_heads, dim]``; ``index_select`` is 10x faster here than indexing."""
    return buffer.index_select(0, slots).to(dtype)


class Masks:
    """Additive causal masks of one forward pass, shared by its layers."""

    def __init__(self) -> None:
        self._masks: dict[tuple[int, int, torch.dtype], torch.Tensor] = {}

    def get(self, rows: int, prefix: int, dtype: torch.dtype) -> torch.Tensor:
        """``[rows, prefix + rows]``, with rows added up to a multiple of ``_ROW_MULTIPLE``."""
        key = (rows, prefix, dtype)
        if key not in self._masks:
            mask = torch.zeros(_padded(rows), prefix + rows, dtype=dtype)
            own = mask[:, prefix:]
            own.copy_(torch.full(own.shape, -torch.inf, dtype=dtype).triu_(1))
            self._masks[key] = mask
        return self._masks[key]


def _padded(rows: int) -> int:
    return -(-rows // _ROW_MULTIPLE) * _ROW_MULTIPLE


def attend_causal(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, masks: Masks
) -> torch.Tensor:
    """The rows are the last tokens of ``key``'s sequence; each sees itself and what is before.

    ``query`` and the result ``[new, q_heads, dim]``, K and V ``[prefix + new, kv_heads, dim]``.
    """
    new, q_heads, dim = query.shape
    length, kv_heads, _ = key.shape
    group = q_heads // kv_heads
    # A stride of 0 over the group repeats K and V without copying them.
    keys = key.permute(1, 0, 2).unsqueeze(1).expand(-1, group, -1, -1)
    values = value.permute(1, 0, 2).unsqueeze(1).expand(-1, group, -1, -1)
    result = torch.empty_like(query)
    # A whole prompt needs no mask, so no tiles to bound it.
    step = new if length == new else _MASKED_ROWS
    for start in range(0, new, step):
        rows = min(step, new - start)
        end = length - new + start + rows
        padded = query.new_zeros(_padded(rows), q_heads, dim)
        padded[:rows] = query[start : start + rows]
        grouped = padded.view(-1, kv_heads, group, dim).permute(1, 2, 0, 3)
        if end == rows:
            out = flash(grouped, keys[:, :, :end], values[:, :, :end], scale, causal=True)
        else:
            mask = masks.get(rows, end - rows, query.dtype)
            out = flash(grouped, keys[:, :, :end], values[:, :, :end], scale, mask=mask)
        tile = out.permute(2, 0, 1, 3)[:rows]
        result[start : start + rows] = tile.reshape(rows, q_heads, dim)
    return result


def attend_bidirectional(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
) -> torch.Tensor:
    """Every row over every key. Shapes as in ``attend_causal``."""
    rows, q_heads, dim = query.shape
    kv_heads = key.shape[1]
    folded = query.view(rows, kv_heads, -1, dim).permute(1, 2, 0, 3)
    out = flash(
        folded.reshape(1, kv_heads, -1, dim),
        key.permute(1, 0, 2).unsqueeze(0),
        value.permute(1, 0, 2).unsqueeze(0),
        scale,
    )
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
    out = flash(query.view(count, kv_heads, -1, dim), key, value, scale, mask=mask)
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
