"""One lease at one source, what is read under it, and its release. Part of ``state.Fetch``."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum, auto

from ..errors import LimitExceeded, TransferFailed
from ..protocol.control import (
    KEY_BYTES,
    ErrorReply,
    LeaseReply,
    LeaseRequest,
    Message,
    ReleaseReply,
    ReleaseRequest,
)
from ..types import BlockId, PageKey
from .base import ReadState, Store
from .outcome import Ending, Outcome, outcome_of
from .plan import first_outside
from .port import Greeting, Port, Task

_PROBE = PageKey(b"\xff" * KEY_BYTES)


class Phase(Enum):
    LEASING = auto()
    READING = auto()
    RELEASING = auto()
    ENDED = auto()


class Round:
    """Pages ``first`` to ``stop`` of the chain; ``stop`` moves down when the source grants less.

    ``ending`` is set when it is over: COMPLETE when all it could fill is published. ``gaps`` are
    pages it was granted but does not fill: others on this rank do, or blocks ran out (``starved``).
    ``refused``: it ended by an ErrorReply to its lease request. ``outdated``: the source's memory
    has changed since it was greeted. ``postponed``: a bound of ours leaves no room to read it now.
    """

    def __init__(self, task: Task, port: Port, greeting: Greeting, first: int, stop: int) -> None:
        self.first = first
        self.stop = stop
        self.phase = Phase.LEASING
        self.ending: Ending | None = None
        self.refused = False
        self.outdated = False
        self.postponed = False
        self.starved = False
        self.gaps: list[tuple[int, int]] = []
        self.fetched_pages = 0
        self.wake_s = task.deadline_s
        self.request_id: int | None = None
        self.read_handle: int | None = None
        self.ticket: int | None = None
        self.lease_id = 0
        self.patient_until_s = task.deadline_s
        self._task = task
        self._port = port
        self._greeting = greeting
        self._store: Store | None = None
        self._checksums: Sequence[int] = ()
        self._lease_end_s = task.deadline_s

    @property
    def memory_version(self) -> int:
        """Of the source's memory, as it was known when this began."""
        return self._greeting.memory_version

    @property
    def granted(self) -> bool:
        """Whether the source has pinned pages for it; then ``stop`` and ``gaps`` are known."""
        return self._store is not None or (self.phase is Phase.ENDED and not self.refused)

    # -- events --

    def lease(self, now: float) -> None:
        task, settings = self._task, self._task.settings
        # The peer's answer should come before our own deadline, to end as a miss and not as one.
        latest = min(task.wait_until_s, task.deadline_s - 0.1 * (task.deadline_s - now))
        self.patient_until_s = latest
        wait_s = max(0.0, latest - now)
        ttl_s = min(task.deadline_s - now + settings.reply_timeout_s, settings.max_lease_ttl_s)
        # By the peer's clock it lasts longer: it starts when the peer answers.
        self._lease_end_s = now + wait_s + settings.reply_timeout_s + ttl_s
        self._enter(Phase.LEASING, now + wait_s + settings.reply_timeout_s)
        keys: list[bytes] = list(task.keys[self.first : self.stop])
        self.request_id = self._port.send(
            LeaseRequest(self._greeting.generation, keys, min_pages=1, wait_s=wait_s, ttl_s=ttl_s)
        )

    def on_reply(self, message: Message, now: float) -> None:
        """The answer to ``request_id``."""
        self.request_id = None
        if isinstance(message, ErrorReply):
            self.refused = self.phase is Phase.LEASING
            self.end(Ending(outcome_of(message.kind), message.message))
        elif self.phase is Phase.LEASING and isinstance(message, LeaseReply):
            self._on_lease(message, now)
        elif self.phase is Phase.RELEASING and isinstance(message, ReleaseReply):
            self._on_released(message)
        else:
            text = f"{type(message).__name__} while {self.phase.name.lower()}"
            self.end(Ending(Outcome.PROTOCOL_ERROR, text))

    def on_read_ended(self, state: ReadState, now: float) -> None:
        assert self.phase is Phase.READING and state is not ReadState.RUNNING, (self.phase, state)
        assert self._store is not None
        self.read_handle = None
        if state is ReadState.FAILED:
            self._port.reconnect()
            self.end(Ending(Outcome.TRANSFER_FAILED, "the read failed"))
            return
        self._enter(Phase.RELEASING, now + self._task.settings.reply_timeout_s)
        self.request_id = self._port.send(self._release_request())
        if self._checksums:
            local = self._task.pool.addresses([block for _, block in self._store.missing])
            self.ticket = self._port.verify(local, self._checksums)

    def on_verified(self, damaged: int | None) -> None:
        """``damaged``: index among the blocks that were read of one with another checksum."""
        assert self._store is not None and self.ticket is not None
        self.ticket = None
        if damaged is not None:
            key = self._task.keys[self.first + self._store.missing[damaged][0]]
            text = f"page {key.hex()[:16]} has not the checksum {self._checksums[damaged]:#x}"
            self.end(Ending(Outcome.CHECKSUM_MISMATCH, text))
        elif self.lease_id == 0:
            self._publish()

    def on_time(self, now: float) -> None:
        if now < self.wake_s or self.phase is Phase.ENDED:
            return
        if self.phase is Phase.READING:
            self.end(Ending(Outcome.LEASE_INVALID, "the lease was over before the read"))
        elif self.request_id is not None:
            self._port.forget()
            text = f"no answer in {self._task.settings.reply_timeout_s:g} s"
            self.end(Ending(Outcome.PEER_UNREACHABLE, text))
        else:
            self.wake_s = self._task.deadline_s  # blocks are being verified

    def end(self, ending: Ending) -> None:
        """Give back the peer's lease and our unpublished blocks. Idempotent."""
        if self.phase is Phase.ENDED:
            return
        self.phase = Phase.ENDED
        self.ending = ending
        self.request_id = self.ticket = None
        self.wake_s = self._task.deadline_s
        self._give_back()

    # -- transitions --

    def _on_lease(self, message: LeaseReply, now: float) -> None:
        task = self._task
        self.lease_id = message.lease_id
        if message.memory_version > self._greeting.memory_version:
            self.refused = self.outdated = True
            self.end(Ending(Outcome.LEASE_INVALID, "the source's memory has changed"))
            return
        count = len(message.addresses)
        if self.lease_id == 0 or count == 0:
            self.refused = True
            self.end(Ending(Outcome.MISS, f"page {self.first} is not there"))
            return
        wrong = self._what_is_wrong(message)
        if wrong:
            self.refused = True
            self.end(Ending(Outcome.PROTOCOL_ERROR, wrong))
            return
        self.stop = self.first + count
        keys = task.keys[self.first : self.stop]
        parent = task.keys[self.first - 1] if self.first else None
        store = task.pool.prepare_store(keys, parent=parent)
        missing = store.missing
        if len(missing) < count:
            self._find_gaps(keys, {index for index, _ in missing})
        if not missing:
            self.end(Ending(Outcome.COMPLETE))
            return
        self._store = store
        if message.checksums and any(message.checksums):
            self._checksums = [message.checksums[index] for index, _ in missing]
        self._read(missing, message.addresses)

    def _what_is_wrong(self, message: LeaseReply) -> str:
        """With a lease: nothing that a peer says may lead us outside the memory it described."""
        count, asked = len(message.addresses), self.stop - self.first
        if count > asked:
            return f"{count} addresses for {asked} pages"
        if message.checksums and len(message.checksums) != count:
            return f"{len(message.checksums)} checksums for {count} addresses"
        size = self._task.pool.block_bytes
        wrong = first_outside(message.addresses, size, self._greeting.memory)
        if wrong is not None:
            ranges = ", ".join(f"{base:#x}+{size:#x}" for base, size in self._greeting.memory[:8])
            return f"no block is at {wrong:#x}; the peer's memory is {ranges or 'empty'}"
        return ""

    def _read(self, missing: Sequence[tuple[int, BlockId]], addresses: Sequence[int]) -> None:
        remote = [addresses[index] for index, _ in missing]
        local = self._task.pool.addresses([block for _, block in missing])
        try:
            self.read_handle = self._port.read(self._greeting.transport_name, remote, local)
        except LimitExceeded as error:
            self.refused = self.postponed = True
            self.gaps = []
            self.end(Ending(Outcome.LIMIT, str(error)))
            return
        except TransferFailed as error:
            self._port.reconnect()
            self.end(Ending(Outcome.TRANSFER_FAILED, str(error)))
            return
        self._enter(Phase.READING, self._lease_end_s)

    def _on_released(self, message: ReleaseReply) -> None:
        self.lease_id = 0
        if not message.valid:
            self.end(Ending(Outcome.LEASE_INVALID, "the lease ended before it was released"))
        elif self.ticket is None:
            self._publish()

    def _publish(self) -> None:
        store, self._store = self._store, None
        assert store is not None
        store.commit(checksums=self._checksums)
        self.fetched_pages = len(store.missing)
        self.end(Ending(Outcome.COMPLETE))

    def _find_gaps(self, keys: Sequence[PageKey], filled: set[int]) -> None:
        """Runs of pages that are neither filled by this round nor readable."""
        pool = self._task.pool
        index = 0
        while index < len(keys):
            if index not in filled and not pool.readable_pages(keys[index : index + 1]):
                first = self.first + index
                if self.gaps and self.gaps[-1][1] == first:
                    self.gaps[-1] = (self.gaps[-1][0], first + 1)
                else:
                    self.gaps.append((first, first + 1))
            index += 1
        if self.gaps:
            # Whether the pool can give a block at all, tried with a page that nobody else fills.
            probe = pool.prepare_store([_PROBE])
            self.starved = not probe.missing
            probe.abort()

    def _enter(self, phase: Phase, wake_s: float) -> None:
        self.phase = phase
        self.wake_s = min(wake_s, self._task.deadline_s)

    def _release_request(self) -> ReleaseRequest:
        return ReleaseRequest(self._greeting.generation, self.lease_id)

    def _give_back(self) -> None:
        if self.lease_id:
            self._port.send(self._release_request())
            self.lease_id = 0
        store, self._store = self._store, None
        handle, self.read_handle = self.read_handle, None
        if store is None:
            return
        if handle is None:
            store.abort()
        else:
            self._port.abandon(handle, store)
