"""Every bound of a rank, reached: what it refuses, by the bound's name, and what goes on."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
from sglang_memserve.config import Limits, parse_limits
from sglang_memserve.errors import ConfigError, LimitExceeded
from sglang_memserve.protocol.control import ErrorReply, FetchRequest, LeaseReply, LeaseRequest
from sglang_memserve.transfer.loopback import LoopbackTransport
from sglang_memserve.transfer.port import FetchSettings
from sglang_memserve.types import PageKey
from unit.agents import BLOCK, KEYS, LIMIT_S, Asker, Rank, holds, put, until

Ranks = Callable[..., Rank]


def lease(rank: Rank, keys: Sequence[bytes] = KEYS, wait_s: float = 0.0) -> LeaseRequest:
    return LeaseRequest(rank.generation, list(keys), 1, wait_s, 20.0)


def refusal(reply: object) -> str:
    assert isinstance(reply, ErrorReply) and reply.kind == "LimitExceeded", reply
    return reply.message


def test_leases_in_all(ranks: Ranks) -> None:
    holder = ranks(limits=Limits(max_leases=3))
    put(holder.pool, KEYS)
    address = holder.agent.peer_address
    with Asker(address) as one, Asker(address) as two:
        for asker in (one, two, one):
            assert isinstance(asker.ask(lease(holder)), LeaseReply)
        assert "max_leases is 3" in refusal(two.ask(lease(holder)))
    assert holder.stats()["transfer_lease_requests_refused_total"] == 1


def test_leases_of_one_peer(ranks: Ranks) -> None:
    holder = ranks(limits=Limits(max_leases_per_peer=2))
    put(holder.pool, KEYS)
    address = holder.agent.peer_address
    with Asker(address) as greedy, Asker(address) as modest:
        for _ in range(2):
            assert isinstance(greedy.ask(lease(holder)), LeaseReply)
        assert "max_leases_per_peer is 2" in refusal(greedy.ask(lease(holder)))
        assert isinstance(modest.ask(lease(holder)), LeaseReply)


def test_bytes_leased_by_one_peer(ranks: Ranks) -> None:
    holder = ranks(limits=Limits(max_leased_bytes_per_peer=25 * BLOCK + 1))
    put(holder.pool, KEYS)
    with Asker(holder.agent.peer_address) as asker:
        first = asker.ask(lease(holder, KEYS[:20]))
        second = asker.ask(lease(holder))
        assert isinstance(first, LeaseReply) and len(first.addresses) == 20
        # Less than asked for, and the reader asks on.
        assert isinstance(second, LeaseReply) and len(second.addresses) == 5
        text = f"max_leased_bytes_per_peer is {25 * BLOCK + 1}"
        assert text in refusal(asker.ask(lease(holder)))


def test_a_page_is_leased_whatever_its_size(ranks: Ranks) -> None:
    holder = ranks(limits=Limits(max_leased_bytes_per_peer=1))
    put(holder.pool, KEYS)
    reader = ranks()
    assert reader.fetch(holder, KEYS).outcome == "complete"


def test_a_fetch_gets_along_with_few_leases(ranks: Ranks) -> None:
    holder = ranks(limits=Limits(max_leases_per_peer=2, max_leased_bytes_per_peer=6 * BLOCK))
    reader = ranks(limits=Limits(max_round_bytes=4 * BLOCK, max_rounds=4))
    put(holder.pool, KEYS)
    replies = [reader.start(holder, KEYS[first:]).result(LIMIT_S) for first in (0, 20)]
    assert [reply.outcome for reply in replies] == ["complete"] * 2
    assert holds(reader.pool, KEYS)


def test_lease_requests_that_wait(ranks: Ranks) -> None:
    holder = ranks(limits=Limits(max_parked=1))
    with Asker(holder.agent.peer_address) as one, Asker(holder.agent.peer_address) as two:
        one.post(lease(holder, wait_s=10.0))
        until(lambda: holder.stats()["transfer_lease_requests_parked"] == 1)
        assert "max_parked is 1" in refusal(two.ask(lease(holder, wait_s=10.0)))


def test_pages_that_are_waited_for(ranks: Ranks) -> None:
    limits = Limits(max_parked_pages=50, max_parked_pages_per_peer=41)
    holder = ranks(limits=limits)
    with Asker(holder.agent.peer_address) as one, Asker(holder.agent.peer_address) as two:
        one.post(lease(holder, wait_s=10.0))
        until(lambda: holder.stats()["transfer_lease_requests_parked"] == 1)
        text = refusal(one.ask(lease(holder, KEYS[:2], wait_s=10.0)))
        assert "42 pages, max_parked_pages_per_peer is 41" in text
        text = refusal(two.ask(lease(holder, KEYS[:11], wait_s=10.0)))
        assert "51 pages would be waited for, max_parked_pages is 50" in text
        two.post(lease(holder, KEYS[:10], wait_s=10.0))
        until(lambda: holder.stats()["transfer_lease_requests_parked"] == 2)


def test_long_lists_that_wait_cost_no_more_than_short_ones(ranks: Ranks) -> None:
    """As many pages as the default bounds allow, of which all but the last are readable."""
    holder = ranks()
    put(holder.pool, KEYS[:1])
    looked: list[int] = []
    readable_pages = holder.pool.readable_pages

    def counted(keys: Sequence[PageKey]) -> int:
        looked.append(len(keys))
        return readable_pages(keys)

    with Asker(holder.agent.peer_address) as asker:
        keys: list[bytes] = [*KEYS[:1] * 65_535, KEYS[1]]
        asker.post(LeaseRequest(holder.generation, keys, len(keys), 30.0, 1.0))
        until(lambda: holder.stats()["transfer_lease_requests_parked"] == 1)
        holder.pool.readable_pages = counted  # type: ignore[method-assign]
        put(holder.pool, KEYS[2:3])
        until(lambda: len(looked) > 2)
        assert max(looked) <= 64
        # The first page is evicted before the last one comes: not enough are readable.
        holder.pool.delete(KEYS[:1])
        put(holder.pool, KEYS[1:2])
        until(lambda: max(looked) > 64)
        assert holder.stats()["transfer_lease_requests_parked"] == 1
        put(holder.pool, KEYS[:1])
        until(lambda: holder.stats()["transfer_lease_requests_parked"] == 0)


def test_a_reader_waits_for_longer_than_its_source_does(ranks: Ranks) -> None:
    holder, reader = ranks(limits=Limits(lease_wait_s=0.05)), ranks()
    fetch = reader.start(holder, KEYS, wait_s=15.0, deadline_s=15.0)
    until(lambda: holder.stats()["transfer_lease_requests_parked"] == 0)
    put(holder.pool, KEYS)
    assert fetch.result(LIMIT_S).outcome == "complete"


class CountingTransport(LoopbackTransport):
    """Copies a segment a poll, and remembers how many blocks were under way at most."""

    def __init__(self, name: str) -> None:
        super().__init__(name, segments_per_poll=1)
        self.running: dict[int, int] = {}
        self.most = 0

    def read(self, peer: str, remote: Sequence[int], local: Sequence[int], block_bytes: int) -> int:
        handle = super().read(peer, remote, local, block_bytes)
        self.running = {h: n for h, n in self.running.items() if h in self._reads}
        self.running[handle] = len(local)
        self.most = max(self.most, sum(self.running.values()))
        return handle


def test_bytes_that_are_read_from_one_peer(ranks: Ranks) -> None:
    holder = ranks()
    made: list[CountingTransport] = []

    def make(name: str) -> CountingTransport:
        made.append(CountingTransport(name))
        return made[0]

    limits = Limits(max_round_bytes=4 * BLOCK, max_reading_bytes_per_peer=6 * BLOCK)
    reader = ranks(make, limits=limits)
    put(holder.pool, KEYS)
    reply = reader.fetch(holder, KEYS)
    assert reply.outcome == "complete" and holds(reader.pool, KEYS)
    assert 4 <= made[0].most <= 6


def test_rounds_of_one_source() -> None:
    settings = FetchSettings.of(Limits(max_rounds=7, max_round_bytes=10 * BLOCK))
    assert settings.rounds == 7
    assert settings.round_pages(BLOCK) == 10
    assert settings.round_pages(100 * BLOCK) == 1


@pytest.mark.parametrize(
    ("limits", "request_of", "text"),
    [
        (
            Limits(max_sources=1),
            lambda source: FetchRequest([source, source], [], 0.0, 1.0),
            "2 sources, max_sources is 1",
        ),
        (
            Limits(max_pages_per_request=39),
            lambda source: FetchRequest([source], list(KEYS), 0.0, 1.0),
            "40 pages, max_pages_per_request is 39",
        ),
        (
            Limits(fetch_deadline_s=2.0),
            lambda source: FetchRequest([source], [], 0.0, 2.5),
            "deadline of 2.5 s, fetch_deadline_s is 2",
        ),
    ],
)
def test_fetches_that_ask_for_too_much(
    ranks: Ranks, limits: Limits, request_of: Callable[..., FetchRequest], text: str
) -> None:
    reader = ranks(limits=limits)
    with pytest.raises(LimitExceeded, match=text):
        reader.agent.fetch(request_of(reader.source())).result(LIMIT_S)


def test_limits_on_the_command_line() -> None:
    given = parse_limits(["max_leases=7", "max_leased_bytes_per_peer=4GiB", "lease_wait_s=1.5"])
    assert given == Limits(max_leases=7, max_leased_bytes_per_peer=4 << 30, lease_wait_s=1.5)
    assert parse_limits([]) == Limits()
    for text in (
        "max_leases",
        "leases=7",
        "=3",
        "lease_wait_s=soon",
        "max_leases=0",
        "grace_share=nan",
    ):
        with pytest.raises(ConfigError):
            parse_limits([text])
