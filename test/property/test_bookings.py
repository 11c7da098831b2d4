"""What is booked is taken back, whatever happens in between. Its parts against plain oracles."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from sglang_memserve.router.cost.backlog import Backlog, Ending, Work
from sglang_memserve.router.cost.bookings import Booking, Bookings, Order
from sglang_memserve.router.cost.coming import Coming, Promise
from sglang_memserve.router.cost.flows import Flow, Flows
from sglang_memserve.router.cost.learned import CostModel
from sglang_memserve.router.policy.base import Rotation
from sglang_memserve.router.policy.registry import POLICIES, make_policy
from sglang_memserve.router.values import InstanceView, Match, Prompt
from sglang_memserve.types import Generation, InstanceId, Role, ShortKey

PAGE = 16
HOSTS = [InstanceId(f"http://host{number}:1") for number in range(4)]
ROLES = (Role.PREFILL, Role.BOTH, Role.DECODE, Role.DECODE)


def chain(kind: int, pages: int) -> list[ShortKey]:
    """Prefixes of a kind agree; kinds share their first three pages."""
    return [ShortKey(page if page < 3 else 1000 * (kind + 1) + page) for page in range(pages)]


class Booked(RuleBasedStateMachine):
    """Requests at random stages. What is seen of them ends with them."""

    @initialize(policy=st.sampled_from(sorted(POLICIES)))
    def start(self, policy: str) -> None:
        self.now, self.costs, self.rotation = 0.0, CostModel(), Rotation()
        self.bookings = Bookings(lambda: self.now, self.costs)
        self.policy = make_policy(policy, self.rotation, self.costs)
        self.open: list[Booking] = []

    def views(self, keys: Sequence[ShortKey], held: Sequence[int]) -> list[InstanceView]:
        views = []
        for host, role, pages in zip(HOSTS, ROLES, held, strict=True):
            match = Match(min(pages, len(keys)))
            share = self.bookings.share(host, match, keys)
            assert share.coming_pages == 0 or match.pages < share.coming_pages <= len(keys)
            assert share.queue_s >= 0 and share.coming_s >= 0
            views.append(
                InstanceView(
                    host,
                    Generation("g"),
                    role,
                    running_requests=share.seats,
                    queue_s=share.queue_s,
                    coming_pages=share.coming_pages,
                    coming_s=share.coming_s,
                    match=match,
                )
            )
        return views

    @rule(
        kind=st.integers(0, 2),
        pages=st.integers(0, 40),
        held=st.lists(st.integers(0, 40), min_size=4, max_size=4),
        ending=st.sampled_from(list(Ending)),
    )
    def decide(self, kind: int, pages: int, held: list[int], ending: Ending) -> None:
        keys, prompt = chain(kind, pages), Prompt(pages * PAGE + 1, PAGE)
        views = self.views(keys, held)
        plan = self.policy.decide(prompt, views)
        self.rotation.advance()
        self.open.append(self.bookings.book(plan, Order(prompt, keys, ending), views))

    @rule(seconds=st.floats(0, 100))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @precondition(lambda self: self.open)
    @rule(data=st.data(), stage=st.sampled_from(["prefilled", "arrived", "computed", "release"]))
    def advance(self, data: st.DataObject, stage: str) -> None:
        booking = data.draw(st.sampled_from(self.open))
        getattr(booking, stage)()
        if stage == "release":
            self.open.remove(booking)
            booking.release()

    @rule(host=st.sampled_from(HOSTS))
    def leave(self, host: InstanceId) -> None:
        self.bookings.forget(host)

    @invariant()
    def sound(self) -> None:
        if not hasattr(self, "bookings"):
            return
        self.bookings.check()
        if not self.open:
            assert self.costs.flows.count() == 0
            assert not self.bookings.coming.busy()
            for view in self.views(chain(0, 40), [0, 0, 0, 0]):
                assert (view.running_requests, view.coming_pages) == (0, 0)
                assert view.queue_s == 0.0

    def teardown(self) -> None:
        if hasattr(self, "bookings"):
            for booking in self.open:
                booking.release()
            self.open.clear()
            self.sound()


TestBooked = Booked.TestCase
TestBooked.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


operations = st.lists(
    st.tuples(
        st.sampled_from(["add", "assume", "end", "ask"]), st.floats(0, 5), st.integers(0, 30)
    ),
    max_size=60,
)


@settings(deadline=None)
@given(operations)
def test_a_backlog_is_what_its_works_have_left(steps: list[tuple[str, float, int]]) -> None:
    backlog, now = Backlog(), 0.0
    # The oracle: works in order, and since when the first of them is at work.
    works: list[tuple[Work, float, bool]] = []
    since = 0.0
    for step, seconds, which in steps:
        now += seconds
        while works and not works[0][2] and now - since >= works[0][1]:
            since += works.pop(0)[1]
        if step in ("add", "assume"):
            ending = Ending.SEEN if step == "add" else Ending.ASSUMED
            if not works:
                since = now
            works.append((backlog.add(seconds, now, ending), seconds, step == "add"))
        elif step == "end" and works:
            at = which % len(works)
            backlog.end(works[at][0], now)
            backlog.end(works[at][0], now)
            del works[at]
            if at == 0:
                since = now
        while works and not works[0][2] and now - since >= works[0][1]:
            since += works.pop(0)[1]
        expected = 0.0
        if works:
            expected = abs(works[0][1] - (now - since)) + sum(one[1] for one in works[1:])
        assert abs(backlog.remaining_s(now) - expected) < 1e-6
        assert len(backlog) == len(works)
        backlog.check()


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 3), st.integers(0, 30), st.integers(0, 30), st.booleans()),
        max_size=30,
    ),
    st.integers(0, 30),
)
def test_what_is_coming_is_what_was_promised(
    steps: list[tuple[int, int, int, bool]], bound: int
) -> None:
    coming = Coming(max_pages=bound * 4)
    host, made = HOSTS[0], list[tuple[Promise, set[ShortKey]]]()
    for number, (kind, first, pages, withdraw) in enumerate(steps):
        if withdraw and made:
            promise, _ = made.pop(first % len(made))
            coming.withdraw(promise)
            coming.withdraw(promise)
        else:
            keys = chain(kind, first + pages)[first:]
            there = set().union(*(one for _, one in made))
            promise = coming.promise(host, keys, float(number))
            new = set(keys) - there
            assert set(promise.keys) in (new, set())
            made.append((promise, set(promise.keys)))
        coming.check()
        there = set().union(*(one for _, one in made))
        for kind_asked in range(4):
            keys = chain(kind_asked, 40)
            for held in (0, 3, 10):
                expected = coming.expected(host, keys, held, 0.0)
                assert (expected is None) == (keys[held] not in there)
                if expected is not None:
                    assert keys[expected.pages - 1] in there and expected.pages > held
    for promise, _ in made:
        coming.withdraw(promise)
    assert not coming.busy()


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 3), st.integers(0, 3), st.floats(0, 1e9), st.booleans()),
        max_size=30,
    ),
    st.floats(0, 1e9),
)
def test_flows_share_the_busier_end(steps: list[tuple[int, int, float, bool]], size: float) -> None:
    flows, open_ = Flows(), list[tuple[Flow, int, int, float]]()
    for source, target, moved, ends in steps:
        if ends and open_:
            flow, *_ = open_.pop()
            flow.end()
            flow.end()
        else:
            open_.append((flows.begin(HOSTS[source], HOSTS[target], moved), source, target, moved))
        flows.check()
        for one in range(4):
            for two in range(4):
                out = [moved for _, source, _, moved in open_ if source == one]
                into = [moved for _, _, target, moved in open_ if target == two]
                most = max(min(sum(x), len(x) * size) for x in (out, into))
                found = flows.beside_bytes(HOSTS[one], HOSTS[two], size)
                assert abs(found - most) <= 1e-3 + 1e-9 * most
    assert flows.count() == len(open_)
