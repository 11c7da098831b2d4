"""Pages that were fetched for a request and stay until the request takes them. Pure: no clock.

A request that waits for its turn has nothing that keeps its pages: the engine looks up only those
it tries to admit. So whoever fetches pages for a request says for how long they are to be held:

    prepare (the fetch begins) -> complete (it ended: what is readable is pinned)
        -> claim (the request was looked up, and pins them itself), or the time is over

A hold is known by the last key that was asked for. Keys are chained, so a look-up that names this
key is one of the same prompt, or of one that goes on from it; of several holds that a look-up
covers, the longest is its own. Requests with the same prompt share one hold: the first that is
looked up brings the pages into HBM, where the others find them.

A request that comes while its pages are still on their way claims its hold all the same: nothing
is held then, since nobody would claim it any more.

All together pin at most ``share`` of the blocks, each block counted once, and are at most ``most``.
What would be more is refused: those that came first are served first, and what they wait for must
not go for others that wait behind them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from math import inf

from ..types import BlockId, HoldOutcome, PageKey
from .local_index import LocalIndex

COUNTERS = (
    "holds_total",
    "holds_claimed_total",
    "holds_refused_total",
    "holds_expired_total",
    "holds_ended_total",
)


@dataclass(slots=True, eq=False)
class Hold:
    """Made by ``Holds.prepare``. ``keys``: all that was asked for, not empty."""

    keys: Sequence[PageKey]
    wanted: bool = True


@dataclass(slots=True)
class _Held:
    blocks: list[BlockId]
    ends_s: float


@dataclass(slots=True)
class Holds:
    """Of one index. ``free`` takes blocks whose page was removed while they were held. Every time
    is on one clock of the caller's."""

    index: LocalIndex
    share: float
    most: int
    free: Callable[[Sequence[BlockId]], None]
    counts: Counter[str] = field(default_factory=Counter)
    _limit: int = field(init=False)
    _waiting: dict[PageKey, list[Hold]] = field(init=False, default_factory=dict)
    # The oldest in front.
    _held: dict[PageKey, _Held] = field(init=False, default_factory=dict)
    _blocks: Counter[BlockId] = field(init=False, default_factory=Counter)
    _next_s: float = field(init=False, default=inf)

    def __post_init__(self) -> None:
        self._limit = self.index.total_blocks

    def __len__(self) -> int:
        return len(self._held)

    @property
    def held_blocks(self) -> int:
        return len(self._blocks)

    def pinned(self) -> Iterable[BlockId]:
        """Every pin: a block as often as it is held."""
        for held in self._held.values():
            yield from held.blocks

    # -- the life of a hold --

    def prepare(self, keys: Sequence[PageKey]) -> Hold:
        """Before the pages come; ``complete`` or ``abort`` must follow."""
        hold = Hold(keys)
        self._waiting.setdefault(keys[-1], []).append(hold)
        return hold

    def abort(self, hold: Hold) -> None:
        """Nobody will ask for its pages. Idempotent, and nothing after ``complete``."""
        if hold.wanted:
            hold.wanted = False
            self._no_longer_waiting(hold)

    def complete(self, hold: Hold, ends_s: float) -> HoldOutcome:
        """Pin the leading resident run of its keys until ``ends_s``."""
        if not hold.wanted:
            return HoldOutcome.NEEDLESS
        self.abort(hold)
        last, blocks = hold.keys[-1], self.index.match(hold.keys)
        if not blocks:
            return HoldOutcome.NEEDLESS
        before = self._held.get(last)
        if before is not None:
            ends_s = max(ends_s, before.ends_s)
        new = sum(block not in self._blocks for block in blocks)
        full = before is None and len(self._held) >= self.most
        if full or self.held_blocks + new > self.share * self._limit or max(blocks) >= self._limit:
            self.counts["holds_refused_total"] += 1
            return HoldOutcome.REFUSED
        self.index.pin(blocks)
        self._blocks.update(blocks)
        if before is not None:
            self._end(last)
        self._held[last] = _Held(blocks, ends_s)
        self._next_s = min(self._next_s, ends_s)
        self.counts["holds_total"] += 1
        return HoldOutcome.HELD

    def claim(self, keys: Sequence[PageKey]) -> None:
        """A request that names ``keys`` has pinned what there is of them: end its hold."""
        if not self._held and not self._waiting:
            return
        for key in reversed(keys):
            if key in self._held or key in self._waiting:
                for hold in self._waiting.pop(key, ()):
                    hold.wanted = False
                if key in self._held:
                    self.counts["holds_claimed_total"] += 1
                    self._end(key)
                return

    # -- other ends --

    def end_expired(self, now_s: float) -> None:
        if now_s < self._next_s:
            return
        over = [key for key, held in self._held.items() if held.ends_s <= now_s]
        self._end_all(over, "holds_expired_total")
        self._next_s = min((held.ends_s for held in self._held.values()), default=inf)

    def end_all(self) -> None:
        """The pages are gone, or will be. What is on its way may still be held."""
        self._end_all(list(self._held), "holds_ended_total")

    def confine(self, limit: int) -> None:
        """Only blocks below ``limit`` may be held from now on: the others are to be emptied, or
        are there again. Ends the holds that reach beyond, and then the latest of those that are
        too much for what is left."""
        self._limit = limit
        beyond = [key for key, held in self._held.items() if max(held.blocks) >= limit]
        self._end_all(beyond, "holds_ended_total")
        while self.held_blocks > self.share * limit:
            self._end_all([next(reversed(self._held))], "holds_ended_total")

    # -- inside --

    def _no_longer_waiting(self, hold: Hold) -> None:
        last = hold.keys[-1]
        waiting = self._waiting[last]
        waiting.remove(hold)
        if not waiting:
            del self._waiting[last]

    def _end_all(self, keys: Sequence[PageKey], counter: str) -> None:
        self.counts[counter] += len(keys)
        for key in keys:
            self._end(key)

    def _end(self, key: PageKey) -> None:
        blocks = self._held.pop(key).blocks
        for block in blocks:
            if self._blocks[block] == 1:
                del self._blocks[block]
            else:
                self._blocks[block] -= 1
        self.free(self.index.unpin(blocks))

    def stats(self) -> dict[str, int]:
        gauges = {"holds": len(self), "held_blocks": self.held_blocks}
        return gauges | {name: self.counts[name] for name in COUNTERS}

    def check(self) -> None:
        assert len(self._held) <= self.most, len(self._held)
        assert self.held_blocks <= self.share * self._limit, (self.held_blocks, self._limit)
        assert self._blocks == Counter(self.pinned()), "holds and their blocks differ"
        assert all(held.blocks for held in self._held.values()), "a hold of nothing"
        assert max(self._blocks, default=-1) < self._limit, self._limit
        assert self._next_s <= min((held.ends_s for held in self._held.values()), default=inf)
        for last, waiting in self._waiting.items():
            assert waiting and all(hold.wanted and hold.keys[-1] == last for hold in waiting), last
