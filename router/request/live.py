"""Requests that are being served now, and how to stop the work on them everywhere.

When a client goes away, closing our connections tells the instances; SGLang notices that at once
for streams, and for others only every few seconds while they compute
(``SGLANG_REQUEST_STATE_WAIT_TIMEOUT``). So each instance is sent ``/abort_request`` too, with the
exact ids it knows the request by: its tokenizer manager ignores prefixes of them.

Ids that clients choose may be another client's too. As in SGLang, a second request by an id that
lives is refused: stopping it would stop the first, by our abort and by SGLang's own after a stream.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import Enum

from sglang_memserve.errors import LimitExceeded, PeerError, ProtocolError
from sglang_memserve.types import InstanceId

from ..http.ids import new_id
from ..http.proxy import Upstream

logger = logging.getLogger(__name__)

ABORT_S = 5.0
LAST_ABORTS_S = 1.0
MAX_ABORTS_IN_FLIGHT = 4096


class DuplicateRid(ProtocolError):
    """A request that lives is called so already."""


class GivenRids(Enum):
    """Whether instances are told to abort a request by an id that its client chose. SHARED: other
    processes serve requests too, which may be called the same; closing connections has to do."""

    OURS_ALONE = "ours alone"
    SHARED = "shared"


class Live:
    """One request. ``rids``: what the client calls it, if it said so. ``over``: whether the client
    has all of its answer, and may use them again."""

    def __init__(self, rids: Sequence[str], stop: Stop, over: Callable[[], bool]) -> None:
        self.rids = frozenset(rids)
        self.over = over
        self.aborted = False
        self.prefilling: asyncio.Task[int] | None = None
        self._stop = stop

    @contextmanager
    def at(self, instance: InstanceId, rids: Sequence[str]) -> Iterator[None]:
        """``instance`` works on it under ``rids``; left by any exception it is told to stop."""
        try:
            yield
        except BaseException:
            self._stop(self, instance, rids)
            raise


Stop = Callable[[Live, InstanceId, Sequence[str]], None]


def new_rid() -> str:
    """An id for an instance: the same one twice there would be refused while the first lives."""
    return new_id()


class LiveRequests:
    """All of them, at most ``limit``."""

    def __init__(
        self, upstream: Upstream, limit: int, given: GivenRids = GivenRids.OURS_ALONE
    ) -> None:
        self._upstream = upstream
        self.limit = limit
        self._given = given
        self._live: dict[Live, None] = {}
        self._called: dict[str, Live] = {}
        self._aborts: set[asyncio.Task[None]] = set()

    def __len__(self) -> int:
        return len(self._live)

    @contextmanager
    def enter(
        self, rids: Sequence[str] = (), over: Callable[[], bool] = lambda: False
    ) -> Iterator[Live]:
        """Raises LimitExceeded when as many as allowed are here already, DuplicateRid."""
        if len(self._live) >= self.limit:
            raise LimitExceeded(f"{self.limit} requests are in flight")
        for rid in rids:
            if rid in self._called and not self._called[rid].over():
                # SGLang's words.
                raise DuplicateRid(f"Duplicate request ID detected: {rid}")
        live = Live(rids, self._stop, over)
        self._live[live] = None
        self._called.update(dict.fromkeys(live.rids, live))
        try:
            yield live
        finally:
            del self._live[live]
            for rid in live.rids:
                if self._called.get(rid) is live:
                    del self._called[rid]

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

    def _stop(self, live: Live, instance: InstanceId, rids: Sequence[str]) -> None:
        for rid in rids:
            if rid in live.rids and self._given is GivenRids.SHARED:
                continue
            if len(self._aborts) >= MAX_ABORTS_IN_FLIGHT:
                logger.warning("too many aborts in flight; %s is not told", instance)
                return
            task = asyncio.create_task(self._tell(live, instance, rid))
            self._aborts.add(task)
            task.add_done_callback(self._aborts.discard)

    async def _tell(self, live: Live, instance: InstanceId, rid: str) -> None:
        if self._called.get(rid, live) is not live:
            # Its client asked again by the same id already.
            return
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
