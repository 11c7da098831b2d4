"""The size of an instance's DRAM pool: one number to the operator, one pool a rank underneath.

All ranks change, or none as far as possible: when one refuses, the others go back. A rank that
cannot go back any more leaves the instance uneven, which costs memory and nothing else: a page
counts as present when all ranks have it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Protocol

from fastapi import APIRouter, Request, Response

from ..config import parse_dram
from ..errors import ConfigError, LimitExceeded, MemServeError
from ..protocol.control import ResizeReply, ResizeRequest, StatsReply, StatsRequest
from ..protocol.http import PoolBody, PoolInfo, PoolResult, RankPool, RankResize
from ..transfer.client import LocalClient
from ..transfer.resizer import MAX_WAIT_S
from ..types import ResizeOutcome
from .answers import json_answer, memserve_router, read_body

_CALL_S = 5.0
# On top of the patience that was asked for: pages are moved, a gigabyte or more a second.
_WORK_S = 60.0
_BACK_WAIT_S = 1.0

UNEVEN = "uneven"
_REFUSALS = (ResizeOutcome.REFUSED.value, UNEVEN)


class Sized(Protocol):
    """What the routes need of the instance."""

    async def pool(self) -> PoolInfo: ...

    async def resize_pool(self, body: PoolBody) -> PoolResult: ...


class PoolSize:
    """``ranks`` in order; they answer on their local sockets."""

    def __init__(self, ranks: Sequence[LocalClient]) -> None:
        self._ranks = ranks
        self._busy = asyncio.Lock()

    async def show(self) -> PoolInfo:
        """Raises PeerUnreachable when a rank does not answer."""
        replies = await asyncio.gather(
            *(rank.call(StatsRequest(), _CALL_S) for rank in self._ranks)
        )
        pools = [
            _describe(index, reply.values)
            for index, reply in enumerate(replies)
            if isinstance(reply, StatsReply)
        ]
        return PoolInfo(sum(pool.total_bytes for pool in pools), pools)

    async def resize(self, body: PoolBody) -> PoolResult:
        """A size that cannot be had now is a result. Raises ConfigError for one that can never be,
        LimitExceeded while another change is under way, PeerUnreachable when a rank is silent
        before anything has changed."""
        share_bytes = _wanted_bytes(body) // len(self._ranks)
        if self._busy.locked():
            raise LimitExceeded("another change of the pool's size is under way")
        async with self._busy:
            before = await self.show()
            answers = await self._ask([share_bytes] * len(self._ranks), body.wait_s)
            failed = [answer for answer in answers if isinstance(answer, MemServeError)]
            if len(failed) == len(answers):
                raise failed[0]
            done = [_result(index, answer) for index, answer in enumerate(answers)]
            refused = [rank for rank in done if rank.outcome == ResizeOutcome.REFUSED.value]
            if not refused:
                changed = any(rank.outcome == ResizeOutcome.RESIZED.value for rank in done)
                outcome = ResizeOutcome.RESIZED if changed else ResizeOutcome.UNCHANGED
                return await self._finish(outcome.value, "", done)
            reason = "; ".join(f"rank {rank.rank}: {rank.reason}" for rank in refused)
            await self._ask([pool.total_bytes for pool in before.ranks], _BACK_WAIT_S)
            return await self._finish(ResizeOutcome.REFUSED.value, reason, done, before)

    async def _finish(
        self,
        outcome: str,
        reason: str,
        done: Sequence[RankResize],
        before: PoolInfo | None = None,
    ) -> PoolResult:
        after = await self.show()
        if before is not None:
            sizes = zip(before.ranks, after.ranks, strict=True)
            stuck = [str(new.rank) for old, new in sizes if new.total_blocks != old.total_blocks]
            if stuck:
                outcome = UNEVEN
                reason += f"; could not take back the change of rank {', '.join(stuck)}"
        return PoolResult(outcome, reason, after.dram_bytes, after.ranks, list(done))

    async def _ask(self, sizes: Sequence[int], wait_s: float) -> list[ResizeReply | MemServeError]:
        answers = await asyncio.gather(
            *(
                rank.call(ResizeRequest(size, wait_s), wait_s + _WORK_S)
                for rank, size in zip(self._ranks, sizes, strict=True)
            ),
            return_exceptions=True,
        )
        results: list[ResizeReply | MemServeError] = []
        for answer in answers:
            if isinstance(answer, ResizeReply | MemServeError):
                results.append(answer)
            elif isinstance(answer, BaseException):
                raise answer
            else:
                results.append(MemServeError(f"a rank answered with {type(answer).__name__}"))
        return results


def pool_routes(instance: Sized) -> APIRouter:
    """``GET`` and ``POST /memserve/pool``."""
    router = memserve_router()

    @router.get("/pool")
    async def show() -> Response:
        return json_answer(await instance.pool())

    @router.post("/pool")
    async def resize(request: Request) -> Response:
        result = await instance.resize_pool(await read_body(request, PoolBody))
        return json_answer(result, 409 if result.outcome in _REFUSALS else 200)

    return router


def _wanted_bytes(body: PoolBody) -> int:
    if (body.dram is None) == (body.dram_bytes is None):
        raise ConfigError('say either {"dram": "3GiB"} or {"dram_bytes": 3221225472}')
    text = str(body.dram_bytes) if body.dram is None else body.dram
    if not 0 <= body.wait_s <= MAX_WAIT_S:
        raise ConfigError(f"wait_s must be in 0..{MAX_WAIT_S:g}, got {body.wait_s}")
    return parse_dram(text)


def _describe(rank: int, stats: Mapping[str, float]) -> RankPool:
    block_bytes = int(stats["block_bytes"])
    total_blocks = int(stats["total_blocks"])
    return RankPool(
        rank=rank,
        total_bytes=total_blocks * block_bytes,
        total_blocks=total_blocks,
        block_bytes=block_bytes,
        slabs=int(stats["slabs"]),
        capacity_bytes=int(stats["capacity_blocks"]) * block_bytes,
        free_blocks=int(stats["free_blocks"]),
        pinned_blocks=int(stats["pinned_blocks"]),
        filling_blocks=int(stats["filling_blocks"]),
    )


def _result(rank: int, answer: ResizeReply | MemServeError) -> RankResize:
    if isinstance(answer, MemServeError):
        return RankResize(rank, ResizeOutcome.REFUSED.value, 0, 0, str(answer))
    return RankResize(rank, answer.outcome, answer.moved_pages, answer.evicted_pages, answer.reason)
