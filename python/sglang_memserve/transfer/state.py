"""One fetch as a state machine: no clock, no socket, no thread.

Life cycle. A fetch makes a chain of page keys readable here by reading what is missing from one or
several sources, until all is readable or nothing more can be had:

    Fetch    shares the missing pages out: each to the first source that may be asked for it, and
             what a source could not give to the next one that was not asked for it yet
    Holder   one source: greets it when it is not known, then keeps up to ``settings.rounds`` rounds
             under way
    Round    one lease, and the pages that are read under it:

    LEASING     the source pins the next missing pages; it may wait for pages it is computing
       v
    READING     into blocks of ours that nobody can see yet
       v
    RELEASING   the source says whether its blocks stayed put, while checksums are compared:
       v        only then they are published
    ENDED       with an Outcome

Only one round of a source is LEASING, and the next one begins as soon as the source has answered:
while a round is read, the next lease is asked for. Pages are published round by round, also behind
a hole that another source has not filled yet; what counts as readable is the leading run.

A round never waits for pages that somebody else on this rank is filling (its *gaps*): the holder
looks again when pages became readable, and asks for those that did not soon after. A page is asked
for once at each source at most, but for gaps, and for a source that came back under its address.
Every phase has a deadline, and none of them lies behind that of the fetch.

What is held and given back: leases of the sources (released, or they expire), our blocks being
filled (a ``Store``: committed, aborted, or handed to ``Port.abandon`` when a read into them still
runs), and pins on our own readable pages of the chain. The pins outlive the fetch by a grace
period, so that the request that the fetch was made for finds its pages.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import LimitExceeded
from ..protocol.control import FetchReply, FetchRequest, Hello, Message, SourceReply
from ..types import PageKey
from .base import BlockStore, Lease, ReadState
from .holder import Holder, Span
from .outcome import Ending, Outcome
from .port import FetchSettings, Port, Task

_LOOK_PAGES = 256


class Fetch:
    """``ports``: one for each source of the request, in its order, or why there is none.
    ``deadline_s`` and every ``now`` are on one monotonic clock of the caller.

    Call ``start`` once, then ``on_reply``, ``on_read_ended``, ``on_verified`` and
    ``on_pages_readable`` as things happen, and ``on_time`` no later than ``wake_s``, until
    ``outcome`` is set.
    """

    def __init__(
        self,
        request: FetchRequest,
        ports: Sequence[Port | Ending],
        *,
        arrived_s: float,
        store: BlockStore,
        hello: Hello,
        settings: FetchSettings,
    ) -> None:
        assert len(ports) == len(request.sources), (len(ports), len(request.sources))
        self.request = request
        self.keys = [PageKey(key) for key in request.keys]
        self.outcome: Outcome | None = None
        self.deadline_s = arrived_s + request.deadline_s
        self.wake_s = self.deadline_s
        self.grace_lease: Lease | None = None
        self._arrived_s = arrived_s
        self._ended_s = arrived_s
        self._pool = store
        self._settings = settings
        self._now = arrived_s
        wait_until_s = min(arrived_s + request.wait_s, self.deadline_s)
        task = Task(self.keys, store, hello, settings, self.deadline_s, wait_until_s)
        self.holders = [
            Holder(task, port, index, *self._range(index), landed=self._pin)
            for index, port in enumerate(ports)
        ]
        self._lost: list[tuple[Span, Ending]] = []
        self._pins: list[Lease] = []
        self._present_pages = 0
        self._readable_pages = 0

    # -- events --

    def start(self, now: float) -> None:
        self._now = now
        self._look()
        self._present_pages = self._readable_pages
        self._pin(0, self._readable_pages)
        if self._readable_pages < len(self.keys):
            nobody = Ending(Outcome.MISS, "no source was named for it")
            self._hand_over(Span(self._readable_pages, len(self.keys)), nobody)
        self._settle(now)

    def on_reply(self, source: int, request_id: int, message: Message, now: float) -> bool:
        """A peer's answer to anything that was sent, in any order, late or twice.

        False for a lease that nobody here waits for: the caller gives it back."""
        if self.outcome is not None:
            return False
        self._now = now
        known = self.holders[source].on_reply(request_id, message, now)
        self._settle(now)
        return known

    def on_read_ended(self, handle: int, state: ReadState, now: float) -> None:
        if self.outcome is None:
            self._now = now
            any(holder.on_read_ended(handle, state, now) for holder in self.holders)
            self._settle(now)

    def on_verified(self, ticket: int, damaged: int | None, now: float) -> None:
        if self.outcome is None:
            self._now = now
            any(holder.on_verified(ticket, damaged, now) for holder in self.holders)
            self._settle(now)

    def on_pages_readable(self, now: float) -> None:
        if self.outcome is None:
            self._now = now
            for holder in self.holders:
                holder.on_pages_readable()
            self._settle(now)

    def on_time(self, now: float) -> None:
        if self.outcome is not None or now < self.wake_s:
            return
        self._now = now
        if now < self.deadline_s:
            for holder in self.holders:
                holder.on_time(now)
        self._settle(now)

    def cancel(self, outcome: Outcome, now: float) -> None:
        if self.outcome is None:
            self._now = now
            self._end(Ending(outcome), now)

    def reply(self) -> FetchReply:
        assert self.outcome is not None, "the fetch has not ended"
        fetched_pages = sum(holder.fetched_pages for holder in self.holders)
        return FetchReply(
            present_pages=self._present_pages,
            readable_pages=self._readable_pages,
            fetched_pages=fetched_pages,
            fetched_bytes=fetched_pages * self._pool.block_bytes,
            seconds=self._ended_s - self._arrived_s,
            outcome=self.outcome.value,
            sources=[self._reply_of(holder) for holder in self.holders],
        )

    # -- inside --

    def _range(self, index: int) -> tuple[int, int]:
        source = self.request.sources[index]
        stop = source.first_page + source.pages if source.pages else len(self.keys)
        return source.first_page, min(stop, len(self.keys))

    def _reply_of(self, holder: Holder) -> SourceReply:
        ending = holder.failure or Ending(Outcome.COMPLETE)
        peer_id = self.request.sources[holder.index].peer_id
        return SourceReply(peer_id, holder.fetched_pages, ending.outcome.value, ending.detail)

    def _settle(self, now: float) -> None:
        """Bring everybody up to date after an event."""
        if now < self.deadline_s:
            for holder in self.holders:
                holder.step(now)
            while self._take_dropped():
                for holder in self.holders:
                    holder.step(now)
        self._look()
        if self._readable_pages == len(self.keys):
            self._end(Ending(Outcome.NO_BLOCKS, "pages were dropped here meanwhile"), now)
        elif now >= self.deadline_s:
            self._end(Ending(Outcome.DEADLINE), now)
        elif not any(holder.busy for holder in self.holders):
            self._end(Ending(Outcome.MISS), now)
        else:
            wakes = [holder.wake_s for holder in self.holders if holder.busy]
            self.wake_s = min(*wakes, self.deadline_s)

    def _take_dropped(self) -> bool:
        dropped = [item for holder in self.holders for item in holder.dropped]
        for holder in self.holders:
            holder.dropped.clear()
        for span, ending in dropped:
            self._hand_over(span, ending)
        return bool(dropped)

    def _hand_over(self, span: Span, ending: Ending) -> None:
        """To the first source that may be asked for a part, and so on with the rest."""
        if ending.outcome is Outcome.NO_BLOCKS:
            self._lost.append((span, ending))  # no source can help
            return
        waiting = [span]
        while waiting:
            part = waiting.pop()
            for holder in self.holders:
                first, stop = max(part.first, holder.first), min(part.stop, holder.stop)
                if holder.ending is None and holder.index not in part.tried and first < stop:
                    holder.give(part._replace(first=first, stop=stop))
                    if part.first < first:
                        waiting.append(part._replace(stop=first))
                    if stop < part.stop:
                        waiting.append(part._replace(first=stop))
                    break
            else:
                self._lost.append((part, ending))

    def _end(self, ending: Ending, now: float) -> None:
        for holder in self.holders:
            holder.cancel(ending)
            self._lost.extend(holder.dropped)
            holder.dropped.clear()
        self._ended_s = now
        self._readable_pages = self._pool.readable_pages(self.keys)
        first = self._readable_pages
        if first == len(self.keys):
            self.outcome = Outcome.COMPLETE
        else:
            reasons = [lost for span, lost in self._lost if span.first <= first < span.stop]
            self.outcome = (reasons[-1] if reasons else ending).outcome
        self.grace_lease = self._acquire(0, first, self._settings.grace_s)
        for pin in self._pins:
            pin.release()
        self._pins.clear()

    # -- our own pages --

    def _look(self) -> None:
        """Count our own leading readable pages; those counted before are taken for granted."""
        while self._readable_pages < len(self.keys):
            window = self.keys[self._readable_pages : self._readable_pages + _LOOK_PAGES]
            lead = self._pool.readable_pages(window)
            self._readable_pages += lead
            if lead < len(window):
                return

    def _pin(self, first: int, stop: int) -> None:
        """Those of the pages that are readable, until the fetch ends."""
        ttl_s = max(0.0, self.deadline_s - self._now) + self._settings.grace_s
        while first < stop:
            pin = self._acquire(first, stop, ttl_s)
            if pin is None:
                return
            if pin.blocks:
                self._pins.append(pin)
            # The next page is a gap.
            first += len(pin.blocks) + 1

    def _acquire(self, first: int, stop: int, ttl_s: float) -> Lease | None:
        keys = self.keys[first:stop]
        if not keys:
            return None
        ttl_s = min(ttl_s, self._settings.max_lease_ttl_s)
        try:
            return self._pool.acquire(keys, owner="fetch", ttl_s=ttl_s)
        except LimitExceeded:
            # Unpinned pages may be evicted before they are used; they are then computed.
            return None
