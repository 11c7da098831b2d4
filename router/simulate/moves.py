"""Pages from one instance's DRAM to another's: those that exist, and those being computed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sglang_memserve.types import PageKey

from .agenda import Agenda, Alarm
from .instance import Instance
from .memory import Expected
from .network import Network, Transfer


@dataclass(frozen=True, slots=True)
class Fetched:
    """``readable``: leading pages that the target has now, ``moved`` of them brought here."""

    readable: int
    moved: int
    seconds: float


def fetch(
    network: Network,
    agenda: Agenda,
    source: Instance,
    target: Instance,
    keys: Sequence[PageKey],
    deadline: float,
    hold_s: float,
    then: Callable[[Fetched], None],
) -> None:
    """What ``source`` holds of ``keys`` and ``target`` lacks, all of it or nothing. What ``target``
    has then stays there for ``hold_s`` at most."""
    expected = target.memory.expect(keys, hold_s)
    have, there = source.movable(keys), target.memory.leading(keys)
    began = agenda.now
    if have <= there:
        expected.end()
        then(Fetched(there, 0, 0.0))
        return

    def arrived() -> None:
        late.cancel()
        target.memory.keep(keys, there, have)
        expected.end()
        then(Fetched(have, have - there, agenda.now - began))

    def give_up() -> None:
        transfer.cancel()
        expected.end()
        then(Fetched(there, 0, agenda.now - began))

    size = (have - there) * target.page_bytes
    transfer = network.begin(source.id, target.id, size, arrived)
    late = agenda.at(deadline, give_up)


class Following:
    """``target`` fetches what ``source`` computes, as it is computed. ``then``, once, hears what
    came of it, and how long it took after the last page was computed: when all has arrived, or the
    time to do so is over (``late``). What has arrived stays for ``hold_s`` at most."""

    def __init__(
        self,
        network: Network,
        agenda: Agenda,
        ends: tuple[Instance, Instance],
        keys: Sequence[PageKey],
        hold_s: float,
        then: Callable[[Fetched], None],
    ) -> None:
        self._network = network
        self._agenda = agenda
        self._source, self._target = ends
        self._keys = keys
        self._then: Callable[[Fetched], None] | None = then
        self._ready = 0
        self._there = self._target.memory.leading(keys)
        self._expected = self._expect(hold_s)
        self._moved = 0
        self._completed_s: float | None = None
        self._transfer: Transfer | None = None
        self._deadline: Alarm | None = None
        self.late = False

    def _expect(self, hold_s: float) -> Expected:
        return self._target.memory.expect(self._keys, hold_s)

    def offer(self, pages: int) -> None:
        """So many leading pages are ready at the source."""
        self._ready = max(self._ready, pages)
        self._go_on()

    def complete(self, grace_s: float) -> None:
        """Nothing more will come; what is on its way may take so long."""
        self._deadline = self._agenda.after(grace_s, self._give_up)
        self._completed()

    def _completed(self) -> None:
        self._completed_s = self._agenda.now
        self._go_on()

    def _go_on(self) -> None:
        if self._transfer is not None or self._then is None:
            return
        end = self._movable(self._ready)
        if end > self._there:
            size = (end - self._there) * self._target.page_bytes
            self._transfer = self._network.begin(
                self._source.id, self._target.id, size, lambda: self._arrived(end)
            )
        elif self._completed_s is not None:
            self._end()

    def _arrived(self, end: int) -> None:
        self._transfer = None
        self._keep(end)
        self._moved += end - self._there
        self._there = end
        self._go_on()

    def _movable(self, ready: int) -> int:
        # Pages of the source that are in its HBM alone cannot be moved.
        return min(ready, self._source.movable(self._keys))

    def _keep(self, end: int) -> None:
        self._target.memory.keep(self._keys, self._there, end)
        self._expected.came()

    def _give_up(self) -> None:
        self.late = True
        if self._transfer is not None:
            self._transfer.cancel()
        self._end()

    def _end(self) -> None:
        then, self._then = self._then, None
        if self._deadline is not None:
            self._deadline.cancel()
        self._expected.end()
        assert self._completed_s is not None
        if then is not None:
            then(Fetched(self._there, self._moved, self._agenda.now - self._completed_s))


class Handing(Following):
    """As SGLang's own disaggregation does it: straight from the source's HBM into slots that the
    target keeps free for them. The source holds its pages until all of them are there."""

    def complete(self, grace_s: float) -> None:
        self._completed()

    def _expect(self, hold_s: float) -> Expected:
        return self._target.memory.expect((), hold_s)  # nothing comes into DRAM

    def _movable(self, ready: int) -> int:
        return ready

    def _keep(self, end: int) -> None:
        """The request brings them along."""
