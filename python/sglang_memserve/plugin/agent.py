"""The instance's voice: runs in the HTTP process, speaks to its ranks and to the routers.

Starts with SGLang's app, waits until the engine serves, registers with every router and sends
heartbeats with the engine's load until it is stopped. A router that is not there is retried for as
long as the instance lives; the instance serves meanwhile. A router that refuses us (another model,
another page size) is an operator's mistake: the instance says why and stops.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Protocol

import aiohttp
import msgspec

from ..config import InstanceConfig
from ..errors import ConfigError, MemServeError, PeerError, ProtocolError
from ..protocol import PROTOCOL_VERSION, control
from ..protocol.handshake import layout_hash
from ..protocol.http import (
    FetchBody,
    FetchResult,
    FetchSource,
    Heartbeat,
    HeartbeatReply,
    InstanceInfo,
    InstanceStats,
    Load,
    PeersBody,
    PeersResult,
    PoolBody,
    PoolInfo,
    PoolResult,
    RankInfo,
    Registration,
    RegistrationReply,
    SourceResult,
    decode,
)
from ..transfer.client import LocalClient
from ..types import Role
from .acquaintances import Acquaintances
from .pool_size import PoolSize
from .residency import Residency, residency_of
from .sources import Sources

log = logging.getLogger(__name__)

RANK_CALL_S = 5.0
ROUTER_CALL_S = 5.0
RETRY_FIRST_S = 0.5
RETRY_MOST_S = 5.0
# A fetch's own deadline ends it; this is what the HTTP process waits beyond that.
FETCH_GRACE_S = 2.0


class Engine(Protocol):
    """What the agent asks of SGLang; ``routes`` implements it over the tokenizer manager."""

    async def load(self) -> Load: ...

    def describe(self) -> EngineFacts: ...


@dataclass(frozen=True, slots=True)
class EngineFacts:
    model_path: str
    served_model_name: str
    context_length: int
    max_total_tokens: int
    tp_size: int


class _RouterState(Enum):
    REGISTERING = "registering"
    REGISTERED = "registered"
    LEFT = "left"


@dataclass(slots=True)
class InstanceAgent:
    """``role`` may change while running. ``on_refused`` is called with the reason when a router
    refuses this instance for good. ``api_key`` is shown to other instances, ``admin_key``, where
    there is one, to routers: it takes more than a client's key to join."""

    config: InstanceConfig
    engine: Engine
    on_refused: Callable[[str], None]
    api_key: str | None = None
    admin_key: str | None = None
    role: Role = field(init=False)
    _ranks: list[LocalClient] = field(init=False, default_factory=list)
    _residency: Residency = field(init=False)
    _pool_size: PoolSize = field(init=False)
    _info: InstanceInfo | None = field(init=False, default=None)
    _session: aiohttp.ClientSession | None = field(init=False, default=None)
    _tasks: list[asyncio.Task[None]] = field(init=False, default_factory=list)
    _routers: dict[str, _RouterState] = field(init=False, default_factory=dict)
    _acquaintances: Acquaintances = field(init=False, default_factory=Acquaintances)
    _sources: Sources | None = field(init=False, default=None)
    _changed: asyncio.Event = field(init=False, default_factory=asyncio.Event)
    _ready: asyncio.Event = field(init=False, default_factory=asyncio.Event)
    _loop: asyncio.AbstractEventLoop | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.role = self.config.role

    # -- lifecycle --

    async def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        headers = {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        self._session = aiohttp.ClientSession(headers=headers)
        self._sources = Sources(self._session)
        tp_size = self.engine.describe().tp_size
        self._ranks = [LocalClient(self.config.rank_socket(rank)) for rank in range(tp_size)]
        self._pool_size = PoolSize(self._ranks)
        self._residency = residency_of(self.config, self._ranks)
        await self._residency.start()
        for url in self.config.router_urls:
            self._routers[url] = _RouterState.REGISTERING
            self._tasks.append(asyncio.create_task(self._attend(url), name=f"router {url}"))

    def ready(self) -> None:
        """The engine serves: registration may begin. Called on any thread, after ``start``."""
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._ready.set)

    def terminating(self) -> None:
        """SIGTERM: leave the routers now, while running requests end. Called on any thread."""
        if self._loop is not None:
            asyncio.run_coroutine_threadsafe(self.leave_routers(), self._loop)

    async def leave_routers(self) -> None:
        """They send nothing more here afterwards. Idempotent."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        registered = [u for u, s in self._routers.items() if s is _RouterState.REGISTERED]
        for url in registered:
            self._routers[url] = _RouterState.LEFT
        await asyncio.gather(*(self._leave(url) for url in registered))

    async def stop(self) -> None:
        """Leave the routers and let go of everything."""
        await self.leave_routers()
        if self._session is not None:
            await self._session.close()
        await self._residency.stop()
        for rank in self._ranks:
            rank.close()

    # -- what the routes serve --

    async def info(self) -> InstanceInfo:
        """Raises PeerUnreachable while the ranks are not up yet."""
        if self._info is None:
            self._info = await self._describe()
        return msgspec.structs.replace(self._info, role=self.role.value)

    async def snapshot(self) -> bytes:
        """What every rank holds."""
        return await self._residency.snapshot()

    async def stats(self) -> InstanceStats:
        replies = await asyncio.gather(
            *(rank.call(control.StatsRequest(), RANK_CALL_S) for rank in self._ranks)
        )
        return InstanceStats(
            event_seq=await self._residency.last_seq(),
            instance=await self._residency.stats(),
            ranks=[reply.values for reply in replies if isinstance(reply, control.StatsReply)],
        )

    async def fetch(self, body: FetchBody) -> FetchResult:
        """Every rank fetches its own shard from the same rank of each source.

        Raises ConfigError for malformed keys and for sources that cannot be used, PeerError when
        none can be found; a fetch that could not be completed is a result whose outcome says why.
        """
        try:
            keys = [bytes.fromhex(key) for key in body.keys]
        except ValueError as error:
            raise ConfigError(f"page keys must be hex strings: {error}") from error
        if any(len(key) != control.KEY_BYTES for key in keys):
            raise ConfigError(f"page keys must be {control.KEY_BYTES} bytes")
        sources = body.all_sources()
        if not sources:
            raise ConfigError("a fetch needs a source")
        found = await asyncio.gather(*map(self._ranks_of, sources), return_exceptions=True)
        requests: list[list[control.Source]] = [[] for _ in self._ranks]
        lost: dict[int, PeerError] = {}
        for index, (source, addresses) in enumerate(zip(sources, found, strict=True)):
            if isinstance(addresses, PeerError):
                lost[index] = addresses
            elif isinstance(addresses, BaseException):
                raise addresses
            else:
                for rank, address in enumerate(addresses):
                    wanted = control.Source(source.url, address, source.first_page, source.pages)
                    requests[rank].append(wanted)
        if len(lost) == len(sources):
            raise lost[0]
        replies = await asyncio.gather(
            *(
                rank.call(
                    control.FetchRequest(parts, keys, body.wait_s, body.deadline_s, body.hold_s),
                    body.deadline_s + FETCH_GRACE_S,
                )
                for rank, parts in zip(self._ranks, requests, strict=True)
            )
        )
        answered = [reply for reply in replies if isinstance(reply, control.FetchReply)]
        result = _merge(answered, sources, lost, len(keys))
        for part in result.sources:
            if part.outcome != "complete":
                self._known_sources().forget(part.url)
        return result

    async def _ranks_of(self, source: FetchSource) -> list[str]:
        addresses = source.ranks or await self._known_sources().resolve(source.url)
        if len(addresses) != len(self._ranks):
            raise ConfigError(
                f"{source.url} has {len(addresses)} ranks, this instance has {len(self._ranks)}"
            )
        return addresses

    async def introduce(self, body: PeersBody) -> PeersResult:
        """Every rank gets connected to the same rank of each peer, in the background.

        Peers with another number of ranks are left out. Raises ProtocolError for a duration that
        makes no sense, PeerUnreachable while the ranks are not up."""
        peers = [peer for peer in body.peers if len(peer.ranks) == len(self._ranks)]
        valid_s = body.valid_s
        if valid_s > 0:
            now = time.monotonic()
            peers, valid_s = self._acquaintances.told(body.router, peers, valid_s, now)
        self._known_sources().learn(peers)
        replies = await asyncio.gather(
            *(
                rank.call(
                    control.PeersRequest(
                        [
                            control.PeerEntry(peer.url, peer.generation, peer.ranks[index])
                            for peer in peers
                        ],
                        valid_s,
                    ),
                    RANK_CALL_S,
                )
                for index, rank in enumerate(self._ranks)
            )
        )
        ranks = [reply for reply in replies if isinstance(reply, control.PeersReply)]
        return PeersResult(
            members=min((rank.members for rank in ranks), default=0),
            connected=min((rank.connected for rank in ranks), default=0),
        )

    def _known_sources(self) -> Sources:
        assert self._sources is not None, "the agent has not started"
        return self._sources

    async def pool(self) -> PoolInfo:
        return await self._pool_size.show()

    async def resize_pool(self, body: PoolBody) -> PoolResult:
        try:
            return await self._pool_size.resize(body)
        finally:
            self._info = None  # it says how many blocks there are

    def set_role(self, role: Role) -> None:
        self.role = role
        self._changed.set()

    # -- ranks and peers --

    async def _describe(self) -> InstanceInfo:
        replies = await asyncio.gather(
            *(rank.call(control.InfoRequest(), RANK_CALL_S) for rank in self._ranks)
        )
        ranks = [reply for reply in replies if isinstance(reply, control.InfoReply)]
        facts = self.engine.describe()
        namespace = ranks[0].namespace
        return InstanceInfo(
            protocol=PROTOCOL_VERSION,
            url=self.config.url,
            generation=self.config.generation,
            role=self.role.value,
            model_path=facts.model_path,
            served_model_name=facts.served_model_name,
            layout_hash=layout_hash(namespace),
            namespace=namespace,
            page_size=namespace.page_size,
            context_length=facts.context_length,
            max_total_tokens=facts.max_total_tokens,
            events_address=await self._residency.events_address(),
            ranks=[
                RankInfo(
                    rank=rank.rank,
                    peer_address=rank.peer_address,
                    events_address=rank.events_address,
                    total_blocks=rank.total_blocks,
                    block_bytes=rank.namespace.block_bytes,
                )
                for rank in ranks
            ],
        )

    # -- routers --

    async def _attend(self, url: str) -> None:
        """Register with one router and keep it informed, until cancelled."""
        await self._ready.wait()
        pause_s = RETRY_FIRST_S
        while True:
            try:
                reply = await self._register(url)
                self._routers[url] = _RouterState.REGISTERED
                log.info("registered with router %s as %s", url, self.role.value)
                pause_s = RETRY_FIRST_S
                await self._beat(url, reply.heartbeat_s)
                log.warning("router %s has forgotten this instance; registering again", url)
            except ConfigError as error:
                self.on_refused(f"router {url} refuses this instance: {error}")
                return
            except (MemServeError, aiohttp.ClientError, TimeoutError, OSError) as error:
                if self._routers[url] is _RouterState.REGISTERED or pause_s == RETRY_FIRST_S:
                    reason = str(error) or type(error).__name__
                    log.warning("router %s: %s; serving stand-alone, will retry", url, reason)
            self._routers[url] = _RouterState.REGISTERING
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, RETRY_MOST_S)

    async def _register(self, url: str) -> RegistrationReply:
        body = msgspec.json.encode(Registration(await self.info()))
        answer = await self._post(f"{url}/memserve/register", body)
        return decode(answer, RegistrationReply, f"{url}/memserve/register")

    async def _beat(self, url: str, interval_s: float) -> None:
        """Returns when the router does not know us any more."""
        while True:
            beat = Heartbeat(
                url=self.config.url,
                generation=self.config.generation,
                role=self.role.value,
                load=await self.engine.load(),
                event_seq=await self._residency.last_seq(),
            )
            data = await self._post(f"{url}/memserve/heartbeat", msgspec.json.encode(beat))
            if not decode(data, HeartbeatReply, f"{url}/memserve/heartbeat").known:
                return
            try:
                await asyncio.wait_for(self._changed.wait(), interval_s)
                self._changed.clear()
            except TimeoutError:
                continue

    async def _leave(self, url: str) -> None:
        body = msgspec.json.encode({"url": self.config.url, "generation": self.config.generation})
        try:
            await self._post(f"{url}/memserve/deregister", body)
        except (MemServeError, aiohttp.ClientError, TimeoutError, OSError) as error:
            log.warning("could not tell router %s that we leave: %s", url, error)

    async def _post(self, url: str, body: bytes) -> bytes:
        """Raises ConfigError for a 409 (the router's reason), PeerError for other refusals."""
        assert self._session is not None
        headers = {"Content-Type": "application/json"}
        if self.admin_key:
            headers["Authorization"] = f"Bearer {self.admin_key}"
        async with self._session.post(
            url,
            data=body,
            headers=headers,
            timeout=aiohttp.ClientTimeout(total=ROUTER_CALL_S),
        ) as response:
            data = await response.read()
            if response.status == 409:
                raise ConfigError(_error_text(data))
            if response.status == 401:
                flag = "--admin-api-key" if self.admin_key else "--api-key"
                raise PeerError(f"does not take this instance's {flag} (401)")
            if response.status != 200:
                raise PeerError(f"answered {response.status}: {_error_text(data)}")
            return data


def _merge(
    replies: Sequence[control.FetchReply],
    sources: Sequence[FetchSource],
    lost: Mapping[int, PeerError],
    requested_pages: int,
) -> FetchResult:
    """``lost``: sources that were not asked, and why."""
    # The outcome says why the first page that is not readable is not: that is this rank's page.
    furthest_back = min(replies, key=lambda reply: reply.readable_pages)
    of_ranks = iter(zip(*(reply.sources for reply in replies), strict=False))
    results: list[SourceResult] = []
    for index, source in enumerate(sources):
        if index in lost:
            results.append(SourceResult(source.url, 0, "peer_unreachable", str(lost[index])))
            continue
        parts = next(of_ranks, ())
        failed = next((part for part in parts if part.outcome != "complete"), None)
        results.append(
            SourceResult(
                source.url,
                min((part.fetched_pages for part in parts), default=0),
                failed.outcome if failed else "complete",
                failed.detail if failed else "",
            )
        )
    return FetchResult(
        requested_pages=requested_pages,
        present_pages=min(reply.present_pages for reply in replies),
        readable_pages=min(reply.readable_pages for reply in replies),
        fetched_pages=max(reply.fetched_pages for reply in replies),
        fetched_bytes=sum(reply.fetched_bytes for reply in replies),
        seconds=max(reply.seconds for reply in replies),
        outcome=furthest_back.outcome,
        sources=results,
    )


def _error_text(data: bytes) -> str:
    """The message of an ``{"error": {"message"}}`` body, or the body's beginning."""
    try:
        message = decode(data, dict[str, Any], "error")["error"]["message"]
    except (ProtocolError, KeyError, TypeError):
        return data[:200].decode(errors="replace")
    return str(message)
