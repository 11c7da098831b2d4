"""What is in the instances' MemPools, asked for now and then: for metrics and people, not for
decisions, which follow events. One task an instance that has a MemPool."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import dataclass

import msgspec
from sglang_memserve.errors import PeerError
from sglang_memserve.protocol.http import InstanceInfo, InstanceStats
from sglang_memserve.types import Generation, InstanceId

from ..http.proxy import Upstream

logger = logging.getLogger(__name__)

INTERVAL_S = 5.0
ASK_S = 3.0
MAX_STATS_BYTES = 2**20

STATES = ("free", "filling", "ready", "orphan", "withdrawn")
"""The terms of the conservation law (``docs/mempool.md``): they add up to ``total``."""
REASONS = {
    "room": "evicted_pages_total",
    "named": "deleted_pages_total",
    "cleared": "cleared_pages_total",
}


@dataclass(frozen=True, slots=True)
class PoolState:
    """Of all ranks together. ``blocks`` by state, ``evicted`` by reason."""

    total_blocks: int
    total_bytes: int
    used_bytes: int
    pinned_blocks: int
    blocks: Mapping[str, int]
    evicted: Mapping[str, int]


def pool_state(stats: InstanceStats) -> PoolState:
    """What an old or odd instance leaves out counts as nothing."""

    def total(name: str) -> int:
        return int(sum(rank.get(name, 0.0) for rank in stats.ranks))

    sizes = [rank.get("block_bytes", 0.0) for rank in stats.ranks]
    wholes = [rank.get("total_blocks", 0.0) for rank in stats.ranks]
    frees = [rank.get("free_blocks", 0.0) for rank in stats.ranks]
    return PoolState(
        total_blocks=total("total_blocks"),
        total_bytes=int(sum(size * whole for size, whole in zip(sizes, wholes, strict=True))),
        used_bytes=int(
            sum(s * max(w - f, 0.0) for s, w, f in zip(sizes, wholes, frees, strict=True))
        ),
        pinned_blocks=total("pinned_blocks"),
        blocks={state: total(f"{state}_blocks") for state in STATES},
        evicted={reason: total(name) for reason, name in REASONS.items()},
    )


class Pools:
    """A ``Listener`` of ``Instances``; belongs to the event loop it is used in."""

    def __init__(self, upstream: Upstream, interval_s: float = INTERVAL_S) -> None:
        self._upstream = upstream
        self._interval_s = interval_s
        self._tasks: dict[InstanceId, asyncio.Task[None]] = {}
        self._latest: dict[InstanceId, PoolState] = {}

    def latest(self) -> Mapping[InstanceId, PoolState]:
        return self._latest

    def joined(self, info: InstanceInfo) -> None:
        instance = InstanceId(info.url)
        self.left(instance)
        task = asyncio.create_task(self._watch(instance), name=f"pool of {instance}")
        task.add_done_callback(_report)
        self._tasks[instance] = task

    def left(self, instance: InstanceId) -> None:
        task = self._tasks.pop(instance, None)
        if task is not None:
            task.cancel()
        self._latest.pop(instance, None)

    def beat(self, instance: InstanceId, generation: Generation, event_seq: int) -> None:
        pass

    async def close(self) -> None:
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _watch(self, instance: InstanceId) -> None:
        while True:
            try:
                answer = await self._upstream.call(
                    "GET",
                    f"{instance}/memserve/stats",
                    deadline_s=ASK_S,
                    max_bytes=MAX_STATS_BYTES,
                )
                self._latest[instance] = pool_state(msgspec.convert(answer, InstanceStats))
            except (PeerError, msgspec.ValidationError, ValueError, OverflowError) as error:
                logger.debug("pool of %s: %s", instance, error)
                self._latest.pop(instance, None)
            await asyncio.sleep(self._interval_s)


def _report(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        logger.error("%s stopped", task.get_name(), exc_info=error)
