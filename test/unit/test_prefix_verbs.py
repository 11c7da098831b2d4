"""The device verbs over SGLang's own tree, both cores, with a real MemPool and real tensors."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import pytest
import torch
from sglang.srt.mem_cache.unified_cache import unified_tree_core
from sglang_memserve.errors import LimitExceeded
from sglang_memserve.hashing import page_keys
from sglang_memserve.plugin import prefix_verbs
from sglang_memserve.plugin.agreement import Agreement
from sglang_memserve.plugin.engine_messages import PrefixVerbReqOutput
from unit.device_rig import BLOCKS, LIMIT_S, PAGE, SLOTS, A, Rig, make_rig, node_keys


@pytest.fixture
def plain_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without SGLang's C++ extension, which needs a compiler."""
    monkeypatch.setattr(unified_tree_core, "compute_node_hash_values", node_keys)


@pytest.fixture(params=["rust", "python"])
def rig(request: pytest.FixtureRequest, plain_keys: None) -> Iterator[Rig]:
    rig = make_rig(request.param, Agreement([]))
    yield rig
    rig.copies.close(LIMIT_S)
    rig.check()
    rig.pool.close()


def test_match_says_what_is_where(rig: Rig) -> None:
    rig.compute(A)
    answer = rig.do("match", [*A, *range(900, 908), 1])
    assert (answer.outcome, answer.hbm_pages, answer.dram_pages) == ("complete", 10, 0)
    assert answer.reusable_pages == 10
    assert rig.do("match", [1, 2, 3]).hbm_pages == 0
    assert rig.do("match", A, salt="other").hbm_pages == 0


def test_out_and_in_again(rig: Rig) -> None:
    before = rig.compute(A)
    out = rig.do("swap_out", A)
    assert (out.outcome, out.moved_pages, out.stored_pages) == ("complete", 10, 10)
    assert (out.hbm_pages, out.dram_pages, out.reusable_pages) == (0, 10, 10)
    assert rig.allocator.available_size() == SLOTS
    for buffer in (*rig.kv.k_buffer, *rig.kv.v_buffer):
        buffer.zero_()
    back = rig.do("swap_in", A)
    assert (back.outcome, back.moved_pages, back.hbm_pages) == ("complete", 10, 10)
    assert torch.equal(rig.bytes_in_hbm(A), before)
    again = rig.do("swap_out", A)
    assert (again.moved_pages, again.stored_pages) == (10, 0), "DRAM had them all"


def test_namespaces_are_kept_apart(rig: Rig) -> None:
    rig.compute(A, salt="tenant")
    assert rig.do("swap_out", A).moved_pages == 0
    assert rig.do("swap_out", A, salt="tenant").moved_pages == 10
    assert rig.do("swap_in", A).outcome == "miss"
    assert rig.do("swap_in", A, salt="tenant").moved_pages == 10


def test_part_of_a_prefix_takes_along_what_extends_it(rig: Rig) -> None:
    """A prompt leaves with the answers that were generated after it."""
    rig.compute([*A, *range(300, 308)])
    rig.compute([*A, *range(400, 404)])
    answer = rig.do("swap_out", A[:20])
    assert (answer.outcome, answer.moved_pages, answer.continued_pages) == ("complete", 5, 8)
    assert rig.do("match", [*A, *range(300, 308)]).dram_pages == 12
    assert rig.do("match", [*A, *range(400, 404)]).dram_pages == 11
    assert rig.allocator.available_size() == SLOTS


def test_what_another_prefix_shares_stays(rig: Rig) -> None:
    other = [*A[:16], *range(500, 516)]
    rig.compute(A)
    rig.compute(other)
    answer = rig.do("swap_out", A)
    assert (answer.outcome, answer.moved_pages, answer.hbm_pages) == ("shared", 6, 4)
    assert answer.reusable_pages == 10
    assert rig.do("match", other).hbm_pages == 8


def test_what_a_request_uses_stays(rig: Rig) -> None:
    rig.compute(A)
    node, receipt = rig.lock(A[:24])
    answer = rig.do("swap_out", A)
    assert (answer.outcome, answer.moved_pages, answer.hbm_pages) == ("in_use", 4, 6)
    assert rig.do("swap_out", A).moved_pages == 0
    rig.cache.dec_lock_ref(node, receipt)
    assert rig.do("swap_out", A).outcome == "complete"


def test_request_that_comes_during_the_copy_keeps_its_pages(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig.compute(A)
    gate = hold_copies(rig, monkeypatch)
    call = rig.submit("swap_out", A)
    rig.step()
    node, receipt = rig.lock(A)
    gate.set()
    answer = rig.wait(call)
    assert (answer.outcome, answer.moved_pages, answer.hbm_pages) == ("in_use", 0, 10)
    assert answer.dram_pages == 10, "the copy is not lost"
    rig.cache.dec_lock_ref(node, receipt)


def test_fresh_pages_are_waited_for(rig: Rig) -> None:
    """SGLang holds a node until its write-through is done."""
    rig.compute(A)
    node, receipt = rig.lock(A)
    rig.cache.linker.pending_offloads.append("one")
    call = rig.submit("swap_out", A)
    rig.step()
    assert call not in rig.answers
    rig.cache.linker.pending_offloads.clear()
    rig.cache.dec_lock_ref(node, receipt)
    assert rig.wait(call).moved_pages == 10


def test_pages_that_find_no_block_stay(rig: Rig) -> None:
    """Nothing leaves HBM that DRAM does not hold."""
    taken = rig.pool.alloc_mem(BLOCKS - 4)
    rig.compute(A)
    answer = rig.do("swap_out", A)
    assert (answer.outcome, answer.moved_pages, answer.hbm_pages) == ("no_blocks", 0, 10)
    rig.pool.free_mem(taken)
    assert rig.do("swap_out", A).outcome == "complete"


def test_swap_in_takes_at_most_half_of_the_room(rig: Rig) -> None:
    tokens = list(range(1000, 1000 + 40 * PAGE))
    rig.compute(tokens)
    assert rig.do("swap_out", tokens).moved_pages == 40
    first = rig.do("swap_in", tokens)
    assert (first.outcome, first.moved_pages, first.hbm_pages) == ("no_slots", 32, 32)
    assert first.reusable_pages == 40, "the rest is still in DRAM"


def test_swap_in_evicts_what_is_older(rig: Rig) -> None:
    rig.compute(A)
    rig.do("swap_out", A)
    for first in range(2000, 2000 + 64 * PAGE, 8 * PAGE):
        rig.compute(list(range(first, first + 8 * PAGE)))
    assert rig.allocator.available_size() == 0
    assert rig.do("swap_in", A).moved_pages == 10


def test_swap_in_of_what_nobody_has(rig: Rig) -> None:
    assert rig.do("swap_in", A).outcome == "miss"
    rig.compute(A[:20])
    answer = rig.do("swap_in", A)
    assert (answer.outcome, answer.hbm_pages) == ("miss", 5)
    assert rig.do("swap_in", A[:20]).outcome == "complete"


def test_pages_computed_during_a_swap_in_are_kept_once(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig.compute(A)
    rig.do("swap_out", A)
    gate = hold_copies(rig, monkeypatch)
    call = rig.submit("swap_in", A)
    rig.step()
    computed = rig.compute([*A, *range(600, 608)])
    gate.set()
    assert rig.wait(call).hbm_pages == 10
    assert torch.equal(rig.bytes_in_hbm([*A, *range(600, 608)]), computed)


def test_failed_copies_change_nothing(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("the device is gone")

    rig.compute(A)
    with monkeypatch.context() as patch:
        patch.setattr(rig.device, "gather", broken)
        assert rig.do("swap_out", A).hbm_pages == 10
    rig.do("swap_out", A)
    with monkeypatch.context() as patch:
        patch.setattr(rig.device, "scatter", broken)
        answer = rig.do("swap_in", A)
    assert (answer.outcome, answer.hbm_pages, answer.dram_pages) == ("copy_failed", 0, 10)


def test_deadline_ends_a_verb(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    rig.compute(A)
    rig.do("swap_out", A)
    gate = hold_copies(rig, monkeypatch)
    call = rig.submit("swap_in", A)
    rig.step()
    rig.now[0] += LIMIT_S
    rig.step()
    assert call not in rig.answers, "its slots may still be written"
    gate.set()
    assert rig.wait(call).outcome == "deadline"
    assert rig.allocator.available_size() == SLOTS


def test_verb_whose_time_is_over_does_not_begin(rig: Rig) -> None:
    rig.compute(A)
    call = rig.submit("swap_out", A)
    rig.now[0] += LIMIT_S
    answer = rig.wait(call)
    assert (answer.outcome, answer.hbm_pages) == ("deadline", 10)


def test_flush_ends_what_runs(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    rig.compute(A)
    rig.do("swap_out", A)
    rig.compute(list(range(700, 740)))
    gate = hold_copies(rig, monkeypatch)
    calls = [rig.submit("swap_in", A), rig.submit("swap_out", list(range(700, 740)))]
    rig.step()
    threading.Timer(0.05, gate.set).start()
    answers = rig.verbs.abandon()
    assert [request.call_id for request, _ in answers] == calls
    assert {answer.outcome for _, answer in answers} == {"flushed"}
    assert not rig.verbs.busy


def test_too_many_at_once_are_refused(rig: Rig) -> None:
    calls = [rig.submit("match", A) for _ in range(prefix_verbs.MAX_TASKS + 1)]
    assert rig.answers[calls[-1]].outcome == "limit_exceeded"
    assert rig.wait(calls[0]).outcome == "complete"


def hold_copies(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    gate = threading.Event()

    def wait(*_: object) -> None:
        assert gate.wait(LIMIT_S)

    monkeypatch.setattr(rig.device, "wait", wait)
    return gate


class Lockstep(Agreement):
    """Two ranks as two threads: each waits for the other, as in a collective operation."""

    def __init__(self) -> None:
        super().__init__([])
        self._barrier = threading.Barrier(2)
        self._votes: dict[int, list[int]] = {}

    def least(self, values: list[int]) -> list[int]:
        self._votes[threading.get_ident()] = values
        self._barrier.wait(LIMIT_S)
        mine, other = self._votes.values()
        least = [min(pair) for pair in zip(mine, other, strict=True)]
        self._barrier.wait(LIMIT_S)
        return least


@dataclass
class TwoRanks:
    rigs: tuple[Rig, Rig]

    def do(self, verb: str, tokens: list[int]) -> PrefixVerbReqOutput:
        """The verb on both ranks, round by round; both must answer in the same round and alike."""
        calls = [rig.submit(verb, tokens) for rig in self.rigs]
        deadline = time.monotonic() + LIMIT_S
        while calls[0] not in self.rigs[0].answers:
            assert time.monotonic() < deadline, "the verb did not end"
            list(self.threads.map(Rig.step, self.rigs))
        answers = [rig.answers.pop(call) for rig, call in zip(self.rigs, calls, strict=True)]
        assert answers[0] == answers[1]
        return answers[0]

    threads: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(2))


@pytest.fixture
def two(plain_keys: None) -> Iterator[TwoRanks]:
    together = Lockstep()
    two = TwoRanks((make_rig("rust", together), make_rig("rust", together)))
    yield two
    two.threads.shutdown()
    for rig in two.rigs:
        rig.copies.close(LIMIT_S)
        rig.check()
        rig.pool.close()


def test_ranks_move_what_all_of_them_hold(two: TwoRanks) -> None:
    for rig in two.rigs:
        rig.compute(A)
    assert two.do("swap_out", A).moved_pages == 10
    two.rigs[1].pool.delete(page_keys(A, PAGE)[6:])
    answer = two.do("match", A)
    assert (answer.dram_pages, answer.reusable_pages) == (6, 6)
    answer = two.do("swap_in", A)
    assert (answer.outcome, answer.moved_pages, answer.hbm_pages) == ("miss", 6, 6)


def test_one_rank_without_blocks_keeps_pages_on_all(two: TwoRanks) -> None:
    for rig in two.rigs:
        rig.compute(A)
    taken = two.rigs[1].pool.alloc_mem(BLOCKS - 4)
    answer = two.do("swap_out", A)
    assert (answer.outcome, answer.moved_pages, answer.hbm_pages) == ("no_blocks", 0, 10)
    two.rigs[1].pool.free_mem(taken)
    assert two.do("swap_out", A).outcome == "complete"


def test_copy_that_fails_on_one_rank_counts_for_none(
    two: TwoRanks, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("the device is gone")

    for rig in two.rigs:
        rig.compute(A)
    two.do("swap_out", A)
    with monkeypatch.context() as patch:
        patch.setattr(two.rigs[0].device, "scatter", broken)
        answer = two.do("swap_in", A)
    assert (answer.outcome, answer.hbm_pages) == ("copy_failed", 0)
    assert two.do("swap_in", A).hbm_pages == 10


def test_leases_that_one_rank_refuses_are_taken_by_none(
    two: TwoRanks, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise LimitExceeded("no more leases")

    for rig in two.rigs:
        rig.compute(A)
    two.do("swap_out", A)
    with monkeypatch.context() as patch:
        patch.setattr(two.rigs[1].pool, "acquire", refuse)
        assert two.do("swap_in", A).outcome == "limit_exceeded"
    assert two.do("swap_in", A).outcome == "complete"
