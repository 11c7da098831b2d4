"""What the router has decided and not yet seen done: work, seats, pages and bytes. Pure.

A decision is booked the moment it is made. Between it and the request's arrival at the decode
instance lie a prefill and a transfer, and a hundred other decisions, which would all find the same
instance idle. So every plan leaves, until the part of it is done:

    where it computes    its predicted seconds (``backlog``), the pages it will hold (``coming``)
    where it decodes     a seat, its prompt's KV slots, the seconds of the rest
    in between           its bytes on the move (``flows``)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from sglang_memserve.types import InstanceId, ShortKey

from ..values import InstanceView, Match, Plan, Prompt
from .backlog import Backlog, Ending, Work
from .coming import Coming, Promise
from .flows import Flow
from .learned import CostModel


class Share(NamedTuple):
    """What is booked at one instance, as a view needs it."""

    queue_s: float = 0.0
    seats: int = 0
    tokens: int = 0
    coming_pages: int = 0
    coming_s: float = 0.0


NO_SHARE = Share()


@dataclass(slots=True)
class _Seats:
    taken: int = 0
    tokens: int = 0


@dataclass(frozen=True, slots=True)
class Order:
    """What is to be booked. ``keys``: the prompt's pages in the tree's form, empty for several
    prompts. ``ending``: whether the decode instance tells when it has computed the prompt."""

    prompt: Prompt
    keys: Sequence[ShortKey]
    ending: Ending


class Booking:
    """One plan's marks. Each ``*ed`` says that a part is done; ``release`` takes back the rest.
    All are idempotent."""

    def __init__(self, bookings: Bookings) -> None:
        self._bookings = bookings
        self._prefill: tuple[Backlog, Work] | None = None
        self._decode: tuple[Backlog, Work] | None = None
        self._seat: tuple[InstanceId, int] | None = None
        self._moves: list[Flow] = []
        self._promises: list[Promise] = []

    def prefilled(self) -> None:
        """The prefill instance is done, or has failed."""
        if self._prefill is not None:
            backlog, work = self._prefill
            backlog.end(work, self._bookings.now())
            self._prefill = None

    def arrived(self) -> None:
        """Everything before decode is done: the request goes to the decode instance now, which
        counts it itself."""
        self.prefilled()
        while self._moves:
            self._moves.pop().end()
        if self._seat is not None:
            self._bookings._stand_up(*self._seat)
            self._seat = None

    def computed(self) -> None:
        """The decode instance answers, or has failed."""
        if self._decode is not None:
            backlog, work = self._decode
            backlog.end(work, self._bookings.now())
            self._decode = None
        while self._promises:
            self._bookings.coming.withdraw(self._promises.pop())

    def release(self) -> None:
        self.arrived()
        self.computed()


class Bookings:
    """All of them; empty when nothing is in flight. Owned by one event loop."""

    def __init__(self, clock: Callable[[], float], costs: CostModel) -> None:
        self.now = clock
        self.coming = Coming()
        self._costs = costs
        self._backlogs: dict[InstanceId, Backlog] = {}
        self._seats: dict[InstanceId, _Seats] = {}

    def share(self, instance: InstanceId, match: Match, keys: Sequence[ShortKey]) -> Share:
        """For a request with ``keys``, of which ``instance`` holds ``match``."""
        backlog, seats, now = self._backlogs.get(instance), self._seats.get(instance), self.now()
        expected = self.coming.expected(instance, keys, match.pages, now)
        if not backlog and seats is None and expected is None:
            return NO_SHARE
        return Share(
            backlog.remaining_s(now) if backlog else 0.0,
            seats.taken if seats is not None else 0,
            seats.tokens if seats is not None else 0,
            expected.pages if expected is not None else 0,
            expected.in_s if expected is not None else 0.0,
        )

    def book(self, plan: Plan, order: Order, views: Sequence[InstanceView]) -> Booking:
        """Of a plan that was made from ``views``, at once. The caller releases it."""
        by_id = {view.id: view for view in views}
        decode, now = by_id[plan.decode], self.now()
        booking = Booking(self)
        booking._seat = (decode.id, order.prompt.tokens)
        seats = self._seats.setdefault(decode.id, _Seats())
        seats.taken += 1
        seats.tokens += order.prompt.tokens
        at = by_id[plan.prefill] if plan.prefill is not None else decode
        source = plan.prefill_source if plan.prefill is not None else plan.decode_source
        fetched = max(plan.held_pages - at.match.pages, 0) if source is not None else 0
        ready_s = at.queue_s
        if source is not None and fetched:
            ready_s = max(
                ready_s, plan.wait_s + self._costs.predict_transfer_s(source, at.id, fetched)
            )
            booking._moves.append(self._costs.begin_transfer(source, at.id, fetched, plan.wait_s))
        held = plan.held_pages * order.prompt.page_size
        compute_s = self._costs.predict_prefill_s(at.id, order.prompt.tokens - held, held)
        ready_s += compute_s
        if source is None:
            # Whoever comes next queues behind it there. While it fetches first, it does not.
            self._promise(booking, at, order, now + ready_s)
        if at is decode:
            booking._decode = self._work(decode.id, compute_s, now, order.ending)
            return booking
        booking._prefill = self._work(at.id, compute_s, now, Ending.SEEN)
        self._book_decode(booking, at, decode, order, compute_s)
        return booking

    def _book_decode(
        self,
        booking: Booking,
        prefill: InstanceView,
        decode: InstanceView,
        order: Order,
        compute_s: float,
    ) -> None:
        size = order.prompt.page_size
        whole = max(order.prompt.tokens - 1, 0) // size
        moved = max(whole - decode.match.pages, 0)
        if moved:
            flow = self._costs.begin_transfer(prefill.id, decode.id, moved, compute_s)
            booking._moves.append(flow)
        tail_s = self._costs.predict_prefill_s(
            decode.id, order.prompt.tokens - whole * size, whole * size
        )
        booking._decode = self._work(decode.id, tail_s, self.now(), Ending.ASSUMED)

    def _promise(self, booking: Booking, view: InstanceView, order: Order, due_at: float) -> None:
        keys = order.keys[view.match.pages :]
        if keys and view.can_fetch:
            booking._promises.append(self.coming.promise(view.id, keys, due_at))

    def _work(
        self, instance: InstanceId, seconds: float, now: float, ending: Ending
    ) -> tuple[Backlog, Work]:
        backlog = self._backlogs.setdefault(instance, Backlog())
        return backlog, backlog.add(seconds, now, ending)

    def _stand_up(self, instance: InstanceId, tokens: int) -> None:
        seats = self._seats[instance]
        seats.taken -= 1
        seats.tokens -= tokens
        if not seats.taken:
            del self._seats[instance]

    def forget(self, instance: InstanceId) -> None:
        """It left, or another boot of it is there now. Bookings of the old one may still end."""
        self._backlogs.pop(instance, None)

    def check(self) -> None:
        self.coming.check()
        self._costs.flows.check()
        for backlog in self._backlogs.values():
            backlog.check()
        assert all(seats.taken > 0 <= seats.tokens for seats in self._seats.values())
