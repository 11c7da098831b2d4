"""One request through the fleet: ``request.steps`` and ``request.forward`` in virtual time.

    source --fetch--> P computes the prompt --pages, as they are computed--> D fetches
                              |                                                  |
                              +---- P is done: D gets a bounded grace ----------+--> D serves

The decision, its booking and everything that is learnt from what it came to are the router's own
code; what is written anew here is the order of the steps, since theirs is made of HTTP.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from sglang_memserve.types import InstanceId, PageKey

from ..cost.backlog import Ending
from ..cost.bookings import Booking, Order
from ..cost.spells import Computed
from ..members.member import InFlight, Outcome
from ..request.placement import Holdings, Keyed, decide, look_up, prompt_of
from ..values import Plan
from .engine import Job, Prefilled
from .moves import Fetched, Following, Handing, fetch
from .report import Served

if TYPE_CHECKING:
    from .fleet import Fleet

_Then = Callable[[Fetched], None]


class Journey:
    """Ends by itself: every wait in it has a deadline, and instances serve what they accept."""

    def __init__(
        self,
        fleet: Fleet,
        keyed: Keyed,
        output_tokens: int,
        session: str | None,
        answered_keys: Sequence[PageKey],
        served: Served,
    ) -> None:
        self._fleet = fleet
        self._keyed = keyed
        self._keys = keyed.chains[0].keys
        self._output_tokens = output_tokens
        self._session = session
        self._answered_keys = answered_keys
        self._served = served
        self._plan: Plan
        self._booking: Booking
        self._decode_pages = 0
        self._fetched_pages = 0
        self._given_pages = 0

    def begin(self) -> None:
        fleet, keyed = self._fleet, self._keyed
        holdings = look_up(fleet.known, keyed)
        plan, views = decide(
            fleet.members, fleet.policy, keyed, holdings, self._session, (), fleet.bookings
        )
        order = Order(prompt_of(keyed, self._session), keyed.one_chain(), Ending.SEEN)
        self._plan, self._booking = plan, fleet.bookings.book(plan, order, views)
        self._served.plan = plan
        fleet.rotation.advance()
        if fleet.sent is not None:
            fleet.sent.remember(plan.prefill or plan.decode, keyed.chains[0])
            # Believed, not known: whoever computes finds out.
            holdings = Holdings(({},), {})
        self._decode_pages = holdings.pages(plan.decode)
        self._carry_out(plan, holdings)

    def _carry_out(self, plan: Plan, holdings: Holdings) -> None:
        prefill = plan.prefill if plan.prefill != plan.decode else None
        source = plan.prefill_source if plan.prefill else plan.decode_source
        if not self._keyed.pages or (
            prefill is not None and self._decode_pages >= self._keyed.pages
        ):
            self._send()
        elif prefill is None:
            if source is None:
                self._send()
            else:
                self._fetch(source, plan.decode, plan, self._fetched_to_decode)
        elif source is not None:
            self._fetch(source, prefill, plan, lambda done: self._gathered(done, prefill))
        elif holdings.pages(prefill) >= self._keyed.pages:
            self._fetch(prefill, plan.decode, None, self._fetched_to_decode)
        else:
            self._compute(prefill, holdings.pages(prefill))

    # -- pages that exist, or are expected --

    def _fetch(
        self, source: InstanceId, target: InstanceId, plan: Plan | None, then: _Then
    ) -> None:
        """``plan``: says how long its pages may take to come."""
        fleet, deadlines = self._fleet, self._fleet.deadlines
        limit_s = deadlines.most_existing_s
        one, two = fleet.sites[source], fleet.sites[target]
        keys, wait_s = self._keys, 0.0
        if plan is not None and plan.wait_s > 0:
            wait_s = deadlines.wait_s(plan.wait_s)
            keys = keys[: plan.held_pages]
        until = fleet.agenda.now + wait_s
        size = self._keyed.pages * fleet.costs.page_bytes
        beside = max(fleet.costs.flows.beside_bytes(source, target, size) - size, 0.0)

        def arrived(done: Fetched) -> None:
            if done.moved and not wait_s:
                moved = done.moved * fleet.costs.page_bytes
                fleet.costs.observe_transfer(source, target, moved, done.seconds, beside)
            then(done)

        def start() -> None:
            late, hold_s = until + limit_s, deadlines.hold_s
            fetch(fleet.network, fleet.agenda, one, two, keys, late, hold_s, arrived)

        def ask() -> None:
            if wait_s and one.movable(keys) < len(keys):
                one.once_held(keys[-1], until, start)
            else:
                start()

        fleet.agenda.after(fleet.profile.hop_s, ask)

    def _fetched_to_decode(self, done: Fetched) -> None:
        self._decode_pages = max(self._decode_pages, done.readable)
        self._fetched_pages = done.moved
        self._send()

    def _gathered(self, done: Fetched, prefill: InstanceId) -> None:
        self._fetched_pages = done.moved
        self._compute(prefill, done.readable)

    # -- computing on P while D fetches --

    def _compute(self, prefill: InstanceId, held_pages: int) -> None:
        fleet, keyed = self._fleet, self._keyed
        site, decode = fleet.sites[prefill], fleet.sites[self._plan.decode]
        site.prefills += 1
        self._served.handed_over = True
        flight = fleet.members.begin(prefill, keyed.tokens - keyed.bounded_tokens(held_pages))
        fleet.spells.begin(prefill, fleet.agenda.now)
        view = next(view for view in fleet.members.views({}) if view.id == prefill)
        if view.waiting_requests:
            fleet.spells.spoil(prefill)
        found: list[Prefilled] = []

        def handed_over(done: Fetched) -> None:
            if not following.late:
                fleet.costs.observe_tail(prefill, decode.id, done.moved, done.seconds)
            self._decode_pages = max(self._decode_pages, done.readable)
            self._send()

        def done() -> None:
            self._learn(prefill, flight, found[0])
            predicted_s = fleet.costs.predict_prefill_s(decode.id, keyed.tokens, 0)
            limits = fleet.deadlines
            grace_s = max(limits.least_grace_s, min(limits.grace_s, predicted_s))
            following.complete(grace_s)

        kind = Following
        if fleet.sent is not None:
            kind, self._given_pages = Handing, keyed.pages
        following = kind(
            fleet.network,
            fleet.agenda,
            (site, decode),
            self._keys,
            fleet.deadlines.hold_s,
            handed_over,
        )
        job = Job(self._keys, keyed.tokens, 0, following.offer, found.append, done)
        fleet.agenda.after(fleet.profile.hop_s, lambda: site.engine.submit(job))

    def _learn(self, prefill: InstanceId, flight: InFlight, found: Prefilled) -> None:
        fleet = self._fleet
        flight.end(Outcome.SUCCEEDED)
        self._booking.prefilled()
        self._count(found)
        cached = self._keyed.tokens - found.new_tokens
        spell = fleet.spells.end(prefill, fleet.agenda.now, Computed(found.new_tokens, cached))
        if spell is not None:
            fleet.costs.observe_spell(prefill, spell)

    # -- the client's own request --

    def _send(self) -> None:
        fleet, target = self._fleet, self._plan.decode
        site = fleet.sites[target]
        site.decodes += 1
        view = next(view for view in fleet.members.views({}) if view.id == target)
        idle = not (view.running_requests or view.waiting_requests)
        uncached = self._keyed.tokens - self._keyed.bounded_tokens(self._decode_pages)
        sent_at = fleet.agenda.now
        flight = fleet.members.begin(target, uncached)
        self._booking.arrived()

        def first_token(found: Prefilled) -> None:
            flight.computed()
            self._booking.computed()
            if idle:
                cached = self._keyed.tokens - uncached
                seconds = fleet.agenda.now - sent_at
                fleet.costs.observe_prefill(target, uncached, cached, seconds)
            self._served.first_token_s = fleet.agenda.now
            if self._served.handed_over:
                self._served.again_tokens = found.new_tokens
            else:
                self._count(found)

        def done() -> None:
            flight.end(Outcome.SUCCEEDED)
            self._booking.release()
            self._served.ended_s = fleet.agenda.now
            fleet.ended()

        job = Job(
            self._keys,
            self._keyed.tokens,
            self._output_tokens,
            _nobody,
            first_token,
            done,
            self._given_pages,
            self._answered_keys,
        )
        fleet.agenda.after(fleet.profile.hop_s, lambda: site.engine.submit(job))

    def _count(self, found: Prefilled) -> None:
        """Where the prompt's tokens came from."""
        size, served = self._keyed.page_size, self._served
        fetched = min(self._fetched_pages, found.dram_pages)
        served.hbm_tokens = found.hbm_pages * size
        served.dram_tokens = (found.dram_pages - fetched) * size
        served.fetched_tokens = fetched * size
        served.computed_tokens = found.new_tokens


def _nobody(pages: int) -> None:
    """Nobody follows what the decode instance computes."""
