"""Simulated instances, their network and the peer's policy, in sums done by hand."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import pytest
from sglang_memserve.config import Limits
from sglang_memserve.errors import ConfigError
from sglang_memserve.hashing import page_keys
from sglang_memserve.router.policy.cost import Cost
from sglang_memserve.router.policy.prefix import Prefix
from sglang_memserve.router.simulate import trace
from sglang_memserve.router.simulate.agenda import Agenda
from sglang_memserve.router.simulate.approximate import Approximate
from sglang_memserve.router.simulate.fleet import Fleet, Terms
from sglang_memserve.router.simulate.memory import Memory
from sglang_memserve.router.simulate.network import Network
from sglang_memserve.router.simulate.profile import Decode, Link, Profile
from sglang_memserve.router.simulate.report import Served
from sglang_memserve.router.simulate.trace import Arrival
from sglang_memserve.types import Eviction, InstanceId, Role
from unit.plain_instance import PLAIN

TERMS = Terms(page_tokens=10)


def alone(profile: Profile, *requests: tuple[float, int, int], policy: str = "cost") -> Fleet:
    """One instance; requests as (when, prompt tokens, output tokens), no two alike."""
    fleet = Fleet(profile, [Role.BOTH], replace(TERMS, policy=policy))
    for number, (at_s, prompt, output) in enumerate(requests):
        keyed = trace.keyed(Arrival(at_s, prompt, output, (number,)), 10, block_tokens=1000)
        fleet.submit(at_s, keyed, output)
    fleet.run()
    fleet.check()
    return fleet


def test_a_prompt_is_computed_in_chunks_and_a_stream_gets_a_token_a_step() -> None:
    # 250 tokens: chunks of 100, 100 and 50; then four steps.
    served = alone(PLAIN, (0.0, 250, 5)).served[0]
    assert served.ttft_s == pytest.approx(3 * 0.5 + 2.5)
    assert served.jct_s == pytest.approx(4.0 + 4)
    assert served.tpot_s == pytest.approx(1.0)
    assert served.computed_tokens == 250


def test_a_prompt_waits_for_the_step_under_way_and_then_stops_the_streams() -> None:
    # The stream's steps end at 1.5 + 1, + 2, ...; the prompt comes in the second of them.
    first, second = alone(PLAIN, (0.0, 100, 5), (3.0, 50, 1)).served
    assert first.ttft_s == pytest.approx(1.5)
    assert second.ttft_s == pytest.approx(0.5 + 0.5 + 0.5)
    # Four steps, and one second of the other's prefill between them.
    assert first.jct_s == pytest.approx(1.5 + 4 + 1.0)


def test_steps_grow_with_streams_and_context() -> None:
    decode = Decode(fixed_s=1.0, stream_s=0.1, context_token_s=0.001, max_streams=8)
    profile = msgspec.structs.replace(PLAIN, decode=decode)
    served = alone(profile, (0.0, 100, 4)).served[0]
    assert served.jct_s - served.ttft_s == pytest.approx(3 * 1.1 + 0.001 * (100 + 101 + 102))


def test_streams_wait_where_the_batch_or_the_memory_is_full() -> None:
    few = Decode(fixed_s=1.0, stream_s=0.0, context_token_s=0.0, max_streams=1)
    narrow = msgspec.structs.replace(PLAIN, decode=few)
    small = msgspec.structs.replace(PLAIN, hbm_tokens=120)
    for profile in (narrow, small):
        first, second = alone(profile, (0.0, 100, 5), (0.0, 100, 5)).served
        assert first.ended_s is not None and second.first_token_s is not None
        assert second.first_token_s >= first.ended_s


def test_what_does_not_fit_is_refused_and_told() -> None:
    fleet = alone(PLAIN, (0.0, 9_999, 100), (0.0, 10, 1))
    assert [one.refused for one in fleet.served] == [True, False]


def test_a_frozen_or_slow_instance_is_late() -> None:
    fleet = Fleet(PLAIN, [Role.BOTH], TERMS)
    site = next(iter(fleet.sites.values()))
    site.engine.frozen.append((1.0, 11.0))
    keyed = trace.keyed(Arrival(0.0, 100, 3, (1,)), 10, block_tokens=1000)
    served = fleet.submit(0.0, keyed, 3)
    fleet.run()
    assert served.ttft_s == pytest.approx(1.5 + 10) and served.jct_s == pytest.approx(13.5)
    slow = Fleet(PLAIN, [Role.BOTH], TERMS)
    next(iter(slow.sites.values())).engine.slowness = 3.0
    served = slow.submit(0.0, keyed, 3)
    slow.run()
    assert served.jct_s == pytest.approx(3 * 3.5)


def test_transfers_share_the_way_out_and_the_way_in() -> None:
    agenda = Agenda()
    network = Network(agenda, Link(latency_s=1.0, bytes_per_s=100.0))
    ended: dict[str, float] = {}

    def send(name: str, source: str, target: str, size: int) -> None:
        def there() -> None:
            ended[name] = agenda.now

        network.begin(InstanceId(source), InstanceId(target), size, there)

    send("one", "a", "b", 100)
    send("two", "a", "c", 300)
    send("beside", "d", "e", 100)
    agenda.run()
    # Half the way each until the first is there, then all of it.
    assert ended == pytest.approx({"one": 3.0, "two": 5.0, "beside": 2.0})
    assert network.moved_bytes == pytest.approx(500)
    network.check()


def test_a_cancelled_transfer_calls_nobody_and_makes_room() -> None:
    agenda = Agenda()
    network = Network(agenda, Link(latency_s=0.0, bytes_per_s=100.0))
    ended: list[float] = []
    a, b = InstanceId("a"), InstanceId("b")
    network.begin(a, b, 300, lambda: ended.append(agenda.now))
    lost = network.begin(a, b, 300, lambda: ended.append(-1.0))
    never = network.begin(a, b, 300, lambda: ended.append(-1.0))
    never.cancel()
    agenda.at(2.0, lost.cancel)
    agenda.run()
    assert ended == [pytest.approx(4.0)] and not network.busy()


def test_a_prefix_is_found_moved_and_loaded() -> None:
    profile = msgspec.structs.replace(PLAIN, link=Link(latency_s=0.0, bytes_per_s=1e9))
    fleet = Fleet(profile, [Role.PREFILL, Role.DECODE], replace(TERMS, bypass_tokens=0))
    for at_s, tokens in ((0.0, 501), (100.0, 551)):
        keyed = trace.keyed(Arrival(at_s, tokens, 2, (7,)), 10, block_tokens=1000)
        fleet.submit(at_s, keyed, 2)
    first, second = fleet.run()
    fleet.check()
    assert first.handed_over and first.computed_tokens == 501
    # The last page is never whole: its token is computed where the stream is.
    assert first.again_tokens == 1
    assert second.computed_tokens <= 51
    assert fleet.network.moved_bytes >= 50 * 10 * 100
    p, d = fleet.sites.values()
    assert p.memory.dram.index.leading([]) == 0
    assert len(p.memory.dram.index) >= 50 <= len(d.memory.dram.index)


@pytest.mark.parametrize("output", [1, 25])
def test_what_was_generated_is_found_by_the_prompt_that_goes_on_from_it(output: int) -> None:
    # 50 tokens and the answer; then both again and ten more.
    first = Arrival(0.0, 50, output, (1, 2, 3, 4, 5), None, (1, 2, 3, 4, 5, 6, 7, 8))
    second = Arrival(100.0, 60 + output, 1, (1, 2, 3, 4, 5, 6, 7, 8, 9))
    fleet = Fleet(PLAIN, [Role.BOTH], TERMS)
    for one in (first, second):
        answered = trace.answered_keys(one, 10, 10)
        fleet.submit(one.at_s, trace.keyed(one, 10, 10), one.output_tokens, None, answered)
    _, served = fleet.run()
    fleet.check()
    # The last token of an answer is never computed.
    assert served.hbm_tokens == (50 + output - 1) // 10 * 10
    (site,) = fleet.sites.values()
    assert site.memory.dram.index.leading(trace.answered_keys(first, 10, 10)) == (
        (50 + output - 1) // 10
    )


def test_answers_are_nobodys_cache_where_pages_are_shorter_than_blocks() -> None:
    arrival = Arrival(0.0, 50, 25, (1, 2), None, (1, 2))
    assert not trace.answered_keys(arrival, 10, 40)


# -- pages that wait for their request --


def test_what_is_fetched_stays_until_its_request_is_admitted() -> None:
    now = [0.0]
    memory = Memory(40, 12, Eviction.LRU, lambda *_: None, lambda: now[0], Limits(hold_share=0.5))
    keys, others = page_keys(range(5), 1), page_keys(range(100, 124), 1)

    def flood() -> None:
        for start in range(0, 24, 4):
            memory.keep(others, start, start + 4)
        memory.check()

    for after_fetch in (flood, lambda: None):
        expected = memory.expect(keys, 60.0)
        memory.keep(keys, 0, 3)
        expected.came()
        flood()
        memory.keep(keys, 3, 5)
        expected.end()
        after_fetch()
        assert memory.leading(keys) == 5 and memory.holds.held_blocks == 5
        if after_fetch is flood:
            now[0] += 61.0
            flood()
            assert memory.leading(keys) == 0
    too_much = memory.expect(others[:7], 60.0)
    memory.keep(others, 0, 7)
    too_much.end()
    assert memory.holds.counts["holds_refused_total"] == 1
    seat = memory.admit(keys, 6)
    assert seat is not None and seat.ready == 5 and not len(memory.holds)
    memory.leave(seat)
    memory.check()


# -- policies --


def test_the_policies_are_the_routers_own() -> None:
    assert type(Fleet(PLAIN, [Role.BOTH], replace(TERMS, policy="cost")).policy) is Cost
    assert type(Fleet(PLAIN, [Role.BOTH], replace(TERMS, policy="prefix")).policy) is Prefix
    peer = Fleet(PLAIN, [Role.BOTH], replace(TERMS, policy="approximate"))
    assert type(peer.policy) is Approximate
    with pytest.raises(ConfigError, match="round-robin"):
        Fleet(PLAIN, [Role.BOTH], replace(TERMS, policy="nonsense"))


def test_the_peer_goes_by_what_it_sent_and_not_by_what_is_there() -> None:
    """The first prompt is pushed out of its instance; the peer sends its repetition there all the
    same, the router that hears events knows better."""
    small = msgspec.structs.replace(PLAIN, hbm_tokens=1000, dram_bytes=0)

    def last_of(policy: str) -> tuple[Fleet, Served]:
        fleet = Fleet(small, [Role.BOTH, Role.BOTH], replace(TERMS, policy=policy))
        for number, block in enumerate((1, 2, 3, 4, 1)):
            at_s = 100.0 * number
            keyed = trace.keyed(Arrival(at_s, 999, 1, (block,)), 10, block_tokens=1000)
            fleet.submit(at_s, keyed, 1)
        return fleet, fleet.run()[-1]

    fleet, last = last_of("approximate")
    assert last.plan is not None and fleet.served[0].plan is not None
    assert last.plan.decode == fleet.served[0].plan.decode
    assert last.plan.held_pages == 99 and last.computed_tokens == 999
    _, last = last_of("prefix")
    assert last.plan is not None and last.plan.held_pages == 0


def test_the_peer_leaves_a_worker_that_has_far_more_to_do() -> None:
    fleet = Fleet(PLAIN, [Role.BOTH, Role.BOTH], replace(TERMS, policy="approximate"))
    for number in range(200):
        keyed = trace.keyed(Arrival(0.0, 999, 1, (1,)), 10, block_tokens=1000)
        fleet.submit(number * 1e-3, keyed, 1)
    fleet.run()
    one, two = (site.decodes for site in fleet.sites.values())
    assert one + two == 200 and min(one, two) > 30, (one, two)
