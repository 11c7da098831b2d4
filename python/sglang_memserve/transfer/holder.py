"""One source of one fetch: greets it and keeps a few rounds under way. Part of ``state.Fetch``."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from ..errors import MemServeError
from ..protocol.control import ErrorReply, HelloReply, LeaseReply, Message
from .base import ReadState
from .outcome import Ending, Outcome, ending_of, outcome_of
from .port import Port, Task
from .round import Phase, Round

_LOOK_PAGES = 256
# How often a source's memory may change during one fetch.
_MAX_UPDATES = 8


class Span(NamedTuple):
    """Pages ``first`` to ``stop``; ``tried``: the sources that have already been asked."""

    first: int
    stop: int
    tried: frozenset[int] = frozenset()


class Holder:
    """``first`` to ``stop``: the pages this source may be asked for.

    ``landed(first, stop)`` is called for pages that are readable here now. ``dropped`` collects
    what this source cannot give, and why: the fetch takes it from there. ``ending`` is set when the
    source failed; rounds under way then still end in their own time.
    """

    def __init__(
        self,
        task: Task,
        port: Port | Ending,
        index: int,
        first: int,
        stop: int,
        landed: Callable[[int, int], None],
    ) -> None:
        self.index = index
        self.first = first
        self.stop = stop
        self.fetched_pages = 0
        self.dropped: list[tuple[Span, Ending]] = []
        self.rounds: list[tuple[Round, Span]] = []
        self.failure: Ending | None = None
        self.ending: Ending | None = None
        self._task = task
        self._known_port: Port | None = None
        if isinstance(port, Ending):
            self.ending = self.failure = port
        else:
            self._known_port = port
        self._landed = landed
        self._todo: deque[Span] = deque()
        self._gaps: list[Span] = []
        self._recheck_s = task.deadline_s
        self._hello_id: int | None = None
        self._hello_until_s = task.deadline_s
        self._regreeted = False
        self._updates = 0

    @property
    def busy(self) -> bool:
        waits = self._todo or self._gaps or self._hello_id is not None
        return bool(self.rounds) or (self.ending is None and bool(waits))

    @property
    def wake_s(self) -> float:
        times = [round_.wake_s for round_, _ in self.rounds]
        if self._gaps:
            times.append(self._recheck_s)
        if self._hello_id is not None:
            times.append(self._hello_until_s)
        return min(times, default=self._task.deadline_s)

    # -- events --

    def give(self, span: Span) -> None:
        assert self.ending is None and self.index not in span.tried, (self.ending, span)
        self._todo.append(span)

    def on_reply(self, request_id: int, message: Message, now: float) -> bool:
        """Whether it is the answer to something, or says nothing new about a lease that is held."""
        if request_id == self._hello_id:
            self._hello_id = None
            self._on_greeted(message)
            return True
        for round_, _ in self.rounds:
            if round_.request_id == request_id:
                round_.on_reply(message, now)
                self._after(round_, now)
                return True
        held = {round_.lease_id for round_, _ in self.rounds}
        return not isinstance(message, LeaseReply) or message.lease_id in held

    def on_read_ended(self, handle: int, state: ReadState, now: float) -> bool:
        for round_, _ in self.rounds:
            if round_.read_handle == handle:
                round_.on_read_ended(state, now)
                self._after(round_, now)
                return True
        return False

    def on_verified(self, ticket: int, damaged: int | None, now: float) -> bool:
        for round_, _ in self.rounds:
            if round_.ticket == ticket:
                round_.on_verified(damaged)
                self._after(round_, now)
                return True
        return False

    def on_time(self, now: float) -> None:
        if self._hello_id is not None and now >= self._hello_until_s:
            self._hello_id = None
            self._port.forget()
            text = f"no answer to a greeting in {self._task.settings.reply_timeout_s:g} s"
            self._fail(Ending(Outcome.PEER_UNREACHABLE, text))
        for round_, _ in list(self.rounds):
            round_.on_time(now)
            self._after(round_, now)
        if self._gaps and now >= self._recheck_s:
            self._todo.extendleft(reversed(self._gaps))
            self._gaps.clear()

    def on_pages_readable(self) -> None:
        self._gaps = [rest for span in self._gaps if (rest := self._trim(span)) is not None]

    def step(self, now: float) -> None:
        """Ask for more, if there is more to ask for and room for another round."""
        if self.ending is not None or self._hello_id is not None:
            return
        settings = self._task.settings
        leasing = any(round_.phase is Phase.LEASING for round_, _ in self.rounds)
        if leasing or len(self.rounds) >= settings.rounds:
            return
        span = self._next_span()
        if span is None:
            return
        greeting = self._port.greeting()
        if greeting is None:
            self._hello_until_s = now + settings.reply_timeout_s
            self._hello_id = self._port.send(self._task.hello)
            self._todo.appendleft(span)
            return
        stop = min(span.stop, span.first + settings.round_pages(self._task.pool.block_bytes))
        if stop < span.stop:
            self._todo.appendleft(span._replace(first=stop))
        round_ = Round(self._task, self._port, greeting, span.first, stop)
        self.rounds.append((round_, span._replace(stop=stop)))
        round_.lease(now)

    def cancel(self, ending: Ending) -> None:
        """The fetch is over: end everything now."""
        if self._hello_id is not None and ending.outcome is Outcome.DEADLINE:
            ending = Ending(Outcome.PEER_UNREACHABLE, "no answer to a greeting")
        if self.busy and self.ending is None:
            self._fail(ending)
        for round_, span in self.rounds:
            round_.end(ending)
            self._drop(Span(round_.first, round_.stop, span.tried), ending)
        self.rounds.clear()

    # -- inside --

    @property
    def _port(self) -> Port:
        assert self._known_port is not None, self.ending
        return self._known_port

    def _next_span(self) -> Span | None:
        """Taken out of what is to do; pages that are readable by now are left out."""
        while self._todo:
            rest = self._trim(self._todo.popleft())
            if rest is not None:
                return rest
        return None

    def _on_greeted(self, message: Message) -> None:
        if isinstance(message, HelloReply):
            try:
                self._port.greet(message)
            except MemServeError as error:
                self._fail(ending_of(error))
        elif isinstance(message, ErrorReply):
            self._fail(Ending(outcome_of(message.kind), message.message))
        else:
            text = f"{type(message).__name__} in answer to a greeting"
            self._fail(Ending(Outcome.PROTOCOL_ERROR, text))

    def _after(self, round_: Round, now: float) -> None:
        entry = next((entry for entry in self.rounds if entry[0] is round_), None)
        if entry is None:
            return
        span = entry[1]
        if round_.granted and round_.stop < span.stop:
            # The source granted less than was asked for; the rest is asked for next.
            place = self.rounds.index(entry)
            self.rounds[place] = (round_, span._replace(stop=round_.stop))
            self._return(span._replace(first=round_.stop))
            span = span._replace(stop=round_.stop)
        if round_.gaps:
            self._wait_for([span._replace(first=first, stop=stop) for first, stop in round_.gaps])
            round_.gaps = []
            self._recheck_s = now + self._task.settings.recheck_s
        if round_.ending is None:
            return
        self.rounds = [other for other in self.rounds if other[0] is not round_]
        if round_.ending.outcome is Outcome.COMPLETE:
            self.fetched_pages += round_.fetched_pages
            self._landed(span.first, span.stop)
            if round_.starved and not round_.fetched_pages:
                self._fail(Ending(Outcome.NO_BLOCKS, "no block can be evicted"))
            return
        self._on_failed(round_, span, round_.ending, now)

    def _on_failed(self, round_: Round, span: Span, ending: Ending, now: float) -> None:
        outcome = ending.outcome
        if round_.outdated and self.ending is None and self._updates < _MAX_UPDATES:
            known = self._port.greeting()
            if known is not None and known.memory_version <= round_.memory_version:
                self._port.forget()
                self._updates += 1
            self._return(span)
            return
        if outcome is Outcome.LEASE_INVALID:
            self._port.forget()
        if round_.refused and self.ending is None:
            if outcome is Outcome.MISS and now < round_.patient_until_s:
                # The source waits for less long than it was asked to.
                self._wait_for([span])
                self._recheck_s = now + self._task.settings.recheck_s
                return
            if outcome is Outcome.MISS:
                rest = [span]
                while self._todo and self._todo[0].first == rest[-1].stop:
                    rest.append(self._todo.popleft())
                for part in rest:
                    self._drop(part, ending)
                return
            if outcome is Outcome.LEASE_INVALID and not self._regreeted:
                # A new boot at the old address.
                self._regreeted = True
                self._return(span)
                return
            if outcome is Outcome.LIMIT and (self.rounds or round_.postponed):
                # Our own rounds may be what is in the way.
                self._wait_for([span])
                self._recheck_s = now + self._task.settings.recheck_s
                return
        self._drop(span, ending)
        self._fail(ending)

    def _fail(self, ending: Ending) -> None:
        if self.ending is not None:
            return
        self.ending = ending
        if self.failure is None:
            self.failure = ending
        for span in (*self._todo, *self._gaps):
            self._drop(span, ending)
        self._todo.clear()
        self._gaps.clear()
        self._hello_id = None

    def _drop(self, span: Span, ending: Ending) -> None:
        if self.failure is None:
            self.failure = ending
        self.dropped.append((span._replace(tried=span.tried | {self.index}), ending))

    def _return(self, span: Span) -> None:
        """To be asked for next; what a failed source cannot be asked for is dropped."""
        if self.ending is not None:
            self._drop(span, self.ending)
        elif self._todo and self._todo[0].first == span.stop and self._todo[0].tried == span.tried:
            self._todo[0] = span._replace(stop=self._todo[0].stop)
        else:
            self._todo.appendleft(span)

    def _wait_for(self, spans: list[Span]) -> None:
        for span in spans:
            if self.ending is not None:
                self._drop(span, self.ending)
            else:
                self._gaps.append(span)

    def _trim(self, span: Span) -> Span | None:
        """What is left of ``span`` behind its leading readable pages."""
        task = self._task
        first = span.first
        while first < span.stop:
            keys = task.keys[first : min(first + _LOOK_PAGES, span.stop)]
            lead = task.pool.readable_pages(keys)
            if lead:
                self._landed(first, first + lead)
            first += lead
            if lead < len(keys):
                return span._replace(first=first)
        return None
