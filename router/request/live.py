"""Requests that are being served now, and how to stop the work on them everywhere.

When a client goes away, closing our connections tells the instances; SGLang notices that at once
for streams, and for others only every few seconds while they compute
(``SGLANG_REQUEST_STATE_WAIT_TIMEOUT``). So each instance is sent ``/abort_request`` too, with the
exact ids it knows the request by: its tokenizer manager ignores prefixes of them.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from sglang_memserve.errors import LimitExceeded, PeerError
from sglang_memserve.types import InstanceId

from ..http.ids import new_id
from ..http.proxy import Upstream

logger = logging.getLogger(__name__)

ABORT_S = 5.0
LAST_ABORTS_S = 1.0
MAX_ABORTS_IN_FLIGHT = 4096


Stop = Callable[[InstanceId, Sequence[str]], None]


class Live:
    """One request. ``rids``: what the client calls it, if it said so."""

    def __init__(self, rids: Sequence[str], stop: Stop) -> None:
        self.rids = frozenset(rids)
        self.aborted = False
        self.prefilling: asyncio.Task[int] | None = None
        self._stop = stop

    @contextmanager
    def at(self, instance: InstanceId, rids: Sequence[str]) -> Iterator[None]:
        """``instance`` works on it under ``rids``; left by any exception it is told to stop."""
        try:
            yield
        except BaseException:
            self._stop(instance, rids)
            raise


def new_rid() -> str:
    """An id for an instance: the same one twice there would be refused while the first lives."""
    return new_id()


class LiveRequests:
    """All of them, at most ``limit``."""

    def __init__(self, upstream: Upstream, limit: int) -> None:
        self._upstream = upstream
        self.limit = limit
        self._live: dict[Live, None] = {}
        self._aborts: set[asyncio.Task[None]] = set()

    def __len__(self) -> int:
        return len(self._live)

    @contextmanager
    def enter(self, rids: Sequence[str] = ()) -> Iterator[Live]:
        """Raises LimitExceeded when as many as allowed are here already."""
        if len(self._live) >= self.limit:
            raise LimitExceeded(f"{self.limit} requests are in flight")
        live = Live(rids, self._stop)
        self._live[live] = None
        try:
            yield live
        finally:
            del self._live[live]

    def abort(self, rid: str | None) -> int:
        """Stop the prefill of the request a client calls ``rid``, or of all; how many there were.

        What decode instances do is stopped by the client's own words, passed on to them.
        """
        found = [live for live in self._live if rid is None or rid in live.rids]
        for live in found:
            live.aborted = True
            if live.prefilling is not None:
                live.prefilling.cancel()
        return len(found)

    def _stop(self, instance: InstanceId, rids: Sequence[str]) -> None:
        for rid in rids:
            if len(self._aborts) >= MAX_ABORTS_IN_FLIGHT:
                logger.warning("too many aborts in flight; %s is not told", instance)
                return
            task = asyncio.create_task(self._tell(instance, rid))
            self._aborts.add(task)
            task.add_done_callback(self._aborts.discard)

    async def _tell(self, instance: InstanceId, rid: str) -> None:
        try:
            async with self._upstream.exchange(
                "POST", f"{instance}/abort_request", {"rid": rid}, deadline_s=ABORT_S
            ) as response:
                await response.read()
        except PeerError as error:
            # Quoted: a client chose it, and must not write lines of its own here.
            logger.info("%s could not be told to abort %r: %s", instance, rid, error)

    async def close(self) -> None:
        """Let the last aborts go out. An instance that takes longer is frozen: nobody waits."""
        if not self._aborts:
            return
        _, late = await asyncio.wait(self._aborts, timeout=LAST_ABORTS_S)
        for task in late:
            task.cancel()
        await asyncio.gather(*late, return_exceptions=True)
