"""The linker of ``forgetful``: after each scheduler round it empties HBM of what no request holds,
and DRAM of what nobody has leased, is fetching or waits for."""

from __future__ import annotations

from sglang.srt.mem_cache.base_prefix_cache import EvictParams
from sglang_memserve.errors import OutOfBlocks
from sglang_memserve.mempool import MemPool
from sglang_memserve.plugin.device_tree import DeviceTree
from sglang_memserve.plugin.linker import MemPoolLinker
from sglang_memserve.plugin.swaps import Ports


class ForgetfulLinker(MemPoolLinker):
    _tree: DeviceTree | None = None

    def verb_ports(self, tree: DeviceTree) -> Ports:
        self._tree = tree
        return super().verb_ports(tree)

    def after_round(self, tree_tokens: int) -> None:
        super().after_round(tree_tokens)
        if self._tree is None:
            return
        cache = self._tree._cache
        if unheld := cache.evictable_size():
            cache.evict(EvictParams(num_tokens=unheld))
            forget(self.pool)


def forget(pool: MemPool) -> int:
    """Drop every page that nothing pins; returns how many. What is in nobody's hands makes room
    when all the room is asked for."""
    stats = pool.stats()
    unpinned = int(stats["ready_blocks"] - stats["pinned_blocks"])
    try:
        pool.free_mem(pool.alloc_mem(int(stats["free_blocks"]) + unpinned))
    except OutOfBlocks:
        # Somebody took a block meanwhile: these go after the next round.
        return 0
    return unpinned
