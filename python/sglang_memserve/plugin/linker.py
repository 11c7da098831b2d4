"""Joins a rank's MemPool to SGLang's device pool: SGLang's ``UnifiedCacheLinker`` over our blocks.

One object lives in each scheduler process. The scheduler thread calls every method; none of them
copies a page or waits for the network:

``lookup``   answers from the local index and pins what it claims under the request's id, which
             ends the hold of the fetch that was made for the request
``load``     hands the pinned blocks to the load thread, which scatters them layer by layer while
             the forward runs; ``layer_done_counter`` gates each layer
``offload``  reserves blocks (evicting if need be) and hands them to the copy thread, which gathers
             the device pages and publishes them

The pins of ``lookup`` end when the load is done, when the request is aborted (see ``linker_hooks``)
or after ``PIN_TTL_S``. A pin that ended makes ``load`` decline on every rank, and SGLang computes
the prefix.

SGLang matches completed offloads with its own list by order alone: they are reported in the order
in which they were asked for, whichever ends first.
"""

from __future__ import annotations

import itertools
import logging
import queue
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.mem_cache.hicache_storage import PoolName, PoolTransfer
from sglang.srt.mem_cache.unified_cache.component_type import ComponentType
from sglang.srt.mem_cache.unified_cache.unified_cache_linker import UnifiedCacheLinker

from ..config import InstanceConfig
from ..errors import ConfigError, LimitExceeded
from ..memory.swap import DevicePool
from ..mempool import MemPool
from ..types import BlockId, PageKey
from . import hooks, linker_hooks, scheduler_hooks
from .agreement import Agreement
from .copies import Copy, CopyThread, StoreJob
from .device_tree import DeviceTree
from .device_watch import DeviceWatch
from .load_counter import BoundedLoadCounter
from .node import RankNode, describe_device_pool
from .scheduler_clock import SchedulerClock
from .swaps import Ports

if TYPE_CHECKING:
    from sglang.srt.mem_cache.cache_init_params import CacheInitParams
    from sglang.srt.server_args import ServerArgs

    from ..mempool import PoolLease

log = logging.getLogger(__name__)

# A waiting request is looked up again at every scheduling round, which renews its pin; this bounds
# only pins of requests that vanished without a word.
PIN_TTL_S = 300.0
CLOSE_TIMEOUT_S = 10.0
# A whole arena moves in less; what takes longer does not come, and its requests end with an error.
LOAD_LIMIT_S = 60.0
LOAD_GRACE_S = 10.0
STORE_LIMIT_S = 60.0


@dataclass(slots=True)
class _Pin:
    keys: list[PageKey]
    lease: PoolLease


@dataclass(slots=True)
class _Load:
    rid: str
    pages: torch.Tensor
    blocks: list[BlockId]
    lease: PoolLease


@dataclass(slots=True)
class _LoadBatch:
    counter_index: int
    loads: list[_Load]
    ready: list[Any]


class MemPoolLinker(UnifiedCacheLinker):
    """See the module. Constructed by SGLang's linker factory (``dynamic`` backend)."""

    def __init__(
        self,
        server_args: ServerArgs,
        params: CacheInitParams,
        *,
        components: set[ComponentType],
        extra_config: dict[str, Any] | None = None,
        forward_stream: Any = None,
    ) -> None:
        hooks.page_hash()
        linker_hooks.register()
        scheduler_hooks.register()
        if components != {ComponentType.FULL}:
            names = ", ".join(sorted(component.name for component in components))
            raise ConfigError(
                f"MemPool serves models with full attention only, this one has: {names}"
            )
        config = InstanceConfig.from_json(extra_config or {})
        kv_pool = params.token_to_kv_pool_allocator.get_kvcache()
        namespace = describe_device_pool(server_args, kv_pool, params.page_size)
        self.forward_stream = forward_stream
        self.pools = {PoolName.KV: kv_pool}
        self.clock = SchedulerClock()
        self.layer_done_counter = BoundedLoadCounter(
            namespace.num_layers, self.clock, limit_s=LOAD_LIMIT_S, grace_s=LOAD_GRACE_S
        )
        self._page_size = params.page_size
        self.ranks = Agreement.of(params)
        self._node = RankNode.start(config, namespace, self._stats)
        self.pool: MemPool = self._node.pool
        self.watch = DeviceWatch(self.pool, params.page_size)
        self.device = DevicePool(self.pool.layout, kv_pool.k_buffer, kv_pool.v_buffer)
        self.pool.pin_with(self.device)
        self._pins: dict[str, _Pin] = {}
        self._queued_loads: dict[str, _Load] = {}
        self._offload_parent: PageKey | None = None
        self._offloads: deque[Copy] = deque()
        self._load_queue: queue.SimpleQueue[_LoadBatch | None] = queue.SimpleQueue()
        self._loader = threading.Thread(target=self._run_loads, name="memserve-load", daemon=True)
        self._loader.start()
        self.copies = CopyThread("memserve-copy")

    # -- restore: MemPool -> device slots --

    def lookup(self, rid: str, transfers: list[PoolTransfer]) -> list[int]:
        """Every restorable prefix length in pages: all of 1..n, as full attention has no holes."""
        with self.clock.working():
            return list(range(1, self._claim(rid, transfers[0]) + 1))

    def _claim(self, rid: str, transfer: PoolTransfer) -> int:
        keys = _page_keys(transfer)
        pin = self._pins.pop(rid, None)
        if pin is not None:
            pin.lease.release()
        try:
            lease = self.pool.acquire(keys, owner=rid, ttl_s=PIN_TTL_S)
        except LimitExceeded:
            return 0
        if pin is None:
            # Once a request: a later look-up would take the hold of one that shares its prefix.
            self.pool.claim_hold(keys)
        pages = len(lease.blocks)
        if pages == 0:
            lease.release()
            return 0
        self._forget_ended_pins()
        self._pins[rid] = _Pin(keys[:pages], lease)
        return pages

    def load(self, rid: str, transfers: list[PoolTransfer]) -> bool:
        with self.clock.working():
            return self._queue_load(rid, transfers[0])

    def _queue_load(self, rid: str, transfer: PoolTransfer) -> bool:
        keys = _page_keys(transfer)
        pin = self._pins.pop(rid, None)
        ours = pin is not None and pin.lease.valid() and pin.keys[: len(keys)] == keys
        all_can = self.ranks.unanimous(ours)
        if pin is None:
            return False
        if not all_can:
            pin.lease.release()
            return False
        pages = self._pages_of(transfer)
        self._queued_loads[rid] = _Load(rid, pages, list(pin.lease.blocks[: len(keys)]), pin.lease)
        return True

    def cancel_queued_load(self, rid: str) -> bool:
        load = self._queued_loads.pop(rid, None)
        if load is None:
            return False
        load.lease.release()
        return True

    def release_request(self, rid: str) -> None:
        """The request is gone: end the pin its lookup left (called by ``linker_hooks``)."""
        pin = self._pins.pop(rid, None)
        if pin is not None:
            pin.lease.release()

    def _forget_ended_pins(self) -> None:
        """Pins of requests that vanished without a word: the oldest are in front."""
        while self._pins:
            rid, pin = next(iter(self._pins.items()))
            if pin.lease.valid():
                return
            del self._pins[rid]

    def start_layer_wise_loading(self) -> int:
        if not self._queued_loads:
            return -1
        loads = list(self._queued_loads.values())
        self._queued_loads.clear()
        index = self.layer_done_counter.update_producer()
        self._load_queue.put(_LoadBatch(index, loads, self.device_events()))
        return index

    def finish_layer_wise_loading(self, counter_index: int) -> bool:
        return self.layer_done_counter.finish(counter_index)

    def _run_loads(self) -> None:
        torch.set_num_threads(1)
        while (batch := self._load_queue.get()) is not None:
            try:
                self._load_batch(batch)
            except Exception as error:
                log.exception("loading %d requests from MemPool failed", len(batch.loads))
                self.layer_done_counter.fail(batch.counter_index, error)
            finally:
                for load in batch.loads:
                    load.lease.release()
                self.layer_done_counter.end(batch.counter_index)

    def _load_batch(self, batch: _LoadBatch) -> None:
        blocks = [block for load in batch.loads for block in load.blocks]
        pages = torch.cat([load.pages for load in batch.loads])
        self.device.wait(batch.ready)
        transfer = self.device.begin_scatter(self.pool.arena, blocks, pages)
        self.layer_done_counter.begin(batch.counter_index, transfer)
        try:
            for layer in range(self.device.num_layers):
                if self.layer_done_counter.called_off(batch.counter_index):
                    return
                transfer.layer(layer)
                self.layer_done_counter.complete(batch.counter_index, layer)
        finally:
            # The blocks are let go of next.
            transfer.finish()

    # -- write-through: device pages -> MemPool --

    def set_offload_parent(self, parent: str | None) -> None:
        """Key of the page before the next ``offload``'s first (called by ``linker_hooks``)."""
        self._offload_parent = None if parent is None else PageKey(bytes.fromhex(parent))

    def offload(self, transfers: list[PoolTransfer], session_id: str | None = None) -> bool:
        with self.clock.working():
            self._offload(transfers[0])
        return True

    def _offload(self, transfer: PoolTransfer) -> None:
        parent, self._offload_parent = self._offload_parent, None
        keys = _page_keys(transfer)
        self.watch.joined(keys, parent)
        store = self.pool.prepare_store(keys, parent=parent)
        if not store.missing:
            # Everything is there already, or no block can be had: nothing to copy.
            store.commit()
            held = self.pool.readable_pages(keys) == len(keys)
            self._offloads.append(Copy.nothing(landed=held))
            return
        pages = self._pages_of(transfer)
        wanted = torch.tensor([index for index, _ in store.missing], dtype=torch.int64)
        job = StoreJob(self.pool, self.device, keys, store, pages[wanted], self.device_events())
        self._offloads.append(self.copies.submit(job, STORE_LIMIT_S))

    def num_completed_offloads(self) -> int:
        return sum(1 for _ in itertools.takewhile(lambda copy: copy.done, self._offloads))

    def pop_completed_offload(self) -> bool:
        return self._offloads.popleft().landed

    # -- lifecycle --

    def reset(self) -> None:
        """SGLang flushed its cache: wait for copies under way, then drop every page."""
        if not self.copies.drain(CLOSE_TIMEOUT_S):
            log.error("stores did not drain within %.0f s", CLOSE_TIMEOUT_S)
        for rid in list(self._queued_loads):
            self.cancel_queued_load(rid)
        for rid in list(self._pins):
            self.release_request(rid)
        self._offloads.clear()
        self.layer_done_counter.reset()
        self.watch.reset()
        self.pool.clear()

    def close(self) -> None:
        self._load_queue.put(None)
        self._loader.join(CLOSE_TIMEOUT_S)
        self.copies.close(CLOSE_TIMEOUT_S)
        self.device.close()
        self._node.close()

    # -- for the hooks on SGLang's tree --

    def before_eviction(self, keys: Sequence[str]) -> None:
        """A node of SGLang's tree is evicted, with these pages (called by ``linker_hooks``)."""
        with self.clock.working():
            self.watch.leaves(keys)

    def after_round(self, tree_tokens: int) -> None:
        with self.clock.working():
            self.watch.settle(tree_tokens)

    # -- for the device verbs --

    def verb_ports(self, tree: DeviceTree) -> Ports:
        return Ports(tree, self.pool, self.device, self.copies, self.ranks, self.clock, linked=self)

    # -- helpers --

    def _stats(self) -> dict[str, float]:
        return {**self.clock.stats(), **self.watch.stats()}

    def _pages_of(self, transfer: PoolTransfer) -> torch.Tensor:
        assert transfer.device_indices is not None
        return self.page_ids(transfer.device_indices)

    def page_ids(self, slots: torch.Tensor) -> torch.Tensor:
        """Page numbers of whole pages' token slots, on the CPU: int64 ``[pages]``."""
        return (slots[:: self._page_size] // self._page_size).cpu()

    def device_events(self) -> list[Any]:
        """What a copy must wait for before it touches device pages; nothing on a CPU, where the
        forward has run by the time the scheduler thread gets here."""
        return self.record_offload_ready() if self.device.is_accelerator else []


def _page_keys(transfer: PoolTransfer) -> list[PageKey]:
    return [PageKey(bytes.fromhex(key)) for key in transfer.keys or ()]
