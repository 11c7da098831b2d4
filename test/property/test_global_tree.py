"""The merged tree against an oracle that is a set, with every invariant checked at every step."""

from __future__ import annotations

from contract.trees import TREES
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from oracle.global_tree import FlatTree
from sglang_memserve.protocol.events import AllBlocksCleared, BlockRemoved, BlockStored, Event
from sglang_memserve.router.tree.merged import MergedTree
from sglang_memserve.router.tree.reference import GlobalTree, NodeView
from sglang_memserve.types import InstanceId, ShortKey, Tier

INSTANCES = [InstanceId(f"http://host{n}:30000") for n in range(3)]
RENAMED = dict(zip(INSTANCES, (InstanceId(f"z{n}") for n in (2, 0, 1)), strict=True))
PAGES = 40
# Prefixes as a fixed tree in which page p hangs under parent(p): chains and branches of all sizes.
PARENT = {
    page: (None if page % 17 == 0 else page - 1 if page % 5 else page // 2) for page in range(PAGES)
}

instances = st.sampled_from(INSTANCES)
media = st.sampled_from([None, Tier.HBM.value, Tier.DRAM.value])
pages = st.integers(0, PAGES - 1)


def chain_to(page: int) -> list[int]:
    """All pages from the root to ``page``."""
    chain: list[int] = []
    at: int | None = page
    while at is not None:
        chain.insert(0, at)
        at = PARENT[at]
    return chain


def stored(hashes: list[int], parent: int | None, medium: str | None) -> BlockStored:
    return BlockStored(hashes, parent, [], 16, medium=medium)


class TreeMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.tree = self.make()
        self.renamed = self.make()
        self.oracle = FlatTree()

    def make(self) -> MergedTree:
        return GlobalTree()

    def dropped(self, instance: InstanceId) -> None:
        """For machines that keep another tree beside."""

    def apply(self, instance: InstanceId, event: Event) -> None:
        self.tree.apply(instance, event)
        self.renamed.apply(RENAMED[instance], event)
        self.oracle.apply(instance, event)

    @rule(instance=instances, page=pages, skip=st.integers(0, 6), medium=media)
    def store(self, instance: InstanceId, page: int, skip: int, medium: str | None) -> None:
        """The end of a prefix: with the parent held, or not."""
        chain = chain_to(page)
        skip = min(skip, len(chain) - 1)
        self.apply(instance, stored(chain[skip:], chain[skip - 1] if skip else None, medium))

    @rule(
        instance=instances, page=pages, count=st.integers(1, 8), medium=media, order=st.booleans()
    )
    def remove_end(
        self, instance: InstanceId, page: int, count: int, medium: str | None, order: bool
    ) -> None:
        end = chain_to(page)[-count:]
        self.apply(instance, BlockRemoved(end[::-1] if order else end, medium))

    @rule(instance=instances, hashes=st.lists(pages, min_size=1, max_size=8), medium=media)
    def remove_any(self, instance: InstanceId, hashes: list[int], medium: str | None) -> None:
        self.apply(instance, BlockRemoved(hashes, medium))

    @rule(
        instance=instances,
        hashes=st.lists(pages, min_size=1, max_size=5, unique=True),
        parent=st.none() | pages,
        medium=media,
    )
    def store_nonsense(
        self, instance: InstanceId, hashes: list[int], parent: int | None, medium: str | None
    ) -> None:
        """A sender that is wrong about parents: contradictions, even rings."""
        if parent not in hashes:
            self.apply(instance, stored(hashes, parent, medium))

    @rule(instance=instances)
    def clear(self, instance: InstanceId) -> None:
        self.apply(instance, AllBlocksCleared())

    @rule(instance=instances)
    def drop(self, instance: InstanceId) -> None:
        others = {i: self.tree.dump(i) for i in INSTANCES if i != instance}
        self.tree.drop(instance)
        self.dropped(instance)
        self.renamed.drop(RENAMED[instance])
        self.oracle.drop(instance)
        rebuilt = self.make()
        for other, events in others.items():
            rebuilt.replace(other, events)
        for page in range(PAGES):
            assert self.tree.holders(ShortKey(page)) == rebuilt.holders(ShortKey(page))

    @rule(instance=instances)
    def replace_by_its_own_dump(self, instance: InstanceId) -> None:
        self.tree.replace(instance, self.tree.dump(instance))

    @precondition(lambda self: self.oracle.held)
    @rule()
    def replay(self) -> None:
        """A tree rebuilt from the dumps is the same tree, node for node where parents agree."""
        rebuilt = self.make()
        for instance in INSTANCES:
            for event in self.tree.dump(instance):
                rebuilt.apply(instance, event)
        rebuilt.check()
        for page in range(PAGES):
            key = ShortKey(page)
            assert rebuilt.holders(key) == self.tree.holders(key)
        ours = sorted((view.keys, view.parent_key) for view in self.tree.nodes())
        theirs = sorted((view.keys, view.parent_key) for view in rebuilt.nodes())
        # Rings have no first page, so the cut may fall elsewhere.
        if self._no_rings():
            assert ours == theirs

    def _no_rings(self) -> bool:
        if self.tree.stats().rings or self.renamed.stats().rings:
            return False
        return all(self._rooted(view.keys[0]) for view in self.tree.nodes())

    def _rooted(self, page: int) -> bool:
        parent_of: dict[int, int | None] = {}
        for view in self.tree.nodes():
            parent_of.update(zip(view.keys, (view.parent_key, *view.keys[:-1]), strict=True))
        seen: set[int] = set()
        at: int | None = page
        while at is not None and at in parent_of and at not in seen:
            seen.add(at)
            at = parent_of[at]
        return at not in seen

    @invariant()
    def invariants_hold(self) -> None:
        self.tree.check()
        self.renamed.check()

    @invariant()
    def matches_the_oracle(self) -> None:
        for page in (*range(0, PAGES, 3), PAGES - 1):
            keys = [ShortKey(key) for key in chain_to(page)]
            expected = self.oracle.match(keys)
            assert self.tree.match(keys) == expected
            assert self.tree.match(tuple(keys)) == expected
            renamed = {RENAMED[instance]: match for instance, match in expected.items()}
            assert self.renamed.match(keys) == renamed
        # Any order of keys is answered by what is held, not by what the tree thinks is below what.
        odd = [ShortKey(key) for key in (3, 4, 9, 8, 7, 20, 21)]
        assert self.tree.match(odd) == self.oracle.match(odd)

    @invariant()
    def counts_the_pages(self) -> None:
        stats = self.tree.stats()
        for instance in INSTANCES:
            for tier in Tier:
                count = stats.held.get(instance, {}).get(tier, 0)
                assert count == self.oracle.pages(instance, tier)
        assert stats.pages == len({page for held in self.oracle.held.values() for page, _ in held})


class NativeTreeMachine(TreeMachine):
    """Besides: node for node what the tree in Python is."""

    def __init__(self) -> None:
        super().__init__()
        self.slow = GlobalTree()

    def make(self) -> MergedTree:
        return TREES["native"]()

    def apply(self, instance: InstanceId, event: Event) -> None:
        super().apply(instance, event)
        self.slow.apply(instance, event)

    def dropped(self, instance: InstanceId) -> None:
        self.slow.drop(instance)

    @invariant()
    def has_the_same_nodes(self) -> None:
        nodes, others = list(self.tree.nodes()), list(self.slow.nodes())
        # A ring has no first page: where it is cut depends on the order of merges.
        if self._no_rings():
            assert sorted(map(repr, map(plain, nodes))) == sorted(map(repr, map(plain, others)))


def plain(view: NodeView) -> tuple[object, ...]:
    holders = sorted((who, sorted(map(str, tiers))) for who, tiers in view.holders.items())
    return view.keys, view.parent_key, holders


TestTree = TreeMachine.TestCase
TestTree.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
if "native" in TREES:
    TestNativeTree = NativeTreeMachine.TestCase
    TestNativeTree.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
