"""The merged tree's contract, one sentence a test, for every kind of tree."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from contract.trees import TREES, MakeTree
from sglang_memserve.errors import LimitExceeded, ProtocolError
from sglang_memserve.protocol.events import AllBlocksCleared, BlockRemoved, BlockStored
from sglang_memserve.router.tree import merged
from sglang_memserve.router.tree.native import NativeTree
from sglang_memserve.router.tree.reference import GlobalTree
from sglang_memserve.router.values import Match
from sglang_memserve.types import InstanceId, ShortKey, Tier

A, B = InstanceId("http://a:1"), InstanceId("http://b:1")
DRAM, HBM = Tier.DRAM.value, Tier.HBM.value


@pytest.fixture(params=TREES.values(), ids=list(TREES))
def make(request: pytest.FixtureRequest) -> MakeTree:
    chosen: MakeTree = request.param
    return chosen


def stored(hashes: list[int], parent: int | None = None, medium: str | None = DRAM) -> BlockStored:
    return BlockStored(hashes, parent, [], 16, medium=medium)


def keys(*numbers: int) -> list[ShortKey]:
    return [ShortKey(number) for number in numbers]


def test_an_empty_tree_and_an_empty_prompt_match_nothing(make: MakeTree) -> None:
    tree = make()
    assert tree.match(keys(1, 2)) == {}
    tree.apply(A, stored([1, 2]))
    assert tree.match([]) == {}


def test_leading_pages_are_counted_by_tier(make: MakeTree) -> None:
    tree = make()
    tree.apply(A, stored([1, 2, 3, 4]))
    tree.apply(A, stored([1, 2], medium=HBM))
    tree.apply(B, stored([1, 2, 3], medium=HBM))
    assert tree.match(keys(1, 2, 3, 4, 5)) == {A: Match(4, 2), B: Match(3, 3, 3)}
    assert tree.match(keys(2, 3)) == {A: Match(2, 1), B: Match(2, 2, 2)}


def test_a_chain_with_equal_holders_is_one_node(make: MakeTree) -> None:
    tree = make()
    for page in range(100):
        tree.apply(A, stored([page], page - 1 if page else None))
    assert tree.stats().nodes == 1
    tree.apply(B, stored(list(range(40))))
    assert tree.stats().nodes == 2
    tree.apply(B, BlockRemoved(list(range(39, -1, -1)), DRAM))
    assert tree.stats().nodes == 1
    tree.check()


def test_a_lost_page_hides_what_is_below_it_until_it_is_back(make: MakeTree) -> None:
    tree = make()
    tree.apply(A, stored([1, 2, 3, 4]))
    tree.apply(A, BlockRemoved([2], DRAM))
    assert tree.match(keys(1, 2, 3, 4)) == {A: Match(1)}
    assert tree.match(keys(3, 4)) == {A: Match(2)}
    tree.apply(A, stored([2], 1))
    assert tree.match(keys(1, 2, 3, 4)) == {A: Match(4)}
    assert tree.stats().nodes == 1
    tree.check()


def test_a_chain_may_come_before_its_parent(make: MakeTree) -> None:
    tree = make()
    tree.apply(A, stored([3, 4], 2))
    tree.apply(A, stored([5], 1))
    tree.apply(A, stored([1, 2]))
    tree.check()
    assert tree.match(keys(1, 2, 3, 4)) == {A: Match(4)}
    assert tree.match(keys(1, 5)) == {A: Match(2)}
    assert sorted(view.keys for view in tree.nodes()) == [(1,), (2, 3, 4), (5,)]


def test_what_others_can_fetch_ends_at_the_first_page_that_is_in_hbm_alone(make: MakeTree) -> None:
    tree = make()
    tree.apply(A, stored([1, 2, 3, 4], medium=HBM))
    tree.apply(A, stored([1, 2]))
    tree.apply(A, stored([4, 5], 3))
    match = tree.match(keys(1, 2, 3, 4, 5))[A]
    assert match == Match(5, 4, 3) and match.movable_pages == 2
    tree.apply(A, stored([3], 2))
    assert tree.match(keys(1, 2, 3, 4, 5)) == {A: Match(5, 4, 0)}
    tree.apply(A, BlockRemoved([1], DRAM))
    assert tree.match(keys(1, 2, 3, 4, 5)) == {A: Match(5, 4, 5)}


def test_a_page_leaves_with_its_last_tier(make: MakeTree) -> None:
    tree = make()
    tree.apply(A, stored([1, 2]))
    tree.apply(A, stored([1, 2], medium=HBM))
    tree.apply(A, BlockRemoved([2, 1], HBM))
    assert tree.match(keys(1, 2)) == {A: Match(2, 0)}
    tree.apply(A, BlockRemoved([2, 1], DRAM))
    assert tree.match(keys(1, 2)) == {}
    assert tree.stats().pages == 0


def test_a_missing_medium_is_the_device_and_unknown_media_are_ignored(make: MakeTree) -> None:
    tree = make()
    tree.apply(A, stored([1], medium=None))
    tree.apply(A, stored([2], 1, medium="DISK"))
    tree.apply(A, BlockRemoved([1], "DISK"))
    assert tree.match(keys(1, 2)) == {A: Match(1, 1, 1)}
    assert tree.stats().ignored_events == 2
    tree.apply(A, BlockRemoved([1]))
    assert tree.stats().pages == 0


def test_clear_and_drop_leave_the_others_alone(make: MakeTree) -> None:
    tree = make()
    tree.apply(A, stored([1, 2, 3]))
    tree.apply(B, stored([1, 2]))
    tree.apply(A, AllBlocksCleared())
    assert tree.match(keys(1, 2, 3)) == {B: Match(2)}
    assert tree.stats().held[A] == {Tier.HBM: 0, Tier.DRAM: 0}
    tree.drop(A)
    assert A not in tree.stats().held
    tree.drop(InstanceId("http://never-seen:1"))
    tree.check()


def test_a_dump_names_parents_first_and_rebuilds_the_tree(make: MakeTree) -> None:
    tree = make()
    tree.apply(A, stored([5, 6], 2))
    tree.apply(A, stored([1, 2, 3]))
    events = tree.dump(A)
    seen: set[int] = set()
    for event in events:
        assert isinstance(event, BlockStored)
        assert event.block_size == 16
        assert event.parent_block_hash is None or event.parent_block_hash in seen
        seen.update(event.block_hashes)
    other = make()
    other.replace(B, [stored([9])])
    other.replace(B, events)
    assert other.match(keys(1, 2, 5, 6)) == {B: Match(4)}
    assert other.match(keys(9)) == {}


def test_malformed_chains_are_refused_and_change_nothing(make: MakeTree) -> None:
    tree = make(max_pages=4)
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


def test_a_ring_of_parents_is_survived(make: MakeTree) -> None:
    tree = make()
    tree.apply(A, stored([2], 1))
    tree.apply(A, stored([1], 2))
    tree.apply(A, stored([3], 1))
    tree.check()
    assert tree.match(keys(1, 2)) == {A: Match(2)}
    assert len(tree.dump(A)) == 3
    tree.drop(A)
    tree.check()
    assert tree.stats().nodes == 0


def test_holders_of_one_page(make: MakeTree) -> None:
    tree = make()
    tree.apply(A, stored([1]))
    tree.apply(A, stored([1], medium=HBM))
    assert tree.holders(ShortKey(1)) == {A: frozenset(Tier)}
    assert tree.holders(ShortKey(2)) == {}


@pytest.mark.parametrize("wrong", [2**63, -(2**63) - 1, 2**64])
def test_a_key_beyond_64_bits_is_refused(wrong: int) -> None:
    if "native" not in TREES:
        pytest.skip("the tree in Python takes any integer")
    tree = TREES["native"]()
    for event in (stored([1, wrong]), stored([1], wrong), BlockRemoved([wrong], DRAM)):
        tree.apply(A, stored([5]))
        with pytest.raises(ProtocolError):
            tree.apply(A, event)
    assert tree.stats().pages == 1
    tree.check()


def test_more_instances_than_bits_in_a_word(make: MakeTree) -> None:
    tree = make()
    hosts = [InstanceId(f"http://h{number}:1") for number in range(150)]
    for number, host in enumerate(hosts):
        tree.apply(host, stored(list(range(1 + number % 7)), medium=HBM if number % 2 else DRAM))
    expected = {
        host: Match(1 + number % 7, *(2 * [1 + number % 7] if number % 2 else []))
        for number, host in enumerate(hosts)
    }
    assert tree.match(keys(*range(7))) == expected
    for host in hosts[10:140]:
        tree.drop(host)
    tree.check()
    for host in hosts[10:140]:
        assert tree.dump(host) == []
        del expected[host]
    assert tree.match(keys(*range(7))) == expected
    newcomer = InstanceId("http://new:1")
    tree.apply(newcomer, stored([0], medium=HBM))
    assert tree.match(keys(0))[newcomer] == Match(1, 1, 1)
    assert tree.holders(ShortKey(0))[newcomer] == frozenset({Tier.HBM})
    tree.check()


def test_the_router_runs_the_native_tree_where_there_is_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert isinstance(merged.merged_tree(), NativeTree) == ("native" in TREES)
    monkeypatch.setattr(merged, "native", lambda: None)
    assert isinstance(merged.merged_tree(), GlobalTree)


def test_native_code_of_older_sources_is_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    older = SimpleNamespace(radix_tree=lambda *_: object())
    monkeypatch.setattr(merged, "native", lambda: older)
    assert isinstance(merged.merged_tree(), GlobalTree)
    assert "build sgl-kernel-ext again" in caplog.text


def test_what_is_left_of_a_ring_still_matches(make: MakeTree) -> None:
    tree = make()
    tree.apply(A, stored([1, 2, 3], 6))
    tree.apply(A, stored([4, 5, 6], 3))
    assert tree.stats().rings and tree.stats().nodes == 2
    tree.apply(A, BlockRemoved([1], DRAM))
    tree.check()
    assert tree.match(keys(2, 3, 4, 5, 6)) == {A: Match(5)}
    tree.drop(A)
    tree.check()
    assert tree.stats().nodes == 0
