"""The KV cache of one instance: HBM pages, and MemPool's in DRAM.

What is computed is written through to DRAM. A request takes all the HBM it will ever need when it
is admitted (the engine knows how long the answer gets; a real one guesses and puts streams out
when it guessed wrong), pins what it shares, and leaves its prompt's pages behind, and the answer's
where the trace says which these are. HBM is evicted
leaf first, least recently used, as SGLang does; DRAM by the policy that MemPool is given. What was
fetched for a request is held there until it is admitted, by MemPool's own holds and their bounds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sglang_memserve.config import Limits
from sglang_memserve.index.holds import Holds
from sglang_memserve.types import BlockId, Eviction, PageKey, Tier

from .pages import Change, Pages

Tell = Callable[[Tier, Sequence[PageKey], int, Change], None]
"""Of a tier, a prompt's keys and where in them the pages begin that it now holds more; and pages
that went."""


@dataclass(slots=True)
class Seat:
    """One request's HBM. ``ready``: leading pages of ``keys`` that are in HBM. ``hbm_pages`` and
    ``dram_pages``: where those were that were there when it was admitted."""

    keys: Sequence[PageKey]
    shared: list[BlockId]
    private: list[BlockId]
    ready: int
    hbm_pages: int
    dram_pages: int
    left: bool = False


class Memory:
    """``tell`` hears of every change; it becomes the instance's events. ``limits``: of holds."""

    def __init__(
        self,
        hbm_pages: int,
        dram_pages: int,
        eviction: Eviction,
        tell: Tell,
        now: Callable[[], float],
        limits: Limits | None = None,
    ) -> None:
        self.hbm = Pages(hbm_pages, Eviction.LRU)
        self.dram = Pages(dram_pages, eviction)
        self._tell = tell
        self.now = now
        self.expected: set[Expected] = set()
        self._limits = limits or Limits()
        share, most = self._limits.hold_share, self._limits.max_holds
        self.holds = Holds(self.dram.index, share, most, self.dram.give_back)

    def leading(self, keys: Sequence[PageKey]) -> int:
        """How many of ``keys`` a request here would find."""
        hbm = self.hbm.index.leading(keys)
        return hbm + self.dram.index.leading(keys[hbm:])

    def admit(self, keys: Sequence[PageKey], pages: int, given: int = 0) -> Seat | None:
        """Room for ``pages`` pages, of which the first are ``keys``; None while there is none.

        ``given`` of ``keys`` have come from elsewhere: they are in HBM as soon as it has a place.
        """
        hbm, dram = self.hbm.index, self.dram.index
        shared = hbm.match(keys)
        held = len(shared)
        hbm.pin(shared)
        if pages - held > self.hbm.available:
            hbm.unpin(shared)
            return None
        hbm.touch(shared)
        private, removed = self.hbm.take(pages - held)
        loaded = dram.match(keys[held:])
        dram.touch(loaded)
        seat = Seat(keys, shared, private, held, held, len(loaded))
        if removed:
            self._tell(Tier.HBM, keys, 0, Change((), removed))
        self._into_hbm(seat, max(held + len(loaded), given))
        self.holds.claim(keys)
        return seat

    # -- what was fetched --

    def expect(self, keys: Sequence[PageKey], hold_s: float) -> Expected:
        """Pages are about to come for a request; ``end`` must follow."""
        there = self.leading(keys)
        if there > self.dram.index.leading(keys):
            # Some are in HBM alone; a router asks for those behind them.
            keys = keys[there:]
        return Expected(self, keys, min(hold_s, self._limits.max_hold_s))

    # -- what is computed --

    def computed(self, seat: Seat, pages: int) -> None:
        """The first ``pages`` of its prompt are in HBM now."""
        before = seat.ready
        self._into_hbm(seat, pages)
        if pages > before:
            self.keep(seat.keys, before, pages)

    def keep(self, keys: Sequence[PageKey], start: int, end: int) -> None:
        """Pages for DRAM: computed, or fetched."""
        self.holds.end_expired(self.now())
        change = self.dram.store(keys, start, end)
        if change.stored or change.removed:
            first = keys.index(change.stored[0], start) if change.stored else 0
            self._tell(Tier.DRAM, keys, first, change)

    def leave(self, seat: Seat, answered: Sequence[PageKey] = ()) -> None:
        """``answered``: keys of prompt and answer; those of the prompt come first in it."""
        assert not seat.left
        if answered:
            seat.keys = answered
            self.computed(seat, len(answered))
        seat.left = True
        self.hbm.index.unpin(seat.shared)
        self.hbm.give(seat.private)

    def _into_hbm(self, seat: Seat, pages: int) -> None:
        index, keys, start = self.hbm.index, seat.keys, seat.ready
        seat.ready = max(pages, start)
        at = start
        while at < pages:
            # Another request may have computed the same meanwhile: then its page is shared, and
            # the own copy stays private until the end.
            block = index.get(keys[at])
            if block is not None:
                index.pin([block])
                seat.shared.append(block)
                at += 1
                continue
            stop = at + 1
            while stop < pages and keys[stop] not in index:
                stop += 1
            blocks = [seat.private.pop() for _ in range(stop - at)]
            self.hbm.publish(keys, at, stop, blocks)
            index.pin(blocks)
            seat.shared += blocks
            self._tell(Tier.HBM, keys, at, Change(keys[at:stop], ()))
            at = stop

    def check(self) -> None:
        self.hbm.check()
        self.dram.check()
        self.holds.check()
        assert not self.dram.private, self.dram.private
        pins = Counter(self.holds.pinned())
        for expected in self.expected:
            pins.update(expected.blocks)
        assert self.dram.index.pins() == pins, "others pin in DRAM"


class Expected:
    """Pages on their way for a request. Those that are here stay until ``end``, as MemPool's do for
    as long as a fetch runs; and then until the request is admitted, for ``hold_s`` at most."""

    def __init__(self, memory: Memory, keys: Sequence[PageKey], hold_s: float) -> None:
        self.blocks: list[BlockId] = []
        self._memory = memory
        self._keys = keys
        self._hold_s = hold_s
        self._hold = memory.holds.prepare(keys) if keys and hold_s else None
        memory.expected.add(self)
        self.came()

    def came(self) -> None:
        """More of them, perhaps."""
        index = self._memory.dram.index
        blocks = index.match(self._keys[len(self.blocks) :])
        index.pin(blocks)
        self.blocks += blocks

    def end(self) -> None:
        """As many have come as will."""
        memory, now = self._memory, self._memory.now()
        self.came()
        memory.holds.end_expired(now)
        if self._hold is not None:
            memory.holds.complete(self._hold, now + self._hold_s)
        memory.expected.remove(self)
        memory.dram.index.unpin(self.blocks)
