"""The linker alone: a real MemPool, real tensors on the CPU, SGLang's own transfer values."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.mem_cache.hicache_storage import PoolName, PoolTransfer
from sglang.srt.mem_cache.unified_cache.component_type import ComponentType
from sglang_memserve.config import InstanceConfig
from sglang_memserve.errors import ConfigError, CopyStalled
from sglang_memserve.mempool import MemPool
from sglang_memserve.plugin import hooks, linker, linker_hooks
from sglang_memserve.plugin.node import RankNode
from sglang_memserve.plugin.scheduler_clock import SchedulerClock
from sglang_memserve.protocol.events import BlockStored
from sglang_memserve.types import (
    Generation,
    HoldOutcome,
    InstanceId,
    Namespace,
    PageKey,
    Role,
)

LAYERS, PAGE, HEADS, DIM, SLOTS = 3, 4, 2, 8, 64
BLOCKS = 8
SPACE = Namespace("m", "1", "bfloat16", PAGE, LAYERS, HEADS, DIM, DIM, 0, 1)
LIMIT_S = 10.0


@dataclass
class Rig:
    linker: linker.MemPoolLinker
    pool: MemPool
    kv: Any
    clock: list[float]

    def settle(self, offloads: int = 1) -> list[bool]:
        deadline = time.monotonic() + LIMIT_S
        while self.linker.num_completed_offloads() < offloads:
            assert time.monotonic() < deadline, "the offload did not complete"
            time.sleep(0.001)
        return [self.linker.pop_completed_offload() for _ in range(offloads)]

    def store(
        self, names: list[str], pages: list[int], parent: str | None = None, whole: bool = True
    ) -> None:
        self.linker.set_offload_parent(None if parent is None else key(parent))
        assert self.linker.offload([transfer(names, pages)])
        assert self.settle() == [whole]


class Agent:
    """No network in this test."""

    def close(self) -> None:
        pass


def key(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def transfer(names: list[str], pages: list[int] | None = None) -> PoolTransfer:
    slots = None
    if pages is not None:
        slots = torch.tensor([page * PAGE + i for page in pages for i in range(PAGE)])
    return PoolTransfer(name=PoolName.KV, keys=[key(n) for n in names], device_indices=slots)


def make_kv() -> Any:
    def tensors() -> list[torch.Tensor]:
        return [torch.randn(SLOTS, HEADS, DIM).bfloat16() for _ in range(LAYERS)]

    return SimpleNamespace(k_buffer=tensors(), v_buffer=tensors())


@pytest.fixture
def make_linker(monkeypatch: pytest.MonkeyPatch) -> Callable[..., linker.MemPoolLinker]:
    def make(kv: Any, components: set[ComponentType]) -> linker.MemPoolLinker:
        allocator = SimpleNamespace(get_kvcache=lambda: kv)
        params: Any = SimpleNamespace(
            token_to_kv_pool_allocator=allocator,
            page_size=PAGE,
            tp_cache_group=None,
            attn_cp_cache_group=None,
            attn_tp_cache_group=None,
        )
        config = InstanceConfig(
            Role.BOTH, InstanceId("http://h:1"), Generation("g"), "127.0.0.1", "/nowhere", 1
        )
        server_args: Any = SimpleNamespace()
        return linker.MemPoolLinker(
            server_args, params, components=components, extra_config=config.to_json()
        )

    # These patch SGLang for the whole process, and other tests compare with the original.
    monkeypatch.setattr(hooks, "page_hash", lambda: None)
    monkeypatch.setattr(linker_hooks, "register", lambda: None)
    return make


@pytest.fixture
def rig(
    monkeypatch: pytest.MonkeyPatch, make_linker: Callable[..., linker.MemPoolLinker]
) -> Iterator[Rig]:
    clock = [0.0]
    pool = MemPool(
        SPACE,
        arena_bytes=BLOCKS * SPACE.block_bytes,
        generation="g",
        clock=lambda: clock[0],
    )
    agent: Any = Agent()
    node = RankNode(pool, agent)
    monkeypatch.setattr(linker, "describe_device_pool", lambda *_: SPACE)
    monkeypatch.setattr(RankNode, "start", lambda *_: node)
    kv = make_kv()
    made = make_linker(kv, {ComponentType.FULL})
    yield Rig(made, pool, kv, clock)
    pool.check()
    made.close()


def rows(kv: Any, pages: list[int]) -> torch.Tensor:
    slots = [page * PAGE + i for page in pages for i in range(PAGE)]
    return torch.stack([buffer[slots] for buffer in (*kv.k_buffer, *kv.v_buffer)])


def test_pages_come_back_as_they_went(rig: Rig) -> None:
    rig.store(["a", "b", "c"], [3, 7, 5])
    before = rows(rig.kv, [3, 7, 5])
    assert rig.linker.lookup("r", [transfer(["a", "b", "c", "d"])]) == [1, 2, 3]
    assert rig.linker.load("r", [transfer(["a", "b", "c"], [10, 2, 12])])
    index = rig.linker.start_layer_wise_loading()
    counter = rig.linker.layer_done_counter
    counter.set_consumer(index)
    for layer in range(LAYERS):
        counter.wait_until(layer)
    assert rig.linker.finish_layer_wise_loading(index)
    assert torch.equal(rows(rig.kv, [10, 2, 12]), before)
    deadline = time.monotonic() + LIMIT_S
    while rig.pool.stats()["leases"] and time.monotonic() < deadline:
        time.sleep(0.001)
    assert rig.pool.stats()["leases"] == 0, "the load kept its pins"


def test_a_shorter_load_than_was_claimed(rig: Rig) -> None:
    """Ranks agree on the least: SGLang may load fewer pages than this rank offered."""
    rig.store(["a", "b", "c"], [1, 2, 3])
    rig.linker.lookup("r", [transfer(["a", "b", "c"])])
    assert rig.linker.load("r", [transfer(["a"], [9])])
    index = rig.linker.start_layer_wise_loading()
    assert rig.linker.finish_layer_wise_loading(index)
    assert torch.equal(rows(rig.kv, [9]), rows(rig.kv, [1]))


def test_what_is_claimed_stays(rig: Rig) -> None:
    rig.store([f"a{i}" for i in range(4)], [1, 2, 3, 4])
    rig.linker.lookup("r", [transfer([f"a{i}" for i in range(4)])])
    rig.store([f"b{i}" for i in range(8)], list(range(8)), whole=False)
    assert len(rig.linker.lookup("r", [transfer([f"a{i}" for i in range(4)])])) == 4
    rig.linker.release_request("r")
    rig.store([f"c{i}" for i in range(8)], list(range(8)))
    assert rig.linker.lookup("r", [transfer(["a0"])]) == []


def test_pin_that_ended_declines_the_load(rig: Rig) -> None:
    rig.store(["a"], [1])
    rig.linker.lookup("r", [transfer(["a"])])
    rig.clock[0] += linker.PIN_TTL_S + 1
    assert not rig.linker.load("r", [transfer(["a"], [9])])
    assert not rig.linker.load("never looked up", [transfer(["a"], [9])])
    assert rig.linker.start_layer_wise_loading() == -1


def test_load_that_another_rank_declines_is_declined(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both ways round: a rank that can load follows one that cannot, and votes either way."""
    votes: list[bool] = []

    def others_cannot(vote: bool) -> bool:
        votes.append(vote)
        return False

    rig.store(["a"], [1])
    monkeypatch.setattr(rig.linker.ranks, "unanimous", others_cannot)
    rig.linker.lookup("r", [transfer(["a"])])
    assert not rig.linker.load("r", [transfer(["a"], [9])])
    assert not rig.linker.load("lost its pin", [transfer(["a"], [9])])
    assert votes == [True, False]
    assert rig.linker.start_layer_wise_loading() == -1
    assert rig.pool.stats()["leases"] == 0


def test_pins_of_vanished_requests_are_forgotten(rig: Rig) -> None:
    rig.store(["a"], [1])
    for index in range(50):
        rig.linker.lookup(f"gone {index}", [transfer(["a"])])
    rig.clock[0] += linker.PIN_TTL_S + 1
    rig.linker.lookup("r", [transfer(["a"])])
    assert list(rig.linker._pins) == ["r"]


def test_a_look_up_ends_the_hold_of_its_own_fetch(rig: Rig) -> None:
    rig.store(["a", "b", "c"], [3, 7, 5])
    for names in (["a", "b"], ["a", "b", "c"]):
        hold = rig.pool.prepare_hold([PageKey(bytes.fromhex(key(name))) for name in names])
        assert hold.complete(100.0) is HoldOutcome.HELD
    # It waits for its turn: looked up again and again, it takes no other's.
    for _ in range(3):
        assert rig.linker.lookup("r", [transfer(["a", "b", "c"])]) == [1, 2, 3]
        stats = rig.pool.stats()
        assert (stats["holds"], stats["held_blocks"], stats["pinned_blocks"]) == (1, 2, 3)
    # What was in HBM already is not among the keys.
    assert rig.linker.lookup("s", [transfer(["b"])]) == [1]
    rig.linker.release_request("r")
    rig.linker.release_request("s")
    stats = rig.pool.stats()
    assert (stats["holds"], stats["pinned_blocks"], stats["holds_claimed_total"]) == (0, 0, 2)


def test_a_flush_ends_holds(rig: Rig) -> None:
    rig.store(["a", "b"], [3, 7])
    assert rig.pool.prepare_hold([PageKey(bytes.fromhex(key("a")))]).complete(9.0)
    rig.linker.reset()
    stats = rig.pool.stats()
    assert (stats["holds"], stats["holds_ended_total"], stats["free_blocks"]) == (0, 1, BLOCKS)


def test_cancelled_load_gives_its_pins_back(rig: Rig) -> None:
    rig.store(["a"], [1])
    rig.linker.lookup("r", [transfer(["a"])])
    assert rig.linker.load("r", [transfer(["a"], [9])])
    assert rig.linker.cancel_queued_load("r")
    assert not rig.linker.cancel_queued_load("r")
    assert rig.pool.stats()["leases"] == 0
    assert rig.linker.start_layer_wise_loading() == -1


def test_offload_names_the_parent(rig: Rig) -> None:
    rig.store(["a", "b"], [1, 2])
    rig.store(["c"], [3], parent="b")
    stored = [e for e in rig.pool.snapshot().events if isinstance(e, BlockStored)]
    chain = [h for event in stored for h in event.block_hashes]
    expected = [int.from_bytes(bytes.fromhex(key(n))[:8], "big", signed=True) for n in "abc"]
    assert chain == expected and stored[0].parent_block_hash is None


def test_known_pages_are_not_copied_again(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    rig.store(["a", "b"], [1, 2])
    monkeypatch.setattr(rig.linker.device, "gather", lambda *_: pytest.fail("copied again"))
    rig.store(["a", "b"], [5, 6])


def test_full_pool_stores_what_fits(rig: Rig) -> None:
    """More pages than blocks: the rest is left out, and SGLang hears that it may offer it again."""
    names = [f"p{i}" for i in range(12)]
    assert rig.linker.offload([transfer(names, list(range(12)))])
    assert rig.settle() == [False]
    assert len(rig.linker.lookup("r", [transfer(names)])) == BLOCKS
    assert rig.linker.offload([transfer(names[:BLOCKS], list(range(BLOCKS)))])
    assert rig.settle() == [True]


def test_failed_store_publishes_nothing(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(rig.linker.device, "gather", broken)
    assert rig.linker.offload([transfer(["a"], [1])])
    assert rig.settle() == [False]
    assert rig.linker.lookup("r", [transfer(["a"])]) == []
    assert rig.pool.stats()["free_blocks"] == BLOCKS


def test_failed_load_is_reported_and_unpinned(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("the device is gone")

    rig.store(["a"], [1])
    rig.linker.lookup("r", [transfer(["a"])])
    monkeypatch.setattr(rig.linker.device, "begin_scatter", broken)
    assert rig.linker.load("r", [transfer(["a"], [9])])
    index = rig.linker.start_layer_wise_loading()
    assert not rig.linker.finish_layer_wise_loading(index)


class AsyncLoad:
    """A load that only starts in ``layer``, as on an accelerator."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self.log: list[tuple[str, int]] = []
        self.stalled = False

    def layer(self, layer: int) -> None:
        self.log.append(("start", layer))

    def admit(self, layer: int) -> None:
        self.log.append(("admit", layer))

    def finish(self) -> None:
        if self.stalled:
            raise CopyStalled("the device did not finish")
        for layer in range(LAYERS):
            self._inner.layer(layer)
        self.log.append(("finish", LAYERS))


def start_async_load(rig: Rig, monkeypatch: pytest.MonkeyPatch, *, stalls: bool) -> AsyncLoad:
    rig.store(["a"], [1])
    made: list[AsyncLoad] = []
    begin = rig.linker.device.begin_scatter

    def begin_async(*arguments: Any) -> AsyncLoad:
        made.append(AsyncLoad(begin(*arguments)))
        made[0].stalled = stalls
        return made[0]

    monkeypatch.setattr(rig.linker.device, "begin_scatter", begin_async)
    assert rig.linker.lookup("r", [transfer(["a"])]) == [1]
    assert rig.linker.load("r", [transfer(["a"], [9])])
    index = rig.linker.start_layer_wise_loading()
    rig.linker.layer_done_counter.set_consumer(index)
    for layer in range(LAYERS):
        rig.linker.layer_done_counter.wait_until(layer)
    assert rig.linker.finish_layer_wise_loading(index) is not stalls
    assert rig.pool.stats()["leases"] == 0
    return made[0]


def test_forward_waits_on_its_stream_for_layers_under_way(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = rows(rig.kv, [1])
    load = start_async_load(rig, monkeypatch, stalls=False)
    assert [entry for entry in load.log if entry[0] == "admit"] == [
        ("admit", layer) for layer in range(LAYERS)
    ]
    for layer in range(LAYERS):
        assert load.log.index(("start", layer)) < load.log.index(("admit", layer))
    assert ("finish", LAYERS) in load.log
    assert torch.equal(rows(rig.kv, [9]), before)


def test_a_load_that_stalls_on_the_device_has_not_landed(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    start_async_load(rig, monkeypatch, stalls=True)


def test_reset_drops_every_page(rig: Rig) -> None:
    rig.store(["a", "b"], [1, 2])
    rig.linker.lookup("r", [transfer(["a"])])
    rig.linker.offload([transfer(["c"], [3])])
    rig.linker.reset()
    assert rig.linker.lookup("r", [transfer(["a"])]) == []
    assert rig.linker.num_completed_offloads() == 0
    assert rig.pool.stats()["free_blocks"] == BLOCKS


def test_other_attention_is_refused(
    make_linker: Callable[..., linker.MemPoolLinker],
) -> None:
    with pytest.raises(ConfigError, match="SWA"):
        make_linker(make_kv(), {ComponentType.FULL, ComponentType.SWA})


def test_hooks_pass_on_the_two_facts() -> None:
    told: list[object] = []
    clock = SchedulerClock()
    ours: Any = SimpleNamespace(
        set_offload_parent=told.append, release_request=told.append, clock=clock
    )
    paths = {5: [SimpleNamespace(node_id=4), SimpleNamespace(node_id=5)], 4: [SimpleNamespace()]}
    cache = SimpleNamespace(
        tree_core=SimpleNamespace(collect_path_info=lambda nodes: [paths[n] for n in nodes]),
        get_last_hash_value={4: "y"}.get,
    )
    wrapper = SimpleNamespace(cache_linker=ours, cache=cache)
    linker_hooks._before_offload_node(wrapper, 5, [])
    linker_hooks._before_offload_node(wrapper, 4, [])
    linker_hooks._before_release_request(wrapper, "rid")
    assert told == ["y", None, "rid"]
    assert clock.stats()["scheduler_calls_total"] == 3
    foreign = SimpleNamespace(cache_linker=SimpleNamespace(), cache=cache)
    linker_hooks._before_offload_node(foreign, 5, [])
    linker_hooks._before_release_request(foreign, "rid")


class Gate:
    """Holds the copy of whoever passes it until it is opened."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self.opened = threading.Event()

    def __call__(self, *_: object) -> None:
        self.reached.set()
        assert self.opened.wait(LIMIT_S)


def test_offloads_complete_in_the_order_they_were_asked_for(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SGLang unlocks its oldest pending node for each completion: an offload that has nothing to
    copy must not free the pages of one that is still being copied."""
    rig.store(["known"], [1])
    gate = Gate()
    monkeypatch.setattr(rig.linker.device, "gather", gate)
    assert rig.linker.offload([transfer(["slow"], [2])])
    assert gate.reached.wait(LIMIT_S)
    assert rig.linker.offload([transfer(["known"], [3])])
    assert rig.linker.num_completed_offloads() == 0
    gate.opened.set()
    assert rig.settle(2) == [True, True]


def test_store_that_waited_too_long_is_given_up(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linker, "STORE_LIMIT_S", 0.0)
    assert rig.linker.offload([transfer(["late"], [2])])
    assert rig.settle() == [False]
    assert rig.pool.stats()["free_blocks"] == BLOCKS


def test_load_that_does_not_come_is_called_off(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    rig.store(["a"], [1])
    rig.linker.layer_done_counter._limit_s = 0.05
    gate = Gate()
    monkeypatch.setattr(rig.linker.device, "wait", gate)
    rig.linker.lookup("r", [transfer(["a"])])
    before = rows(rig.kv, [9])
    assert rig.linker.load("r", [transfer(["a"], [9])])
    index = rig.linker.start_layer_wise_loading()
    counter = rig.linker.layer_done_counter
    counter.set_consumer(index)
    for layer in range(LAYERS):
        counter.wait_until(layer)
    gate.opened.set()
    assert not rig.linker.finish_layer_wise_loading(index)
    assert torch.equal(rows(rig.kv, [9]), before), "it was written after it was called off"
    assert rig.linker.clock.stats()["scheduler_wait_seconds_total"] > 0
    assert rig.pool.stats()["leases"] == 0


def test_load_that_does_not_even_stop_is_an_error(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its slots may still be written: nobody can use them or give them back."""
    rig.store(["a"], [1])
    rig.linker.layer_done_counter._limit_s = 0.02
    rig.linker.layer_done_counter._grace_s = 0.02
    gate = Gate()
    monkeypatch.setattr(rig.linker.device, "wait", gate)
    rig.linker.lookup("r", [transfer(["a"])])
    assert rig.linker.load("r", [transfer(["a"], [9])])
    index = rig.linker.start_layer_wise_loading()
    with pytest.raises(CopyStalled, match="did not stop"):
        rig.linker.finish_layer_wise_loading(index)
    gate.opened.set()
