"""A fleet in virtual time: the router's real decisions over instances that are arithmetic.

An instance computes one prompt after the other at its true costs, which the router does not know
and has to learn; a link carries one transfer after the other; what an instance has computed or
fetched it holds, and its events reach the tree at once. Time passes from event to event.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from sglang_memserve.protocol.events import BlockStored
from sglang_memserve.protocol.handshake import layout_hash
from sglang_memserve.protocol.http import InstanceInfo, RankInfo
from sglang_memserve.router.cost.backlog import Ending
from sglang_memserve.router.cost.bookings import Booking, Bookings, Order
from sglang_memserve.router.cost.learned import CostModel
from sglang_memserve.router.cost.spells import Computed, Spells
from sglang_memserve.router.members.instances import Instances
from sglang_memserve.router.members.member import InFlight, Outcome
from sglang_memserve.router.policy.base import Rotation
from sglang_memserve.router.policy.registry import make_policy
from sglang_memserve.router.request.placement import Keyed, decide, key_prompts, look_up, prompt_of
from sglang_memserve.router.tree.reference import GlobalTree
from sglang_memserve.router.values import Plan
from sglang_memserve.types import InstanceId, Namespace, PageKey, Tier

PAGE = 16
NAMESPACE = Namespace("m", "w", "bfloat16", PAGE, 1, 1, 8, 8, 0, 1)


@dataclass
class Site:
    """One instance. ``rate``: how many times slower than the truth of the fleet it is."""

    id: InstanceId
    rate: float = 1.0
    free_at: float = 0.0
    link_free_at: float = 0.0
    frozen: list[tuple[float, float]] = field(default_factory=list)
    holds_at: dict[PageKey, float] = field(default_factory=dict)
    prefills: int = 0
    decodes: int = 0
    computed_tokens: int = 0

    def leading(self, keys: Sequence[PageKey], now: float) -> int:
        count = 0
        while count < len(keys) and self.holds_at.get(keys[count], now + 1) <= now:
            count += 1
        return count

    def work(self, start: float, seconds: float) -> float:
        """When it is done, standing still while frozen."""
        end = start + seconds
        for begin, over in self.frozen:
            if begin < end and start < over:
                end += over - max(start, begin)
        return end


@dataclass(frozen=True)
class Served:
    plan: Plan
    asked_at: float
    ttft_s: float


class Fleet:
    """``roles`` by instance; ``truth``: seconds of prefill by (new, cached) tokens."""

    def __init__(
        self,
        roles: Sequence[str],
        truth: Callable[[int, int], float],
        *,
        policy: str = "cost",
        bytes_per_s: float = 2e9,
        page_bytes: int = 368_640,
        output_s: float = 0.0,
    ) -> None:
        self.now = 0.0
        self.truth, self.bytes_per_s, self.output_s = truth, bytes_per_s, output_s
        self.tree, self.costs, self.rotation = GlobalTree(), CostModel(), Rotation()
        self.costs.page_bytes = page_bytes
        self.bookings = Bookings(lambda: self.now, self.costs)
        self.instances = Instances(lambda: self.now, expire_s=1e9)
        self.policy = make_policy(policy, self.rotation, self.costs)
        self.spells = Spells()
        self.sites: dict[InstanceId, Site] = {}
        self.served: list[Served] = []
        self.moved_pages = 0
        self.transfers = 0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0
        for number, role in enumerate(roles):
            site = Site(InstanceId(f"http://host{number}:1"))
            self.sites[site.id] = site
            self.instances.register(_info(site.id, number, role))

    def site(self, number: int) -> Site:
        return list(self.sites.values())[number]

    def at(self, when: float, do: Callable[[], None]) -> None:
        self._count += 1
        heapq.heappush(self._events, (when, self._count, do))

    def ask(self, when: float, ids: Sequence[int]) -> None:
        self.at(when, lambda: self._decide(key_prompts([ids], [(None, None)], PAGE)))

    def run(self) -> list[Served]:
        """Until nothing is left to happen."""
        while self._events:
            when, _, do = heapq.heappop(self._events)
            self.now = max(self.now, when)
            do()
            self.bookings.check()
        assert self.costs.flows.count() == 0 and not self.bookings.coming.busy()
        for view in self.instances.views({}, (), self.bookings):
            assert (view.running_requests, view.queue_s) == (0, 0.0), view
        return self.served

    # -- one request --

    def _decide(self, keyed: Keyed) -> None:
        holdings = look_up(self.tree, keyed)
        plan, views = decide(self.instances, self.policy, keyed, holdings, None, (), self.bookings)
        order = Order(prompt_of(keyed, None), keyed.one_chain(), Ending.SEEN)
        booking = self.bookings.book(plan, order, views)
        self.rotation.advance()
        at, asked = plan.prefill or plan.decode, self.now
        source = plan.prefill_source if plan.prefill else plan.decode_source

        def ready() -> None:
            if plan.prefill is None:
                self._send(asked, keyed, plan, booking)
            else:
                self._prefill(asked, keyed, plan, booking)

        if source is None:
            ready()
        else:
            keys = keyed.chains[0].keys[: plan.held_pages]
            self._fetch(source, at, keys, self.now + 2 * plan.wait_s, ready)

    def _fetch(
        self,
        source: InstanceId,
        target: InstanceId,
        keys: Sequence[PageKey],
        until: float,
        then: Callable[[], None],
    ) -> None:
        """What ``source`` has of ``keys``, as soon as that is all or it is ``until``."""
        held = self.sites[source].leading(keys, self.now)
        if held < len(keys) and self.now < until:
            later = min(self.now + 0.01, until)
            self.at(later, lambda: self._fetch(source, target, keys, until, then))
            return
        self._move(source, target, keys[:held], then)

    def _move(
        self,
        source: InstanceId,
        target: InstanceId,
        keys: Sequence[PageKey],
        then: Callable[[], None],
    ) -> None:
        """Booked already, so it is among the flows."""
        one, two, asked = self.sites[source], self.sites[target], self.now
        begin = max(asked, one.link_free_at, two.link_free_at)
        there = [key for key in keys if two.holds_at.get(key, 1e9) > begin]
        if not there:
            self.at(begin, then)
            return
        size = len(there) * self.costs.page_bytes
        end = begin + 0.001 + size / self.bytes_per_s
        one.link_free_at = two.link_free_at = end
        self.transfers += 1
        self.moved_pages += len(there)
        self._will_hold(two, keys, end)
        beside = max(self.costs.flows.beside_bytes(source, target, size) - size, 0.0)

        def arrived() -> None:
            self.costs.observe_transfer(source, target, size, end - asked, beside)
            then()

        self.at(end, arrived)

    def _compute(self, site: Site, keyed: Keyed) -> tuple[float, Computed]:
        keys = keyed.chains[0].keys
        start = max(self.now, site.free_at)
        cached = site.leading(keys, start) * PAGE
        new = keyed.tokens - cached
        site.free_at = site.work(start, site.rate * self.truth(new, cached))
        site.computed_tokens += new
        self._will_hold(site, keys, site.free_at)
        return site.free_at, Computed(new, cached)

    def _will_hold(self, site: Site, keys: Sequence[PageKey], when: float) -> None:
        for key in keys:
            site.holds_at[key] = min(site.holds_at.get(key, when), when)
        keyed = [int.from_bytes(key[:8], "big", signed=True) for key in keys]
        event = BlockStored(keyed, None, [], PAGE, medium=Tier.DRAM.value)
        self.at(when, lambda: self.tree.apply(site.id, event))

    def _prefill(self, asked: float, keyed: Keyed, plan: Plan, booking: Booking) -> None:
        assert plan.prefill is not None
        site = self.sites[plan.prefill]
        site.prefills += 1
        flight = self.instances.begin(site.id, keyed.tokens)
        self.spells.begin(site.id, self.now)
        done, computed = self._compute(site, keyed)

        def answered() -> None:
            flight.end(Outcome.SUCCEEDED)
            booking.prefilled()
            spell = self.spells.end(site.id, self.now, computed)
            if spell is not None:
                self.costs.observe_spell(site.id, spell)
            keys = keyed.chains[0].keys
            self._move(site.id, plan.decode, keys, lambda: self._send(asked, keyed, plan, booking))

        self.at(done, answered)

    def _send(self, asked: float, keyed: Keyed, plan: Plan, booking: Booking) -> None:
        site = self.sites[plan.decode]
        site.decodes += 1
        flight = self.instances.begin(site.id, 0)
        booking.arrived()
        done, _ = self._compute(site, keyed)

        def answered() -> None:
            booking.computed()
            booking.release()
            self.served.append(Served(plan, asked, self.now - asked))
            self.at(self.now + self.output_s, lambda: _end(flight))

        self.at(done, answered)


def _end(flight: InFlight) -> None:
    flight.computed()
    flight.end(Outcome.SUCCEEDED)


def _info(instance: InstanceId, number: int, role: str) -> InstanceInfo:
    return InstanceInfo(
        protocol=1,
        url=instance,
        generation=f"g{number}",
        role=role,
        model_path="/models/m",
        served_model_name="m",
        layout_hash=layout_hash(NAMESPACE),
        namespace=NAMESPACE,
        page_size=PAGE,
        context_length=100_000,
        max_total_tokens=100_000,
        events_address="tcp://a:3",
        ranks=[RankInfo(0, "tcp://a:2", "tcp://a:3", 10, NAMESPACE.block_bytes)],
    )
