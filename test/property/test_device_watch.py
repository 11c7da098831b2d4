"""What is told of HBM against SGLang's own tree, over random programs of its users.

The oracle is the tree itself, asked for every prefix there is: a page is in HBM when the tree holds
the whole prefix that it ends.
"""

from __future__ import annotations

from array import array
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from oracle.global_tree import FlatTree
from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator
from sglang.srt.mem_cache.base_prefix_cache import EvictParams, InsertParams, MatchPrefixParams
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.unified_cache.component_type import ComponentType
from sglang.srt.mem_cache.unified_cache.unified_cache_linker import UnifiedCacheLinkerWrapper
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache
from sglang_memserve.hashing import namespace_seed, page_keys, short_key
from sglang_memserve.mempool import MemPool
from sglang_memserve.plugin import linker_hooks, scheduler_hooks
from sglang_memserve.plugin.device_watch import DeviceWatch
from sglang_memserve.plugin.scheduler_clock import SchedulerClock
from sglang_memserve.router.tree.reference import GlobalTree
from sglang_memserve.types import InstanceId, Namespace, PageKey, ShortKey, Tier

PAGE, LAYERS, HEADS, DIM = 4, 1, 1, 1
SLOTS = 24 * PAGE
SPACE = Namespace("m", "1", "bfloat16", PAGE, LAYERS, HEADS, DIM, DIM, 0, 1)
HERE = InstanceId("http://here:1")
SALTS = (None, "tenant")
prefixes = st.lists(st.integers(0, 1), min_size=1, max_size=5)
salts = st.sampled_from(SALTS)


def tokens(branches: list[int]) -> list[int]:
    return [100 * depth + branch for depth, branch in enumerate(branches) for _ in range(PAGE)]


class Linker:
    """Of the linker, what the watch needs; offloads land or fail as the test says."""

    def __init__(self, pool: MemPool) -> None:
        self.watch = DeviceWatch(pool, PAGE)
        self.pool = pool
        self.clock = SchedulerClock()
        self.pools: dict[Any, Any] = {}
        self.outcomes: list[bool] = []
        self.waiting = 0
        self.parent: PageKey | None = None

    def set_offload_parent(self, parent: str | None) -> None:
        self.parent = None if parent is None else PageKey(bytes.fromhex(parent))

    def offload(self, transfers: list[Any], session_id: str | None = None) -> bool:
        keys = [PageKey(bytes.fromhex(key)) for key in transfers[0].keys]
        self.watch.joined(keys, self.parent)
        self.waiting += 1
        return True

    def num_completed_offloads(self) -> int:
        return len(self.outcomes)

    def pop_completed_offload(self) -> bool:
        return self.outcomes.pop(0)

    def before_eviction(self, keys: list[str]) -> None:
        self.watch.leaves(keys)

    def after_round(self, tree_tokens: int) -> None:
        self.watch.settle(tree_tokens)

    def reset(self) -> None:
        self.outcomes.clear()
        self.waiting = 0
        self.watch.reset()
        self.pool.clear()


class Wrapper(UnifiedCacheLinkerWrapper):  # type: ignore[misc]
    """Hooked as ``linker_hooks`` does it, for this test alone."""

    def _offload_node(self, node_id: int, transfers: list[Any]) -> None:
        linker_hooks._before_offload_node(self, node_id, transfers)
        super()._offload_node(node_id, transfers)


class Cache(UnifiedRadixCache):  # type: ignore[misc]
    def _evict_device_leaf(self, node_id: int, tracker: Any) -> Any:
        linker_hooks._before_evict_leaf(self, node_id, tracker)
        return super()._evict_device_leaf(node_id, tracker)

    def check_hicache_events(self) -> None:
        super().check_hicache_events()
        scheduler_hooks._after_cache_events(None, self)


class WatchMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        buffers = [torch.zeros(SLOTS + PAGE, HEADS, DIM).bfloat16()]
        kv: Any = SimpleNamespace(k_buffer=buffers, v_buffer=buffers)
        self.allocator = PagedTokenToKVPoolAllocator(SLOTS, PAGE, torch.bfloat16, "cpu", kv, False)
        nothing: Any = None
        self.cache = Cache(
            CacheInitParams(
                disable=False,
                req_to_token_pool=nothing,
                token_to_kv_pool_allocator=self.allocator,
                page_size=PAGE,
                tree_components=(ComponentType.FULL,),
                tree_core_backend="rust",
            )
        )
        self.pool = MemPool(SPACE, arena_bytes=4 * SPACE.block_bytes, generation="g")
        self.linker = Linker(self.pool)
        linker: Any = self.linker
        self.cache.linker = Wrapper(self.cache, linker)
        self.tree, self.flat = GlobalTree(), FlatTree()
        self.seq = -1
        self.held: list[tuple[int, Any]] = []
        self.prefixes: set[tuple[tuple[int, ...], str | None]] = set()

    def key(self, branches: list[int], salt: str | None) -> RadixKey:
        return RadixKey(array("q", tokens(branches)), cache_salt=salt)

    @rule(branches=prefixes, salt=salts)
    def compute(self, branches: list[int], salt: str | None) -> None:
        """As a request: a match, slots for what is missing, an insert of everything."""
        found = self.cache.match_prefix(MatchPrefixParams(key=self.key(branches, salt)))
        missing = len(tokens(branches)) - found.device_prefix_len
        lock = self.cache.inc_lock_ref(found.last_device_node).to_dec_params()
        self.allocator.evict_to_free_tokens(self.cache, missing)
        fresh = self.allocator.alloc(missing) if missing else torch.empty(0, dtype=torch.int64)
        self.cache.dec_lock_ref(found.last_device_node, lock)
        if fresh is None:
            return
        old = self.cache.path_device_indices(found.last_device_node)
        params = InsertParams(
            key=self.key(branches, salt),
            value=torch.cat([old, fresh]),
            prev_prefix_len=found.device_prefix_len,
        )
        self.cache.insert(params)
        for end in range(1, len(branches) + 1):
            self.prefixes.add((tuple(branches[:end]), salt))

    @rule(count=st.integers(1, 12))
    def evict(self, count: int) -> None:
        self.cache.evict(EvictParams(num_tokens=count * PAGE))

    @precondition(lambda self: len(self.held) < 3)
    @rule(branches=prefixes, salt=salts)
    def hold(self, branches: list[int], salt: str | None) -> None:
        found = self.cache.match_prefix(MatchPrefixParams(key=self.key(branches, salt)))
        node = found.last_device_node
        self.held.append((node, self.cache.inc_lock_ref(node).to_dec_params()))

    @precondition(lambda self: self.held)
    @rule()
    def release(self) -> None:
        self.cache.dec_lock_ref(*self.held.pop())

    @rule(landed=st.booleans())
    def finish_an_offload(self, landed: bool) -> None:
        if self.linker.waiting:
            self.linker.waiting -= 1
            self.linker.outcomes.append(landed)

    @rule()
    def flush(self) -> None:
        self.held.clear()
        self.cache.reset()
        self.allocator.clear()

    @invariant()
    def events_say_what_the_tree_holds(self) -> None:
        self.cache.check_hicache_events()
        assert self.linker.watch.lost == 0
        for seq, events in self.pool.drain_events():
            assert seq == self.seq + 1
            self.seq = seq
            for event in events:
                self.tree.apply(HERE, event)
                self.flat.apply(HERE, event)
        self.tree.check()
        expected = self.in_hbm()
        assert self.flat.held.get(HERE, set()) == {(key, Tier.HBM) for key in expected}
        assert self.tree.stats().held.get(HERE, {}).get(Tier.HBM, 0) == len(expected)
        again = FlatTree()
        for event in self.pool.snapshot().events:
            again.apply(HERE, event)
        assert again.held.get(HERE, set()) == self.flat.held.get(HERE, set())
        for branches, salt in self.prefixes:
            keys = self.short_keys(branches, salt)
            match = self.tree.match(keys).get(HERE)
            pages = self.pages_in_hbm(list(branches), salt)
            assert (match.hbm_pages if match is not None else 0) == pages

    def pages_in_hbm(self, branches: list[int], salt: str | None) -> int:
        core = self.cache.tree_core
        return int(core.match_full_device_prefix(self.key(branches, salt))[0]) // PAGE

    def short_keys(self, branches: tuple[int, ...], salt: str | None) -> list[ShortKey]:
        keys = page_keys(tokens(list(branches)), PAGE, namespace_seed(None, salt))
        return [short_key(key) for key in keys]

    def in_hbm(self) -> set[int]:
        return {
            self.short_keys(branches, salt)[-1]
            for branches, salt in self.prefixes
            if self.pages_in_hbm(list(branches), salt) == len(branches)
        }

    def teardown(self) -> None:
        self.pool.check()
        self.pool.close()


pytest.importorskip("sglang.srt.mem_cache.rust_tree_core.extension")
TestWatch = WatchMachine.TestCase
TestWatch.settings = settings(
    max_examples=60,
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
