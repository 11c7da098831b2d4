"""Fetches and changes of size from other threads of the agent's process: checked, and always
ended."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future

import pytest
from sglang_memserve.errors import (
    ConfigError,
    LimitExceeded,
    MemServeError,
    PeerUnreachable,
    ProtocolError,
)
from sglang_memserve.protocol.control import FetchReply, FetchRequest
from sglang_memserve.transfer.submissions import FetchSubmission, Submissions
from unit.agents import BLOCK, KEYS, LIMIT_S, Rank, holds, put, until

ADDRESS = "tcp://127.0.0.1:9"


def request(keys: object = (bytes(32),), wait_s: object = 0.0, deadline_s: object = 1.0) -> object:
    return FetchRequest.of("p", ADDRESS, keys, wait_s, deadline_s)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "wrong",
    [
        request(wait_s=None),
        request(deadline_s="soon"),
        request(keys=None),
        request(keys=[None]),
        request(keys=[b"abc"]),
        request(keys=[{1, 2}, object()]),
        FetchRequest.of("p", "tcp://a\udc80:1", [bytes(32)], 0.0, 1.0),
        FetchRequest([], [], 0, 2**70),
        "nonsense",
    ],
)
def test_requests_that_are_none(ranks: Callable[..., Rank], wrong: FetchRequest) -> None:
    rank = ranks()
    with pytest.raises(ProtocolError):
        rank.agent.fetch(wrong)
    assert rank.stats()["transfer_internal_errors_total"] == 0


@pytest.mark.parametrize(
    "address",
    [
        "tcp://name.example:5000",
        "tcp://127.0.0.1:99999",
        "tcp://127.0.0.1:0",
        "tcp://*:5",
        "tcp://1.2.3.4;5.6.7.8:5",
        "tcp://::1:5",
        "tcp://a\0b:1",
        "tcp://" + "a" * 100_000 + ":5",
    ],
)
def test_addresses_that_would_have_to_be_looked_up(
    ranks: Callable[..., Rank], address: str
) -> None:
    reply = ranks().agent.fetch(FetchRequest.of("p", address, [bytes(32)], 0.0, 5.0))
    (source,) = reply.result(LIMIT_S).sources
    assert source.outcome == "protocol_error" and "numeric address" in source.detail


def test_keys_of_another_kind_of_bytes(two: tuple[Rank, Rank]) -> None:
    holder, reader = two
    put(holder.pool, KEYS[:3])
    keys = [bytearray(key) for key in KEYS[:3]]
    assert reader.fetch(holder, keys).outcome == "complete"  # type: ignore[arg-type]
    assert holds(reader.pool, KEYS[:3])


def test_an_error_of_our_own_ends_the_future(
    ranks: Callable[..., Rank], monkeypatch: pytest.MonkeyPatch
) -> None:
    rank = ranks()

    def broken(keys: object) -> int:
        raise RuntimeError("a bug")

    monkeypatch.setattr(rank.pool, "readable_pages", broken)
    with pytest.raises(MemServeError, match="a bug"):
        rank.agent.fetch(request()).result(LIMIT_S)  # type: ignore[arg-type]


def test_fetches_that_were_not_looked_at_when_the_agent_closed(two: tuple[Rank, Rank]) -> None:
    holder, reader = two
    busy, go_on = threading.Event(), threading.Event()

    def hold(_: Future[FetchReply]) -> None:
        busy.set()
        go_on.wait(LIMIT_S)

    # The agent's thread is in this callback while more is asked of it, and while it is closed.
    reader.start(holder, []).add_done_callback(hold)
    assert busy.wait(LIMIT_S)
    waiting = [reader.start(holder, KEYS[:1]) for _ in range(3)]
    cancelled = reader.start(holder, KEYS[:1])
    assert cancelled.cancel()
    closing = threading.Thread(target=reader.agent.close)
    closing.start()
    until(lambda: reader.agent._stop.is_set())
    go_on.set()
    closing.join(LIMIT_S)
    for future in waiting:
        error = future.exception(LIMIT_S)
        assert error is None or isinstance(error, PeerUnreachable), error
    with pytest.raises(PeerUnreachable, match="not running"):
        reader.start(holder, KEYS[:1]).result(LIMIT_S)


def test_submissions_end_whenever_they_come() -> None:
    woken: list[bool] = []
    submissions = Submissions(lambda: woken.append(True))

    def put_one() -> Future[FetchReply]:
        future: Future[FetchReply] = Future()
        submissions.put(FetchSubmission(FetchRequest([], [], 0.0, 1.0), future))
        return future

    def ended(future: Future[FetchReply]) -> bool:
        return isinstance(future.exception(0), PeerUnreachable)

    assert ended(put_one()) and not woken
    submissions.open()
    running, waiting = put_one(), put_one()
    assert woken and len(submissions) == 2
    first = submissions.take()
    assert [one.future for one in first] == [running, waiting] and not submissions.take()
    late = put_one()
    submissions.close()
    assert all(ended(future) for future in (running, waiting, late, put_one()))
    submissions.open()
    with pytest.raises(LimitExceeded):
        for _ in range(1_000):
            put_one()
    submissions.close()


def test_the_pool_changes_its_size_through_the_agent(two: tuple[Rank, Rank]) -> None:
    holder, reader = two
    put(holder.pool, KEYS[:10])
    grown = holder.agent.resize(96 * BLOCK).result(LIMIT_S)
    assert (grown.outcome, holder.pool.total_blocks) == ("resized", 96)
    assert holder.agent.resize(32 * BLOCK, wait_s=5.0).result(LIMIT_S).outcome == "resized"
    assert reader.fetch(holder, KEYS[:10]).outcome == "complete"
    with pytest.raises(ConfigError, match="holds no block"):
        holder.agent.resize(BLOCK - 1).result(LIMIT_S)
    with pytest.raises(LimitExceeded, match="wait of nan s"):
        holder.agent.resize(BLOCK, wait_s=float("nan")).result(LIMIT_S)
    with pytest.raises(ProtocolError):
        holder.agent.resize("much")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"RankAgent\.resize"):
        holder.pool.resize(BLOCK)
    holder.agent.close()
    with pytest.raises(PeerUnreachable):
        holder.agent.resize(64 * BLOCK).result(LIMIT_S)
