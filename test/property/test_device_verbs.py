"""Random programs of computing, swapping, holding and evicting over SGLang's own tree.

Every page's content is a function of its key, so the oracle needs no memory: whatever HBM and DRAM
say they hold must have its own content, and every slot is free, in the tree or of a swap under way.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from sglang.srt.mem_cache.base_prefix_cache import EvictParams
from sglang_memserve.hashing import page_keys
from sglang_memserve.plugin.agreement import Agreement
from sglang_memserve.types import PageKey
from unit.device_rig import LIMIT_S, PAGE, SLOTS, Rig, make_rig

MAX_HELD = 3
# Few branches, so that prefixes meet.
prefixes = st.lists(st.integers(0, 1), min_size=1, max_size=12)
verbs = st.sampled_from(["swap_in", "swap_out", "match"])


def tokens(branches: list[int]) -> list[int]:
    return [100 * depth + branch for depth, branch in enumerate(branches) for _ in range(PAGE)]


def value(key: PageKey, buffer: int) -> float:
    """A small integer, exact in bfloat16."""
    return float(key[0] % 128 + buffer)


class DeviceVerbs(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.rig: Rig = make_rig("rust", Agreement([]))
        self.held: list[tuple[int, Any]] = []
        self.running: list[int] = []

    @rule(branches=prefixes)
    def compute(self, branches: list[int]) -> None:
        wanted = tokens(branches)
        room = self.rig.allocator.available_size() + self.rig.cache.evictable_size()
        if room < len(wanted) + PAGE:
            return
        self.rig.allocator.evict_to_free_tokens(self.rig.cache, len(wanted))
        if self.rig.allocator.available_size() < len(wanted):
            return
        fresh_from = self.rig.pages_in_hbm(wanted)
        self.rig.compute(wanted)
        slots = self.rig.slots_of(wanted)
        for index, key in list(enumerate(page_keys(wanted, PAGE)))[fresh_from:]:
            page = slots[index * PAGE : (index + 1) * PAGE]
            for number, buffer in enumerate((*self.rig.kv.k_buffer, *self.rig.kv.v_buffer)):
                buffer[page] = value(key, number)

    @rule(verb=verbs, branches=prefixes)
    def begin(self, verb: str, branches: list[int]) -> None:
        self.running.append(self.rig.submit(verb, tokens(branches)))

    @rule()
    def step(self) -> None:
        self.rig.step()

    @precondition(lambda self: self.running)
    @rule()
    def settle(self) -> None:
        for call in self.running:
            self.rig.wait(call)
        self.running.clear()

    @precondition(lambda self: len(self.held) < MAX_HELD)
    @rule(branches=prefixes)
    def hold(self, branches: list[int]) -> None:
        if self.rig.pages_in_hbm(tokens(branches)):
            self.held.append(self.rig.lock(tokens(branches)))

    @precondition(lambda self: self.held)
    @rule()
    def release(self) -> None:
        node, receipt = self.held.pop()
        self.rig.cache.dec_lock_ref(node, receipt)

    @rule(count=st.integers(1, 10))
    def evict(self, count: int) -> None:
        self.rig.cache.evict(EvictParams(num_tokens=count * PAGE))

    @rule(branches=prefixes)
    def delete(self, branches: list[int]) -> None:
        self.rig.pool.delete(page_keys(tokens(branches), PAGE))

    @rule()
    def flush(self) -> None:
        for node, receipt in self.held:
            self.rig.cache.dec_lock_ref(node, receipt)
        self.held.clear()
        for request, answer in self.rig.verbs.abandon():
            self.rig.answers[request.call_id] = answer
        self.rig.cache.evict(EvictParams(num_tokens=SLOTS))
        assert self.rig.allocator.available_size() == SLOTS

    @invariant()
    def slots_are_conserved(self) -> None:
        cache = self.rig.cache
        known = self.rig.allocator.available_size() + cache.evictable_size()
        assert known + cache.protected_size() <= SLOTS
        if not self.rig.verbs.busy:
            assert known + cache.protected_size() == SLOTS
        self.rig.pool.check()

    def teardown(self) -> None:
        try:
            if self.running:
                self.settle()
            self.contents()
            while self.held:
                self.release()
            self.rig.check()
        finally:
            self.rig.copies.close(LIMIT_S)
            self.rig.pool.close()

    def contents(self) -> None:
        """Of every page in either tier, reached by its prefix."""
        for branches in (
            [(number >> bit) & 1 for bit in range(12)] for number in range(0, 4096, 7)
        ):
            wanted = tokens(branches)
            keys = page_keys(wanted, PAGE)
            pages = self.rig.pages_in_hbm(wanted)
            if pages:
                rows = self.rig.rows(self.rig.slots_of(wanted)[: pages * PAGE])
                expected = [
                    [value(key, number) for key in keys[:pages] for _ in range(PAGE)]
                    for number in range(len(rows))
                ]
                assert torch.equal(rows[:, :, 0, 0].float(), torch.tensor(expected))


pytest.importorskip("sglang.srt.mem_cache.rust_tree_core.extension")
TestDeviceVerbs = DeviceVerbs.TestCase
TestDeviceVerbs.settings = settings(
    max_examples=25,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
