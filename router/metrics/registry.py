"""What the router counts, in a Prometheus registry of its own (names: ``docs/router.md``).

The token funnel of a request is booked once, when its plan has been carried out, at ``Funnel``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from sglang_memserve.protocol.http import FetchResult
from sglang_memserve.types import Tier

from ..tree.merged import MergedTree
from .labels import Bounded, Departed

SourceStates = Callable[[], Mapping[str, str]]
"""Instance to the state of its event stream."""

CONTENT_TYPE = b"text/plain; version=0.0.4; charset=utf-8"
LATENCY_BUCKETS = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0
)  # fmt: skip
ROUTING_BUCKETS = (
    0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0, 5.0
)  # fmt: skip


class Arrival(Enum):
    """``PARTIAL``: all that the source had, which is less than was asked for: nothing failed."""

    WHOLE = "whole"
    PARTIAL = "partial"
    SHORT = "short"


@dataclass(frozen=True, slots=True)
class Fetched:
    """One fetch of one prompt's pages, whatever came of it. ``promised_pages``: leading pages that
    the source had to give, by the tree or because it computed them. More are asked for than that,
    for the tree may be behind."""

    source: str
    target: str
    result: FetchResult
    promised_pages: int

    @property
    def arrival(self) -> Arrival:
        result = self.result
        if result.readable_pages >= result.requested_pages:
            return Arrival.WHOLE
        # Any other outcome than a miss is about pages that the source did have.
        kept = result.outcome == "miss" and result.readable_pages >= self.promised_pages
        return Arrival.PARTIAL if kept else Arrival.SHORT


@dataclass(frozen=True, slots=True)
class Funnel:
    """Tokens of one request, from the prompt down to what was computed.

    ``best_match``: the longest prefix any one instance held. ``selected``: what the chosen
    instance held, by tier. ``cached``: what no instance computed. ``recomputed``: prompt minus
    cached.
    """

    model: str
    policy: str
    role: str
    prompt: int
    best_match: int
    selected: dict[Tier, int]
    cached: int
    fetched: tuple[Fetched, ...] = ()
    page_size: int = 1


@dataclass(slots=True)
class Metrics:
    """All instruments. One object a router; ``expose`` renders them."""

    registry: CollectorRegistry = field(default_factory=CollectorRegistry)
    requests: Counter = field(init=False)
    retries: Counter = field(init=False)
    resumes: Counter = field(init=False)
    aborts: Counter = field(init=False)
    fallbacks: Counter = field(init=False)
    in_flight: Gauge = field(init=False)
    routing: Histogram = field(init=False)
    ttft: Histogram = field(init=False)
    jct: Histogram = field(init=False)
    tpot: Histogram = field(init=False)
    prompt_tokens: Counter = field(init=False)
    best_match_tokens: Counter = field(init=False)
    selected_match_tokens: Counter = field(init=False)
    transferred_tokens: Counter = field(init=False)
    engine_cached_tokens: Counter = field(init=False)
    recomputed_tokens: Counter = field(init=False)
    transfer_seconds: Histogram = field(init=False)
    transfer_bytes: Counter = field(init=False)
    transfer_failures: Counter = field(init=False)
    partial_transfers: Counter = field(init=False)
    _reasons: Bounded = field(default_factory=Bounded)
    _departed: Departed = field(init=False)

    def __post_init__(self) -> None:
        self._requests()
        self._tokens()
        self._transfers()

    def _requests(self) -> None:
        counter, histogram = self._counter, self._histogram
        self.requests = counter("requests", "Requests answered", "route", "code")
        self.retries = counter("retries", "Requests sent to another decode instance", "reason")
        self.resumes = counter(
            "resumes", "Broken streams by what came of them: resumed, or why not", "outcome"
        )
        self.aborts = counter("aborts", "Requests given up because the client went away or asked")
        self.fallbacks = counter(
            "fallbacks", "Steps that failed or were late, so that decode computes", "step", "reason"
        )
        self.in_flight = Gauge(
            "memserve_requests_in_flight", "Inference requests now", registry=self.registry
        )
        self.routing = histogram(
            "routing_seconds", "Time the router itself takes", ROUTING_BUCKETS, "stage"
        )
        self.ttft = histogram("ttft_seconds", "Request to first byte", LATENCY_BUCKETS, "route")
        self.jct = histogram("jct_seconds", "Request to last byte", LATENCY_BUCKETS, "route")
        self.tpot = histogram(
            "tpot_seconds", "Between two frames of a stream, on average", LATENCY_BUCKETS, "route"
        )

    def _tokens(self) -> None:
        def tokens(name: str, text: str, *more: str) -> Counter:
            return self._counter(f"{name}_tokens", text, "model", "policy", "role", *more)

        self.prompt_tokens = tokens("prompt", "Tokens of all prompts")
        self.best_match_tokens = tokens(
            "fleet_best_match", "Tokens of the longest prefix any instance held"
        )
        self.selected_match_tokens = tokens(
            "selected_match", "Prefix tokens the chosen instance held", "tier"
        )
        self.transferred_tokens = self._counter(
            "transferred_tokens", "Tokens whose pages were moved", "src", "dst"
        )
        self.engine_cached_tokens = tokens("engine_cached", "Tokens no instance had to compute")
        self.recomputed_tokens = tokens("recomputed", "Tokens an instance had to compute")

    def _transfers(self) -> None:
        self.transfer_seconds = self._histogram(
            "kv_transfer_seconds", "Duration of fetches that moved pages", LATENCY_BUCKETS
        )
        self.transfer_bytes = self._counter("kv_transfer_bytes", "Bytes moved", "src", "dst")
        self.transfer_failures = self._counter(
            "kv_transfer_failures", "Fetches that did not get the pages promised", "reason"
        )
        self.partial_transfers = self._counter(
            "kv_transfer_partial", "Fetches that got all their source had, not the whole prompt"
        )
        self._departed = Departed((self.transferred_tokens, self.transfer_bytes))

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"memserve_{name}", text, labels, registry=self.registry)

    def _histogram(
        self, name: str, text: str, buckets: tuple[float, ...], *labels: str
    ) -> Histogram:
        return Histogram(f"memserve_{name}", text, labels, buckets=buckets, registry=self.registry)

    def book(self, funnel: Funnel) -> None:
        """Count one request's tokens."""
        who = (funnel.model, funnel.policy, funnel.role)
        self.prompt_tokens.labels(*who).inc(funnel.prompt)
        self.best_match_tokens.labels(*who).inc(funnel.best_match)
        for tier, tokens in funnel.selected.items():
            self.selected_match_tokens.labels(*who, tier.name.lower()).inc(tokens)
        self.engine_cached_tokens.labels(*who).inc(funnel.cached)
        self.recomputed_tokens.labels(*who).inc(max(funnel.prompt - funnel.cached, 0))
        for fetched in funnel.fetched:
            self._book_fetch(fetched, funnel.page_size)

    def _book_fetch(self, fetched: Fetched, page_size: int) -> None:
        result = fetched.result
        if result.fetched_pages:
            pair = (fetched.source, fetched.target)
            self._departed.used(pair)
            self.transferred_tokens.labels(*pair).inc(result.fetched_pages * page_size)
            self.transfer_bytes.labels(*pair).inc(result.fetched_bytes)
            self.transfer_seconds.observe(result.seconds)
        if fetched.arrival is Arrival.PARTIAL:
            self.partial_transfers.inc()
        elif fetched.arrival is Arrival.SHORT:
            reason = self._reasons(short_reason(result.outcome))
            self.transfer_failures.labels(reason).inc()

    def book_stream(self, route: str, frames: int, seconds: float) -> None:
        """``frames`` after the first, in ``seconds``: a token each, unless the client asked its
        instance for several at a time."""
        if frames > 0:
            self.tpot.labels(route).observe(seconds / frames)

    def left(self, instance: str, now: float) -> None:
        """Its (source, target) labels go a while from now (monotonic)."""
        self._departed.left(instance, now)

    def returned(self, instance: str) -> None:
        self._departed.returned(instance)

    def expose(self) -> bytes:
        self._departed.sweep(time.monotonic())
        return generate_latest(self.registry)


def short_reason(text: str) -> str:
    """A label of few values out of a text with details: its words before the first colon."""
    return text.split(":", 1)[0].strip()[:40] or "unknown"


class TreeCollector(Collector):
    """Reads the tree's and the sources' state when asked, so that nothing has to be kept."""

    def __init__(self, tree: MergedTree, sources: SourceStates) -> None:
        self._tree = tree
        self._sources = sources

    def collect(self) -> Iterable[Metric]:
        stats = self._tree.stats()
        nodes = GaugeMetricFamily("memserve_tree_nodes", "Nodes of the merged tree")
        nodes.add_metric([], stats.nodes)
        yield nodes
        blocks = GaugeMetricFamily(
            "memserve_tree_blocks", "Pages an instance holds", labels=["instance", "tier"]
        )
        for instance, held in stats.held.items():
            for tier, pages in held.items():
                blocks.add_metric([instance, tier.name.lower()], pages)
        yield blocks
        states = GaugeMetricFamily(
            "memserve_source_state",
            "1 for the state an instance's event stream is in",
            labels=["instance", "state"],
        )
        for source, state in self._sources().items():
            states.add_metric([source, state], 1)
        yield states
