"""The thread of a rank that owns its transport and its sockets.

    peers' agents  --tcp-->  peer ROUTER   hello, lease, release       -> serve.LeaseServer
    HTTP process   --ipc-->  local ROUTER  fetch, snapshot, stats, info -> session.Sessions, pool
    routers        <--tcp--  events PUB    residency batches from the pool
    peers' agents  <--tcp--  DEALER each   what our own fetches ask

Everything happens in that one thread (``loop``), so nothing has a lock. It sleeps in one poll over
all sockets and a wake-up descriptor; while reads run it looks at them several times a millisecond.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType

from ..config import Limits
from ..errors import ConfigError, MemServeError, PeerUnreachable
from ..protocol.control import (
    FetchReply,
    FetchRequest,
    ResizeReply,
    ResizeRequest,
    as_received,
)
from ..types import Namespace, PageKey
from .base import Pool, Transport
from .loop import AgentConfig, AgentLoop
from .members import MembershipLimits
from .offer import Offers, offer
from .port import FetchSettings
from .sockets import Wake
from .submissions import FetchSubmission, ResizeSubmission, Submissions

log = logging.getLogger(__name__)

_START_S = 60.0
_CLOSE_S = 10.0
_PORTS = 65_536
_WILDCARDS = ("0.0.0.0", "::", "*", "")


class RankAgent:
    """``transport`` is used by the agent's thread only, from ``register`` to ``close``.

    ``namespace`` is the pool's. ``host`` is what the peer and events sockets listen on; a wildcard
    needs ``advertise_host``. Either may be a name, which is looked up once, at the start: others
    are told the address. ``local_path`` is for the local socket, whose folder is made if it is
    missing.
    ``more_stats`` joins the answer to ``StatsRequest``; called on the agent's thread.
    ``peer_port`` is the peer socket's; 0 takes any that is free. Raises ConfigError.
    """

    def __init__(
        self,
        pool: Pool,
        transport: Transport,
        *,
        namespace: Namespace,
        instance_id: str,
        generation: str,
        rank: int,
        host: str,
        local_path: Path | str,
        advertise_host: str | None = None,
        peer_port: int = 0,
        settings: FetchSettings | None = None,
        limits: Limits | None = None,
        membership_limits: MembershipLimits | None = None,
        more_stats: Callable[[], Mapping[str, float]] = dict,
        offers: Offers = Offers.REFUSED,
    ) -> None:
        advertise = host if advertise_host is None else advertise_host
        if advertise in _WILDCARDS:
            raise ConfigError(f"host {advertise!r} is no address for others: name one to advertise")
        if not 0 <= peer_port < _PORTS:
            raise ConfigError(f"peer_port {peer_port}: ports are 1 to {_PORTS - 1}, 0 for any")
        if namespace != pool.namespace:
            raise ConfigError(f"the pool holds pages of {pool.namespace}, not of {namespace}")
        self.peer_address = ""
        self.events_address = ""
        self._config = AgentConfig(
            namespace=namespace,
            instance_id=instance_id,
            generation=generation,
            rank=rank,
            host=host,
            advertise=advertise,
            peer_port=peer_port,
            local_path=Path(local_path),
            fetch=settings or FetchSettings.of(limits or Limits()),
            limits=limits or Limits(),
            members=membership_limits or MembershipLimits(),
            more_stats=more_stats,
            offers=offers,
        )
        self._pool = pool
        self._transport = transport
        self._wake = Wake()
        self._stop = threading.Event()
        self._submissions = Submissions(self._wake.set)
        self._started: Future[None] = Future()
        self._thread = threading.Thread(target=self._main, name=f"memserve-{rank}", daemon=True)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and self._started.done()

    def start(self) -> None:
        """Returns when the sockets are bound and the arena is registered.

        Raises ConfigError or TransferFailed, in at most a minute."""
        self._thread.start()
        try:
            self._started.result(_START_S)
        except TimeoutError as error:
            self._stop.set()
            raise PeerUnreachable(f"the agent did not start in {_START_S:g} s") from error
        except MemServeError:
            self.close()
            raise

    def close(self) -> None:
        """Ends all fetches and leases. Afterwards the arena may be unmapped. Idempotent."""
        self._stop.set()
        self._wake.set()
        if self._thread.ident is not None:
            self._thread.join(_CLOSE_S)
            if self._thread.is_alive():
                log.error("the agent of rank %d did not end in %g s", self._config.rank, _CLOSE_S)
                return
        self._wake.close()

    def __enter__(self) -> RankAgent:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def fetch(self, request: FetchRequest) -> Future[FetchReply]:
        """Start a fetch from any thread of this process; never waits.

        The future ends by the request's deadline; it raises LimitExceeded or ProtocolError for a
        fetch that was refused, PeerUnreachable when the agent does not run. Raises ProtocolError
        for a request that is none, LimitExceeded when too many have just been started."""
        future: Future[FetchReply] = Future()
        self._submissions.put(FetchSubmission(as_received(request), future))
        return future

    def resize(self, total_bytes: int, *, wait_s: float = 0.0) -> Future[ResizeReply]:
        """Grow or shrink the pool, as ``MemPool.resize``, from any thread; never waits.

        The future ends in about ``wait_s`` and what moving the pages takes; it raises ConfigError
        for a size that can never be, LimitExceeded while another change is under way, and as that
        of ``fetch``. Raises as ``fetch``."""
        future: Future[ResizeReply] = Future()
        request = as_received(ResizeRequest(total_bytes, wait_s))
        self._submissions.put(ResizeSubmission(request, future))
        return future

    def transfer_with_insert(
        self, receiver: str, keys: Sequence[PageKey], deadline_s: float
    ) -> FetchReply:
        """Have another rank make our pages ``keys`` (a whole prefix) its own: the paper's verb.

        ``receiver``: its ``peer_address``. Blocks for at most ``deadline_s``; see ``offer.offer``.
        """
        if not self.alive:
            raise PeerUnreachable("the agent is not running")
        return offer(
            receiver,
            peer_id=self._config.instance_id,
            peer_address=self.peer_address,
            keys=keys,
            deadline_s=deadline_s,
        )

    def _main(self) -> None:
        try:
            loop = AgentLoop(
                self._config, self._pool, self._transport, self._wake, self._submissions
            )
        except MemServeError as error:
            self._started.set_exception(error)
            return
        except Exception as error:
            log.exception("the agent of rank %d cannot start", self._config.rank)
            self._started.set_exception(ConfigError(f"agent: {type(error).__name__}: {error}"))
            return
        self.peer_address = loop.peer_address
        self.events_address = loop.events_address
        self._submissions.open()
        self._started.set_result(None)
        try:
            loop.run(self._stop)
        finally:
            try:
                loop.close()
            finally:
                self._submissions.close()
