"""The last requests, the last transfers, and which prefixes were asked for: what people look at.

Bounded, in memory only, and written at three places of a request's life. Prompts are not kept,
except for their first characters where there is an admin key to read them with.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum

from sglang_memserve.types import InstanceId, ShortKey

from ..metrics.registry import Arrival, Fetched
from ..prompt.bodies import Chat, Source, Texts, TokenIds
from .placement import Holdings, Keyed
from .turn import Turn

KEPT_REQUESTS = 200
KEPT_PAIRS = 4096
KEPT_PREFIXES = 20_000
EXCERPT_CHARACTERS = 160
EXCERPT_TOKENS = 24


class Excerpts(Enum):
    """Whether the beginnings of prompts are kept."""

    KEPT = "kept"
    NONE = "none"


@dataclass(frozen=True, slots=True)
class Seen:
    """One request, living or ended. ``phase``: routing, before decode, answering, done.
    ``at``: wall clock; ``status`` 0 while there is no answer."""

    id: str
    route: str
    phase: str
    at: float
    age_s: float
    status: int
    prompt_tokens: int
    cached_tokens: int | None
    prefill: str | None
    decode: str | None
    ttft_s: float | None
    total_s: float | None
    reason: str
    excerpt: str | None


@dataclass(slots=True)
class Pair:
    """Transfers from one instance to another. ``short`` and ``partial``: those of them that
    arrived so. ``last_at``: monotonic."""

    fetches: int = 0
    short: int = 0
    partial: int = 0
    pages: int = 0
    bytes: int = 0
    seconds: float = 0.0
    last_at: float = 0.0


@dataclass(slots=True)
class Heat:
    """How often a prefix was the longest known one of a prompt. Monotonic seconds."""

    hits: int
    first_at: float
    last_at: float


class Journal:
    def __init__(
        self,
        clock: Callable[[], float],
        wall_clock: Callable[[], float],
        excerpts: Excerpts = Excerpts.NONE,
    ) -> None:
        self._clock = clock
        self._wall_clock = wall_clock
        self._excerpts = excerpts
        self._live: dict[int, Turn] = {}
        self._ended: deque[Seen] = deque(maxlen=KEPT_REQUESTS)
        self._pairs: OrderedDict[tuple[str, str], Pair] = OrderedDict()
        self._heat: OrderedDict[ShortKey, Heat] = OrderedDict()
        self.finished = 0

    # -- writing --

    def entered(self, turn: Turn) -> None:
        self._live[id(turn)] = turn

    def left(self, turn: Turn, total_s: float) -> None:
        if self._live.pop(id(turn), None) is not None:
            self.finished += 1
            self._ended.append(self._seen(turn, total_s))

    def planned(self, keyed: Keyed, holdings: Holdings) -> None:
        """Which prefixes the tree could help with."""
        now = self._clock()
        for chain, matches in zip(keyed.chains, holdings.by_chain, strict=True):
            pages = max((match.pages for match in matches.values()), default=0)
            if not pages:
                continue
            key = chain.short[min(pages, len(chain.short)) - 1]
            heat = self._heat.pop(key, None) or Heat(0, now, now)
            heat.hits += 1
            heat.last_at = now
            self._heat[key] = heat
            if len(self._heat) > KEPT_PREFIXES:
                self._heat.popitem(last=False)

    def moved(self, fetches: Iterable[Fetched]) -> None:
        for fetch in fetches:
            who, result = (fetch.source, fetch.target), fetch.result
            pair = self._pairs.pop(who, None) or Pair()
            pair.fetches += 1
            pair.short += fetch.arrival is Arrival.SHORT
            pair.partial += fetch.arrival is Arrival.PARTIAL
            pair.pages += result.fetched_pages
            pair.bytes += result.fetched_bytes
            pair.seconds += result.seconds if result.fetched_pages else 0.0
            pair.last_at = self._clock()
            self._pairs[who] = pair
            if len(self._pairs) > KEPT_PAIRS:
                self._pairs.popitem(last=False)

    def forget(self, instance: InstanceId) -> None:
        """It has left: its transfers are history."""
        for who in [who for who in self._pairs if instance in who]:
            del self._pairs[who]

    # -- reading --

    def living(self, most: int) -> list[Seen]:
        """Oldest first."""
        turns = list(self._live.values())[:most]
        return [self._seen(turn, None) for turn in turns]

    def living_count(self) -> int:
        return len(self._live)

    def ended(self, most: int) -> list[Seen]:
        """Latest first."""
        return list(reversed(self._ended))[:most]

    def pairs(self, most: int) -> list[tuple[str, str, Pair]]:
        """The most recently used ones."""
        return [(*who, pair) for who, pair in reversed(self._pairs.items())][:most]

    def heat(self) -> dict[ShortKey, Heat]:
        """A copy: it may be read while requests go on."""
        return dict(self._heat)

    def now(self) -> float:
        return self._clock()

    def _seen(self, turn: Turn, total_s: float | None) -> Seen:
        verdict = turn.verdict
        age_s = self._clock() - turn.started
        if total_s is not None:
            phase = "done"
        elif turn.client.answered:
            phase = "answering"
        else:
            phase = "before decode" if verdict.decode or verdict.prefill else "routing"
        kept = self._excerpts is Excerpts.KEPT
        return Seen(
            id=turn.client.request_id,
            route=turn.route.value,
            phase=phase,
            at=self._wall_clock() - age_s,
            age_s=age_s,
            status=turn.client.status or (499 if total_s is not None else 0),
            prompt_tokens=turn.prompt_tokens,
            cached_tokens=verdict.cached_tokens,
            prefill=verdict.prefill,
            decode=verdict.decode,
            ttft_s=turn.first_byte_s,
            total_s=total_s,
            reason=verdict.reason,
            excerpt=excerpt(turn.request.source) if kept else None,
        )


def excerpt(source: Source) -> str | None:
    """The beginning of a prompt (of a chat: of its last message). Never salts or other fields."""
    if isinstance(source, Texts):
        return source.texts[0][:EXCERPT_CHARACTERS] if source.texts else None
    if isinstance(source, TokenIds):
        return str(list(source.ids[0][:EXCERPT_TOKENS])) if source.ids else None
    if isinstance(source, Chat):
        messages = source.body.get("messages")
        last = messages[-1] if isinstance(messages, list) and messages else None
        content = last.get("content") if isinstance(last, dict) else None
        return content[:EXCERPT_CHARACTERS] if isinstance(content, str) else None
    return None
