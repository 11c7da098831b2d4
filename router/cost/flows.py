"""Pages on the move now: how much else the two ends of a new transfer have to carry. Pure.

A link is shared fairly. A transfer of ``b`` bytes beside others of ``r`` bytes each ends when ``b``
plus the lesser of ``b`` and ``r`` for each of them have passed; so what counts is the busier end.
"""

from __future__ import annotations

from dataclasses import dataclass

from sglang_memserve.types import InstanceId


@dataclass(slots=True)
class _Carried:
    flows: int = 0
    moved_bytes: float = 0.0


class Flow:
    """One transfer; ``end`` is idempotent."""

    def __init__(self, flows: Flows, ends: tuple[InstanceId, InstanceId], size: float) -> None:
        self._flows = flows
        self._ends = ends
        self._bytes = size
        self._ended = False

    def end(self) -> None:
        if not self._ended:
            self._ended = True
            self._flows._change(self._ends, -1, -self._bytes)


class Flows:
    """All transfers that the router has asked for. Memory: the instances at work."""

    def __init__(self) -> None:
        self._out: dict[InstanceId, _Carried] = {}
        self._in: dict[InstanceId, _Carried] = {}

    def begin(self, source: InstanceId, target: InstanceId, size: float) -> Flow:
        """``size``: bytes. The caller ends it."""
        size = max(size, 0.0)
        self._change((source, target), 1, size)
        return Flow(self, (source, target), size)

    def beside_bytes(self, source: InstanceId, target: InstanceId, size: float) -> float:
        """Bytes that pass before ``size`` more have, because others share the way."""
        out, into = self._out.get(source), self._in.get(target)
        most = 0.0 if out is None else min(out.moved_bytes, out.flows * size)
        return most if into is None else max(most, min(into.moved_bytes, into.flows * size))

    def count(self) -> int:
        return sum(carried.flows for carried in self._out.values())

    def _change(self, ends: tuple[InstanceId, InstanceId], flows: int, size: float) -> None:
        for table, end in zip((self._out, self._in), ends, strict=True):
            carried = table.setdefault(end, _Carried())
            carried.flows += flows
            # Sums of floats do not come back to zero by themselves.
            carried.moved_bytes = max(carried.moved_bytes + size, 0.0)
            if not carried.flows:
                del table[end]

    def check(self) -> None:
        assert sum(c.flows for c in self._in.values()) == self.count()
        for carried in (*self._out.values(), *self._in.values()):
            assert carried.flows > 0 and carried.moved_bytes >= 0, carried
