"""Tells each instance who the others are, so that it is connected before it has to fetch.

One task an instance: it says the list when membership changes, says it again until it is
acknowledged, and from time to time even so, which heals whatever was lost on the way. The instance
lets go of what it was not told for a while: a router that dies leaves nothing behind.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable

import msgspec
from sglang_memserve.errors import PeerError
from sglang_memserve.protocol.http import InstanceInfo, PeerInfo, PeersBody
from sglang_memserve.types import Generation, InstanceId

from ..http.proxy import Refused, Upstream

logger = logging.getLogger(__name__)

ASK_S = 5.0
REFRESH_S = 30.0
VALID_S = 4 * REFRESH_S
RETRY_FIRST_S = 0.5
RETRY_MOST_S = 10.0
# Instances tend to join together: those of one moment are told of in one go.
GATHER_S = 0.1


def peers_of(target: InstanceInfo, others: Iterable[InstanceInfo]) -> list[PeerInfo]:
    """Those whose pages ``target`` can use, by URL: the same layout, as many ranks."""
    return [
        PeerInfo(other.url, other.generation, [rank.peer_address for rank in other.ranks])
        for other in sorted(others, key=lambda other: other.url)
        if other.url != target.url
        and other.layout_hash == target.layout_hash
        and len(other.ranks) == len(target.ranks)
    ]


class Introductions:
    """A ``Listener`` of ``Instances``; belongs to the event loop it is used in."""

    def __init__(self, upstream: Upstream, router: str = "") -> None:
        """``router``: names this one among others, across its restarts."""
        self._upstream = upstream
        self._router = router
        self._infos: dict[InstanceId, InstanceInfo] = {}
        self._changed: dict[InstanceId, asyncio.Event] = {}
        self._tasks: dict[InstanceId, asyncio.Task[None]] = {}

    def joined(self, info: InstanceInfo) -> None:
        instance = InstanceId(info.url)
        self._infos[instance] = info
        self._changed[instance] = asyncio.Event()
        task = asyncio.create_task(
            self._keep_informed(info, self._changed[instance]), name=f"introductions to {instance}"
        )
        task.add_done_callback(_report)
        self._tasks[instance] = task
        self._tell_all()

    def left(self, instance: InstanceId) -> None:
        del self._infos[instance], self._changed[instance]
        self._tasks.pop(instance).cancel()
        self._tell_all()

    def beat(self, instance: InstanceId, generation: Generation, event_seq: int) -> None:
        pass

    async def close(self) -> None:
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _tell_all(self) -> None:
        for event in self._changed.values():
            event.set()

    async def _keep_informed(self, target: InstanceInfo, changed: asyncio.Event) -> None:
        pause_s = RETRY_FIRST_S
        while True:
            await asyncio.sleep(GATHER_S)
            changed.clear()
            try:
                await self._tell(target)
            except PeerError as error:
                if isinstance(error, Refused) and error.status < 500:
                    # It understood and says no (an older version, say): asking again is no use.
                    logger.warning("%s does not want to know its peers: %s", target.url, error)
                    wait_s = REFRESH_S
                else:
                    logger.debug("%s was not told its peers: %s", target.url, error)
                    wait_s, pause_s = pause_s, min(2 * pause_s, RETRY_MOST_S)
            else:
                wait_s, pause_s = REFRESH_S, RETRY_FIRST_S
            try:
                await asyncio.wait_for(changed.wait(), wait_s)
            except TimeoutError:
                continue

    async def _tell(self, target: InstanceInfo) -> None:
        body = PeersBody(peers_of(target, self._infos.values()), VALID_S, self._router)
        await self._upstream.call(
            "POST", f"{target.url}/memserve/peers", msgspec.json.encode(body), deadline_s=ASK_S
        )


def _report(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        logger.error("%s stopped", task.get_name(), exc_info=error)
