"""What happens before the decode instance gets the request: prefill elsewhere, pages moved.

    source --fetch--> P computes the prompt --pages, as they are computed--> D fetches
                              |                                                  |
                              +---- P is done: D gets a bounded grace ----------+--> go on

Nothing here can fail a request. Whatever is late, refused or broken is counted, logged and left
out; D then computes what it lacks. What a plan came to is an ``Outcome``.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from sglang_memserve.errors import MemServeError, NoInstance
from sglang_memserve.protocol.http import FetchResult
from sglang_memserve.types import InstanceId

from ..cost.bookings import Booking
from ..cost.learned import CostModel
from ..http.limits import StepDeadlines
from ..http.proxy import Upstream
from ..members.instances import Instances
from ..metrics.registry import Arrival, Fetched, Metrics, short_reason
from ..prompt.bodies import Request
from ..values import Plan
from .fetches import Fetches
from .live import Live
from .placement import Holdings, Keyed
from .prefill import Prefills

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Result:
    """What came of the steps. ``computed_cached_tokens``: what P had cached of what it computed,
    None if it computed nothing (or nothing we know of). ``decode_pages``: distinct pages known to
    be readable on D."""

    computed_cached_tokens: int | None
    decode_pages: int
    fetched: list[Fetched] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def cached_tokens(self, keyed: Keyed) -> int:
        """Prompt tokens that no instance had to compute for this request."""
        on_decode = keyed.bounded_tokens(self.decode_pages)
        if self.computed_cached_tokens is None:
            return on_decode
        # P computed what it had not cached; D computes what it cannot read.
        return min(on_decode, self.computed_cached_tokens)


class Steps:
    """Carries plans out, up to the point where the decode instance takes over."""

    def __init__(
        self,
        upstream: Upstream,
        instances: Instances,
        costs: CostModel,
        metrics: Metrics,
        deadlines: StepDeadlines,
    ) -> None:
        self._fetches = Fetches(upstream, instances, deadlines)
        self._prefills = Prefills(upstream, instances, costs, deadlines)
        self._costs = costs
        self._metrics = metrics
        self._deadlines = deadlines

    async def run(
        self,
        request: Request,
        keyed: Keyed,
        holdings: Holdings,
        plan: Plan,
        live: Live,
        booking: Booking,
    ) -> Result:
        """Everything the plan says before decode. Raises nothing but cancellation."""
        result = Result(None, holdings.pages(plan.decode))
        if not keyed.pages:
            return result
        prefill = plan.prefill if plan.prefill != plan.decode else None
        if prefill is None:
            source = plan.decode_source or (plan.prefill_source if plan.prefill else None)
            if source is not None:
                await self._fetch_existing(source, plan.decode, keyed, holdings, result, plan)
            return result
        if holdings.pages(plan.decode) >= keyed.pages:
            return result
        if plan.prefill_source is not None:
            gathered = Result(None, holdings.pages(prefill))
            await self._fetch_existing(
                plan.prefill_source, prefill, keyed, holdings, gathered, plan
            )
            result.fetched += gathered.fetched
            result.notes += gathered.notes
        complete = all(
            holdings.of_chain(i, prefill) >= len(chain.keys) for i, chain in enumerate(keyed.chains)
        )
        if complete:
            await self._fetch_existing(prefill, plan.decode, keyed, holdings, result)
        else:
            await self._compute_and_fetch(
                request, keyed, holdings, prefill, plan.decode, live, booking, result
            )
        return result

    # -- moving pages that exist --

    async def _fetch_existing(
        self,
        source: InstanceId,
        target: InstanceId,
        keyed: Keyed,
        holdings: Holdings,
        result: Result,
        plan: Plan | None = None,
    ) -> None:
        """``plan``: says how long pages that are still being computed may take to come."""
        missing = _missing(keyed, holdings, target)
        deadlines = self._deadlines
        limit_s = deadlines.most_existing_s
        wait_s, pages = 0.0, None
        if plan is not None and plan.wait_s > 0:
            wait_s, pages = deadlines.wait_s(plan.wait_s), plan.held_pages
        beside = self._beside_bytes(source, target, keyed)
        answers = await asyncio.gather(
            *(
                self._fetches.once(
                    source,
                    target,
                    keyed,
                    i,
                    wait_s,
                    wait_s + limit_s,
                    pages,
                    holdings.skippable(i, target),
                )
                for i in missing
            ),
            return_exceptions=True,
        )
        readable = dict.fromkeys(range(len(keyed.chains)), 0)
        whole = [answer for answer in answers if isinstance(answer, FetchResult)]
        if whole and len(whole) == len(answers) and not wait_s:
            # They waited for no computing, so their duration is the transfer's.
            moved = sum(answer.fetched_bytes for answer in whole)
            seconds = max(answer.seconds for answer in whole)
            self._costs.observe_transfer(source, target, moved, seconds, beside)
        for i, answer in zip(missing, answers, strict=True):
            if isinstance(answer, FetchResult):
                promised = holdings.movable(i, source) if pages is None else pages
                self._book(Fetched(source, target, answer, promised), result)
                readable[i] = answer.readable_pages
            elif isinstance(answer, MemServeError):
                self._failed("fetch", f"{target} fetching from {source}", answer, result)
            elif isinstance(answer, BaseException):
                raise answer
        result.decode_pages = _pages_readable(keyed, holdings, target, readable)

    def _beside_bytes(self, source: InstanceId, target: InstanceId, keyed: Keyed) -> float:
        """What shares the way with a transfer that is booked already, and so counts too."""
        size = keyed.pages * self._costs.page_bytes
        return max(self._costs.flows.beside_bytes(source, target, size) - size, 0.0)

    # -- computing on P while D fetches --

    async def _compute_and_fetch(
        self,
        request: Request,
        keyed: Keyed,
        holdings: Holdings,
        prefill: InstanceId,
        decode: InstanceId,
        live: Live,
        booking: Booking,
        result: Result,
    ) -> None:
        wait_s = self._prefills.limit_s(keyed, holdings, prefill)
        missing = _missing(keyed, holdings, decode)
        fetches = {
            asyncio.create_task(
                self._fetches.as_computed(
                    prefill, decode, keyed, i, wait_s, holdings.skippable(i, decode)
                )
            ): i
            for i in missing
        }
        compute = asyncio.create_task(
            self._prefills.compute(request, keyed, holdings, prefill, live, wait_s)
        )
        compute.add_done_callback(lambda _: booking.prefilled())
        live.prefilling = compute
        readable = dict.fromkeys(range(len(keyed.chains)), 0)
        computed = False
        try:
            await _until_settled(compute, list(fetches))
            if not compute.done():
                # D said that it cannot fetch: P's work would be for nothing now.
                result.notes.append("prefill abandoned")
            elif computed := self._computed(compute, result):
                await self._grace(keyed, prefill, decode, fetches)
        finally:
            live.prefilling = None
            await _end(compute, *fetches)
        for task, i in fetches.items():
            if task.cancelled():
                # Without P's part there was nothing to fetch: that is P's failure alone.
                if computed:
                    self._failed("fetch", f"{decode} fetching from {prefill}", "late", result)
                continue
            error = task.exception()
            if error is None:
                whole = len(keyed.chains[i].keys)
                promised = whole if computed else holdings.movable(i, prefill)
                self._book(Fetched(prefill, decode, task.result(), promised), result)
                readable[i] = task.result().readable_pages
            elif isinstance(error, MemServeError):
                self._failed("fetch", f"{decode} fetching from {prefill}", error, result)
            else:
                raise error
        result.decode_pages = _pages_readable(keyed, holdings, decode, readable)

    def _computed(self, compute: asyncio.Task[int], result: Result) -> bool:
        """Whether P did its part; books it if so."""
        try:
            result.computed_cached_tokens = compute.result()
        except asyncio.CancelledError:
            result.notes.append("prefill aborted")
            return False
        except MemServeError as error:
            self._failed("prefill", "prefill", error, result)
            return False
        return True

    async def _grace(
        self,
        keyed: Keyed,
        prefill: InstanceId,
        decode: InstanceId,
        fetches: Mapping[asyncio.Task[FetchResult], int],
    ) -> None:
        """P is done: what is left to move gets its time, and shows how much that is."""
        began = time.monotonic()
        _, late = await asyncio.wait(fetches, timeout=self._grace_s(keyed, decode))
        done = [task for task in fetches if not task.cancelled() and task not in late]
        whole = [task.result() for task in done if task.exception() is None]
        if len(whole) == len(fetches):
            pages = sum(one.fetched_pages for one in whole)
            self._costs.observe_tail(prefill, decode, pages, time.monotonic() - began)

    def _grace_s(self, keyed: Keyed, decode: InstanceId) -> float:
        predicted = self._costs.predict_prefill_s(decode, keyed.tokens, 0)
        return max(self._deadlines.least_grace_s, min(self._deadlines.grace_s, predicted))

    # -- booking --

    def _book(self, fetched: Fetched, result: Result) -> None:
        result.fetched.append(fetched)
        answer, arrival = fetched.result, fetched.arrival
        if arrival is not Arrival.WHOLE:
            why = answer.outcome if arrival is Arrival.SHORT else arrival.value
            note = f"fetched {answer.readable_pages}/{answer.requested_pages}: {why}"
            result.notes.append(note)

    def _failed(self, step: str, what: str, error: MemServeError | str, result: Result) -> None:
        kind = error if isinstance(error, str) else type(error).__name__
        self._metrics.fallbacks.labels(step, short_reason(kind)).inc()
        if step == "fetch":
            self._metrics.transfer_failures.labels(short_reason(kind)).inc()
        result.notes.append(f"{step} failed: {kind}")
        level = logging.INFO if isinstance(error, NoInstance) else logging.WARNING
        logger.log(level, "%s failed, decode computes instead: %s", what, error)


async def _until_settled(
    compute: asyncio.Task[int], fetches: Sequence[asyncio.Task[FetchResult]]
) -> None:
    """Wait for P to be done, or for D to have failed at every fetch."""
    while not compute.done():
        running = [task for task in fetches if not task.done()]
        ended = [task for task in fetches if task.done()]
        if not running and all(t.cancelled() or t.exception() is not None for t in ended):
            return
        await asyncio.wait({compute, *running}, return_when=asyncio.FIRST_COMPLETED)


async def _end(*tasks: asyncio.Task[int] | asyncio.Task[FetchResult]) -> None:
    """Cancel what still runs and see it end; their errors are read by the caller."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _missing(keyed: Keyed, holdings: Holdings, target: InstanceId) -> list[int]:
    """Chains of which ``target`` lacks pages."""
    return [
        i for i, chain in enumerate(keyed.chains) if holdings.of_chain(i, target) < len(chain.keys)
    ]


def _pages_readable(
    keyed: Keyed, holdings: Holdings, target: InstanceId, readable: dict[int, int]
) -> int:
    """Distinct pages ``target`` can read: of each chain what a fetch said, or the tree."""
    pages = set()
    for i, chain in enumerate(keyed.chains):
        pages.update(chain.keys[: max(readable[i], holdings.of_chain(i, target))])
    return len(pages)
