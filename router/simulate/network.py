"""Bytes between instances: a fluid model.

Each instance has one way out and one way in. Transfers share each of them in equal parts, and a
transfer is as fast as the slower of its two parts. Every one begins with the link's latency.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from sglang_memserve.types import InstanceId

from .agenda import Agenda, Alarm
from .profile import Link

# What passes in so little time is left only because sums of floats are not exact.
_NOTHING_S = 1e-9


class Transfer:
    """Bytes on their way. ``cancel`` gives up, and calls nobody back."""

    def __init__(
        self,
        network: Network,
        ends: tuple[InstanceId, InstanceId],
        size: float,
        then: Callable[[], None],
    ) -> None:
        self.source, self.target = ends
        self.left_bytes = size
        self.rate = 0.0
        self.then = then
        self._network = network
        self.latency: Alarm | None = None

    def cancel(self) -> None:
        if self.latency is not None:
            self.latency.cancel()
        self._network.drop(self)


class Network:
    """All transfers of a fleet."""

    def __init__(self, agenda: Agenda, link: Link) -> None:
        self._agenda = agenda
        self._link = link
        self._moving: dict[Transfer, None] = {}
        self._out: Counter[InstanceId] = Counter()
        self._in: Counter[InstanceId] = Counter()
        self._at = 0.0
        self._next: Alarm | None = None
        self.moved_bytes = 0.0
        self.transfers = 0

    def begin(
        self, source: InstanceId, target: InstanceId, size: float, then: Callable[[], None]
    ) -> Transfer:
        """``size``: bytes. ``then`` is called when the last of them has arrived."""
        transfer = Transfer(self, (source, target), size, then)
        self.transfers += 1
        transfer.latency = self._agenda.after(self._link.latency_s, lambda: self._enter(transfer))
        return transfer

    def drop(self, transfer: Transfer) -> None:
        if transfer in self._moving:
            self._flow()
            self._leave(transfer)
            self._plan()

    def busy(self) -> bool:
        return bool(self._moving)

    def _enter(self, transfer: Transfer) -> None:
        self._flow()
        self._moving[transfer] = None
        self._out[transfer.source] += 1
        self._in[transfer.target] += 1
        self._plan()

    def _leave(self, transfer: Transfer) -> None:
        del self._moving[transfer]
        self._out[transfer.source] -= 1
        self._in[transfer.target] -= 1

    def _flow(self) -> None:
        """What has moved since the rates were last set."""
        passed_s, self._at = self._agenda.now - self._at, self._agenda.now
        for transfer in self._moving:
            moved = min(transfer.rate * passed_s, transfer.left_bytes)
            transfer.left_bytes -= moved
            self.moved_bytes += moved

    def _plan(self) -> None:
        """New rates, and when the next transfer ends."""
        if self._next is not None:
            self._next.cancel()
            self._next = None
        if not self._moving:
            return
        soonest_s = float("inf")
        for transfer in self._moving:
            most = max(self._out[transfer.source], self._in[transfer.target])
            transfer.rate = self._link.bytes_per_s / most
            soonest_s = min(soonest_s, transfer.left_bytes / transfer.rate)
        self._next = self._agenda.after(soonest_s, self._arrive)

    def _arrive(self) -> None:
        self._flow()
        done = [one for one in self._moving if one.left_bytes <= _NOTHING_S * one.rate]
        for transfer in done:
            self.moved_bytes += transfer.left_bytes
            self._leave(transfer)
        self._plan()
        for transfer in done:
            transfer.then()

    def check(self) -> None:
        assert sum(self._out.values()) == sum(self._in.values()) == len(self._moving)
        assert min([*self._out.values(), *self._in.values()], default=0) >= 0
