"""What the linker needs to know that SGLang's linker interface does not pass on.

    UnifiedCacheLinkerWrapper._offload_node     before: the key above the node's first page
    UnifiedCacheLinkerWrapper.release_request   before: a request that will not load
    UnifiedRadixCache._evict_device_leaf        before: the pages that leave the device tree

None changes what SGLang does, and all leave foreign linkers alone.
"""

from __future__ import annotations

from typing import Any

from sglang.srt.plugins.hook_registry import HookRegistry, HookType

_WRAPPER = "sglang.srt.mem_cache.unified_cache.unified_cache_linker.UnifiedCacheLinkerWrapper"

_CACHE = "sglang.srt.mem_cache.unified_radix_cache.UnifiedRadixCache"


def register() -> None:
    """Called where a linker is built. Safe to call twice."""
    for target, hook, kind in (
        (f"{_WRAPPER}._offload_node", _before_offload_node, HookType.BEFORE),
        (f"{_WRAPPER}.release_request", _before_release_request, HookType.BEFORE),
        (f"{_CACHE}._evict_device_leaf", _before_evict_leaf, HookType.BEFORE),
    ):
        if not any(known is hook for _, known, _ in HookRegistry._hooks.get(target, [])):
            HookRegistry.register(target, hook, kind)
    HookRegistry.apply_hooks()


def _before_offload_node(wrapper: Any, node_id: int, transfers: list[Any]) -> None:
    """The key before the node's first page: eviction leaf first and events need the chain."""
    linker = wrapper.cache_linker
    if not hasattr(linker, "set_offload_parent"):
        return
    with linker.clock.working():
        (path,) = wrapper.cache.tree_core.collect_path_info([node_id])
        # A root has no pages; the path does not name it.
        above = wrapper.cache.get_last_hash_value(path[-2].node_id) if len(path) > 1 else None
        linker.set_offload_parent(above)


def _before_release_request(wrapper: Any, rid: str) -> None:
    """A request that was looked up but will never load must not pin its blocks."""
    linker = wrapper.cache_linker
    if hasattr(linker, "release_request"):
        with linker.clock.working():
            linker.release_request(rid)


def _before_evict_leaf(cache: Any, node_id: int, *_: Any) -> None:
    """Its keys go with it."""
    linker: Any = getattr(cache.linker, "cache_linker", None)
    if hasattr(linker, "before_eviction"):
        linker.before_eviction(cache.tree_core.get_hash_values(node_id))
