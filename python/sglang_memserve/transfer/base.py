"""The seams of transfer: where bytes come from and go to (BlockStore, Pool), and how (Transport).

Transport and BlockStore have several implementations each, and one contract suite each
(``test/contract``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from typing import Protocol

from ..protocol.events import Event, Snapshot
from ..types import BlockId, HoldOutcome, Namespace, PageKey, Progress, Region, ResizeResult


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
    ``checksums``: one 64-bit value for each of ``missing`` (0: not known), or none at all.
    """

    @property
    def missing(self) -> Sequence[tuple[int, BlockId]]: ...

    def commit(self, count: int | None = None, checksums: Sequence[int] = ()) -> None: ...

    def abort(self) -> None: ...


class Hold(Protocol):
    """Pages that are to stay until the request comes for which they are fetched. Exactly one of
    both methods counts; a second call does nothing."""

    def complete(self, ttl_s: float) -> HoldOutcome:
        """Pin what is readable of their leading run until then, or until the request is there."""
        ...

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

    def addresses(self, blocks: Sequence[BlockId]) -> list[int]: ...

    def checksums(self, blocks: Sequence[BlockId]) -> list[int]:
        """What was committed with each of some leased blocks: 0 where nothing was, and an empty
        list where nothing ever was."""
        ...

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

    def subscribe(self, on_readable: Callable[[], None]) -> Callable[[], None]:
        """Call back, on any thread and outside all locks, after pages became readable. Returns
        what ends it. Raises LimitExceeded."""
        ...


class Resize(Protocol):
    """One change of a pool's size: register ``adds``, or ``vacate`` until it is DONE and unregister
    ``removes``; then ``complete``. ``abort`` leaves the size as it was."""

    @property
    def adds(self) -> Sequence[Region]: ...

    @property
    def removes(self) -> Sequence[Region]: ...

    def vacate(self) -> Progress:
        """Do a bounded piece of the work."""
        ...

    def obstacle(self) -> str:
        """What is in the way, in words; empty when nothing is."""
        ...

    def complete(self) -> ResizeResult: ...

    def abort(self, reason: str = "") -> ResizeResult: ...


class Pool(BlockStore, Protocol):
    """What a ``RankAgent`` needs of the rank's pool. Thread-safe; every method returns at once."""

    @property
    def namespace(self) -> Namespace: ...

    @property
    def total_blocks(self) -> int: ...

    def prepare_hold(self, keys: Sequence[PageKey]) -> Hold:
        """Before the pages come. ``keys``: at least one."""
        ...

    def regions(self) -> Sequence[Region]:
        """The memory in use, in the ranges in which it is to be registered."""
        ...

    def prepare_resize(self, total_bytes: int) -> Resize:
        """Raises ConfigError for a size that cannot be, LimitExceeded while another one is under
        way."""
        ...

    def own_resizing(self, owner: str | None) -> None:
        """``owner`` registers the memory: from now on the size changes through it only. None:
        nobody reads or writes there any more."""
        ...

    def expire(self) -> int:
        """End the leases whose deadline has passed; returns how many there were."""
        ...

    def set_event_wake(self, on_events: Callable[[], None] | None) -> None:
        """Call back, on any thread and outside all locks, when there is something to drain."""
        ...

    def drain_events(self) -> Sequence[tuple[int, Sequence[Event]]]:
        """Residency changes since the last call, as numbered batches without holes."""
        ...

    def snapshot(self) -> Snapshot:
        """All that is held, true right after the batch whose number it carries."""
        ...

    def stats(self) -> Mapping[str, float]: ...


class ReadState(Enum):
    """DONE and FAILED mean that the read has ended: no byte of it lands any more."""

    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"


class Transport(Protocol):
    """Moves bytes. Used by one thread only; no method blocks longer than a submission takes.

    Errors of a peer are TransferFailed (see errors.py).
    """

    def register(self, base: int, length: int) -> None:
        """Make a range of our memory readable by peers and usable as a destination.

        A read may go over several ranges, a block may not. Peers that know us learn of a new range
        by connecting again. Raises TransferFailed when it overlaps one that is registered."""
        ...

    def unregister(self, base: int, length: int) -> None:
        """Undo one ``register``, when no read of ours goes there any more. What a peer still reads
        from there fails or gets bytes of any kind, and harms nobody. Raises TransferFailed for a
        range that is not registered."""
        ...

    def metadata(self) -> bytes:
        """What a peer needs to read from us. Call after ``register``, and again after a change."""
        ...

    def name_in(self, metadata: bytes) -> str:
        """The name that ``connect`` will give. Raises TransferFailed for what is no metadata."""
        ...

    def connect(self, metadata: bytes) -> str:
        """Learn a peer; returns the name to use for it. Doing it again renews the connection; with
        newer metadata of the same peer, its new memory is learnt, also while reads from it run.

        Raises TransferFailed when the peer is gone, or reads from it have not ended where that is
        in the way: the connection is to be renewed, or memory was registered anew."""
        ...

    def disconnect(self, peer: str) -> None:
        """Forget a peer, at the latest when the reads from it that run have ended."""
        ...

    def read(self, peer: str, remote: Sequence[int], local: Sequence[int], block_bytes: int) -> int:
        """Start reading ``remote[i]`` (peer's addresses) into ``local[i]``; returns a handle.

        Raises TransferFailed when nothing was started."""
        ...

    def poll(self, handle: int) -> ReadState:
        """How far a read is; moves it on. The first DONE or FAILED gives the handle back."""
        ...

    def cancel(self, handle: int) -> None:
        """Give a running read up: as little of it as possible is still read, and it ends as
        FAILED. It may be RUNNING for a while: its blocks must not be reused before ``poll`` says
        that it has ended. Unknown and ended handles are ignored."""
        ...

    def close(self) -> None:
        """Stop. Afterwards no byte lands and nobody reads from us; memory may be unmapped."""
        ...
