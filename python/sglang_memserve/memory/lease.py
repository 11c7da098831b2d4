"""Pinned blocks and blocks being filled, as values that their holder must end.

Both carry a callback into the pool that made them; all bookkeeping happens there, under its lock.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Sequence
from heapq import heapify, heappop, heappush
from types import TracebackType

from ..errors import ConfigError, LimitExceeded
from ..types import BlockId, PageKey

_MAX_CHECKSUM = 2**64 - 1


class PoolLease:
    """Blocks that stay in place and unchanged while ``valid()``; see ``transfer.base.Lease``.

    ``deadline_s`` is on the pool's clock. A context manager: leaving it releases.
    """

    __slots__ = ("_clock", "_end", "blocks", "deadline_s", "ended", "owner")

    def __init__(
        self,
        blocks: Sequence[BlockId],
        owner: str,
        deadline_s: float,
        clock: Callable[[], float],
        end: Callable[[PoolLease], None],
    ) -> None:
        self.blocks: Sequence[BlockId] = blocks
        self.owner = owner
        self.deadline_s = deadline_s
        self.ended = False
        self._clock = clock
        self._end = end

    def valid(self) -> bool:
        return not self.ended and self._clock() < self.deadline_s

    def release(self) -> None:
        self._end(self)

    def __enter__(self) -> PoolLease:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()


class LeaseTable:
    """All leases that have not ended, by owner and by deadline. Not thread-safe.

    A lease that ended early leaves its entry in the deadline heap until the heap is half garbage.
    """

    def __init__(self, max_leases: int, max_ttl_s: float) -> None:
        self.max_leases = max_leases
        self.max_ttl_s = max_ttl_s
        self._owners: dict[str, dict[int, PoolLease]] = {}
        self._deadlines: list[tuple[float, int, PoolLease]] = []
        self._count = 0
        self._serial = 0

    def __len__(self) -> int:
        return self._count

    def require_allowed(self, ttl_s: float) -> None:
        """Raises LimitExceeded when a lease of that length, or another lease, is not allowed."""
        # Written so that a NaN fails too.
        if not 0 < ttl_s <= self.max_ttl_s:
            raise LimitExceeded(
                f"lease of {ttl_s} s; allowed is more than 0 and at most {self.max_ttl_s:g} s"
            )
        if self._count >= self.max_leases:
            raise LimitExceeded(f"{self._count} leases are held, the limit is {self.max_leases}")

    def add(self, lease: PoolLease) -> None:
        assert not lease.ended and self._count < self.max_leases, lease
        self._owners.setdefault(lease.owner, {})[id(lease)] = lease
        self._serial += 1
        heappush(self._deadlines, (lease.deadline_s, self._serial, lease))
        self._count += 1

    def end(self, lease: PoolLease) -> bool:
        """Whether ``lease`` was held until now."""
        if lease.ended:
            return False
        lease.ended = True
        held = self._owners[lease.owner]
        del held[id(lease)]
        if not held:
            del self._owners[lease.owner]
        self._count -= 1
        if len(self._deadlines) > 2 * self._count + 64:
            self._deadlines = [entry for entry in self._deadlines if not entry[2].ended]
            heapify(self._deadlines)
        return True

    def end_expired(self, now_s: float) -> list[PoolLease]:
        expired: list[PoolLease] = []
        while self._deadlines and self._deadlines[0][0] <= now_s:
            lease = heappop(self._deadlines)[2]
            if self.end(lease):
                expired.append(lease)
        return expired

    def end_owner(self, owner: str) -> list[PoolLease]:
        return self._end_all(list(self._owners.get(owner, {}).values()))

    def end_all(self) -> list[PoolLease]:
        return self._end_all([lease for held in self._owners.values() for lease in held.values()])

    def latest_deadline_s(self, blocks: Container[BlockId]) -> float | None:
        """When the last lease on any of ``blocks`` ends by itself; None when there is none."""
        deadlines = (
            lease.deadline_s
            for held in self._owners.values()
            for lease in held.values()
            if any(block in blocks for block in lease.blocks)
        )
        return max(deadlines, default=None)

    def pinned(self) -> Iterable[BlockId]:
        """Every pin a lease holds: a block as often as it is leased."""
        for held in self._owners.values():
            for lease in held.values():
                yield from lease.blocks

    def _end_all(self, leases: list[PoolLease]) -> list[PoolLease]:
        return [lease for lease in leases if self.end(lease)]

    def check(self) -> None:
        held = [lease for leases in self._owners.values() for lease in leases.values()]
        assert len(held) == self._count <= self.max_leases, (len(held), self._count)
        assert all(self._owners.values()), "an owner without leases is kept"
        assert not any(lease.ended for lease in held)
        waiting = {id(entry[2]) for entry in self._deadlines}
        assert all(id(lease) in waiting for lease in held), "a lease without a deadline"
        assert len(self._deadlines) <= 2 * self._count + 64, len(self._deadlines)


class PoolStore:
    """Blocks being filled; see ``transfer.base.Store``. Made by ``MemPool.prepare_store``.

    ``held`` are resident pages of the same chain, pinned meanwhile so that what is published has
    its head. ``flushed``: the pool was cleared since, so nothing will be published.
    A context manager: leaving it without a commit aborts.
    """

    __slots__ = ("_end", "ended", "flushed", "held", "keys", "missing", "parent")

    def __init__(
        self,
        keys: Sequence[PageKey],
        parent: PageKey | None,
        missing: Sequence[tuple[int, BlockId]],
        held: Sequence[BlockId],
        end: Callable[[PoolStore, int, Sequence[int]], None],
    ) -> None:
        self.keys = keys
        self.parent = parent
        self.missing: Sequence[tuple[int, BlockId]] = missing
        self.held = held
        self.ended = False
        self.flushed = False
        self._end = end

    def commit(self, count: int | None = None, checksums: Sequence[int] = ()) -> None:
        """Publish the first ``count`` of ``missing`` (all of them if None), free the rest.

        ``checksums``: one for each of ``missing`` (see ``checksums``), or none at all. ConfigError,
        and the store goes on, for a ``count`` or checksums that cannot be."""
        wanted = len(self.missing) if count is None else count
        if not 0 <= wanted <= len(self.missing):
            raise ConfigError(f"commit of {wanted} blocks of {len(self.missing)}")
        if len(checksums) not in (0, len(self.missing)):
            raise ConfigError(f"{len(checksums)} checksums of {len(self.missing)} blocks")
        if checksums and not 0 <= min(checksums) <= max(checksums) <= _MAX_CHECKSUM:
            raise ConfigError("a checksum is an integer of 64 bits, not negative")
        self._end(self, wanted, checksums)

    def abort(self) -> None:
        self._end(self, 0, ())

    def __enter__(self) -> PoolStore:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.abort()
