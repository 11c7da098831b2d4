"""LocalIndex with every eviction policy against an oracle that scans, over random programs."""

from __future__ import annotations

import hashlib
import os

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from oracle.index import IndexOracle
from sglang_memserve.index.local_index import LocalIndex
from sglang_memserve.types import BlockId, Eviction, PageKey


def key_of(prefix: tuple[int, ...]) -> PageKey:
    return PageKey(hashlib.sha256(bytes(prefix)).digest())


def chain_of(prefix: tuple[int, ...]) -> list[PageKey]:
    return [key_of(prefix[: end + 1]) for end in range(len(prefix))]


# Two letters and up to six pages: chains share heads and fork often.
prefixes = st.lists(st.integers(0, 1), min_size=1, max_size=6).map(tuple)
some_key = prefixes.map(key_of)
counts = st.integers(0, 8)


class IndexMachine(RuleBasedStateMachine):
    eviction: Eviction

    @initialize(total=st.integers(1, 24), contents=st.lists(prefixes, max_size=8))
    def start(self, total: int, contents: list[tuple[int, ...]]) -> None:
        self.index = LocalIndex(total, self.eviction)
        self.oracle = IndexOracle(total, self.eviction is Eviction.TWO_QUEUE)
        for prefix in contents:
            self.use_or_store(prefix)

    def blocks(self, keys: list[PageKey]) -> list[BlockId]:
        return [BlockId(self.oracle.pages[key].block) for key in keys]

    def insert(self, keys: list[PageKey], parents: list[PageKey | None]) -> None:
        blocks = [BlockId(block) for block in self.oracle.unused()[: len(keys)]]
        keys, parents = keys[: len(blocks)], parents[: len(blocks)]
        expected = self.oracle.insert(keys, blocks, parents)
        assert self.index.insert(keys, blocks, parents) == expected

    # -- pages come and are used --

    @rule(prefix=prefixes)
    def use_or_store(self, prefix: tuple[int, ...]) -> None:
        """What a pool does with a prompt: use what is there, make room, keep the rest."""
        chain = chain_of(prefix)
        found = self.index.match(chain)
        self.touch(prefix)
        self.index.pin(found)
        self.oracle.pins.update(found)
        missing = [key for key in chain if key not in self.index]
        self.evict(len(missing) - len(self.oracle.unused()))
        self.insert(
            missing, [chain[chain.index(k) - 1] if k != chain[0] else None for k in missing]
        )
        self.unpin(found)

    @rule(prefix=prefixes, parents=st.lists(st.none() | some_key, min_size=6, max_size=6))
    def store_nonsense(self, prefix: tuple[int, ...], parents: list[PageKey | None]) -> None:
        """Keys under any parents: what a broken peer may send."""
        self.insert([key for key in chain_of(prefix) if key not in self.index], parents)

    @rule(prefix=prefixes)
    def touch(self, prefix: tuple[int, ...]) -> None:
        found = [key for key in chain_of(prefix) if key in self.index]
        self.index.touch(self.blocks(found))
        self.oracle.touch(found)

    @rule(prefix=prefixes)
    def pin(self, prefix: tuple[int, ...]) -> None:
        blocks = self.index.match(chain_of(prefix))
        self.index.pin(blocks)
        self.oracle.pins.update(blocks)

    @rule(data=st.data())
    def unpin_some(self, data: st.DataObject) -> None:
        pinned = sorted(self.oracle.pins.elements())
        if pinned:
            self.unpin(data.draw(st.lists(st.sampled_from(pinned), max_size=4, unique=True)))

    def unpin(self, blocks: list[BlockId]) -> None:
        self.oracle.pins.subtract(blocks)
        self.oracle.pins = +self.oracle.pins
        ended = {block for block in self.oracle.orphans if not self.oracle.pins[block]}
        self.oracle.orphans -= ended
        assert set(self.index.unpin(blocks)) == ended

    # -- pages go --

    @rule(count=counts)
    def evict(self, count: int) -> None:
        where = {key: page.block for key, page in self.oracle.pages.items()}
        expected = self.oracle.evict(count)
        removed = self.index.evict(count)
        assert removed.keys == expected
        assert removed.blocks == [where[key] for key in expected]

    @rule(keys=st.lists(some_key, max_size=6))
    def remove(self, keys: list[PageKey]) -> None:
        where = {key: page.block for key, page in self.oracle.pages.items()}
        removed = self.index.remove(keys)
        assert removed.keys == self.oracle.remove(keys)
        free = [where[key] for key in removed.keys if not self.oracle.pins[where[key]]]
        assert removed.blocks == free

    @rule(data=st.data())
    def evict_blocks(self, data: st.DataObject) -> None:
        everything = st.integers(0, self.oracle.total_blocks - 1)
        blocks = data.draw(st.lists(everything, max_size=6, unique=True))
        keys = [self.oracle.in_block(b) for b in blocks if not self.oracle.pins[b]]
        expected = self.oracle.remove([key for key in keys if key is not None])
        removed = self.index.evict_blocks([BlockId(block) for block in blocks])
        assert removed.keys == expected
        assert len(removed.blocks) == len(expected)

    @rule()
    def clear(self) -> None:
        removed = self.index.clear()
        assert set(removed.keys) == set(self.oracle.pages)
        self.oracle.clear()

    # -- blocks come and change places --

    @rule(total=st.integers(1, 30))
    def resize(self, total: int) -> None:
        """Down to ``total`` blocks, or to the last that is in use."""
        in_use = set(range(self.oracle.total_blocks)) - set(self.oracle.unused())
        total = max(total, 1 + max(in_use, default=0))
        self.index.resize(total)
        self.oracle.resize(total)

    @rule(data=st.data())
    def relocate(self, data: st.DataObject) -> None:
        resident = [page.block for page in self.oracle.pages.values()]
        unused = self.oracle.unused()
        if resident and unused:
            source = data.draw(st.sampled_from(resident))
            target = data.draw(st.sampled_from(unused))
            self.index.prepare_relocations()
            self.index.relocate(BlockId(source), BlockId(target))
            self.oracle.relocate(source, target)

    @precondition(lambda self: hasattr(self, "index"))
    @invariant()
    def agrees(self) -> None:
        self.index.check()
        expected = self.oracle
        assert len(self.index) == len(expected.pages)
        assert self.index.total_blocks == expected.total_blocks
        keys, parents = self.index.pages()
        assert dict(zip(keys, parents, strict=True)) == {
            key: page.parent for key, page in expected.pages.items()
        }
        assert {key: self.index.get(key) for key in keys} == {
            key: page.block for key, page in expected.pages.items()
        }
        assert self.index.pins() == dict(expected.pins)
        assert self.index.orphans() == expected.orphans
        assert self.index.pinned_blocks == len(expected.pins)


class LruMachine(IndexMachine):
    eviction = Eviction.LRU


class TwoQueueMachine(IndexMachine):
    eviction = Eviction.TWO_QUEUE


SETTINGS = settings(
    max_examples=int(os.environ.get("MEMSERVE_POOL_EXAMPLES", "100")),
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
LruMachine.TestCase.settings = SETTINGS
TwoQueueMachine.TestCase.settings = SETTINGS


TestLru = LruMachine.TestCase
TestTwoQueue = TwoQueueMachine.TestCase
