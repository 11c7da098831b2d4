"""A router and its instances in virtual time.

The router's half is the product: merged tree, members, cost model, bookings, policies, placement.
The instances are ``instance``, the network between them ``network``; ``journey`` is what happens to
one request. Events and heartbeats reach the router as they would: events after a delay, loads as
old as the last heartbeat.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

from sglang_memserve.config import DEFAULT_EVICTION
from sglang_memserve.errors import ConfigError
from sglang_memserve.protocol.events import Event
from sglang_memserve.types import Eviction, InstanceId, PageKey, Role

from ..cost.bookings import Bookings
from ..cost.learned import CostModel
from ..cost.spells import Spells
from ..http.limits import StepDeadlines
from ..members.instances import Instances
from ..policy.base import Policy, Rotation
from ..policy.registry import POLICIES, make_policy
from ..request.placement import Keyed
from ..tree.merged import Matcher, MergedTree, merged_tree
from .agenda import Agenda
from .approximate import NAME as APPROXIMATE
from .approximate import Approximate, Sent
from .instance import Instance
from .journey import Journey
from .network import Network
from .profile import Profile
from .report import Served, Work

NAMES = (*POLICIES, APPROXIMATE)


@dataclass(frozen=True, slots=True)
class Terms:
    """How the router and its instances are set. ``dram_bytes`` an instance; None: the profile's."""

    policy: str = "cost"
    page_tokens: int = 128
    dram_bytes: int | None = None
    eviction: Eviction = DEFAULT_EVICTION
    bypass_tokens: int | None = None
    heartbeat_s: float = 2.0
    event_delay_s: float = 0.002


class Fleet:
    """One instance for each of ``roles``. Raises ConfigError for terms that do not go together."""

    def __init__(self, profile: Profile, roles: Sequence[Role], terms: Terms) -> None:
        self.profile = profile
        self.terms = terms
        self.agenda = Agenda()
        self.deadlines = StepDeadlines()
        self.network = Network(self.agenda, profile.link)
        self.tree: MergedTree = merged_tree()
        self.costs, self.rotation, self.spells = CostModel(), Rotation(), Spells()
        self.bookings = Bookings(lambda: self.agenda.now, self.costs)
        self.members = Instances(lambda: self.agenda.now, heartbeat_s=terms.heartbeat_s)
        self.sent: Sent | None = None
        self.known: Matcher = self.tree
        self.policy: Policy = self._policy()
        self.sites: dict[InstanceId, Instance] = {}
        self.served: list[Served] = []
        self._open = 0
        self._beating = False
        for number, role in enumerate(roles):
            self._join(InstanceId(f"http://i{number}:1"), role)

    def _policy(self) -> Policy:
        if self.terms.policy == APPROXIMATE:
            self.sent = Sent(self.terms.page_tokens)
            self.known = self.sent.tree
            return Approximate(self.rotation)
        if self.terms.policy not in POLICIES:
            raise ConfigError(
                f"unknown policy {self.terms.policy!r}: choose one of {', '.join(NAMES)}"
            )
        most_wait_s = self.deadlines.most_wait_s
        bypass_tokens = self.terms.bypass_tokens
        return make_policy(self.terms.policy, self.rotation, self.costs, bypass_tokens, most_wait_s)

    def _join(self, id: InstanceId, role: Role) -> None:
        given = self.terms.dram_bytes
        site = Instance(
            id,
            role,
            self.agenda,
            self.profile,
            page_tokens=self.terms.page_tokens,
            dram_bytes=self.profile.dram_bytes if given is None else given,
            eviction=self.terms.eviction,
            publish=self._publish,
        )
        self.sites[id] = site
        self.costs.page_bytes = site.page_bytes
        self.members.register(site.info())

    def _publish(self, instance: InstanceId, event: Event) -> None:
        if self.sent is None:
            delay_s = self.terms.event_delay_s
            self.agenda.after(delay_s, lambda: self.tree.apply(instance, event))

    # -- running --

    def submit(
        self,
        at_s: float,
        keyed: Keyed,
        output_tokens: int,
        session: str | None = None,
        answered_keys: Sequence[PageKey] = (),
    ) -> Served:
        """A request that comes at ``at_s``; its record is filled in while it is served.
        ``answered_keys``: ``engine.Job``."""
        served = Served(at_s, keyed.tokens, output_tokens)
        self.served.append(served)
        slots = self.profile.hbm_tokens // self.terms.page_tokens * self.terms.page_tokens
        if keyed.tokens + output_tokens > slots:
            served.refused = True
            return served
        self._open += 1
        journey = Journey(self, keyed, output_tokens, session, answered_keys, served)
        self.agenda.at(at_s, journey.begin)
        return served

    def ended(self) -> None:
        self._open -= 1

    def run(self, until: float = inf) -> list[Served]:
        """Until every request has ended, or it is ``until``."""
        if not self._beating:
            self._beating = True
            self._beat()
        self.agenda.run(until)
        assert until < inf or not self._open, f"{self._open} requests never end"
        return self.served

    def _beat(self) -> None:
        for site in self.sites.values():
            self.members.heartbeat(site.heartbeat())
        if self._open:
            self.agenda.after(self.terms.heartbeat_s, self._beat)
        else:
            self._beating = False

    def work(self) -> list[Work]:
        """What each instance did, as shares of the time until the last request ended."""
        ends = [one.ended_s for one in self.served if one.ended_s is not None]
        whole = max([*ends, 0.0]) - min([*(one.arrived_s for one in self.served), 0.0])
        whole = whole or 1.0
        return [
            Work(
                site.id,
                site.role.value,
                site.engine.prefill_s / whole,
                site.engine.decode_s / whole,
                site.prefills,
                site.decodes,
                site.engine.computed_tokens,
            )
            for site in self.sites.values()
        ]

    def check(self) -> None:
        """After ``run``: everything is conserved, and nothing is left of what has ended."""
        for site in self.sites.values():
            site.check()
        self.members.check()
        self.network.check()
        self.bookings.check()
        self.spells.check()
        if self._open:
            return
        assert not self.network.busy() and not self.bookings.coming.busy()
        assert self.costs.flows.count() == 0
        for site in self.sites.values():
            assert site.engine.idle() and not site.memory.hbm.private, site.id
            assert not site.memory.hbm.index.pinned_blocks, site.id
        for view in self.members.views({}, (), self.bookings):
            assert (view.in_flight_prefill_tokens, view.queue_s) == (0, 0.0), view
