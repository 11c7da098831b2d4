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
    set_parent = getattr(wrapper.cache_linker, "set_offload_parent", None)
    if set_parent is None:
        return
    ancestors = wrapper.cache.get_prefix_hash_values(node_id)
    set_parent(ancestors[-1] if ancestors else None)


def _before_release_request(wrapper: Any, rid: str) -> None:
    """A request that was looked up but will never load must not pin its blocks."""
    release = getattr(wrapper.cache_linker, "release_request", None)
    if release is not None:
        release(rid)
