"""Joins a rank's MemPool to SGLang's device pool: SGLang's ``UnifiedCacheLinker`` over our blocks.

One object lives in each scheduler process. The scheduler thread calls every method; none of them
copies a page or waits for the network:

``lookup``   answers from the local index and pins what it claims under the request's id
``load``     hands the pinned blocks to the load thread, which scatters them layer by layer while
             the forward runs; ``layer_done_counter`` gates each layer
``offload``  reserves blocks (evicting if need be) and hands them to the store thread, which gathers
             the device pages and publishes them

The pins of ``lookup`` end when the load is done, when the request is aborted (see ``linker_hooks``)
or after ``PIN_TTL_S``. A pin that ended makes ``load`` decline on every rank, and SGLang computes
the prefix.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.mem_cache.hicache_storage import PoolName, PoolTransfer
from sglang.srt.mem_cache.unified_cache.component_type import ComponentType
from sglang.srt.mem_cache.unified_cache.unified_cache_linker import (
    LayerWiseLoadCounter,
    UnifiedCacheLinker,
)

from ..config import InstanceConfig
from ..errors import ConfigError, LimitExceeded
from ..memory.swap import DevicePool
from ..mempool import MemPool
from ..types import BlockId, PageKey
from . import hooks, linker_hooks
from .agreement import Agreement
from .node import RankNode, describe_device_pool

if TYPE_CHECKING:
    from sglang.srt.mem_cache.cache_init_params import CacheInitParams
    from sglang.srt.server_args import ServerArgs

    from ..mempool import PoolLease, PoolStore

log = logging.getLogger(__name__)

# A waiting request is looked up again at every scheduling round, which renews its pin; this bounds
# only pins of requests that vanished without a word.
PIN_TTL_S = 300.0
CLOSE_TIMEOUT_S = 10.0


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


@dataclass(slots=True)
class _Offload:
    keys: list[PageKey]
    store: PoolStore
    pages: torch.Tensor
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
        self.layer_done_counter = LayerWiseLoadCounter(namespace.num_layers)
        self._page_size = params.page_size
        self._ranks = Agreement.of(params)
        self._node = RankNode.start(config, namespace)
        self._pool: MemPool = self._node.pool
        self._device = DevicePool(self._pool.layout, kv_pool.k_buffer, kv_pool.v_buffer)
        self._pins: dict[str, _Pin] = {}
        self._queued_loads: dict[str, _Load] = {}
        self._offload_parent: PageKey | None = None
        self._completed: deque[bool] = deque()
        self._load_queue: queue.SimpleQueue[_LoadBatch | None] = queue.SimpleQueue()
        self._store_queue: queue.SimpleQueue[_Offload | threading.Event | None] = (
            queue.SimpleQueue()
        )
        self._threads = [
            threading.Thread(target=self._run_loads, name="memserve-load", daemon=True),
            threading.Thread(target=self._run_stores, name="memserve-store", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    # -- restore: MemPool -> device slots --

    def lookup(self, rid: str, transfers: list[PoolTransfer]) -> list[int]:
        """Every restorable prefix length in pages: all of 1..n, as full attention has no holes."""
        keys = _page_keys(transfers[0])
        pin = self._pins.pop(rid, None)
        if pin is not None:
            pin.lease.release()
        try:
            lease = self._pool.acquire(keys, owner=rid, ttl_s=PIN_TTL_S)
        except LimitExceeded:
            return []
        pages = len(lease.blocks)
        if pages == 0:
            lease.release()
            return []
        self._forget_ended_pins()
        self._pins[rid] = _Pin(keys[:pages], lease)
        return list(range(1, pages + 1))

    def load(self, rid: str, transfers: list[PoolTransfer]) -> bool:
        transfer = transfers[0]
        keys = _page_keys(transfer)
        pin = self._pins.pop(rid, None)
        ours = pin is not None and pin.lease.valid() and pin.keys[: len(keys)] == keys
        all_can = self._ranks.unanimous(ours)
        if pin is None:
            return False
        if not all_can:
            pin.lease.release()
            return False
        pages = self._page_ids(transfer)
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
        self._load_queue.put(_LoadBatch(index, loads, self._device_events()))
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

    def _load_batch(self, batch: _LoadBatch) -> None:
        blocks = [block for load in batch.loads for block in load.blocks]
        pages = torch.cat([load.pages for load in batch.loads])
        self._device.wait(batch.ready)
        transfer = self._device.begin_scatter(self._pool.arena, blocks, pages)
        for layer in range(self._device.num_layers):
            transfer.layer(layer)
            self.layer_done_counter.complete(batch.counter_index, layer)

    # -- write-through: device pages -> MemPool --

    def set_offload_parent(self, parent: str | None) -> None:
        """Key of the page before the next ``offload``'s first (called by ``linker_hooks``)."""
        self._offload_parent = None if parent is None else PageKey(bytes.fromhex(parent))

    def offload(self, transfers: list[PoolTransfer], session_id: str | None = None) -> bool:
        transfer = transfers[0]
        parent, self._offload_parent = self._offload_parent, None
        keys = _page_keys(transfer)
        store = self._pool.prepare_store(keys, parent=parent)
        if not store.missing:
            # Everything is there already, or no block can be had: nothing to copy.
            store.commit()
            self._completed.append(self._holds(keys))
            return True
        pages = self._page_ids(transfer)
        wanted = torch.tensor([index for index, _ in store.missing], dtype=torch.int64)
        self._store_queue.put(_Offload(keys, store, pages[wanted], self._device_events()))
        return True

    def _holds(self, keys: list[PageKey]) -> bool:
        """Whether SGLang may call these pages stored; else it offers them again when next used."""
        return self._pool.readable_pages(keys) == len(keys)

    def num_completed_offloads(self) -> int:
        return len(self._completed)

    def pop_completed_offload(self) -> bool:
        return self._completed.popleft()

    def _run_stores(self) -> None:
        torch.set_num_threads(1)
        while (item := self._store_queue.get()) is not None:
            if isinstance(item, threading.Event):
                item.set()
                continue
            landed = False
            try:
                self._device.wait(item.ready)
                blocks = [block for _, block in item.store.missing]
                self._device.gather(self._pool.arena, blocks, item.pages)
                item.store.commit()
                landed = self._holds(item.keys)
            except Exception:
                log.exception("storing %d pages in MemPool failed", len(item.pages))
                item.store.abort()
            self._completed.append(landed)

    # -- lifecycle --

    def reset(self) -> None:
        """SGLang flushed its cache: wait for copies under way, then drop every page."""
        drained = threading.Event()
        self._store_queue.put(drained)
        if not drained.wait(CLOSE_TIMEOUT_S):
            log.error("stores did not drain within %.0f s", CLOSE_TIMEOUT_S)
        for rid in list(self._queued_loads):
            self.cancel_queued_load(rid)
        for rid in list(self._pins):
            self.release_request(rid)
        self._completed.clear()
        self.layer_done_counter.reset()
        self._pool.clear()

    def close(self) -> None:
        self._load_queue.put(None)
        self._store_queue.put(None)
        for thread in self._threads:
            thread.join(CLOSE_TIMEOUT_S)
        self._node.close()

    # -- helpers --

    def _page_ids(self, transfer: PoolTransfer) -> torch.Tensor:
        """Page numbers of a transfer's token slots, on the CPU: int64 ``[pages]``."""
        slots = transfer.device_indices
        assert slots is not None
        return (slots[:: self._page_size] // self._page_size).cpu()

    def _device_events(self) -> list[Any]:
        """What a copy must wait for before it touches device pages; nothing on a CPU, where the
        forward has run by the time the scheduler thread gets here."""
        return self.record_offload_ready() if self._device.is_accelerator else []


def _page_keys(transfer: PoolTransfer) -> list[PageKey]:
    return [PageKey(bytes.fromhex(key)) for key in transfer.keys or ()]
