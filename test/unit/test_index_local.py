"""The page forest: eviction order, parents that come and go, pins and orphans."""

from __future__ import annotations

import hashlib

import pytest
from sglang_memserve.index.local_index import LocalIndex
from sglang_memserve.types import BlockId, Eviction, PageKey


def key(name: str) -> PageKey:
    return PageKey(hashlib.sha256(name.encode()).digest())


def names(keys: list[PageKey], among: str) -> str:
    return "".join(name for wanted in keys for name in among if key(name) == wanted)


class Forest:
    """An index whose pages are letters; a page's block is the letter's position in the alphabet."""

    def __init__(self) -> None:
        self.index = LocalIndex(26, Eviction.LRU)

    def add(self, chain: str, parent: str | None = None) -> None:
        keys = [key(name) for name in chain]
        parents = [None if parent is None else key(parent), *keys[:-1]]
        self.index.insert(keys, self.blocks(chain), parents)
        self.index.check()

    def blocks(self, chain: str) -> list[BlockId]:
        return [BlockId(ord(name) - ord("a")) for name in chain]

    def evict(self, count: int) -> str:
        removed = self.index.evict(count)
        self.index.check()
        assert len(removed.keys) == len(removed.blocks)
        return names(removed.keys, "abcdefghijklmnopqrstuvwxyz")

    def touch(self, chain: str) -> None:
        self.index.touch(self.blocks(chain))
        self.index.check()

    def pin(self, chain: str) -> None:
        self.index.pin(self.blocks(chain))
        self.index.check()

    def unpin(self, chain: str) -> list[BlockId]:
        ended = self.index.unpin(self.blocks(chain))
        self.index.check()
        return ended


@pytest.fixture
def forest() -> Forest:
    return Forest()


def test_leading_run_ends_at_the_first_gap(forest: Forest) -> None:
    forest.add("abc")
    asked = [key(name) for name in "abxc"]
    assert forest.index.leading(asked) == 2
    assert forest.index.match(asked) == forest.blocks("ab")
    assert forest.index.leading([]) == 0


def test_a_chain_is_evicted_from_its_tail(forest: Forest) -> None:
    forest.add("abcd")
    assert forest.evict(2) == "dc"
    assert forest.evict(10) == "ba"
    assert len(forest.index) == 0


def test_least_recently_used_leaf_goes_first(forest: Forest) -> None:
    forest.add("ab")
    forest.add("cd")
    forest.add("ef")
    forest.touch("ab")
    assert forest.evict(1) == "d"
    forest.touch("c")
    assert forest.evict(5) == "febac"


def test_a_fork_is_kept_until_both_branches_are_gone(forest: Forest) -> None:
    forest.add("ab")
    forest.add("cd", parent="b")
    forest.add("e", parent="b")
    assert forest.evict(2) == "dc"
    assert forest.evict(9) == "eba"


def test_a_page_is_as_recent_as_its_last_descendant(forest: Forest) -> None:
    forest.add("ab")
    forest.add("cd")
    forest.touch("b")  # the tail alone: the engine's device tier held the head
    assert forest.evict(2) == "dc"
    forest.add("ef")
    forest.touch("b")
    assert [removed for removed in forest.index.remove([key("b")]).keys] == [key("b")]
    forest.index.check()
    # a itself was used before e and f, but its child after them.
    assert forest.evict(3) == "fea"


def test_a_head_that_arrives_later_takes_over_its_children(forest: Forest) -> None:
    forest.add("cd", parent="b")
    forest.add("b", parent="a")
    forest.add("a")
    assert forest.evict(9) == "dcba"


def test_children_outlive_a_deleted_parent_and_find_it_again(forest: Forest) -> None:
    forest.add("abc")
    removed = forest.index.remove([key("b"), key("x")])
    assert removed.keys == [key("b")] and removed.blocks == forest.blocks("b")
    forest.index.check()
    forest.add("b", parent="a")
    forest.touch("b")
    assert forest.evict(9) == "cba"


def test_pinned_pages_and_their_ancestors_stay(forest: Forest) -> None:
    forest.add("abc")
    forest.add("xyz")
    forest.pin("b")
    assert forest.evict(9) == "czyx"
    assert forest.unpin("b") == []
    assert forest.evict(9) == "ba"


def test_pins_are_counted(forest: Forest) -> None:
    forest.add("a")
    forest.pin("a")
    forest.pin("a")
    assert forest.index.pinned_blocks == 1
    forest.unpin("a")
    assert forest.evict(1) == ""
    forest.unpin("a")
    assert forest.index.pinned_blocks == 0
    assert forest.evict(1) == "a"
    with pytest.raises(AssertionError):
        forest.index.unpin(forest.blocks("a"))


@pytest.mark.parametrize("way", ["remove", "clear"])
def test_a_removed_pinned_page_leaves_an_orphan(forest: Forest, way: str) -> None:
    forest.add("ab")
    forest.pin("a")
    removed = forest.index.clear() if way == "clear" else forest.index.remove([key("a"), key("b")])
    forest.index.check()
    assert set(removed.keys) == {key("a"), key("b")}
    assert removed.blocks == forest.blocks("b")
    assert forest.index.orphans() == set(forest.blocks("a"))
    assert forest.index.leading([key("a")]) == 0
    assert forest.unpin("a") == forest.blocks("a")
    assert forest.index.orphan_blocks == 0


def test_a_key_may_return_while_its_orphan_is_pinned(forest: Forest) -> None:
    forest.add("a")
    forest.pin("a")
    forest.index.remove([key("a")])
    forest.index.insert([key("a")], forest.blocks("z"), [None])
    forest.index.check()
    assert forest.index.match([key("a")]) == forest.blocks("z")
    assert forest.unpin("a") == forest.blocks("a")
    assert forest.index.match([key("a")]) == forest.blocks("z")


def test_nothing_is_its_own_ancestor(forest: Forest) -> None:
    forest.add("a", parent="a")
    forest.add("cd", parent="b")
    forest.add("b", parent="d")
    assert sorted(forest.evict(9)) == list("abcd")


def test_insert_refuses_a_resident_key_and_a_block_in_use(forest: Forest) -> None:
    forest.add("a")
    with pytest.raises(AssertionError):
        forest.index.insert([key("a")], forest.blocks("b"), [None])
    with pytest.raises(AssertionError):
        forest.index.insert([key("b")], forest.blocks("a"), [None])


def test_pages_of_given_blocks_go_but_not_pinned_ones_nor_what_hangs_under_them(
    forest: Forest,
) -> None:
    forest.add("abcd")
    forest.pin("c")
    removed = forest.index.evict_blocks(forest.blocks("bcz"))
    forest.index.check()
    assert (removed.keys, removed.blocks) == ([key("b")], forest.blocks("b"))
    assert forest.index.pages()[0] == [key(name) for name in "acd"]
    forest.unpin("c")
    assert forest.evict(9) == "dca"


def test_a_page_moves_to_another_block_with_all_that_is_known_of_it(forest: Forest) -> None:
    forest.add("abc")
    forest.add("de")
    for source, target in ("ax", "cy"):
        forest.index.relocate(forest.blocks(source)[0], forest.blocks(target)[0])
        forest.index.check()
    assert forest.index.match([key(name) for name in "abc"]) == forest.blocks("xby")
    assert forest.evict(9) == "cbaed"
    assert forest.index.pages() == ([], [])


def test_only_a_resident_page_moves_and_only_where_nothing_is(forest: Forest) -> None:
    forest.add("ab")
    for source, target in ("ba", "yz"):
        with pytest.raises(AssertionError):
            forest.index.relocate(forest.blocks(source)[0], forest.blocks(target)[0])
        forest.index.check()


def test_a_pinned_page_that_moves_leaves_an_orphan_to_its_reader(forest: Forest) -> None:
    forest.add("ab")
    forest.pin("b")
    source, target = forest.blocks("bz")
    forest.index.relocate(source, target)
    forest.index.check()
    assert forest.index.orphans() == {source} and forest.index.key_of(source) is None
    assert forest.index.key_of(target) == key("b")
    assert forest.index.unpin([source]) == [source]
    assert forest.evict(9) == "ba"


def test_more_blocks_may_come() -> None:
    index = LocalIndex(1, Eviction.LRU)
    index.insert([key("a")], [BlockId(0)], [None])
    index.resize(3)
    index.check()
    assert index.total_blocks == 3
    index.insert([key("b"), key("c")], [BlockId(1), BlockId(2)], [key("a"), key("b")])
    index.check()
    assert index.match([key(name) for name in "abc"]) == [0, 1, 2]
    assert index.evict(9).blocks == [2, 1, 0]
