"""Two facts the linker needs that SGLang's linker interface does not pass on.

Both are hooks before a method of ``UnifiedCacheLinkerWrapper``; neither changes what it does, and
both leave foreign linkers alone.
"""

from __future__ import annotations

from typing import Any

from sglang.srt.plugins.hook_registry import HookRegistry, HookType

_WRAPPER = "sglang.srt.mem_cache.unified_cache.unified_cache_linker.UnifiedCacheLinkerWrapper"


def register() -> None:
    """Called where a linker is built. Safe to call twice."""
    for name, hook in (
        ("_offload_node", _before_offload_node),
        ("release_request", _before_release_request),
    ):
        target = f"{_WRAPPER}.{name}"
        if not any(known is hook for _, known, _ in HookRegistry._hooks.get(target, [])):
            HookRegistry.register(target, hook, HookType.BEFORE)
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
