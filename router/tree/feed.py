"""Residency events into the global tree: one source for each instance (``router.tree.source``)."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping

import aiohttp
import zmq.asyncio
from sglang_memserve.errors import LimitExceeded, PeerError, PeerUnreachable
from sglang_memserve.protocol.events import Snapshot, decode_snapshot
from sglang_memserve.protocol.http import InstanceInfo
from sglang_memserve.types import Generation, InstanceId

from .merged import MergedTree
from .source import MOST_PAGES, Source, SourceState, SourceStatus

__all__ = ["Feed", "SourceState", "SourceStatus"]

log = logging.getLogger(__name__)

SNAPSHOT_S = 10.0
_MAX_SNAPSHOT_BYTES = 512 * 2**20


class Feed:
    """All sources. A ``instances.Listener``: membership tells it whom to follow.

    Its methods must be called in a running event loop; ``close`` ends every task and socket.
    ``headers`` go with every request to an instance (its API key). ``most_pages``: of one instance.
    """

    def __init__(
        self,
        tree: MergedTree,
        session: aiohttp.ClientSession,
        *,
        clock: Callable[[], float],
        wall_clock: Callable[[], float],
        headers: Mapping[str, str] | None = None,
        on_state: Callable[[SourceStatus], None] | None = None,
        most_pages: int = MOST_PAGES,
    ) -> None:
        self._tree = tree
        self._session = session
        self._clock = clock
        self._wall_clock = wall_clock
        self._headers = dict(headers or {})
        self._on_state = on_state
        self._most_pages = most_pages
        self._context = zmq.asyncio.Context()
        self._sources: dict[InstanceId, tuple[Source, asyncio.Task[None]]] = {}
        self._ending: set[asyncio.Task[None]] = set()

    # -- instances.Listener --

    def joined(self, info: InstanceInfo) -> None:
        """Follow it; a source of another boot of the same URL is ended and its pages dropped."""
        instance = InstanceId(info.url)
        if instance in self._sources:
            if self._sources[instance][0].generation == info.generation:
                return
            self.left(instance)
        source = Source(
            info,
            self._tree,
            self.fetch_snapshot,
            clock=self._clock,
            wall_clock=self._wall_clock,
            on_state=self._on_state,
            most_pages=self._most_pages,
        )
        task = asyncio.create_task(source.run(self._context), name=f"events of {instance}")
        task.add_done_callback(_report)
        self._sources[instance] = (source, task)

    def left(self, instance: InstanceId) -> None:
        """Stop following it and drop its pages."""
        entry = self._sources.pop(instance, None)
        if entry is not None:
            task = entry[1]
            task.cancel()
            self._ending.add(task)
            task.add_done_callback(self._ending.discard)
        self._tree.drop(instance)

    def beat(self, instance: InstanceId, generation: Generation, event_seq: int) -> None:
        """What a heartbeat says of the last event batch."""
        entry = self._sources.get(instance)
        if entry is not None and entry[0].generation == generation:
            entry[0].told_of(event_seq)

    # -- the rest --

    def status(self) -> list[SourceStatus]:
        return [source.status() for source, _ in self._sources.values()]

    def doubts(self) -> dict[InstanceId, SourceState]:
        """The instances of which the tree may hold what is not so."""
        return {
            instance: source.state
            for instance, (source, _) in self._sources.items()
            if source.doubtful
        }

    async def fetch_snapshot(self, instance: InstanceId) -> Snapshot:
        """GET the instance's snapshot within SNAPSHOT_S. Raises PeerError, ProtocolError and
        LimitExceeded."""
        url = f"{instance}/memserve/snapshot"
        timeout = aiohttp.ClientTimeout(total=SNAPSHOT_S)
        body = bytearray()
        try:
            async with self._session.get(
                url, headers=self._headers, timeout=timeout, allow_redirects=False
            ) as response:
                if response.status != 200:
                    raise PeerError(f"{url} answered {response.status}")
                async for chunk in response.content.iter_any():
                    body += chunk
                    if len(body) > _MAX_SNAPSHOT_BYTES:
                        raise LimitExceeded(f"{url}: more than {_MAX_SNAPSHOT_BYTES} bytes")
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            # ValueError: its URL cannot be parsed, or its host not looked up.
            raise PeerUnreachable(f"{url}: {error or type(error).__name__}") from error
        return decode_snapshot(bytes(body))

    async def close(self) -> None:
        """End all tasks and sockets. The tree keeps what it has."""
        tasks = [task for _, task in self._sources.values()] + list(self._ending)
        self._sources.clear()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._context.term()


def _report(task: asyncio.Task[None]) -> None:
    """A source never ends by itself: say so loudly if it does."""
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("%s stopped", task.get_name(), exc_info=error)
