"""The holder's side: answers hello, lease and release; parks lease requests that may wait.

Belongs to the agent's thread; knows no sockets. ``answer`` is called once for every request, now or
later: a lease request that asks for pages that are not readable yet is parked until they are, or
until its wait is over.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from ..config import Limits
from ..errors import LeaseInvalid, LimitExceeded, MemServeError, ProtocolError
from ..protocol import handshake
from ..protocol.control import (
    ErrorReply,
    Hello,
    HelloReply,
    LeaseReply,
    LeaseRequest,
    Message,
    ReleaseReply,
    ReleaseRequest,
)
from ..types import PageKey, Region
from .base import Lease, Pool

_LOOK_PAGES = 64

Answer = Callable[[Message], None]


@dataclass(frozen=True, slots=True)
class _Grant:
    owner: str
    lease: Lease
    end_s: float


@dataclass(slots=True)
class _Parked:
    """``seen``: leading pages that were readable when last looked at."""

    owner: str
    keys: list[PageKey]
    min_pages: int
    ttl_s: float
    until_s: float
    answer: Answer
    seen: int = 0

    def ready(self, pool: Pool) -> bool:
        """Looks on from the first page that was not readable, so that a long list costs no more
        than a short one."""
        while self.seen < self.min_pages:
            window = self.keys[self.seen : self.seen + _LOOK_PAGES]
            lead = pool.readable_pages(window)
            self.seen += lead
            if lead < len(window) and self.seen < self.min_pages:
                return False
        # Those in front may have been evicted meanwhile.
        self.seen = pool.readable_pages(self.keys[: self.min_pages])
        return self.seen >= self.min_pages


@dataclass(slots=True)
class ServeCounts:
    leases: int = 0
    pages: int = 0
    invalid_releases: int = 0
    expired: int = 0
    refused: int = 0


def error_reply(error: MemServeError) -> ErrorReply:
    return ErrorReply(type(error).__name__, str(error))


class LeaseServer:
    def __init__(self, pool: Pool, hello: HelloReply, limits: Limits) -> None:
        self.counts = ServeCounts()
        self.limits = limits
        self._pool = pool
        self._hello = hello
        self._grants: dict[int, _Grant] = {}
        self._parked: list[_Parked] = []

    def handle(self, owner: str, message: Message, now: float, answer: Answer) -> None:
        """``owner`` tells askers apart. Everything a peer can do wrong is an ErrorReply."""
        try:
            match message:
                case Hello():
                    answer(self._greet(message))
                case LeaseRequest():
                    self._lease(owner, message, now, answer)
                case ReleaseRequest():
                    answer(ReleaseReply(self._release(message)))
                case _:
                    raise ProtocolError(f"{type(message).__name__} is not for a peer socket")
        except MemServeError as error:
            if isinstance(error, LimitExceeded):
                self.counts.refused += 1
            answer(error_reply(error))

    def on_pages_readable(self, now: float) -> None:
        self._retry_parked(now)

    def on_time(self, now: float) -> None:
        self._retry_parked(now)
        expired = [lease_id for lease_id, grant in self._grants.items() if grant.end_s <= now]
        for lease_id in expired:
            self._grants.pop(lease_id).lease.release()
            self.counts.expired += 1

    def wake_s(self) -> float:
        """When ``on_time`` has something to do, at the latest."""
        return min((parked.until_s for parked in self._parked), default=float("inf"))

    def close(self) -> None:
        for parked in self._parked:
            parked.answer(ErrorReply("PeerUnreachable", "the holder is shutting down"))
        self._parked.clear()
        for grant in self._grants.values():
            grant.lease.release()
        self._grants.clear()

    def stats(self) -> dict[str, float]:
        return {
            "leases_granted_total": self.counts.leases,
            "leased_pages_total": self.counts.pages,
            "leases_expired_total": self.counts.expired,
            "releases_invalid_total": self.counts.invalid_releases,
            "lease_requests_refused_total": self.counts.refused,
            "leases_held_by_peers": len(self._grants),
            "lease_requests_parked": len(self._parked),
        }

    def check(self) -> None:
        assert len(self._grants) <= self.limits.max_leases
        assert len(self._parked) <= self.limits.max_parked
        assert sum(len(parked.keys) for parked in self._parked) <= self.limits.max_parked_pages
        assert 0 not in self._grants

    def _greet(self, hello: Hello) -> HelloReply:
        handshake.require_same_version(hello.version)
        handshake.require_same_namespace(
            self._hello.namespace, hello.namespace, self._hello.instance_id, hello.instance_id
        )
        return self._hello

    def _lease(self, owner: str, request: LeaseRequest, now: float, answer: Answer) -> None:
        limits = self.limits
        if request.generation != self._hello.generation:
            raise LeaseInvalid(f"this is generation {self._hello.generation}")
        if len(request.keys) > limits.max_pages_per_request:
            text = f"lease of {len(request.keys)} pages, max_pages_per_request is"
            raise LimitExceeded(f"{text} {limits.max_pages_per_request}")
        # Written so that NaN is refused too.
        if not (request.wait_s >= 0 and request.ttl_s > 0):
            raise ProtocolError(f"lease: wait {request.wait_s} s, life {request.ttl_s} s")
        # Who asks for more gets our bound: two instances need not be set up alike, and a reader
        # learns at the release whether the lease lasted. Who waits for longer asks again.
        wait_s = min(request.wait_s, limits.lease_wait_s)
        ttl_s = min(request.ttl_s, limits.lease_ttl_s)
        keys = [PageKey(key) for key in request.keys]
        wanted = _Parked(
            owner,
            keys,
            min(max(1, request.min_pages), len(keys)),
            ttl_s,
            now + wait_s,
            answer,
        )
        if wait_s == 0 or wanted.ready(self._pool):
            answer(self._grant(wanted, now))
        else:
            self._park(wanted)

    def _park(self, wanted: _Parked) -> None:
        """Raises LimitExceeded."""
        limits, parked = self.limits, self._parked
        if len(parked) >= limits.max_parked:
            text = f"{len(parked)} lease requests wait, max_parked is {limits.max_parked}"
            raise LimitExceeded(text)
        pages = len(wanted.keys) + sum(len(other.keys) for other in parked)
        if pages > limits.max_parked_pages:
            text = f"{pages} pages would be waited for, max_parked_pages is"
            raise LimitExceeded(f"{text} {limits.max_parked_pages}")
        theirs = [other for other in parked if other.owner == wanted.owner]
        pages = len(wanted.keys) + sum(len(other.keys) for other in theirs)
        if pages > limits.max_parked_pages_per_peer:
            text = f"this peer would wait for {pages} pages, max_parked_pages_per_peer is"
            raise LimitExceeded(f"{text} {limits.max_parked_pages_per_peer}")
        parked.append(wanted)

    def memory_changed(self, metadata: bytes, memory: list[Region]) -> None:
        """Peers that know the old memory learn with their next lease that they have to ask."""
        self._hello = msgspec.structs.replace(
            self._hello,
            transport_metadata=metadata,
            memory=memory,
            memory_version=self._hello.memory_version + 1,
        )

    def _nothing(self) -> LeaseReply:
        return LeaseReply(0, [], [], self._hello.memory_version)

    def _grant(self, wanted: _Parked, now: float) -> LeaseReply:
        keys = wanted.keys[: self._room_pages(wanted.owner)]
        if not self._pool.readable_pages(keys):
            return self._nothing()
        lease = self._pool.acquire(keys, owner=f"peer {wanted.owner}", ttl_s=wanted.ttl_s)
        if not lease.blocks:
            lease.release()
            return self._nothing()
        lease_id = 0
        while lease_id == 0 or lease_id in self._grants:
            lease_id = secrets.randbits(63)
        self._grants[lease_id] = _Grant(wanted.owner, lease, now + wanted.ttl_s)
        self.counts.leases += 1
        self.counts.pages += len(lease.blocks)
        addresses = self._pool.addresses(lease.blocks)
        checksums = self._pool.checksums(lease.blocks)
        known = checksums if any(checksums) else []
        return LeaseReply(lease_id, addresses, known, self._hello.memory_version)

    def _room_pages(self, owner: str) -> int:
        """How many pages ``owner`` may lease now. Raises LimitExceeded when it may none."""
        limits, size = self.limits, self._pool.block_bytes
        held = [grant.lease for grant in self._grants.values() if grant.owner == owner]
        if len(self._grants) >= limits.max_leases:
            text = f"{len(self._grants)} leases are held, max_leases is {limits.max_leases}"
            raise LimitExceeded(text)
        if len(held) >= limits.max_leases_per_peer:
            text = f"this peer holds {len(held)} leases, max_leases_per_peer is"
            raise LimitExceeded(f"{text} {limits.max_leases_per_peer}")
        leased_bytes = sum(len(lease.blocks) for lease in held) * size
        room_bytes = limits.max_leased_bytes_per_peer - leased_bytes
        if held and room_bytes < size:
            text = f"this peer has leased {leased_bytes} bytes, max_leased_bytes_per_peer is"
            raise LimitExceeded(f"{text} {limits.max_leased_bytes_per_peer}")
        return max(1, room_bytes // size)

    def _release(self, request: ReleaseRequest) -> bool:
        """Of an unknown, expired or earlier lease: False, which is all a reader has to know."""
        valid = False
        if request.generation == self._hello.generation:
            grant = self._grants.pop(request.lease_id, None)
            if grant is not None:
                valid = grant.lease.valid()
                grant.lease.release()
        self.counts.invalid_releases += not valid
        return valid

    def _retry_parked(self, now: float) -> None:
        still: list[_Parked] = []
        for parked in self._parked:
            if now < parked.until_s and not parked.ready(self._pool):
                still.append(parked)
                continue
            try:
                parked.answer(self._grant(parked, now))
            except LimitExceeded as error:
                self.counts.refused += 1
                parked.answer(error_reply(error))
        self._parked = still
