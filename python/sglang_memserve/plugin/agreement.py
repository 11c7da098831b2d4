"""What the ranks of one instance must decide alike.

Ranks run the same batches in lockstep: a rank that took a request's prefix from MemPool while
another computed it would wait for ever in the next collective operation. SGLang compares what the
ranks found (``lookup``), what landed (``pop_completed_offload``) and what was restored
(``finish_layer_wise_loading``). Whether a load can begin at all it takes from each rank alone: that
is compared here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from sglang.srt.mem_cache.cache_init_params import CacheInitParams


class Agreement:
    """The ranks that hold shards of the same pages. Use on the scheduler thread only, at points
    that all ranks reach in the same order."""

    def __init__(self, groups: list[Any]) -> None:
        self._groups = groups

    @classmethod
    def of(cls, params: CacheInitParams) -> Agreement:
        """The groups in which SGLang's cache compares its ranks."""
        attention = [params.attn_cp_cache_group, params.attn_tp_cache_group]
        groups = [group for group in attention if _ranks(group) > 1]
        if not groups and _ranks(params.tp_cache_group) > 1:
            groups = [params.tp_cache_group]
        return cls(groups)

    def unanimous(self, vote: bool) -> bool:
        """Whether every rank says yes. Waits for the slowest, at most SGLang's own time-out for
        collective operations; with one rank it costs nothing."""
        return bool(self.least([int(vote)])[0])

    def least(self, values: list[int]) -> list[int]:
        """The least of each value over the ranks. Waits as ``unanimous``."""
        if not self._groups:
            return values
        votes = torch.tensor(values, dtype=torch.int64)
        for group in self._groups:
            torch.distributed.all_reduce(votes, op=torch.distributed.ReduceOp.MIN, group=group)
        return [int(vote) for vote in votes.tolist()]


def _ranks(group: Any) -> int:
    return 0 if group is None else torch.distributed.get_world_size(group=group)
