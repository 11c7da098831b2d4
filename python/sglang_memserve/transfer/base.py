"""The two seams of transfer: where bytes come from and go to (BlockStore), and how (Transport).

Both have several implementations and one contract suite each (``test/contract``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum
from typing import Protocol

from ..types import BlockId, PageKey


class Lease(Protocol):
    """Pinned blocks as a value. While it is valid its blocks stay in place and unchanged.

    ``release`` is idempotent. A lease whose deadline has passed is not valid and pins nothing.
    """

    @property
    def blocks(self) -> Sequence[BlockId]: ...

    def valid(self) -> bool: ...

    def release(self) -> None: ...


class Store(Protocol):
    """Blocks being filled, invisible to readers until ``commit``.

    ``missing`` lists (index into the keys asked for, block to fill); keys that were readable or
    already being filled by somebody else are not in it, and when blocks ran out it ends early.
    ``commit(count)`` publishes the first ``count`` of ``missing`` in chain order and frees the
    rest; ``abort()`` frees all. Exactly one of them counts; a second call does nothing.
    """

    @property
    def missing(self) -> Sequence[tuple[int, BlockId]]: ...

    def commit(self, count: int | None = None) -> None: ...

    def abort(self) -> None: ...


class BlockStore(Protocol):
    """What transfer needs of a pool. Every method is thread-safe and returns at once."""

    @property
    def block_bytes(self) -> int: ...

    @property
    def arena_base(self) -> int:
        """Virtual address of block 0."""
        ...

    @property
    def arena_bytes(self) -> int: ...

    def address(self, block: BlockId) -> int: ...

    def readable_pages(self, keys: Sequence[PageKey]) -> int:
        """Length of the leading run of ``keys`` that can be read now. Changes nothing."""
        ...

    def acquire(self, keys: Sequence[PageKey], *, owner: str, ttl_s: float) -> Lease:
        """Pin the leading readable run (maybe nothing). Raises LimitExceeded."""
        ...

    def prepare_store(self, keys: Sequence[PageKey], *, parent: PageKey | None = None) -> Store:
        """Blocks for those of ``keys`` (a chain under ``parent``) that are not readable yet,
        evicting if need be. ``missing`` is shorter than wished when blocks run out."""
        ...

    def subscribe(self, on_readable: Callable[[], None]) -> None:
        """Call back, on any thread and outside all locks, after pages became readable."""
        ...


class ReadState(Enum):
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"


class Transport(Protocol):
    """Moves bytes. Used by one thread only; no method blocks longer than a submission takes.

    Errors of a peer are TransferFailed (see errors.py).
    """

    def register(self, base: int, length: int) -> None:
        """Make our memory readable by peers and usable as a destination."""
        ...

    def metadata(self) -> bytes:
        """What a peer needs to read from us."""
        ...

    def connect(self, metadata: bytes) -> str:
        """Learn a peer; returns the name to use for it."""
        ...

    def disconnect(self, peer: str) -> None: ...

    def read(
        self, peer: str, remote: Sequence[int], local: Sequence[int], block_bytes: int
    ) -> int:
        """Start reading ``remote[i]`` (peer's addresses) into ``local[i]``; returns a handle."""
        ...

    def poll(self, handle: int) -> ReadState: ...

    def finish(self, handle: int) -> None:
        """Give the handle back; a running read is cancelled and no byte lands afterwards, or the
        implementation keeps it until it has ended and says so by ``poll``."""
        ...

    def close(self) -> None: ...
