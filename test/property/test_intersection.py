"""What all ranks hold, against an oracle that is a set for each rank."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from sglang_memserve.index.intersection import Intersection, Merged
from sglang_memserve.protocol.events import (
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    Event,
)
from sglang_memserve.types import Tier

RANKS = 3
PAGES = 24
# Prefixes as a fixed forest: chains and branches of all sizes.
PARENT = {
    page: (None if page % 11 == 0 else page - 1 if page % 4 else page // 2) for page in range(PAGES)
}

ranks = st.integers(0, RANKS - 1)
media = st.sampled_from([None, Tier.HBM.value, Tier.DRAM.value, "DISK"])
pages = st.integers(0, PAGES - 1)

Held = set[tuple[int, Tier]]


def chain_to(page: int) -> list[int]:
    chain: list[int] = []
    at: int | None = page
    while at is not None:
        chain.insert(0, at)
        at = PARENT[at]
    return chain


def after(held: Held, event: Event) -> Held:
    if isinstance(event, AllBlocksCleared):
        return set()
    known: dict[str | None, Tier] = {None: Tier.HBM} | {tier.value: tier for tier in Tier}
    if event.medium not in known:
        return held
    named = {(key, known[event.medium]) for key in event.block_hashes}
    return held | named if isinstance(event, BlockStored) else held - named


def replay(events: list[Event]) -> Held:
    held: Held = set()
    for event in events:
        held = after(held, event)
    return held


class IntersectionMachine(RuleBasedStateMachine):
    """``seen`` is a subscriber that hears only the merged stream."""

    @initialize(count=st.integers(1, RANKS))
    def begin(self, count: int) -> None:
        self.count = count
        self.ours = Intersection(count)
        self.oracle: list[Held] = [set() for _ in range(count)]
        self.seen: Held = set()
        self.last_seq = -1

    def say(self, rank: int, events: list[Event]) -> None:
        rank %= self.count
        self.hear(self.ours.apply(rank, events))
        for event in events:
            self.oracle[rank] = after(self.oracle[rank], event)

    def hear(self, merged: Merged | None) -> None:
        if merged is None:
            return
        assert merged.seq == self.last_seq + 1 and merged.events
        self.last_seq = merged.seq
        before = self.seen
        for event in merged.events:
            changed = after(self.seen, event)
            assert changed != self.seen, "an event that changes nothing"
            if isinstance(event, BlockStored):
                assert PARENT[event.block_hashes[0]] == event.parent_block_hash
            self.seen = changed
        assert self.seen != before

    @rule(rank=ranks, page=pages, skip=st.integers(0, 6), medium=media)
    def store(self, rank: int, page: int, skip: int, medium: str | None) -> None:
        """The end of a prefix: with the parent held, or not."""
        chain = chain_to(page)
        skip = min(skip, len(chain) - 1)
        above = chain[skip - 1] if skip else None
        self.say(rank, [BlockStored(chain[skip:], above, [], 16, medium=medium)])

    @rule(page=pages, medium=media)
    def store_on_all(self, page: int, medium: str | None) -> None:
        for rank in range(self.count):
            self.say(rank, [BlockStored(chain_to(page), None, [], 16, medium=medium)])

    @rule(rank=ranks, hashes=st.lists(pages, min_size=1, max_size=8), medium=media)
    def remove(self, rank: int, hashes: list[int], medium: str | None) -> None:
        self.say(rank, [BlockRemoved(hashes, medium)])

    @rule(rank=ranks)
    def clear(self, rank: int) -> None:
        self.say(rank, [AllBlocksCleared()])

    @rule(rank=ranks, page=pages, hashes=st.lists(pages, min_size=1, max_size=8))
    def many_in_one_batch(self, rank: int, page: int, hashes: list[int]) -> None:
        chain = BlockStored(chain_to(page), None, [], 16, medium=Tier.DRAM.value)
        gone = BlockRemoved(hashes, Tier.DRAM.value)
        rank %= self.count
        held = replay([chain, gone, chain])
        self.hear(self.ours.replace(rank, [chain, gone, chain]))
        self.oracle[rank] = held

    @rule(rank=ranks, held=st.sets(st.tuples(pages, st.sampled_from(list(Tier)))))
    def taken_anew(self, rank: int, held: Held) -> None:
        """Events were lost: the rank's snapshot says something else than what was heard."""
        rank %= self.count
        events: list[Event] = [
            BlockStored([page], PARENT[page], [], 16, medium=tier.value)
            for page, tier in sorted(held, key=lambda item: (item[0], item[1].value))
        ]
        self.hear(self.ours.replace(rank, events))
        self.oracle[rank] = held

    @invariant()
    def agrees_with_the_oracle(self) -> None:
        self.ours.check()
        everywhere = set.intersection(*self.oracle)
        anywhere = set.union(*self.oracle)
        assert self.seen == everywhere
        seq, events = self.ours.snapshot()
        assert seq == self.last_seq == self.ours.last_seq
        assert replay(events) == everywhere
        self.parents_come_first(events)
        stats = self.ours.stats()
        assert stats["residency_pages"] == len(everywhere)
        assert stats["residency_partial_pages"] == len(anywhere - everywhere)

    def parents_come_first(self, events: list[Event]) -> None:
        for tier in Tier:
            stored = [e for e in events if isinstance(e, BlockStored) and e.medium == tier.value]
            order = [key for event in stored for key in event.block_hashes]
            assert len(set(order)) == len(order)
            for position, key in enumerate(order):
                above = PARENT[key]
                assert above is None or above not in order[position:]


TestIntersection = IntersectionMachine.TestCase
TestIntersection.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
