"""The merged tree's contract, one sentence a test."""

from __future__ import annotations

import pytest
from sglang_memserve.errors import LimitExceeded, ProtocolError
from sglang_memserve.protocol.events import AllBlocksCleared, BlockRemoved, BlockStored
from sglang_memserve.router.global_tree import GlobalTree
from sglang_memserve.router.values import Match
from sglang_memserve.types import InstanceId, ShortKey, Tier

A, B = InstanceId("http://a:1"), InstanceId("http://b:1")
DRAM, HBM = Tier.DRAM.value, Tier.HBM.value


def stored(hashes: list[int], parent: int | None = None, medium: str | None = DRAM) -> BlockStored:
    return BlockStored(hashes, parent, [], 16, medium=medium)


def keys(*numbers: int) -> list[ShortKey]:
    return [ShortKey(number) for number in numbers]


def test_an_empty_tree_and_an_empty_prompt_match_nothing() -> None:
    tree = GlobalTree()
    assert tree.match(keys(1, 2)) == {}
    tree.apply(A, stored([1, 2]))
    assert tree.match([]) == {}


def test_leading_pages_are_counted_by_tier() -> None:
    tree = GlobalTree()
    tree.apply(A, stored([1, 2, 3, 4]))
    tree.apply(A, stored([1, 2], medium=HBM))
    tree.apply(B, stored([1, 2, 3], medium=HBM))
    assert tree.match(keys(1, 2, 3, 4, 5)) == {A: Match(4, 2), B: Match(3, 3)}
    assert tree.match(keys(2, 3)) == {A: Match(2, 1), B: Match(2, 2)}


def test_a_chain_with_equal_holders_is_one_node() -> None:
    tree = GlobalTree()
    for page in range(100):
        tree.apply(A, stored([page], page - 1 if page else None))
    assert tree.stats().nodes == 1
    tree.apply(B, stored(list(range(40))))
    assert tree.stats().nodes == 2
    tree.apply(B, BlockRemoved(list(range(39, -1, -1)), DRAM))
    assert tree.stats().nodes == 1
    tree.check()


def test_a_lost_page_hides_what_is_below_it_until_it_is_back() -> None:
    tree = GlobalTree()
    tree.apply(A, stored([1, 2, 3, 4]))
    tree.apply(A, BlockRemoved([2], DRAM))
    assert tree.match(keys(1, 2, 3, 4)) == {A: Match(1)}
    assert tree.match(keys(3, 4)) == {A: Match(2)}
    tree.apply(A, stored([2], 1))
    assert tree.match(keys(1, 2, 3, 4)) == {A: Match(4)}
    assert tree.stats().nodes == 1
    tree.check()


def test_a_chain_may_come_before_its_parent() -> None:
    tree = GlobalTree()
    tree.apply(A, stored([3, 4], 2))
    tree.apply(A, stored([5], 1))
    tree.apply(A, stored([1, 2]))
    tree.check()
    assert tree.match(keys(1, 2, 3, 4)) == {A: Match(4)}
    assert tree.match(keys(1, 5)) == {A: Match(2)}
    assert sorted(view.keys for view in tree.nodes()) == [(1,), (2, 3, 4), (5,)]


def test_a_page_leaves_with_its_last_tier() -> None:
    tree = GlobalTree()
    tree.apply(A, stored([1, 2]))
    tree.apply(A, stored([1, 2], medium=HBM))
    tree.apply(A, BlockRemoved([2, 1], HBM))
    assert tree.match(keys(1, 2)) == {A: Match(2, 0)}
    tree.apply(A, BlockRemoved([2, 1], DRAM))
    assert tree.match(keys(1, 2)) == {}
    assert tree.stats().pages == 0


def test_a_missing_medium_is_the_device_and_unknown_media_are_ignored() -> None:
    tree = GlobalTree()
    tree.apply(A, stored([1], medium=None))
    tree.apply(A, stored([2], 1, medium="DISK"))
    tree.apply(A, BlockRemoved([1], "DISK"))
    assert tree.match(keys(1, 2)) == {A: Match(1, 1)}
    assert tree.stats().ignored_events == 2
    tree.apply(A, BlockRemoved([1]))
    assert tree.stats().pages == 0


def test_clear_and_drop_leave_the_others_alone() -> None:
    tree = GlobalTree()
    tree.apply(A, stored([1, 2, 3]))
    tree.apply(B, stored([1, 2]))
    tree.apply(A, AllBlocksCleared())
    assert tree.match(keys(1, 2, 3)) == {B: Match(2)}
    assert tree.stats().held[A] == {Tier.HBM: 0, Tier.DRAM: 0}
    tree.drop(A)
    assert A not in tree.stats().held
    tree.drop(InstanceId("http://never-seen:1"))
    tree.check()


def test_a_dump_names_parents_first_and_rebuilds_the_tree() -> None:
    tree = GlobalTree()
    tree.apply(A, stored([5, 6], 2))
    tree.apply(A, stored([1, 2, 3]))
    events = tree.dump(A)
    seen: set[int] = set()
    for event in events:
        assert isinstance(event, BlockStored)
        assert event.block_size == 16
        assert event.parent_block_hash is None or event.parent_block_hash in seen
        seen.update(event.block_hashes)
    other = GlobalTree()
    other.replace(B, [stored([9])])
    other.replace(B, events)
    assert other.match(keys(1, 2, 5, 6)) == {B: Match(4)}
    assert other.match(keys(9)) == {}


def test_malformed_chains_are_refused_and_change_nothing() -> None:
    tree = GlobalTree(max_pages=4)
    tree.apply(A, stored([1, 2]))
    with pytest.raises(ProtocolError, match="twice"):
        tree.apply(A, stored([3, 4, 3]))
    with pytest.raises(ProtocolError, match="below itself"):
        tree.apply(A, stored([3, 4], 4))
    with pytest.raises(LimitExceeded, match="4 pages"):
        tree.apply(A, stored([3, 4, 5], 2))
    assert tree.match(keys(1, 2, 3)) == {A: Match(2)}
    assert tree.stats().pages == 2
    tree.check()


def test_a_ring_of_parents_is_survived() -> None:
    tree = GlobalTree()
    tree.apply(A, stored([2], 1))
    tree.apply(A, stored([1], 2))
    tree.apply(A, stored([3], 1))
    tree.check()
    assert tree.match(keys(1, 2)) == {A: Match(2)}
    assert len(tree.dump(A)) == 3
    tree.drop(A)
    tree.check()
    assert tree.stats().nodes == 0


def test_holders_of_one_page() -> None:
    tree = GlobalTree()
    tree.apply(A, stored([1]))
    tree.apply(A, stored([1], medium=HBM))
    assert tree.holders(ShortKey(1)) == {A: frozenset(Tier)}
    assert tree.holders(ShortKey(2)) == {}
