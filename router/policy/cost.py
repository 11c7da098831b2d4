"""The default: the plan with the least predicted time to first token, streams' delays included.

    ready(I)  = queue(I) + min over sources S of [ move(S -> I) + compute(I, what S lacks too) ]
    bypass(D) = ready(D) + load(D) + delay(D, what D computes)
    via(P, D) = max(ready(P) + delay(P, ...) + hop + move(P -> D), queue(D))
                + compute(D, last page) + load(D) + delay(D, last page)

``move`` and ``compute`` are ``router.cost`` predictions, so pages move only where that is predicted
to be faster than computing them. ``delay`` is what a prefill costs the streams it interrupts: its
seconds, for each stream, weighted. A decode instance is reckoned to have one stream at least: it
is there for streams, and another may begin at any moment. That makes an idle decode instance
compute short rests itself and leave long ones to the prefill instances.

Source: MemServe (arXiv 2406.17565), the router's ``argmin`` of queue plus execution; the transfer
term is measured here, and what a prefill does to streams is added.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sglang_memserve.types import InstanceId

from ..cost import CostModel
from ..values import InstanceView, Plan, Prompt
from .base import Rotation, cached_pages, decode_candidates, load_of, usable_pages

# A second for which one stream stands still, in seconds of time to first token.
STREAM_DELAY_WEIGHT = 0.25
# A second request to another instance: HTTP both ways, scheduling there.
HOP_S = 0.005
# What each running stream, and each request in the queue, slows a new stream by.
RUNNING_S = 0.005
WAITING_S = 0.1
# Predictions that differ by less are equal: load and rotation decide.
TIE_RELATIVE = 0.02
TIE_S = 0.0005


@dataclass(frozen=True, slots=True)
class _Ready:
    """How one instance gets the whole prompt: its seconds after the queue, by part."""

    source: InstanceId | None
    held_pages: int
    fetch_s: float
    compute_s: float


@dataclass(frozen=True, slots=True)
class _Option:
    plan: Plan
    decode: InstanceView
    prefill: InstanceView | None
    seconds: float


@dataclass(frozen=True, slots=True)
class Cost:
    rotation: Rotation
    bypass_tokens: int | None
    costs: CostModel

    def decide(self, prompt: Prompt, views: Sequence[InstanceView]) -> Plan:
        """See ``base.Policy``. ``terms`` are seconds; ``total`` includes the delays of others."""
        decodes = decode_candidates(views)
        prefills = [view for view in views if view.role.can_prefill and view.can_fetch]
        ready = {view.id: self._ready(prompt, view, views) for view in (*decodes, *prefills)}
        options: list[_Option] = []
        for decode in decodes:
            others = [p for p in prefills if p.id != decode.id] if decode.can_fetch else []
            if cached_pages(prompt, decode) == usable_pages(prompt):
                others = []
            must, may = self._bypass_rule(prompt, decode, ready[decode.id])
            if may or not others:
                options.append(self._bypass(prompt, decode, ready[decode.id]))
            if not must:
                options.extend(self._via(prompt, p, decode, ready[p.id]) for p in others)
        return self._pick(options).plan

    # -- the parts --

    def _queue_s(self, view: InstanceView) -> float:
        return self.costs.predict_backlog_s(view.id, view.in_flight_prefill_tokens)

    def _compute_s(self, prompt: Prompt, view: InstanceView, pages: int) -> float:
        held = pages * prompt.page_size
        return self.costs.predict_prefill_s(view.id, prompt.tokens - held, held)

    def _ready(self, prompt: Prompt, view: InstanceView, views: Sequence[InstanceView]) -> _Ready:
        """The fastest way to the whole prompt at ``view``: computing, or fetching from one."""
        own = cached_pages(prompt, view)
        best = _Ready(None, own, 0.0, self._compute_s(prompt, view, own))
        for source in views if view.can_fetch else ():
            pages = cached_pages(prompt, source)
            if source.id == view.id or not source.can_fetch or pages <= own:
                continue
            fetch_s = self.costs.predict_transfer_s(source.id, view.id, pages - own) + HOP_S
            compute_s = self._compute_s(prompt, view, pages)
            if fetch_s + compute_s < best.fetch_s + best.compute_s:
                best = _Ready(source.id, pages, fetch_s, compute_s)
        return best

    def _delay_s(self, view: InstanceView, compute_s: float) -> float:
        streams = view.running_requests if view.role.can_decode else 0
        if not view.role.can_prefill:
            streams = max(streams, 1)
        return STREAM_DELAY_WEIGHT * streams * compute_s

    def _load_s(self, view: InstanceView) -> float:
        return RUNNING_S * view.running_requests + WAITING_S * view.waiting_requests

    def _bypass_rule(
        self, prompt: Prompt, decode: InstanceView, ready: _Ready
    ) -> tuple[bool, bool]:
        """Whether the decode instance must, and whether it may, compute the rest itself."""
        if self.bypass_tokens is None:
            return False, True
        held = max(ready.held_pages, cached_pages(prompt, decode))
        rest = prompt.tokens - held * prompt.page_size
        must = rest <= self.bypass_tokens or held == usable_pages(prompt)
        return must, must

    # -- the options --

    def _bypass(self, prompt: Prompt, decode: InstanceView, ready: _Ready) -> _Option:
        terms = {
            "queue": self._queue_s(decode),
            "fetch": ready.fetch_s,
            "compute": ready.compute_s,
            "load": self._load_s(decode),
        }
        terms["ttft"] = sum(terms.values())
        terms["delay"] = self._delay_s(decode, ready.compute_s)
        terms["total"] = total = terms["ttft"] + terms["delay"]
        tokens = prompt.tokens - ready.held_pages * prompt.page_size
        moved = "" if ready.source is None else f"fetches {ready.held_pages} pages' prefix from "
        moved += "" if ready.source is None else f"{ready.source}, "
        reason = f"direct: {decode.id} {moved}computes {tokens} tokens, {total * 1e3:.0f} ms"
        plan = Plan(decode.id, decode_source=ready.source, reason=reason, terms=terms)
        return _Option(plan, decode, None, total)

    def _via(
        self, prompt: Prompt, prefill: InstanceView, decode: InstanceView, ready: _Ready
    ) -> _Option:
        whole = usable_pages(prompt)
        moved = whole - cached_pages(prompt, decode)
        tail_s = self._compute_s(prompt, decode, whole)
        terms = {
            "queue": self._queue_s(prefill),
            "fetch": ready.fetch_s,
            "compute": ready.compute_s,
            "move": HOP_S + self.costs.predict_transfer_s(prefill.id, decode.id, moved),
        }
        # The decode instance works off its own queue meanwhile.
        terms["decode_queue"] = max(0.0, self._queue_s(decode) - sum(terms.values()))
        terms["tail"] = tail_s
        terms["load"] = self._load_s(decode)
        terms["ttft"] = sum(terms.values())
        terms["delay"] = self._delay_s(prefill, ready.compute_s) + self._delay_s(decode, tail_s)
        terms["total"] = total = terms["ttft"] + terms["delay"]
        tokens = prompt.tokens - ready.held_pages * prompt.page_size
        source = "" if ready.source is None else f" after a fetch from {ready.source}"
        reason = (
            f"prefill: {prefill.id} computes {tokens} tokens{source}, "
            f"{moved} pages move to {decode.id}, {total * 1e3:.0f} ms"
        )
        plan = Plan(decode.id, prefill.id, ready.source, reason=reason, terms=terms)
        return _Option(plan, decode, prefill, total)

    def _pick(self, options: Sequence[_Option]) -> _Option:
        """The least total; ties go to the idlest instances, then in turn."""
        least = min(option.seconds for option in options)
        limit = least * (1 + TIE_RELATIVE) + TIE_S
        tied = [option for option in options if option.seconds <= limit]
        loads = [_option_load(option) for option in tied]
        idlest = [o for o, load in zip(tied, loads, strict=True) if load == min(loads)]
        return idlest[self.rotation.turn % len(idlest)]


def _option_load(option: _Option) -> tuple[int, int]:
    requests, tokens = load_of(option.decode)
    if option.prefill is not None:
        more_requests, more_tokens = load_of(option.prefill)
        requests, tokens = requests + more_requests, tokens + more_tokens
    return requests, tokens
