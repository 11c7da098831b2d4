"""Sources against instances that change, lose batches, repeat them and boot again.

No sockets: the machine hands a ``Source`` what its socket and its snapshot request would give. The
oracle is every instance's own set of pages by tier. Whenever a source says that it is exact, the
tree holds exactly that; whatever happens to one instance, the others' pages stay as they are.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from oracle.global_tree import FlatTree
from sglang_memserve.errors import MemServeError
from sglang_memserve.protocol import PROTOCOL_VERSION
from sglang_memserve.protocol.events import (
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    Event,
    EventBatch,
    Snapshot,
)
from sglang_memserve.protocol.handshake import layout_hash
from sglang_memserve.protocol.http import InstanceInfo
from sglang_memserve.router.tree.merged import merged_tree
from sglang_memserve.router.tree.source import (
    LAG_S,
    SnapshotReason,
    Source,
    SourceState,
    _OutOfStep,
)
from sglang_memserve.types import InstanceId, Namespace, ShortKey, Tier

URLS = [InstanceId(f"http://host{number}:1") for number in range(3)]
SPACE = Namespace("model", "1", "bfloat16", 16, 1, 1, 1, 1, 0, 1)
PAGES = 24
MOST_PAGES = 30
who = st.sampled_from(URLS)
tiers = st.sampled_from(Tier)


def chain_to(page: int) -> list[int]:
    """Page p hangs under p // 2."""
    chain = [page]
    while chain[0] > 1:
        chain.insert(0, chain[0] // 2)
    return chain


@dataclass
class Instance:
    """One boot. ``sent``: batches on their way, in the order in which they arrive."""

    source: Source
    seq: int = -1
    sent: list[tuple[int, list[Event]]] = field(default_factory=list)
    history: list[tuple[int, list[Event]]] = field(default_factory=list)


class SourceMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.boots = 0
        self.tree = merged_tree()
        self.truth = FlatTree()
        self.instances: dict[InstanceId, Instance] = {}
        for url in URLS:
            self.boot(url)

    def boot(self, url: InstanceId) -> None:
        self.boots += 1
        info = InstanceInfo(
            protocol=PROTOCOL_VERSION,
            url=url,
            generation=f"boot {self.boots}",
            role="both",
            model_path="/m",
            served_model_name="m",
            layout_hash=layout_hash(SPACE),
            namespace=SPACE,
            page_size=16,
            context_length=1,
            max_total_tokens=1,
            events_address="",
            ranks=[],
        )
        source = Source(
            info,
            self.tree,
            self.never,
            clock=lambda: self.now,
            wall_clock=lambda: self.now,
            most_pages=MOST_PAGES,
        )
        self.instances[url] = Instance(source)
        self.truth.drop(url)

    async def never(self, _: InstanceId) -> Snapshot:
        raise AssertionError("the machine takes the snapshots")

    # -- what instances do --

    def publish(self, url: InstanceId, event: Event) -> None:
        self.truth.apply(url, event)
        instance = self.instances[url]
        instance.seq += 1
        instance.sent.append((instance.seq, [event]))
        instance.history.append((instance.seq, [event]))

    @rule(url=who, page=st.integers(1, PAGES), skip=st.integers(0, 3), tier=tiers)
    def store(self, url: InstanceId, page: int, skip: int, tier: Tier) -> None:
        chain = chain_to(page)
        skip = min(skip, len(chain) - 1)
        above = chain[skip - 1] if skip else None
        self.publish(url, BlockStored(chain[skip:], above, [], 16, medium=tier.value))

    @rule(url=who, pages=st.lists(st.integers(1, PAGES), min_size=1, max_size=6), tier=tiers)
    def remove(self, url: InstanceId, pages: list[int], tier: Tier) -> None:
        self.publish(url, BlockRemoved(pages, medium=tier.value))

    @rule(url=who)
    def flush(self, url: InstanceId) -> None:
        self.publish(url, AllBlocksCleared())

    @rule(url=who)
    def boot_again(self, url: InstanceId) -> None:
        """As ``Feed.joined`` with another generation."""
        others = [other for other in URLS if other != url]
        before = [self.tiers_of(page, other) for other in others for page in range(1, PAGES + 1)]
        self.tree.drop(url)
        self.boot(url)
        after = [self.tiers_of(page, other) for other in others for page in range(1, PAGES + 1)]
        assert after == before

    # -- what the network does --

    @rule(url=who, count=st.integers(1, 8))
    def deliver(self, url: InstanceId, count: int) -> None:
        instance = self.instances[url]
        if instance.source.state is SourceState.SYNCING:
            return  # they wait in the socket
        for _ in range(min(count, len(instance.sent))):
            self.hand_over(instance, *instance.sent.pop(0))

    @rule(url=who)
    def lose(self, url: InstanceId) -> None:
        del self.instances[url].sent[:1]

    @rule(url=who, back=st.integers(1, 5))
    def repeat(self, url: InstanceId, back: int) -> None:
        instance = self.instances[url]
        if instance.source.state is not SourceState.SYNCING:
            for batch in instance.history[-back:][:1]:
                self.hand_over(instance, *batch)

    def hand_over(self, instance: Instance, seq: int, events: list[Event]) -> None:
        try:
            instance.source._apply(seq, EventBatch(self.now, events))
        except _OutOfStep as error:
            instance.source._parted(error.reason, str(error))
        except MemServeError as error:
            instance.source._parted(SnapshotReason.MALFORMED, str(error))

    @rule(url=who)
    def take_snapshot(self, url: InstanceId) -> None:
        """True when it is made; what was sent before may still come after it."""
        instance = self.instances[url]
        held = self.truth.held.get(url, set())
        events: list[Event] = [
            BlockStored([page], page // 2 if page > 1 else None, [], 16, medium=tier.value)
            for page, tier in sorted(held, key=lambda one: (one[0], one[1].value))
        ]
        generation = instance.source.generation
        instance.source._take(Snapshot(generation, instance.seq, events))

    @rule(url=who)
    def a_heartbeat_tells(self, url: InstanceId) -> None:
        """Twice, far enough apart: what was lost at the end is noticed."""
        instance = self.instances[url]
        if instance.source.state is SourceState.SYNCING:
            return
        instance.source.told_of(instance.seq)
        for _ in range(2):
            try:
                instance.source._require_progress()
            except _OutOfStep as error:
                instance.source._parted(error.reason, str(error))
            self.now += LAG_S + 0.1

    # -- what must hold --

    @invariant()
    def exact_means_exact(self) -> None:
        self.tree.check()
        for url, instance in self.instances.items():
            source = instance.source
            assert self.tree.held(url) <= MOST_PAGES
            if source.state is not SourceState.EXACT or source.status().seq < instance.seq:
                continue
            held = {
                (page, tier) for page in range(1, PAGES + 1) for tier in self.tiers_of(page, url)
            }
            assert held == self.truth.held.get(url, set()), url

    @invariant()
    def full_is_right_as_far_as_it_goes(self) -> None:
        for url, instance in self.instances.items():
            source = instance.source
            if source._full_since is None or source.status().seq < instance.seq:
                continue
            truth = self.truth.held.get(url, set())
            for page in range(1, PAGES + 1):
                assert {(page, tier) for tier in self.tiers_of(page, url)} <= truth

    def tiers_of(self, page: int, url: InstanceId) -> frozenset[Tier]:
        return self.tree.holders(ShortKey(page)).get(url, frozenset())

    def teardown(self) -> None:
        """After quiet: one snapshot each, and everybody is exact or says that it is full."""
        for url in URLS:
            self.take_snapshot(url)
            source = self.instances[url].source
            too_many = len(self.truth.held.get(url, set())) > MOST_PAGES
            assert source.state is (SourceState.DEGRADED if too_many else SourceState.EXACT)
        self.exact_means_exact()


TestSources = SourceMachine.TestCase
TestSources.settings = settings(max_examples=150, stateful_step_count=50, deadline=None)
