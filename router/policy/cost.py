"""The default: the plan with the least predicted time to first token, streams' delays included.

    ready(I)  = min over ways to get a prefix:
                  I's own pages, now or when they have come:  max(queue(I), coming) + compute
                  pages of S, now or when they have come:     max(queue(I), coming + move) + compute
    bypass(D) = ready(D) + load(D) + room(D) + delay(D, what D computes)
    via(P, D) = max(ready(P) + hop + move(P -> D), queue(D)) + compute(D, last page)
                + load(D) + room(D) + delay(P, ...) + delay(D, last page)

``queue``, ``move`` and ``compute`` are predictions of ``cost.learned``, ``move`` beside what else
is on the move; pages are fetched first only where that is predicted to be clearly cheaper than
computing them. Pages that are still being computed somewhere count from when they are there, so
requests with one new prefix gather where it is being computed until the queue there costs more than
computing it again; from elsewhere they are fetched only if a fetch would wait for so long.
``delay`` is what a prefill costs the streams it interrupts: its seconds, for each stream, weighted,
and a little for whatever comes after it. A decode instance is reckoned to have one stream at least:
it is there for streams, and another may begin at any moment. That makes an idle decode instance
compute short rests itself and leave long ones to the prefill instances. ``room`` is what running
out of KV slots costs: a stream that is put out computes its prompt again.

All pairs are weighed where there are few; of many instances the ``SHORTLIST`` with the least time
of their own on each side.

Source: MemServe (arXiv 2406.17565), the router's ``argmin`` of queue plus execution; the transfer
term is measured here, and what a prefill does to streams is added.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from heapq import nsmallest
from math import inf
from typing import NamedTuple, TypeVar

from sglang_memserve.types import InstanceId, Role

from ..cost.learned import CostModel
from ..values import InstanceView, Plan, Prompt
from .base import (
    Rotation,
    can_hand_over,
    decode_candidates,
    load_of,
    rotated,
    usable_pages,
)

# A second for which one stream stands still, in seconds of time to first token.
STREAM_DELAY_WEIGHT = 0.25
# A second request to another instance: HTTP both ways, scheduling there.
HOP_S = 0.005
# What each running stream slows a new one by: as long as computing so many tokens takes.
RUNNING_TOKENS = 6
# A second of computing, for whatever comes after it there.
WORK_WEIGHT = 0.1
WORK = 1 + WORK_WEIGHT
# A fetch is reckoned this much slower than predicted: it has to be clearly worth it.
FETCH_CAUTION = 1.25
# KV slots in use above this share begin to cost; at 1, computing the whole prompt again.
ROOMY_SHARE = 0.85
# Predictions that differ by less are equal: load and rotation decide. Finer, and the instance
# that looked a little quicker first would get all the work of an idle fleet.
TIE_RELATIVE = 0.1
TIE_S = 0.0005
# Waiting for pages to come means at least this: what is there needs no waiting.
LEAST_WAIT_S = 0.001
SHORTLIST = 6
SOURCES = 4
# Of ``http.limits.StepDeadlines`` with its defaults.
MOST_WAIT_S = 5.0

_T = TypeVar("_T")


# Named tuples: some two hundred of these are made for each request.


class _Site(NamedTuple):
    """One instance, and how it would get the whole prompt.

    ``own_pages``: what it has itself; ``held_pages``: with what it fetches or waits for.
    ``start_s``: when it can begin to compute, of which ``queue_s`` is its queue; ``wait_s``: until
    the source has the pages; ``token_s``: of one token more."""

    view: InstanceView
    source: InstanceId | None
    own_pages: int
    held_pages: int
    queue_s: float
    start_s: float
    compute_s: float
    token_s: float
    tail_s: float
    wait_s: float = 0.0

    @property
    def ready_s(self) -> float:
        return self.start_s + self.compute_s


class _Offer(NamedTuple):
    """Pages that can be fetched from ``source`` in ``wait_s``."""

    source: InstanceId
    pages: int
    wait_s: float
    rest_tokens: int
    rest_pairs: float


class _Decode(NamedTuple):
    """What decoding at an instance costs, however the prompt gets there: ``own_s``, of which all
    but the tail is named."""

    site: _Site
    missing_pages: int
    own_s: float
    tail_delay_s: float
    load_s: float
    room_s: float


class _Option(NamedTuple):
    """``prefill`` is None for a bypass. ``move_s``: of pages from it, after the prefill."""

    total_s: float
    decode: _Decode
    prefill: _Site | None = None
    move_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Cost:
    rotation: Rotation
    bypass_tokens: int | None
    costs: CostModel
    most_wait_s: float = MOST_WAIT_S

    def decide(self, prompt: Prompt, views: Sequence[InstanceView]) -> Plan:
        """See ``base.Policy``. ``terms`` are seconds; ``total`` includes the delays of others."""
        return self._plan(prompt, self._pick(self._options(prompt, views)))

    def candidates(self, prompt: Prompt, views: Sequence[InstanceView], most: int) -> list[Plan]:
        """See ``base.Weighing``."""
        options = self._options(prompt, views)
        best = nsmallest(most, options, key=lambda option: option.total_s)
        return [self._plan(prompt, option) for option in best]

    def _options(self, prompt: Prompt, views: Sequence[InstanceView]) -> list[_Option]:
        turn = self.rotation.turn
        decoding = rotated(decode_candidates(views), turn)
        able = [view for view in views if view.role.can_prefill and view.can_fetch]
        prefilling = rotated(able, turn)
        sources = self._offers(prompt, self._sources(prompt, views))
        whole = usable_pages(prompt)
        sites = {
            view.id: self._site(prompt, whole, view, sources) for view in (*decoding, *prefilling)
        }
        decodes = [self._decode(prompt, whole, sites[view.id]) for view in decoding]
        options = []
        relayed: list[_Decode] = []
        for decode in decodes:
            must, may = self._bypass_rule(prompt, whole, decode.site)
            others = decode.site.view.can_fetch and decode.missing_pages > 0
            others = others and any(view.id != decode.site.view.id for view in prefilling)
            if may or not others:
                options.append(self._bypass(decode))
            if others and not must:
                relayed.append(decode)
        prefills = [sites[view.id] for view in prefilling]
        listed = _shortlist(relayed, _least_decode_s)
        least_s = min((option.total_s for option in options), default=inf)
        for prefill in _shortlist(prefills, self._prefill_s):
            least_prefill_s = self._least_via_s(whole, prefill)
            for decode in listed:
                if decode.site.view.id == prefill.view.id:
                    continue
                if least_prefill_s + decode.own_s > least_s + _tie_s(least_s):
                    continue
                if can_hand_over(prompt, prefill.view, decode.site.view):
                    options.append(self._via(whole, prefill, decode))
                    least_s = min(least_s, options[-1].total_s)
        return options or [self._bypass(decode) for decode in decodes]

    # -- the parts --

    def _sources(self, prompt: Prompt, views: Sequence[InstanceView]) -> list[InstanceView]:
        """Those worth fetching from: the longest prefixes, equals in turn."""
        holders = [
            view
            for view in views
            if view.can_fetch and (view.match.movable_pages or self._in_time(view))
        ]
        if len(holders) <= SOURCES:
            return holders
        whole = usable_pages(prompt)
        ranked = sorted(
            rotated(holders, self.rotation.turn),
            key=lambda view: (
                -min(max(view.match.movable_pages, self._in_time(view)), whole),
                view.coming_s if self._in_time(view) else 0.0,
            ),
        )
        return ranked[:SOURCES]

    def _offers(self, prompt: Prompt, sources: Sequence[InstanceView]) -> list[_Offer]:
        """Longest first: most others then need no closer look."""
        whole, offers = usable_pages(prompt), []
        for view in sources:
            now = min(view.match.movable_pages, whole)
            if now:
                offers.append(_Offer(view.id, now, 0.0, *_rest(prompt, now)))
            coming = min(self._in_time(view), whole)
            if coming > now:
                wait_s = max(view.coming_s, LEAST_WAIT_S)
                offers.append(_Offer(view.id, coming, wait_s, *_rest(prompt, coming)))
        return sorted(offers, key=lambda offer: -offer.pages)

    def _in_time(self, view: InstanceView) -> int:
        """Pages that come soon enough for a fetch: one that ends before has moved nothing, and all
        would be computed."""
        return view.coming_pages if view.coming_s <= self.most_wait_s else 0

    def _site(
        self, prompt: Prompt, whole: int, view: InstanceView, offers: Sequence[_Offer]
    ) -> _Site:
        """The fastest way to the whole prompt at ``view``: computing, or fetching from one.
        ``whole``: its usable pages."""
        fixed, linear, attention = self.costs.prefill_theta(view.id)
        queue_s = view.queue_s
        if view.waiting_requests:
            queue_s += self.costs.predict_request_s(view.id) * view.waiting_requests
        own = min(view.match.pages, whole)
        new, area = _rest(prompt, own)
        start_s, compute_s = queue_s, fixed + linear * new + attention * area
        source, held, waited_s = None, own, 0.0
        coming = min(view.coming_pages, whole)
        least_s = start_s + WORK * compute_s
        if coming > own:
            new, area = _rest(prompt, coming)
            begin_s, rest_s = max(queue_s, view.coming_s), fixed + linear * new + attention * area
            if begin_s + WORK * rest_s < least_s:
                held, start_s, compute_s = coming, begin_s, rest_s
                least_s = start_s + WORK * compute_s
        for who, pages, wait_s, new, area in offers if view.can_fetch else ():
            if pages <= own or who == view.id:
                continue
            rest_s = fixed + linear * new + attention * area
            if (queue_s if queue_s > wait_s else wait_s) + WORK * rest_s >= least_s:
                continue
            fetch_s = self.costs.predict_transfer_s(who, view.id, pages - own) + HOP_S
            price_s = max(queue_s, wait_s + FETCH_CAUTION * fetch_s) + WORK * rest_s
            if price_s < least_s:
                least_s, source, held, waited_s = price_s, who, pages, wait_s
                start_s, compute_s = max(queue_s, wait_s + fetch_s), rest_s
        new, area = _rest(prompt, whole)
        tail_s = fixed + linear * new + attention * area
        times = (queue_s, start_s, compute_s, linear, tail_s, waited_s)
        return _Site(view, source, own, held, *times)

    def _decode(self, prompt: Prompt, whole: int, site: _Site) -> _Decode:
        view = site.view
        load_s = RUNNING_TOKENS * site.token_s * view.running_requests
        room_s = self._room_s(prompt, whole, view) if view.total_tokens > 0 else 0.0
        delay_s = self._delay_s(view, site.tail_s)
        own_s = site.tail_s + load_s + room_s + delay_s
        return _Decode(site, whole - site.own_pages, own_s, delay_s, load_s, room_s)

    def _room_s(self, prompt: Prompt, whole: int, view: InstanceView) -> float:
        held = min(view.match.hbm_pages, whole) * prompt.page_size
        used = view.total_tokens - view.free_tokens + prompt.tokens - held
        over = (used / view.total_tokens - ROOMY_SHARE) / (1 - ROOMY_SHARE)
        return over * self.costs.predict_prefill_s(view.id, prompt.tokens, 0) if over > 0 else 0.0

    def _delay_s(self, view: InstanceView, compute_s: float) -> float:
        streams = view.running_requests if view.role is not Role.PREFILL else 0
        if view.role is Role.DECODE:
            streams = max(streams, 1)
        return (STREAM_DELAY_WEIGHT * streams + WORK_WEIGHT) * compute_s

    def _prefill_s(self, site: _Site) -> float:
        return site.ready_s + self._delay_s(site.view, site.compute_s)

    def _bypass_rule(self, prompt: Prompt, whole: int, site: _Site) -> tuple[bool, bool]:
        """Whether the decode instance must, and whether it may, compute the rest itself."""
        if self.bypass_tokens is None:
            return False, True
        rest = prompt.tokens - site.held_pages * prompt.page_size
        must = rest <= self.bypass_tokens or site.held_pages == whole
        return must, must

    # -- the options --

    def _bypass(self, decode: _Decode) -> _Option:
        site = decode.site
        delay_s = self._delay_s(site.view, site.compute_s)
        return _Option(site.ready_s + decode.load_s + decode.room_s + delay_s, decode)

    def _via(self, whole: int, prefill: _Site, decode: _Decode) -> _Option:
        pair = prefill.view.id, decode.site.view.id
        if prefill.own_pages == whole:
            # Nothing is computed there that moving could go along with.
            compute_s, start_s = 0.0, 0.0
            move_s = self.costs.predict_transfer_s(*pair, decode.missing_pages)
        else:
            compute_s, start_s = prefill.compute_s, prefill.start_s
            move_s = self.costs.predict_tail_s(*pair, decode.missing_pages)
        arrives_s = start_s + compute_s + HOP_S + move_s
        total_s = max(arrives_s, decode.site.queue_s) + decode.own_s
        total_s += self._delay_s(prefill.view, compute_s)
        return _Option(total_s, decode, prefill, move_s)

    def _least_via_s(self, whole: int, prefill: _Site) -> float:
        """What a prompt takes over ``prefill`` at least, before anything moves."""
        if prefill.own_pages == whole:
            return HOP_S
        return prefill.ready_s + HOP_S + self._delay_s(prefill.view, prefill.compute_s)

    def _pick(self, options: Sequence[_Option]) -> _Option:
        """The least total; ties go to the idlest instances, then in turn."""
        least = min(option.total_s for option in options)
        limit = least + _tie_s(least)
        tied = [option for option in options if option.total_s <= limit]
        if len(tied) == 1:
            return tied[0]
        loads = [_option_load(option) for option in tied]
        idlest_load = min(loads)
        idlest = [o for o, load in zip(tied, loads, strict=True) if load == idlest_load]
        # Both sides were put in their turn before.
        return idlest[0]

    # -- in words --

    def _plan(self, prompt: Prompt, option: _Option) -> Plan:
        decode = option.decode
        if option.prefill is None:
            return self._direct(prompt, decode)
        return self._relay(prompt, option.prefill, decode, option.move_s)

    def _direct(self, prompt: Prompt, decode: _Decode) -> Plan:
        site = decode.site
        terms = _ready_terms(site)
        terms["load"], terms["room"] = decode.load_s, decode.room_s
        _add_up(terms, self._delay_s(site.view, site.compute_s))
        tokens = prompt.tokens - site.held_pages * prompt.page_size
        moved = "" if site.source is None else f"fetches from {site.source}, "
        reason = f"direct: {site.view.id} {moved}computes {tokens} tokens{_late(site)}"
        return Plan(
            site.view.id,
            decode_source=site.source,
            held_pages=site.held_pages,
            wait_s=site.wait_s,
            reason=f"{reason}, {_ms(terms)}",
            terms=terms,
        )

    def _relay(self, prompt: Prompt, prefill: _Site, decode: _Decode, move_s: float) -> Plan:
        computes = prefill.own_pages < usable_pages(prompt)
        terms = _ready_terms(prefill) if computes else {"queue": 0.0, "fetch": 0.0, "compute": 0.0}
        terms["move"] = HOP_S + move_s
        # The decode instance works off its own queue meanwhile.
        terms["decode_queue"] = max(0.0, decode.site.queue_s - sum(terms.values()))
        terms["tail"] = decode.site.tail_s
        terms["load"], terms["room"] = decode.load_s, decode.room_s
        delay_s = self._delay_s(prefill.view, terms["compute"]) + decode.tail_delay_s
        _add_up(terms, delay_s)
        tokens = prompt.tokens - prefill.held_pages * prompt.page_size
        source = "" if prefill.source is None else f" after a fetch from {prefill.source}"
        reason = (
            f"prefill: {prefill.view.id} computes {tokens} tokens{source}{_late(prefill)}, "
            f"{decode.missing_pages} pages move to {decode.site.view.id}, {_ms(terms)}"
        )
        return Plan(
            decode.site.view.id,
            prefill.view.id,
            prefill.source,
            held_pages=prefill.held_pages,
            wait_s=prefill.wait_s,
            reason=reason,
            terms=terms,
        )


def _shortlist(among: Sequence[_T], seconds: Callable[[_T], float]) -> Sequence[_T]:
    """Those with the fewest seconds; those that differ by less than a tie stay in their turn."""
    if len(among) <= SHORTLIST:
        return among
    each = [seconds(one) for one in among]
    grid = _tie_s(min(each))
    ranks = [int(one / grid) for one in each]
    # Sorting is quicker than a heap in Python, for as many as there are.
    return [among[at] for at in sorted(range(len(among)), key=ranks.__getitem__)[:SHORTLIST]]


def _rest(prompt: Prompt, pages: int) -> tuple[int, float]:
    """What is left to compute after ``pages``: tokens, and the pairs of tokens that attend."""
    held = pages * prompt.page_size
    return prompt.tokens - held, (prompt.tokens * prompt.tokens - held * held) / 2


def _tie_s(seconds: float) -> float:
    return seconds * TIE_RELATIVE + TIE_S


def _ready_terms(site: _Site) -> dict[str, float]:
    """``fetch`` is what waiting for pages adds to the queue: both pass at the same time."""
    return {
        "queue": site.queue_s,
        "fetch": site.start_s - site.queue_s,
        "compute": site.compute_s,
    }


def _add_up(terms: dict[str, float], delay_s: float) -> None:
    terms["ttft"] = sum(terms.values())
    terms["delay"] = delay_s
    terms["total"] = terms["ttft"] + delay_s


def _late(site: _Site) -> str:
    """Says when the prefix is still being computed."""
    coming = site.held_pages > site.view.match.pages if site.source is None else site.wait_s > 0
    return " once its prefix has come" if coming else ""


def _ms(terms: dict[str, float]) -> str:
    return f"{terms['total'] * 1e3:.0f} ms"


def _least_decode_s(decode: _Decode) -> float:
    """What decoding there costs at least. Pages that are there need not move."""
    return max(decode.site.queue_s, 0.0) + decode.own_s - decode.tail_delay_s


def _option_load(option: _Option) -> tuple[int, int]:
    requests, tokens = load_of(option.decode.site.view)
    if option.prefill is not None:
        more_requests, more_tokens = load_of(option.prefill.view)
        requests, tokens = requests + more_requests, tokens + more_tokens
    return requests, tokens
