"""SGLang's own tree and allocator, a MemPool and the device verbs over small tensors: no engine."""

from __future__ import annotations

import time
from array import array
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator
from sglang.srt.mem_cache.base_prefix_cache import InsertParams, MatchPrefixParams
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.unified_cache.component_type import ComponentType
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache
from sglang_memserve.hashing import namespace_seed, page_keys
from sglang_memserve.memory.swap import DevicePool
from sglang_memserve.mempool import MemPool
from sglang_memserve.plugin.agreement import Agreement
from sglang_memserve.plugin.copies import CopyThread
from sglang_memserve.plugin.device_tree import DeviceTree
from sglang_memserve.plugin.engine_messages import PrefixVerbReqInput, PrefixVerbReqOutput
from sglang_memserve.plugin.prefix_verbs import PrefixVerbs
from sglang_memserve.plugin.scheduler_clock import SchedulerClock
from sglang_memserve.plugin.swaps import Ports
from sglang_memserve.types import Namespace

PAGE, LAYERS, HEADS, DIM = 4, 2, 2, 8
SLOTS = 64 * PAGE
BLOCKS = 40
SPACE = Namespace("m", "1", "bfloat16", PAGE, LAYERS, HEADS, DIM, DIM, 0, 1)
LIMIT_S = 10.0
A = list(range(100, 140))


class Linked:
    def device_events(self) -> list[Any]:
        return []


@dataclass
class Rig:
    cache: Any
    allocator: Any
    pool: MemPool
    device: DevicePool
    copies: CopyThread
    verbs: PrefixVerbs
    kv: Any
    now: list[float]
    calls: int = 0
    answers: dict[int, PrefixVerbReqOutput] = field(default_factory=dict)

    def key(self, tokens: list[int], salt: str | None = None) -> RadixKey:
        return RadixKey(array("q", tokens), cache_salt=salt)

    def compute(self, tokens: list[int], salt: str | None = None) -> torch.Tensor:
        """As a request would: slots for what the tree lacks, filled, then inserted."""
        tokens = tokens[: len(tokens) // PAGE * PAGE]
        found = self.cache.match_prefix(MatchPrefixParams(key=self.key(tokens, salt)))
        known = found.device_prefix_len
        fresh = self.allocator.alloc(len(tokens) - known)
        assert fresh is not None
        for buffer in (*self.kv.k_buffer, *self.kv.v_buffer):
            buffer[fresh] = torch.randn(len(fresh), HEADS, DIM).bfloat16()
        old = self.cache.path_device_indices(found.last_device_node)
        params = InsertParams(
            key=self.key(tokens, salt), value=torch.cat([old, fresh]), prev_prefix_len=known
        )
        result = self.cache.insert(params)
        return self.rows(self.cache.path_device_indices(result.last_device_node))

    def rows(self, slots: torch.Tensor) -> torch.Tensor:
        return torch.stack([b[slots] for b in (*self.kv.k_buffer, *self.kv.v_buffer)])

    def slots_of(self, tokens: list[int]) -> torch.Tensor:
        found = self.cache.match_prefix(MatchPrefixParams(key=self.key(tokens)))
        slots: torch.Tensor = self.cache.path_device_indices(found.last_device_node)
        return slots

    def pages_in_hbm(self, tokens: list[int]) -> int:
        return int(self.cache.tree_core.match_full_device_prefix(self.key(tokens))[0]) // PAGE

    def bytes_in_hbm(self, tokens: list[int]) -> torch.Tensor:
        found = self.cache.match_prefix(MatchPrefixParams(key=self.key(tokens)))
        return self.rows(self.cache.path_device_indices(found.last_device_node))

    def lock(self, tokens: list[int]) -> tuple[int, Any]:
        """As a running request holds its prefix."""
        found = self.cache.match_prefix(MatchPrefixParams(key=self.key(tokens)))
        node = found.last_device_node
        return node, self.cache.inc_lock_ref(node).to_dec_params()

    def submit(
        self, verb: str, tokens: list[int], salt: str | None = None, deadline_s: float = LIMIT_S
    ) -> int:
        self.calls += 1
        request = PrefixVerbReqInput(
            call_id=self.calls,
            verb=verb,
            tokens=tokens,
            keys=list(page_keys(tokens, PAGE, namespace_seed(None, salt))),
            extra_key=None,
            cache_salt=salt,
            deadline_s=deadline_s,
        )
        if (refused := self.verbs.submit(request)) is not None:
            self.answers[self.calls] = refused
        return self.calls

    def step(self) -> None:
        for request, answer in self.verbs.advance():
            self.answers[request.call_id] = answer

    def wait(self, call: int) -> PrefixVerbReqOutput:
        deadline = time.monotonic() + LIMIT_S
        while call not in self.answers:
            assert time.monotonic() < deadline, "the verb did not end"
            self.step()
            self.verbs.pause(0.001)
        return self.answers.pop(call)

    def do(self, verb: str, tokens: list[int], **options: Any) -> PrefixVerbReqOutput:
        return self.wait(self.submit(verb, tokens, **options))

    def check(self) -> None:
        """Every slot is free or in the tree, and nobody holds anything."""
        self.pool.check()
        assert self.allocator.available_size() + self.cache.evictable_size() == SLOTS
        assert self.cache.protected_size() == 0
        stats = self.pool.stats()
        assert stats["leases"] == stats["stores"] == 0


def make_rig(core: str, ranks: Agreement) -> Rig:
    def buffers() -> list[torch.Tensor]:
        return [torch.zeros(SLOTS + PAGE, HEADS, DIM).bfloat16() for _ in range(LAYERS)]

    kv: Any = SimpleNamespace(k_buffer=buffers(), v_buffer=buffers())
    allocator = PagedTokenToKVPoolAllocator(SLOTS, PAGE, torch.bfloat16, "cpu", kv, False)
    nothing: Any = None
    cache = UnifiedRadixCache(
        CacheInitParams(
            disable=False,
            req_to_token_pool=nothing,
            token_to_kv_pool_allocator=allocator,
            page_size=PAGE,
            tree_components=(ComponentType.FULL,),
            tree_core_backend=core,
        )
    )
    # Keys without write-through: what DRAM holds is the test's business.
    cache.tree_core.enable_external_cache_linker = True
    cache.tree_core.write_through_threshold = 10**6
    cache.linker = SimpleNamespace(pending_offloads=[])
    pool = MemPool(SPACE, arena_bytes=BLOCKS * SPACE.block_bytes, generation="g")
    device = DevicePool(pool.layout, kv.k_buffer, kv.v_buffer)
    copies = CopyThread("test-copy")
    tree = DeviceTree(cache)
    ports = Ports(tree, pool, device, copies, ranks, SchedulerClock(), linked=Linked())
    now = [0.0]
    verbs = PrefixVerbs(ports, clock=lambda: now[0])
    return Rig(cache, allocator, pool, device, copies, verbs, kv, now)


def node_keys(node: Any, page_size: int) -> list[str]:
    parent = node.parent
    seed: bytes | None = namespace_seed(node.key.extra_key, node.key.cache_salt)
    if parent is not None and parent.hash_value:
        seed = bytes.fromhex(parent.hash_value[-1])
    return [key.hex() for key in page_keys(node.key.raw_token_ids(), page_size, seed)]
