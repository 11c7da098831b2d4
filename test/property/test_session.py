"""Fetches against simulated peers and a network that do everything wrong but lie.

The reader's pool is a real MemPool on virtual time; the peers are modelled: a few blocks of memory
each, reused as soon as no valid lease pins them, so that bytes read under a lease that has ended
may be of another page. The network loses, repeats, reorders and delays; reads copy block by block,
several at a time, and damage some blocks of a holder that sends checksums.
"""

from __future__ import annotations

import ctypes
import hashlib
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field

from hypothesis import event, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from sglang_memserve.errors import LimitExceeded, TransferFailed
from sglang_memserve.mempool import MemPool
from sglang_memserve.protocol.control import (
    ErrorReply,
    FetchRequest,
    Hello,
    HelloReply,
    LeaseReply,
    LeaseRequest,
    Message,
    ReleaseReply,
    ReleaseRequest,
    Source,
)
from sglang_memserve.transfer.base import ReadState, Store
from sglang_memserve.transfer.outcome import Outcome
from sglang_memserve.transfer.port import FetchSettings, Greeting
from sglang_memserve.transfer.round import Phase
from sglang_memserve.transfer.state import Fetch
from sglang_memserve.types import Namespace, PageKey

NAMESPACE = Namespace("m", "1", "float16", 4, 1, 1, 8, 8, 0, 1)
BLOCK = NAMESPACE.block_bytes
OUR_BLOCKS = 10
THEIR_BLOCKS = 8
PAGES = 8
SETTINGS = FetchSettings(
    reply_timeout_s=1.0,
    rounds=3,
    max_pages_per_lease=3,
    max_lease_ttl_s=0.9,
    grace_s=0.8,
    recheck_s=0.25,
)
HOLDERS = 2
# Of a fetch: which holders it names for which pages.
SOURCES = [
    [(0, 0, 0)],
    [(1, 0, 0)],
    [(0, 0, 3), (1, 3, 0)],
    [(0, 4, 4), (1, 0, 4)],
    [(0, 0, 0), (1, 0, 0)],
    [(1, 2, 5), (0, 0, 6), (1, 5, 0)],
    [(0, 0, 2), (1, 6, 0)],
]
KEYS = [PageKey(bytes([index + 1]) * 32) for index in range(PAGES)]
OTHER_KEYS = [KEYS[0], KEYS[1], *(PageKey(bytes([index + 101]) * 32) for index in range(PAGES - 2))]


def content(key: bytes) -> bytes:
    return hashlib.shake_128(key).digest(BLOCK)


@dataclass
class PeerLease:
    blocks: list[int]
    end_s: float


@dataclass
class Waiting:
    request_id: int
    asker: Port
    request: LeaseRequest
    until_s: float


@dataclass
class Holder:
    number: int = 0
    boot: int = 1
    checksums: bool = False
    pages: list[PageKey | None] = field(default_factory=lambda: [None] * THEIR_BLOCKS)
    leases: dict[int, PeerLease] = field(default_factory=dict)
    waiting: list[Waiting] = field(default_factory=list)
    next_lease: int = 1

    @property
    def generation(self) -> str:
        return f"{self.number}-boot-{self.boot}"

    @property
    def base(self) -> int:
        return (self.number + 1) << 20

    def leading(self, keys: Sequence[bytes]) -> list[int]:
        found: list[int] = []
        for key in keys:
            if key not in self.pages:
                break
            found.append(self.pages.index(PageKey(key)))
        return found

    def pinned(self, now: float) -> set[int]:
        valid = [lease for lease in self.leases.values() if now < lease.end_s]
        return {block for lease in valid for block in lease.blocks}

    def grant(self, request: LeaseRequest, now: float) -> LeaseReply:
        blocks = self.leading(request.keys)
        if not blocks:
            return LeaseReply(0, [], [])
        lease_id, self.next_lease = self.next_lease, self.next_lease + 1
        self.leases[lease_id] = PeerLease(blocks, now + request.ttl_s)
        sums = [checksum(self.pages[block]) for block in blocks] if self.checksums else []
        # The simulated read looks up what lies at an address when it copies.
        return LeaseReply(lease_id, [self.base + block * BLOCK for block in blocks], sums)


def checksum(key: bytes | None) -> int:
    return zlib.crc32(content(key or b"")) + 1


@dataclass
class Port:
    """``port.Port`` of one source of one fetch; messages go to the network and nowhere else."""

    world: World
    number: int
    source: int
    holder: int

    def send(self, message: Message) -> int:
        self.world.next_request += 1
        self.world.to_holder.append((self.world.next_request, self, message))
        return self.world.next_request

    def greeting(self) -> Greeting | None:
        return self.world.known.get(self.holder)

    def greet(self, reply: HelloReply) -> Greeting:
        if self.world.refuse_connections:
            raise TransferFailed("refused")
        name = reply.transport_metadata.decode()
        known = Greeting(reply.generation, name, tuple(reply.memory))
        self.world.known[self.holder] = known
        return known

    def forget(self) -> None:
        self.world.known.pop(self.holder, None)

    def reconnect(self) -> None:
        self.forget()

    def read(self, name: str, remote: Sequence[int], local: Sequence[int]) -> int:
        if self.world.refuse_connections:
            raise TransferFailed("refused")
        if self.world.no_room:
            raise LimitExceeded("too much is being read")
        self.world.next_read += 1
        self.world.reads[self.world.next_read] = Read(
            self, name, list(zip(remote, local, strict=True))
        )
        return self.world.next_read

    def abandon(self, handle: int, store: Store) -> None:
        self.world.reads[handle].abandoned = store

    def verify(self, local: Sequence[int], checksums: Sequence[int]) -> int:
        found = [zlib.crc32(ctypes.string_at(address, BLOCK)) + 1 for address in local]
        wrong = [i for i, pair in enumerate(zip(found, checksums, strict=True)) if len({*pair}) > 1]
        self.world.next_ticket += 1
        self.world.verdicts[self.world.next_ticket] = (self, wrong[0] if wrong else None)
        return self.world.next_ticket


@dataclass
class Read:
    asker: Port
    boot: str
    todo: list[tuple[int, int]]
    abandoned: Store | None = None


class World(RuleBasedStateMachine):
    @initialize(
        theirs=st.lists(st.integers(0, THEIR_BLOCKS), min_size=HOLDERS, max_size=HOLDERS),
        checksums=st.booleans(),
        ours=st.integers(0, 3),
    )
    def begin(self, theirs: list[int], checksums: bool, ours: int) -> None:
        self.now = 100.0
        self.next_request = 0
        self.next_read = 0
        self.refuse_connections = False
        self.no_room = False
        self.lost_leases: set[tuple[int, int]] = set()
        self.next_ticket = 0
        self.holders = [Holder(number, checksums=checksums) for number in range(HOLDERS)]
        for holder, pages in zip(self.holders, theirs, strict=True):
            holder.pages[:pages] = KEYS[:pages]
        self.known: dict[int, Greeting] = {}
        self.verdicts: dict[int, tuple[Port, int | None]] = {}
        self.to_holder: list[tuple[int, Port, Message]] = []
        self.to_reader: list[tuple[int, Port, Message]] = []
        self.reads: dict[int, Read] = {}
        self.pool = MemPool(
            NAMESPACE,
            arena_bytes=OUR_BLOCKS * BLOCK,
            generation="reader",
            clock=lambda: self.now,
        )
        self.put(KEYS[:ours])
        self.fetches: list[Fetch] = []
        self.pool.subscribe(self.on_readable)
        self.notices = 0

    @precondition(lambda self: sum(fetch.outcome is None for fetch in self.fetches) < 3)
    @rule(
        keys=st.sampled_from([KEYS, KEYS, OTHER_KEYS]),
        wait_s=st.sampled_from([0.0, 0.5, 3.0]),
        deadline_s=st.sampled_from([0.0, 1.0, 9.0, 60.0]),
        sources=st.sampled_from(SOURCES),
    )
    def fetch(
        self,
        keys: list[PageKey],
        wait_s: float,
        deadline_s: float,
        sources: list[tuple[int, int, int]],
    ) -> None:
        named = [Source(f"{who}", "tcp://peer:1", first, pages) for who, first, pages in sources]
        number = len(self.fetches)
        fetch = Fetch(
            FetchRequest(named, list(keys), wait_s, deadline_s),
            [Port(self, number, index, who) for index, (who, _, _) in enumerate(sources)],
            arrived_s=self.now,
            store=self.pool,
            hello=Hello(1, "reader", "reader", NAMESPACE),
            settings=SETTINGS,
        )
        self.fetches.append(fetch)
        fetch.start(self.now)

    def teardown(self) -> None:
        if not hasattr(self, "fetches"):
            return
        # Whatever is still under way: time alone must end every fetch by its deadline.
        while any(fetch.outcome is None for fetch in self.fetches):
            waking = [fetch.wake_s for fetch in self.fetches if fetch.outcome is None]
            self.now = max(self.now, min(waking))
            self.let_time_pass()
        self.check_world()
        for fetch in self.fetches:
            reply = fetch.reply()
            assert reply.readable_pages <= PAGES
            assert (reply.outcome == "complete") == (reply.readable_pages == PAGES)
            assert not any(holder.rounds for holder in fetch.holders)
            assert reply.fetched_pages == sum(source.fetched_pages for source in reply.sources)
            event(f"{reply.outcome}, fetched something: {reply.fetched_pages > 0}")
            if fetch.grace_lease is not None:
                fetch.grace_lease.release()
        for read in list(self.reads.values()):
            assert read.abandoned is not None, "a read that runs belongs to nobody"
            read.abandoned.abort()
        self.deliver_everything()
        # What was not lost on the way was released; the rest ends by itself.
        for holder in self.holders:
            left = {(holder.number, lease_id) for lease_id in holder.leases}
            assert left <= self.lost_leases, (left, self.lost_leases)
        self.pool.check()
        stats = self.pool.stats()
        assert stats["leases"] == 0 and stats["stores"] == 0 and stats["pinned_blocks"] == 0, stats
        assert stats["free_blocks"] + stats["ready_blocks"] == OUR_BLOCKS, stats
        self.pool.close()

    # -- the reader --

    def put(self, keys: Sequence[PageKey]) -> None:
        with self.pool.prepare_store(keys) as store:
            for index, block in store.missing:
                ctypes.memmove(self.pool.address(block), content(keys[index]), BLOCK)
            store.commit()

    def on_readable(self) -> None:
        self.notices += 1

    def let_time_pass(self) -> None:
        self.pool.expire()
        for fetch in self.fetches:
            fetch.on_time(self.now)

    @rule(step_s=st.sampled_from([0.01, 0.1, 0.3, 0.9, 2.0]))
    def pass_time(self, step_s: float) -> None:
        self.now += step_s
        self.let_time_pass()

    @precondition(lambda self: self.notices)
    @rule()
    def notice_pages(self) -> None:
        self.notices = 0
        for fetch in self.fetches:
            fetch.on_pages_readable(self.now)

    @rule(page=st.integers(0, PAGES - 1))
    def compute_here(self, page: int) -> None:
        self.put(KEYS[: page + 1])

    @rule(page=st.integers(0, PAGES - 1))
    def drop_here(self, page: int) -> None:
        self.pool.delete([KEYS[page]])

    @precondition(lambda self: self.reads)
    @rule()
    def cancel_readers(self) -> None:
        for fetch in self.fetches:
            rounds = [round_ for holder in fetch.holders for round_, _ in holder.rounds]
            if any(round_.phase is Phase.READING for round_ in rounds):
                fetch.cancel(Outcome.CLOSED, self.now)

    # -- reads --

    @precondition(lambda self: self.reads)
    @rule(data=st.data(), blocks=st.integers(1, 8))
    def copy(self, data: st.DataObject, blocks: int) -> None:
        self.copy_blocks(self.reads[data.draw(st.sampled_from(sorted(self.reads)))], blocks)

    def copy_blocks(self, read: Read, blocks: int) -> None:
        holder = self.holders[read.asker.holder]
        for remote, local in read.todo[:blocks]:
            same_boot = read.boot == holder.generation
            page = holder.pages[(remote - holder.base) // BLOCK] if same_boot else None
            ctypes.memmove(local, content(page) if page else b"\xee" * BLOCK, BLOCK)
        del read.todo[:blocks]

    @precondition(lambda self: self.reads and self.holders[0].checksums)
    @rule(data=st.data())
    def damage(self, data: st.DataObject) -> None:
        """A block that was copied already, or none."""
        read = self.reads[data.draw(st.sampled_from(sorted(self.reads)))]
        if read.todo:
            _, local = read.todo.pop(0)
            ctypes.memmove(local, b"\xdd" * BLOCK, BLOCK)

    @precondition(lambda self: self.verdicts)
    @rule(data=st.data())
    def tell_verdict(self, data: st.DataObject) -> None:
        ticket = data.draw(st.sampled_from(sorted(self.verdicts)))
        port, damaged = self.verdicts.pop(ticket)
        self.fetches[port.number].on_verified(ticket, damaged, self.now)

    @precondition(lambda self: any(not read.todo for read in self.reads.values()))
    @rule(data=st.data())
    def end_read(self, data: st.DataObject) -> None:
        done = sorted(handle for handle, read in self.reads.items() if not read.todo)
        self.finish(data.draw(st.sampled_from(done)), ReadState.DONE)

    @precondition(lambda self: self.reads)
    @rule()
    def complete_reads(self) -> None:
        for handle, read in list(self.reads.items()):
            self.copy_blocks(read, PAGES)
            self.finish(handle, ReadState.DONE)

    @precondition(lambda self: self.reads)
    @rule(data=st.data())
    def fail_read(self, data: st.DataObject) -> None:
        self.finish(data.draw(st.sampled_from(sorted(self.reads))), ReadState.FAILED)

    def finish(self, handle: int, state: ReadState) -> None:
        read = self.reads.pop(handle)
        if read.abandoned is not None:
            read.abandoned.abort()
        self.fetches[read.asker.number].on_read_ended(handle, state, self.now)

    @rule(refuse=st.sampled_from([False, False, True]))
    def refuse(self, refuse: bool) -> None:
        self.refuse_connections = refuse

    @rule(no_room=st.sampled_from([False, False, True]))
    def leave_no_room(self, no_room: bool) -> None:
        self.no_room = no_room

    # -- the network --

    @precondition(lambda self: self.to_holder)
    @rule(data=st.data(), keep=st.booleans())
    def reach_holder(self, data: st.DataObject, keep: bool) -> None:
        index = data.draw(st.integers(0, len(self.to_holder) - 1))
        message = self.to_holder[index] if keep else self.to_holder.pop(index)
        self.answer(*message)

    @precondition(lambda self: self.to_reader)
    @rule(data=st.data(), keep=st.booleans())
    def reach_reader(self, data: st.DataObject, keep: bool) -> None:
        index = data.draw(st.integers(0, len(self.to_reader) - 1))
        request_id, port, message = self.to_reader[index] if keep else self.to_reader.pop(index)
        self.hear(request_id, port, message)

    def hear(self, request_id: int, port: Port, message: Message) -> None:
        """As ``Sessions.on_message``."""
        fetch = self.fetches[port.number]
        known = fetch.on_reply(port.source, request_id, message, self.now)
        if not known and isinstance(message, LeaseReply) and message.lease_id:
            port.send(ReleaseRequest(self.holders[port.holder].generation, message.lease_id))

    @precondition(lambda self: self.to_holder or self.to_reader)
    @rule(data=st.data())
    def lose(self, data: st.DataObject) -> None:
        queue = data.draw(st.sampled_from([q for q in (self.to_holder, self.to_reader) if q]))
        _, port, message = queue.pop(data.draw(st.integers(0, len(queue) - 1)))
        if isinstance(message, LeaseReply | ReleaseRequest):
            self.lost_leases.add((port.holder, message.lease_id))

    @rule()
    def talk(self) -> None:
        """The ordinary course of things, so that fetches do get somewhere."""
        self.deliver_everything()

    @rule()
    def all_goes_well(self) -> None:
        self.refuse_connections = self.no_room = False
        for _ in range(3):
            self.deliver_everything()
            self.complete_reads()
        self.deliver_everything()

    def deliver_everything(self) -> None:
        for _ in range(50):
            if not self.to_holder and not self.to_reader and not self.verdicts:
                return
            while self.to_holder:
                self.answer(*self.to_holder.pop(0))
            while self.to_reader:
                request_id, port, message = self.to_reader.pop(0)
                self.hear(request_id, port, message)
            for ticket, (port, damaged) in list(self.verdicts.items()):
                del self.verdicts[ticket]
                self.fetches[port.number].on_verified(ticket, damaged, self.now)
        raise AssertionError("messages without end")

    # -- the holder --

    def answer(self, request_id: int, port: Port, message: Message) -> None:
        holder = self.holders[port.holder]
        reply: Message
        match message:
            case Hello():
                generation = holder.generation
                memory = [(holder.base, THEIR_BLOCKS * BLOCK)]
                reply = HelloReply(1, "peer", generation, NAMESPACE, generation.encode(), memory)
            case LeaseRequest() if message.generation != holder.generation:
                reply = ErrorReply("LeaseInvalid", "another boot")
            case LeaseRequest():
                assert message.wait_s >= 0 and 0 < message.ttl_s <= SETTINGS.max_lease_ttl_s
                assert 0 < len(message.keys) <= SETTINGS.max_pages_per_lease
                if not holder.leading(message.keys) and message.wait_s > 0:
                    until_s = self.now + message.wait_s
                    holder.waiting.append(Waiting(request_id, port, message, until_s))
                    return
                reply = holder.grant(message, self.now)
            case ReleaseRequest():
                lease = holder.leases.pop(message.lease_id, None)
                valid = lease is not None and self.now < lease.end_s
                reply = ReleaseReply(valid and message.generation == holder.generation)
            case _:
                raise AssertionError(message)
        self.to_reader.append((request_id, port, reply))

    @rule(
        who=st.integers(0, HOLDERS - 1),
        page=st.integers(0, PAGES - 1),
        block=st.integers(0, THEIR_BLOCKS - 1),
    )
    def compute_there(self, who: int, page: int, block: int) -> None:
        """Into a block that nothing pins, whatever was in it."""
        holder = self.holders[who]
        if block in holder.pinned(self.now) or KEYS[page] in holder.pages:
            return
        holder.pages[block] = KEYS[page]
        self.answer_waiting()

    @rule(who=st.integers(0, HOLDERS - 1))
    def compute_all_there(self, who: int) -> None:
        holder = self.holders[who]
        free = sorted(set(range(THEIR_BLOCKS)) - holder.pinned(self.now))
        missing = [key for key in KEYS if key not in holder.pages]
        for block, key in zip(free, missing, strict=False):
            holder.pages[block] = key
        self.answer_waiting()

    @rule(who=st.integers(0, HOLDERS - 1))
    def reuse_there(self, who: int) -> None:
        """Every block that nothing pins gets the bytes of some other prefix."""
        holder = self.holders[who]
        for block in set(range(THEIR_BLOCKS)) - holder.pinned(self.now):
            holder.pages[block] = PageKey(bytes([200 + block]) * 32)

    @precondition(lambda self: any(holder.waiting for holder in self.holders))
    @rule()
    def answer_waiting(self) -> None:
        for holder in self.holders:
            still: list[Waiting] = []
            for waiting in holder.waiting:
                if holder.leading(waiting.request.keys) or self.now >= waiting.until_s:
                    reply = holder.grant(waiting.request, self.now)
                    self.to_reader.append((waiting.request_id, waiting.asker, reply))
                else:
                    still.append(waiting)
            holder.waiting = still

    @rule(who=st.integers(0, HOLDERS - 1))
    def restart_holder(self, who: int) -> None:
        old = self.holders[who]
        self.holders[who] = Holder(who, old.boot + 1, old.checksums, next_lease=old.next_lease)

    # -- what must always hold --

    @invariant()
    def check_world(self) -> None:
        if not hasattr(self, "fetches"):
            return
        self.pool.check()
        for key in {*KEYS, *OTHER_KEYS}:
            for block in self.pool.match([key]):
                found = ctypes.string_at(self.pool.address(block), BLOCK)
                assert found == content(key), f"page {key.hex()[:4]} holds other bytes"
        for fetch in self.fetches:
            if fetch.outcome is None:
                assert fetch.wake_s <= fetch.deadline_s
                assert self.now < fetch.deadline_s, (self.now, fetch.deadline_s)
                for source in fetch.holders:
                    assert len(source.rounds) <= SETTINGS.rounds
                    leasing = [r for r, _ in source.rounds if r.phase is Phase.LEASING]
                    assert len(leasing) <= 1
                    assert not source.dropped


TestWorld = World.TestCase
TestWorld.settings = settings(max_examples=200, stateful_step_count=70, deadline=None)
