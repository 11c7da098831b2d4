"""Messages between ranks, and between an instance's HTTP process and its ranks.

Each rank binds two ZMQ ROUTER sockets; the other side uses DEALER. A message is two frames: a
request id (8 bytes, chosen by the asker, echoed in the answer) and one msgpack struct below.

``peer`` socket (tcp), other instances' ranks of the same index:
    Hello -> HelloReply          once per peer and generation: namespaces are compared here
    LeaseRequest -> LeaseReply   pin pages and learn where they lie; may wait for pages to appear
    ReleaseRequest -> ReleaseReply   end the lease and learn whether it was valid all along
    OfferRequest -> FetchReply   fetch from the asker; only by ranks that take offers
``local`` socket (ipc, this machine's user only), the instance's HTTP process:
    FetchRequest -> FetchReply   make pages of peers our own
    ResizeRequest -> ResizeReply   grow or shrink the DRAM pool
    SnapshotRequest -> SnapshotReply
    StatsRequest -> StatsReply
    PeersRequest -> PeersReply   who belongs to the cluster: connect to them, forget the others
Any request may be answered by ErrorReply.

All durations are seconds relative to arrival: clocks of two machines are never compared.
"""

from __future__ import annotations

from typing import TypeVar

import msgspec

from ..errors import ProtocolError
from ..types import Namespace
from . import UNDECODABLE


class _Message(msgspec.Struct, frozen=True, tag=True):
    pass


_M = TypeVar("_M", bound=_Message)


class Hello(_Message, frozen=True):
    """The asker introduces itself. It only reads, so the holder needs none of its memory."""

    version: int
    instance_id: str
    generation: str
    namespace: Namespace


class HelloReply(_Message, frozen=True):
    """``transport_metadata``: the holder's NIXL agent metadata (or the loopback's name).
    ``memory``: (address, bytes) of each range that it can be read from; blocks lie in these.
    ``memory_version`` grows when the holder's memory does, or shrinks."""

    version: int
    instance_id: str
    generation: str
    namespace: Namespace
    transport_metadata: bytes
    memory: list[tuple[int, int]] = []
    memory_version: int = 0


class LeaseRequest(_Message, frozen=True):
    """Pin the leading run of ``keys`` (32-byte page keys in chain order) that is readable.

    Answered as soon as at least ``min_pages`` of them are readable, and with whatever is readable
    (maybe nothing) after ``wait_s``. The lease ends by itself ``ttl_s`` after the answer.
    """

    generation: str
    keys: list[bytes]
    min_pages: int
    wait_s: float
    ttl_s: float


class LeaseReply(_Message, frozen=True):
    """``lease_id`` is 0 and ``addresses`` empty when nothing was readable.

    ``addresses[i]`` is the holder's virtual address of the block of ``keys[i]``;
    ``checksums`` is empty or has one 64-bit value a block; 0 stands for one that is not known.
    ``memory_version`` is the holder's: who knows an older one has to greet it again before reading.
    """

    lease_id: int
    addresses: list[int]
    checksums: list[int]
    memory_version: int = 0


class ReleaseRequest(_Message, frozen=True):
    generation: str
    lease_id: int


class ReleaseReply(_Message, frozen=True):
    """``valid``: the lease had not expired; what was read under it may be published."""

    valid: bool


class Source(msgspec.Struct, frozen=True):
    """Pages ``first_page`` and the ``pages`` - 1 after it (0: all to the end of the keys) may be
    read from the rank whose ``peer`` socket is ``peer_address``."""

    peer_id: str
    peer_address: str
    first_page: int = 0
    pages: int = 0


class FetchRequest(_Message, frozen=True):
    """Make ``keys`` (a whole prefix from page 0, in chain order) readable here, reading what is
    missing from ``sources``.

    Where sources overlap, the first one listed reads a page and the others stand by for it.
    ``wait_s``: how long to wait for pages that a source is still computing. ``deadline_s``: after
    this the fetch ends with what it has. ``hold_s``: for how long what is readable then stays for
    the request that it was fetched for, unless that comes before. Never raises for a miss: the
    reply says how far it got.
    """

    sources: list[Source]
    keys: list[bytes]
    wait_s: float
    deadline_s: float
    hold_s: float = 0.0

    @classmethod
    def of(
        cls, peer_id: str, peer_address: str, keys: list[bytes], wait_s: float, deadline_s: float
    ) -> FetchRequest:
        """All pages from one peer."""
        return cls([Source(peer_id, peer_address)], keys, wait_s, deadline_s)


class OfferRequest(_Message, frozen=True):
    """The asker, whose ``peer`` socket is ``peer_address``, would like the receiver to fetch
    ``keys`` from it, with this deadline: as a FetchRequest of the receiver's own."""

    peer_id: str
    peer_address: str
    keys: list[bytes]
    deadline_s: float


class SourceReply(msgspec.Struct, frozen=True):
    """``fetched_pages``: moved from this source, in place of another one too. ``outcome``:
    ``complete``, or why it did not give all that was asked of it; ``detail`` explains that."""

    peer_id: str
    fetched_pages: int
    outcome: str
    detail: str = ""


class FetchReply(_Message, frozen=True):
    """``present_pages``: leading pages that were here before; ``readable_pages``: leading pages
    readable now; ``fetched_pages``/``fetched_bytes``: moved by this fetch, also behind a hole.
    ``outcome`` is ``complete`` or the reason why not all keys are readable. ``sources``: one for
    each source of the request, in its order; empty when the fetch was not started."""

    present_pages: int
    readable_pages: int
    fetched_pages: int
    fetched_bytes: int
    seconds: float
    outcome: str
    sources: list[SourceReply] = []


class ResizeRequest(_Message, frozen=True):
    """Grow or shrink the rank's DRAM pool to ``total_bytes``; ``wait_s``: how long to wait for
    leases and stores that are in the way of shrinking."""

    total_bytes: int
    wait_s: float


class ResizeReply(_Message, frozen=True):
    """As ``types.ResizeResult``; ``outcome``: ``resized``, ``unchanged`` or ``refused``."""

    outcome: str
    total_blocks: int
    total_bytes: int
    moved_pages: int
    evicted_pages: int
    reason: str = ""


class SnapshotRequest(_Message, frozen=True):
    pass


class SnapshotReply(_Message, frozen=True):
    """``snapshot`` is an encoded ``events.Snapshot``."""

    snapshot: bytes


class StatsRequest(_Message, frozen=True):
    pass


class StatsReply(_Message, frozen=True):
    """Counters and gauges of one rank; names are documented in ``docs/mempool.md``."""

    values: dict[str, float]


class InfoRequest(_Message, frozen=True):
    pass


class InfoReply(_Message, frozen=True):
    rank: int
    generation: str
    namespace: Namespace
    peer_address: str
    events_address: str
    total_blocks: int


class PeerEntry(msgspec.Struct, frozen=True):
    """One rank of another instance: the one of the same index."""

    peer_id: str
    generation: str
    peer_address: str


class PeersRequest(_Message, frozen=True):
    """All other members of the cluster, for ``valid_s`` seconds unless it is said again: be
    connected to them. One that is not in it any more is forgotten."""

    peers: list[PeerEntry]
    valid_s: float


class PeersReply(_Message, frozen=True):
    """``members``: how many were taken over; ``connected``: to how many a connection is up."""

    members: int
    connected: int


class ErrorReply(_Message, frozen=True):
    """``kind`` is the name of a class in ``errors``; ``message`` its text."""

    kind: str
    message: str


Message = (
    Hello
    | HelloReply
    | LeaseRequest
    | LeaseReply
    | ReleaseRequest
    | ReleaseReply
    | FetchRequest
    | OfferRequest
    | FetchReply
    | ResizeRequest
    | ResizeReply
    | SnapshotRequest
    | SnapshotReply
    | StatsRequest
    | StatsReply
    | InfoRequest
    | InfoReply
    | PeersRequest
    | PeersReply
    | ErrorReply
)

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)

KEY_BYTES = 32
_ADDRESSES = 2**64


def encode(message: _Message) -> bytes:
    return _encoder.encode(message)


def as_received(message: _M) -> _M:
    """``message`` as its receiver would have it: what code of this process made is checked as what
    came over the network is. Raises ProtocolError."""
    try:
        received = decode(encode(message))
    # Lists of other things, text that is no Unicode, numbers that are too large.
    except (msgspec.MsgspecError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise ProtocolError(f"{type(message).__name__}: {error}") from error
    if not isinstance(received, type(message)):
        raise ProtocolError(f"a {type(message).__name__} is no message")
    return received


def decode(data: bytes) -> Message:
    """Raises ProtocolError for bytes that are no message, and for keys of a wrong length."""
    try:
        message = _decoder.decode(data)
    except UNDECODABLE as error:
        raise ProtocolError(f"control message: {error}") from error
    if isinstance(message, LeaseRequest | FetchRequest | OfferRequest):
        for key in message.keys:
            if len(key) != KEY_BYTES:
                raise ProtocolError(f"page key of {len(key)} bytes, expected {KEY_BYTES}")
    elif isinstance(message, HelloReply):
        for base, length in message.memory:
            if base < 0 or length <= 0 or base + length > _ADDRESSES:
                raise ProtocolError(f"no memory is {length} bytes at {base:#x}")
    return message
