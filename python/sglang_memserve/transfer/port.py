"""What a fetch needs of the world outside: the seam between its state machine and ``session``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from ..config import Limits
from ..protocol.control import Hello, HelloReply, Message
from ..types import PageKey
from .base import BlockStore, Store


@dataclass(frozen=True, slots=True)
class Greeting:
    """What is known of a peer once it was greeted: its boot, its name in our transport, and the
    (address, bytes) ranges its blocks lie in, as of ``memory_version``."""

    generation: str
    transport_name: str
    memory: tuple[tuple[int, int], ...] = ()
    memory_version: int = 0


@dataclass(frozen=True, slots=True)
class FetchSettings:
    """``reply_timeout_s``: for a peer's answer, on top of any wait it was asked for.
    ``rounds``: leases a fetch holds at one source at the same time. ``max_bytes_per_lease``: what
    one round reads, but at least a page. ``grace_s``: how long the pages of an ended fetch stay
    pinned. ``recheck_s``: how often a fetch that waits for others on this rank looks again."""

    reply_timeout_s: float = 1.0
    rounds: int = 4
    max_pages_per_lease: int = 1024
    max_bytes_per_lease: int = 64 << 20
    max_lease_ttl_s: float = 30.0
    grace_s: float = 3.0
    recheck_s: float = 0.05

    @classmethod
    def of(cls, limits: Limits) -> FetchSettings:
        return cls(
            reply_timeout_s=limits.connect_timeout_s,
            rounds=limits.max_rounds,
            max_bytes_per_lease=limits.max_round_bytes,
            max_lease_ttl_s=limits.lease_ttl_s,
        )

    def round_pages(self, block_bytes: int) -> int:
        return max(1, min(self.max_pages_per_lease, self.max_bytes_per_lease // block_bytes))


@dataclass(frozen=True, slots=True)
class Task:
    """What all sources of one fetch share. Times are on the caller's monotonic clock."""

    keys: Sequence[PageKey]
    pool: BlockStore
    hello: Hello
    settings: FetchSettings
    deadline_s: float
    wait_until_s: float


class Port(Protocol):
    """One source of one fetch, as the world outside. Nothing here waits."""

    def send(self, message: Message) -> int:
        """To the peer; returns the request id under which it may answer."""
        ...

    def greeting(self) -> Greeting | None: ...

    def greet(self, reply: HelloReply) -> Greeting:
        """Check and remember a peer. Raises NamespaceMismatch, VersionMismatch, PeerError."""
        ...

    def forget(self) -> None:
        """The peer must be greeted again before anything else is asked of it."""
        ...

    def reconnect(self) -> None:
        """As ``forget``; and the transport has to learn the peer anew."""
        ...

    def read(self, name: str, remote: Sequence[int], local: Sequence[int]) -> int:
        """Raises TransferFailed when nothing was started, LimitExceeded when too much is being
        read from that peer: later then."""
        ...

    def abandon(self, handle: int, store: Store) -> None:
        """Take over a read that runs and the blocks it writes to; abort ``store`` when it ended."""
        ...

    def verify(self, local: Sequence[int], checksums: Sequence[int]) -> int:
        """Compare blocks at ``local`` with their checksums (0: not known, passes), in another
        thread; returns a ticket."""
        ...
