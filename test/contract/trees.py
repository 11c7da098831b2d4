"""Every kind of merged tree, for the suites that all of them must pass."""

from __future__ import annotations

from collections.abc import Callable

from sglang_memserve.router.tree.merged import MergedTree, native_core
from sglang_memserve.router.tree.native import NativeTree
from sglang_memserve.router.tree.reference import DEFAULT_MAX_PAGES, GlobalTree

MakeTree = Callable[..., MergedTree]


def native_tree(max_pages: int = DEFAULT_MAX_PAGES) -> NativeTree:
    """With positions that are numbered anew every few changes, as after years of them."""
    core = native_core(max_pages, position_limit=7)
    assert core is not None
    return NativeTree(core, max_pages)


TREES: dict[str, MakeTree] = {"python": GlobalTree}
if native_core(1) is not None:
    TREES["native"] = native_tree
