"""A rank's pool that changes size under its agent, while it reads from peers and they from it."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import zmq
from sglang_memserve.errors import ConfigError, TransferFailed
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
    ResizeReply,
    ResizeRequest,
    decode,
    encode,
)
from sglang_memserve.transfer.loopback import LoopbackTransport
from sglang_memserve.transfer.nixl import NixlTransport
from sglang_memserve.types import BlockId
from unit.agents import BLOCK, KEYS, LIMIT_S, NAMESPACE, Asker, Rank, content, holds, put, until

SMALL = 64  # blocks a rank starts with: one slab
LARGE = 128


def ask(rank: Rank, blocks: int, wait_s: float = 0.0) -> Message:
    return rank.ask(ResizeRequest(blocks * BLOCK, wait_s))


def resize(rank: Rank, blocks: int, wait_s: float = 0.0) -> ResizeReply:
    reply = ask(rank, blocks, wait_s)
    assert isinstance(reply, ResizeReply), reply
    assert reply.total_blocks == rank.pool.total_blocks
    rank.pool.check()
    return reply


def fill(rank: Rank, blocks: int) -> list[BlockId]:
    """Take free blocks until only those from ``blocks`` on are left."""
    taken = rank.pool.alloc_mem(int(rank.pool.stats()["free_blocks"]))
    rank.pool.free_mem([block for block in taken if block >= blocks])
    return [block for block in taken if block < blocks]


def lease(rank: Rank, pages: int) -> LeaseRequest:
    return LeaseRequest(rank.generation, list(KEYS[:pages]), 1, 0.0, 20.0)


def test_pages_in_new_memory_are_read_by_a_peer_that_knew_the_old(pair: tuple[Rank, Rank]) -> None:
    holder, reader = pair
    put(holder.pool, KEYS[:8])
    assert reader.fetch(holder, KEYS[:8]).outcome == "complete"
    assert resize(holder, LARGE).outcome == "resized"
    assert resize(reader, LARGE).outcome == "resized"
    fill(holder, SMALL)
    fill(reader, SMALL)
    put(holder.pool, KEYS)
    assert min(holder.pool.match(KEYS)[8:]) >= SMALL
    reply = reader.fetch(holder, KEYS)
    assert (reply.outcome, reply.fetched_pages) == ("complete", 32)
    assert holds(reader.pool, KEYS) and min(reader.pool.match(KEYS)[8:]) >= SMALL


def test_shrinking_waits_for_the_lease_of_a_peer_or_refuses(pair: tuple[Rank, Rank]) -> None:
    holder, reader = pair
    resize(holder, LARGE)
    low = fill(holder, SMALL)
    put(holder.pool, KEYS)
    holder.pool.free_mem(low)
    with Asker(holder.agent.peer_address) as peer:
        granted = peer.ask(lease(holder, 9))
        assert isinstance(granted, LeaseReply) and len(granted.addresses) == 9
        refused = resize(holder, SMALL)
        assert refused.outcome == "refused" and "9 leased" in refused.reason
        assert holder.pool.total_blocks == LARGE and holds(holder.pool, KEYS)
        impatient = resize(holder, SMALL, wait_s=0.05)
        assert impatient.outcome == "refused" and "9 leased" in impatient.reason
        # It has moved them meanwhile, under the reader, which still has the old blocks.
        assert max(holder.pool.match(KEYS)) < SMALL
        for key, address in zip(KEYS, granted.addresses, strict=False):
            assert ctypes.string_at(address, BLOCK) == content(key)
        replies: list[ResizeReply] = []
        patient = threading.Thread(target=lambda: replies.append(resize(holder, SMALL, 20.0)))
        patient.start()
        until(lambda: holder.pool.stats()["withdrawn_blocks"] > 0)
        # The agent goes on with its work, and takes one change at a time.
        another = ask(holder, SMALL)
        assert isinstance(another, ErrorReply) and another.kind == "LimitExceeded"
        assert peer.ask(ReleaseRequest(holder.generation, granted.lease_id)) == ReleaseReply(True)
        patient.join(LIMIT_S)
    assert [reply.outcome for reply in replies] == ["resized"]
    assert holder.pool.total_blocks == SMALL and holds(holder.pool, KEYS)
    assert reader.fetch(holder, KEYS).outcome == "complete"
    assert holds(reader.pool, KEYS)


def test_fetches_go_on_while_both_sides_change_size(pair: tuple[Rank, Rank]) -> None:
    holder, reader = pair
    keys = KEYS[:12]  # what ended fetches pin leaves room for others
    put(holder.pool, keys)
    stop = threading.Event()
    sizes: list[str] = []

    def change(rank: Rank) -> None:
        while not stop.is_set():
            for blocks in (LARGE, SMALL):
                sizes.append(resize(rank, blocks, wait_s=5.0).outcome)
                time.sleep(0.01)

    threads = [threading.Thread(target=change, args=(rank,)) for rank in pair]
    for thread in threads:
        thread.start()
    outcomes: list[str] = []
    try:
        for _ in range(40):
            reader.pool.clear()
            outcomes.append(reader.fetch(holder, keys).outcome)
            assert holds(reader.pool, keys[: reader.pool.readable_pages(keys)])
    finally:
        stop.set()
        for thread in threads:
            thread.join(LIMIT_S)
    # Memory that was registered anew while a read ran is the one reason to fail.
    assert set(outcomes) <= {"complete", "transfer_failed"}
    assert outcomes.count("complete") >= len(outcomes) // 2, outcomes
    assert sizes.count("resized") > 4 and set(sizes) <= {"resized", "refused"}
    for rank in pair:
        rank.pool.check()


def test_sizes_and_waits_that_are_refused(ranks: Callable[..., Rank]) -> None:
    rank = ranks()
    for message, kind, text in (
        (ResizeRequest(BLOCK - 1, 0.0), "ConfigError", "holds no block"),
        (ResizeRequest(1 << 60, 0.0), "ConfigError", "does not fit"),
        (ResizeRequest(BLOCK, float("nan")), "LimitExceeded", "wait of nan s"),
        (ResizeRequest(BLOCK, 601.0), "LimitExceeded", "0 to 600 s"),
    ):
        reply = rank.ask(message)
        assert isinstance(reply, ErrorReply) and reply.kind == kind and text in reply.message
    with Asker(rank.agent.peer_address) as stranger:
        reply = stranger.ask(ResizeRequest(2 * BLOCK, 0.0))
        assert isinstance(reply, ErrorReply) and reply.kind == "ProtocolError"
    with pytest.raises(ConfigError, match="the agent of rank 0 changes this pool's size"):
        rank.pool.resize(2 * BLOCK)
    assert resize(rank, SMALL).outcome == "unchanged"
    assert rank.pool.total_blocks == SMALL


class PickyTransport(LoopbackTransport):
    """Refuses what would make it know more than ``most`` ranges, or forget any when ``clings``."""

    most = 1
    clings = False

    def register(self, base: int, length: int) -> None:
        if len(list(self._regions)) >= self.most:
            raise TransferFailed("no more memory can be registered")
        super().register(base, length)

    def unregister(self, base: int, length: int) -> None:
        if self.clings:
            raise TransferFailed("the network clings to it")
        super().unregister(base, length)


def test_a_network_that_refuses_leaves_the_size_as_it_was(
    ranks: Callable[..., Rank], monkeypatch: pytest.MonkeyPatch
) -> None:
    rank = ranks(PickyTransport)
    put(rank.pool, KEYS)
    refused = resize(rank, LARGE)
    assert (refused.outcome, refused.reason) == ("refused", "no more memory can be registered")
    assert rank.pool.total_blocks == SMALL and holds(rank.pool, KEYS)
    monkeypatch.setattr(PickyTransport, "most", 2)
    assert resize(rank, LARGE).outcome == "resized"
    monkeypatch.setattr(PickyTransport, "clings", True)
    refused = resize(rank, SMALL, wait_s=1.0)
    assert (refused.outcome, refused.reason) == ("refused", "the network clings to it")
    assert rank.pool.total_blocks == LARGE and holds(rank.pool, KEYS)
    monkeypatch.setattr(PickyTransport, "clings", False)
    assert resize(rank, SMALL, wait_s=1.0).outcome == "resized"


def test_an_agent_that_closes_answers_who_waits_for_a_size(folder: Path) -> None:
    rank = Rank(folder, LoopbackTransport)
    resize(rank, LARGE)
    rank.pool.alloc_mem(LARGE)
    replies: list[Message] = []
    waits = threading.Thread(target=lambda: replies.append(ask(rank, SMALL, wait_s=60.0)))
    waits.start()
    try:
        until(lambda: rank.pool.stats()["withdrawn_blocks"] == 0 and rank.pool._resize is not None)
    finally:
        rank.close()
        waits.join(LIMIT_S)
    (reply,) = replies
    assert isinstance(reply, ResizeReply)
    assert (reply.outcome, reply.reason) == ("refused", "the rank is shutting down")


def test_a_holder_whose_memory_never_stays_is_given_up(ranks: Callable[..., Rank]) -> None:
    """It says of every lease that its memory has changed again."""
    reader = ranks()
    context = zmq.Context()
    router = context.socket(zmq.ROUTER)
    router.rcvtimeo = int(LIMIT_S * 1000)
    port = router.bind_to_random_port("tcp://127.0.0.1")
    other = LoopbackTransport(f"restless-{os.getpid()}")
    try:
        request = FetchRequest.of("p", f"tcp://127.0.0.1:{port}", list(KEYS), 0.0, 15.0)
        fetch = reader.agent.fetch(request)
        asked = {"Hello": 0, "LeaseRequest": 0, "ReleaseRequest": 0}
        began_s = time.monotonic()
        while not fetch.done() and time.monotonic() < began_s + LIMIT_S:
            if not router.poll(50):
                continue
            asker, request_id, data = router.recv_multipart()
            message = decode(data)
            asked[type(message).__name__] += 1
            reply: Message = ReleaseReply(True)
            if isinstance(message, Hello):
                who = (message.version, "p", "g", NAMESPACE)
                reply = HelloReply(*who, other.metadata(), [(0, 1 << 40)], asked["Hello"])
            elif isinstance(message, LeaseRequest):
                reply = LeaseReply(asked["LeaseRequest"], [BLOCK], [], asked["Hello"] + 1)
            router.send_multipart([asker, request_id, encode(reply)])
        assert fetch.result(LIMIT_S).outcome == "lease_invalid"
        assert 2 <= asked["Hello"] <= 12
        assert asked["ReleaseRequest"] <= asked["LeaseRequest"] <= 12
    finally:
        context.destroy(0)
        other.close()


HOLDER = """
import sys
from pathlib import Path
from sglang_memserve.transfer.nixl import NixlTransport
from unit.agents import KEYS, Rank, put
rank = Rank(Path(sys.argv[1]), NixlTransport)
print(rank.path, rank.agent.peer_address, rank.generation, flush=True)
low = []
for line in sys.stdin:
    if line == "low\\n":
        low = [b for b in rank.pool.alloc_mem(int(rank.pool.stats()["free_blocks"])) if b < 64]
        rank.pool.free_mem([b for b in range(64, rank.pool.total_blocks)])
    elif line == "put\\n":
        put(rank.pool, KEYS)
    elif line == "free\\n":
        rank.pool.free_mem(low)
    print(max(rank.pool.match(KEYS), default=-1), flush=True)
rank.close()
"""


class RemoteRank:
    """A rank with NIXL in a process of its own."""

    def __init__(self, folder: Path) -> None:
        test_root = str(Path(__file__).parents[1])
        self.process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": test_root},
        )
        assert self.process.stdout is not None
        # The test's own time limit bounds this line.
        self.path, self.peer_address, self.generation = self.process.stdout.readline().split()

    def do(self, what: str) -> int:
        """Returns the highest block that holds one of KEYS."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(f"{what}\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def resize(self, blocks: int, wait_s: float = 0.0) -> ResizeReply:
        with Asker(f"ipc://{self.path}") as asker:
            reply = asker.ask(ResizeRequest(blocks * BLOCK, wait_s))
        assert isinstance(reply, ResizeReply), reply
        return reply

    def close(self) -> None:
        try:
            self.process.communicate(timeout=LIMIT_S)
        finally:
            self.process.kill()


def test_another_process_reads_what_came_and_not_what_went(
    folder: Path, ranks: Callable[..., Rank]
) -> None:
    reader = ranks(NixlTransport)
    holder = RemoteRank(folder)

    def fetch(pages: int) -> str:
        reader.pool.clear()
        request = FetchRequest.of("p", holder.peer_address, list(KEYS[:pages]), 0.0, 10.0)
        outcome = reader.agent.fetch(request).result(LIMIT_S).outcome
        assert holds(reader.pool, KEYS[: reader.pool.readable_pages(KEYS)])
        return outcome

    try:
        assert fetch(1) == "miss"
        assert holder.resize(LARGE).outcome == "resized"
        holder.do("low")
        assert holder.do("put") >= SMALL
        assert fetch(12) == "complete"
        with Asker(holder.peer_address) as peer:
            granted = peer.ask(LeaseRequest(holder.generation, list(KEYS[:5]), 1, 0.0, 20.0))
            assert isinstance(granted, LeaseReply)
            refused = holder.resize(SMALL)
            assert refused.outcome == "refused" and "5 leased" in refused.reason
            assert fetch(12) == "complete"
            peer.ask(ReleaseRequest(holder.generation, granted.lease_id))
        holder.do("free")
        # Our own fetch may still hold its lease for a moment.
        shrunk = holder.resize(SMALL, wait_s=10.0)
        assert (shrunk.outcome, shrunk.moved_pages, shrunk.evicted_pages) == ("resized", 40, 0)
        assert holder.do("look") < SMALL
        assert fetch(12) == "complete"
        # The same memory once more: it is registered anew.
        assert holder.resize(LARGE).outcome == "resized"
        assert fetch(12) == "complete"
    finally:
        holder.close()
    assert holder.process.returncode == 0
