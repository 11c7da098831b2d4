"""Holds over an index against an oracle that is a list and scans, over random programs."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    precondition,
    rule,
)
from sglang_memserve.index.holds import Hold, Holds
from sglang_memserve.index.local_index import LocalIndex
from sglang_memserve.types import BlockId, Eviction, HoldOutcome, PageKey

BLOCKS = 14
MOST = 3

# Two letters and up to five pages: chains share heads and fork often.
prefixes = st.lists(st.integers(0, 1), min_size=1, max_size=5).map(tuple)


def chain_of(prefix: tuple[int, ...]) -> list[PageKey]:
    ends = range(1, len(prefix) + 1)
    return [PageKey(hashlib.sha256(bytes(prefix[:end])).digest()) for end in ends]


@dataclass
class Known:
    """A hold that pins."""

    last: PageKey
    blocks: list[BlockId]
    ends_s: float


class HoldsMachine(RuleBasedStateMachine):
    waiting = Bundle("waiting")

    @initialize(share=st.sampled_from([0.2, 0.5, 1.0]))
    def start(self, share: float) -> None:
        self.now = 0.0
        self.share = share
        self.limit = BLOCKS
        self.index = LocalIndex(BLOCKS, Eviction.LRU)
        self.free = set(range(BLOCKS))
        self.holds = Holds(self.index, share, MOST, self.free.update)
        self.known: list[Known] = []
        self.unclaimed: list[Hold] = []

    def blocks_held(self) -> set[BlockId]:
        return {block for known in self.known for block in known.blocks}

    # -- pages come and go --

    @rule(prefix=prefixes)
    def store(self, prefix: tuple[int, ...]) -> None:
        keys = chain_of(prefix)
        missing = [at for at, key in enumerate(keys) if key not in self.index]
        if len(missing) > len(self.free):
            gone = self.index.evict(len(missing) - len(self.free))
            assert not set(gone.blocks) & self.blocks_held(), "a held page was evicted"
            self.free.update(gone.blocks)
        # Eviction may have taken the head of this chain.
        missing = [at for at, key in enumerate(keys) if key not in self.index]
        blocks = [BlockId(self.free.pop()) for _ in missing[: len(self.free)]]
        missing = missing[: len(blocks)]
        self.index.insert(
            [keys[at] for at in missing],
            blocks,
            [keys[at - 1] if at else None for at in missing],
        )

    @rule(prefix=prefixes)
    def remove(self, prefix: tuple[int, ...]) -> None:
        self.free.update(self.index.remove(chain_of(prefix)[-1:]).blocks)

    @rule()
    def flush(self) -> None:
        self.holds.end_all()
        self.known.clear()
        self.free.update(self.index.clear().blocks)

    # -- holds --

    @rule(target=waiting, prefix=prefixes)
    def prepare(self, prefix: tuple[int, ...]) -> Hold:
        hold = self.holds.prepare(chain_of(prefix))
        self.unclaimed.append(hold)
        return hold

    @rule(hold=consumes(waiting))
    def abort(self, hold: Hold) -> None:
        self.holds.abort(hold)
        self.holds.abort(hold)
        self.unclaimed = [other for other in self.unclaimed if other is not hold]
        assert self.holds.complete(hold, self.now + 9) is HoldOutcome.NEEDLESS

    @rule(hold=consumes(waiting), ttl_s=st.sampled_from([1.0, 5.0, 50.0]))
    def complete(self, hold: Hold, ttl_s: float) -> None:
        wanted = any(other is hold for other in self.unclaimed)
        self.unclaimed = [other for other in self.unclaimed if other is not hold]
        outcome = self.holds.complete(hold, self.now + ttl_s)
        assert self.holds.complete(hold, self.now + 99) is HoldOutcome.NEEDLESS
        blocks, last = self.index.match(hold.keys), hold.keys[-1]
        if not wanted or not blocks:
            assert outcome is HoldOutcome.NEEDLESS
            return
        same = [known for known in self.known if known.last == last]
        crowded = len(self.known) >= MOST and not same
        too_much = len(self.blocks_held() | set(blocks)) > self.share * self.limit
        if crowded or too_much or max(blocks) >= self.limit:
            assert outcome is HoldOutcome.REFUSED
            return
        assert outcome is HoldOutcome.HELD
        ends_s = max([self.now + ttl_s, *(known.ends_s for known in same)])
        self.known = [known for known in self.known if known.last != last]
        self.known.append(Known(last, blocks, ends_s))

    @rule(prefix=prefixes, start=st.integers(0, 4))
    def claim(self, prefix: tuple[int, ...], start: int) -> None:
        """What is in HBM already is not looked up: the keys may begin anywhere."""
        keys = chain_of(prefix)[start:]
        self.holds.claim(keys)
        lasts = {known.last for known in self.known} | {hold.keys[-1] for hold in self.unclaimed}
        covered = [key for key in keys if key in lasts]
        if covered:
            self.known = [known for known in self.known if known.last != covered[-1]]
            self.unclaimed = [h for h in self.unclaimed if h.keys[-1] != covered[-1]]

    @rule(step_s=st.sampled_from([0.5, 1.0, 7.0, 60.0]))
    def pass_time(self, step_s: float) -> None:
        self.now += step_s
        self.holds.end_expired(self.now)
        self.known = [known for known in self.known if known.ends_s > self.now]

    @rule(limit=st.integers(1, BLOCKS))
    def confine(self, limit: int) -> None:
        self.holds.confine(limit)
        self.limit = limit
        self.known = [known for known in self.known if max(known.blocks) < limit]
        while len(self.blocks_held()) > self.share * limit:
            self.known.pop()

    @precondition(lambda self: hasattr(self, "holds"))
    @invariant()
    def agrees(self) -> None:
        self.index.check()
        self.holds.check()
        pins = Counter(block for known in self.known for block in known.blocks)
        assert self.index.pins() == pins == Counter(self.holds.pinned())
        assert (len(self.holds), self.holds.held_blocks) == (len(self.known), len(pins))
        assert len(self.free) + len(self.index) + len(self.index.orphans()) == BLOCKS


TestHolds = HoldsMachine.TestCase
TestHolds.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
