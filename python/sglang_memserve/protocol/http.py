"""Bodies of ``/memserve/*``, on instances and on the router. JSON unless said otherwise.

On an instance (on SGLang's own app; which key opens what: ``access``):
    GET  /memserve/info      -> InstanceInfo
    GET  /memserve/snapshot  -> msgpack ``events.Snapshot`` (``application/msgpack``)
    POST /memserve/fetch     FetchBody -> FetchResult
    POST /memserve/peers     PeersBody -> PeersResult
    GET  /memserve/stats     -> InstanceStats
    GET  /memserve/pool      -> PoolInfo
    POST /memserve/pool      PoolBody -> PoolResult (409 when it was refused)
    POST /memserve/match     PrefixBody -> what of it is in HBM, what in DRAM (also
                             /memserve/swap_out and /memserve/swap_in)
    POST /memserve/role      {"role": "prefill"|"decode"|"both"} -> InstanceInfo
On a router:
    POST /memserve/register    Registration -> RegistrationReply (409 with the reason: a mismatch)
    POST /memserve/heartbeat   Heartbeat -> HeartbeatReply
    POST /memserve/deregister  {"url", "generation"} -> {}
Errors are ``{"error": {"message", "type", "code"}}``.
"""

from __future__ import annotations

from typing import Annotated, TypeVar

import msgspec

from ..errors import ProtocolError
from ..types import Namespace
from . import UNDECODABLE

_T = TypeVar("_T")

MOST = 2**53
"""No count on the wire is larger: whoever adds some up, or divides, has room for what comes out."""
Count = Annotated[int, msgspec.Meta(ge=0, le=MOST)]
Positive = Annotated[int, msgspec.Meta(ge=1, le=MOST)]
EventSeq = Annotated[int, msgspec.Meta(ge=-1, le=MOST)]
"""Number of an event batch; -1 before the first."""


def decode(data: bytes, kind: type[_T], what: str) -> _T:
    """``data`` as ``kind``. Raises ProtocolError, which begins with ``what``."""
    try:
        return msgspec.json.decode(data, type=kind)
    except UNDECODABLE as error:
        raise ProtocolError(f"{what}: {error}") from error


class RankInfo(msgspec.Struct, frozen=True):
    """Where one rank listens for other ranks and where it publishes what it alone holds."""

    rank: Count
    peer_address: str
    events_address: str
    total_blocks: Count
    block_bytes: Count


class InstanceInfo(msgspec.Struct, frozen=True):
    """What an instance is. ``layout_hash`` is rank 0's; ``namespace`` explains it.

    ``events_address``: the stream of what all ranks hold; the snapshot belongs to it.
    """

    protocol: int
    url: str
    generation: str
    role: str
    model_path: str
    served_model_name: str
    layout_hash: str
    namespace: Namespace
    page_size: Positive
    context_length: Positive
    max_total_tokens: Count
    events_address: str
    ranks: list[RankInfo]


class Load(msgspec.Struct, frozen=True):
    """What the router weighs. Tokens are slots of the device pool."""

    running_requests: Count
    waiting_requests: Count
    used_tokens: Count
    total_tokens: Count

    @classmethod
    def counted(cls, running: int, waiting: int, used: int, total: int) -> Load:
        """Of an engine's own figures, each brought within its bounds: engines count by adding and
        subtracting, and one that is off for a moment is no reason to refuse its heartbeat."""
        return cls(*(min(max(count, 0), MOST) for count in (running, waiting, used, total)))


class Registration(msgspec.Struct, frozen=True):
    info: InstanceInfo


class RegistrationReply(msgspec.Struct, frozen=True):
    """Send a heartbeat every ``heartbeat_s``; without one for ``expire_s`` you are dropped."""

    heartbeat_s: float
    expire_s: float


class Heartbeat(msgspec.Struct, frozen=True):
    """``event_seq``: number of the instance's last event batch, -1 before the first: a router
    that has not seen it a moment later has lost events."""

    url: str
    generation: str
    role: str
    load: Load
    event_seq: EventSeq = -1


class HeartbeatReply(msgspec.Struct, frozen=True):
    """``known`` is False when the router has forgotten us: register again."""

    known: bool


class InstanceStats(msgspec.Struct, frozen=True):
    """Counters and gauges, documented in ``docs/mempool.md``. ``instance``: of what is the whole
    instance's; ``ranks``: of each rank. ``event_seq`` as in ``Heartbeat``."""

    event_seq: EventSeq
    instance: dict[str, float]
    ranks: list[dict[str, float]]


class PeerInfo(msgspec.Struct, frozen=True):
    """``ranks``: the ``peer_address`` of each rank, in order."""

    url: str
    generation: str
    ranks: list[str]


class PeersBody(msgspec.Struct, frozen=True):
    """The other instances whose pages may be fetched: be connected to them before they are asked.

    All of them that ``router`` knows: one that was named by it before and is not any more has left.
    Good for ``valid_s`` seconds; a router says it again before that, and whenever it changes. To
    say it twice is fine. Of several routers' words the union counts.
    """

    peers: list[PeerInfo]
    valid_s: float
    router: str = ""


class PeersResult(msgspec.Struct, frozen=True):
    """Over several ranks the least. ``members``: peers taken over, and those that have just left;
    ``connected``: to how many of them a connection is up already."""

    members: int
    connected: int


class FetchSource(msgspec.Struct, frozen=True):
    """A holder of pages ``first_page`` and the ``pages`` - 1 after it (0: to the end).

    ``ranks``: the ``peer_address`` of each of its ranks, if the asker knows it; else the instance
    asks the holder's ``/memserve/info``."""

    url: str
    first_page: int = 0
    pages: int = 0
    ranks: list[str] | None = None


class FetchBody(msgspec.Struct, frozen=True):
    """``keys``: hex page keys of a whole prefix from page 0. ``sources``: who holds which of them;
    ``source`` and ``source_ranks`` are short for one that holds all. ``hold_s``: for how long the
    pages then stay for a request, unless it takes them before; 0 for none."""

    keys: list[str]
    source: str = ""
    wait_s: float = 0.0
    deadline_s: float = 5.0
    source_ranks: list[str] | None = None
    sources: list[FetchSource] = []
    hold_s: float = 0.0

    def all_sources(self) -> list[FetchSource]:
        if self.source:
            return [FetchSource(self.source, ranks=self.source_ranks), *self.sources]
        return self.sources


class SourceResult(msgspec.Struct, frozen=True):
    """As ``control.SourceReply``; over several ranks the least pages and the first failure."""

    url: str
    fetched_pages: int
    outcome: str
    detail: str = ""


class FetchResult(msgspec.Struct, frozen=True):
    """As ``control.FetchReply``; over several ranks the least pages, the sum of bytes."""

    requested_pages: Count
    present_pages: Count
    readable_pages: Count
    fetched_pages: Count
    fetched_bytes: Count
    seconds: Annotated[float, msgspec.Meta(ge=0, le=1e9)]
    outcome: str
    sources: list[SourceResult] = []


class PoolBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The instance's DRAM for KV pages, divided among its ranks: ``dram`` as on the command line
    (``3GiB``) or ``dram_bytes``. ``wait_s``: how long to wait for what is in the way of shrinking.
    """

    dram: str | None = None
    dram_bytes: int | None = None
    wait_s: float = 5.0


class RankPool(msgspec.Struct, frozen=True):
    """``capacity_bytes``: how far it may grow, by the addresses that were reserved."""

    rank: int
    total_bytes: int
    total_blocks: int
    block_bytes: int
    slabs: int
    capacity_bytes: int
    free_blocks: int
    pinned_blocks: int
    filling_blocks: int


class PoolInfo(msgspec.Struct, frozen=True):
    """``dram_bytes``: of all ranks together."""

    dram_bytes: int
    ranks: list[RankPool]


class RankResize(msgspec.Struct, frozen=True):
    """What one rank did when it was asked: ``resized``, ``unchanged`` or ``refused``."""

    rank: int
    outcome: str
    moved_pages: int
    evicted_pages: int
    reason: str = ""


class PoolResult(msgspec.Struct, frozen=True):
    """``outcome``: ``resized``, ``unchanged``, ``refused`` (all ranks are as before), or ``uneven``
    (one refused, and another could not go back). ``ranks`` and ``dram_bytes`` as they are now;
    ``steps``: what each rank did at first."""

    outcome: str
    reason: str
    dram_bytes: int
    ranks: list[RankPool]
    steps: list[RankResize]


class PrefixBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A prefix: exactly one of ``input_ids``, ``text`` and ``keys`` (hex, ``match`` only), in the
    namespace that ``extra_key`` and ``cache_salt`` make, as in SGLang's ``/generate``. Only full
    pages count."""

    input_ids: list[int] | None = None
    text: str | None = None
    keys: list[str] | None = None
    extra_key: str | None = None
    cache_salt: str | None = None
    deadline_s: float = 10.0


class PrefixResult(msgspec.Struct, frozen=True):
    """Pages of ``page_size`` tokens; over several ranks the least.

    ``pages``: full pages of the prefix. ``hbm_pages``, ``dram_pages``: leading ones in that tier
    now; ``both_pages``: in both; ``reusable_pages``: what a request need not compute, HBM and then
    DRAM. Null where only keys were given: HBM is searched by tokens. ``moved_pages``: left HBM, or
    came into it. ``stored_pages``: written to DRAM before they could leave. ``continued_pages``:
    beyond the prefix, left with it. ``outcome`` is ``complete`` or why not all was moved.
    """

    outcome: str
    page_size: int
    pages: int
    hbm_pages: int | None
    dram_pages: int
    both_pages: int | None
    reusable_pages: int | None
    moved_pages: int
    stored_pages: int
    continued_pages: int
    seconds: float
