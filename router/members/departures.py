"""Instances that have left: which of them stay away, and what to tell of the others. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Container

from sglang_memserve.types import Generation, InstanceId

from .member import Member

REMEMBER_S = 3600.0
_REMEMBERED = 32


class Departures:
    """The last few of each kind. The caller says what time it is (monotonic seconds)."""

    def __init__(self) -> None:
        self._dismissed: dict[InstanceId, Generation] = {}
        self._gone: deque[tuple[float, Member]] = deque(maxlen=_REMEMBERED)

    def dismiss(self, instance: InstanceId, generation: Generation) -> None:
        """This boot stays away, whatever it says."""
        self._dismissed[instance] = generation
        while len(self._dismissed) > _REMEMBERED:
            del self._dismissed[next(iter(self._dismissed))]

    def dismissed(self, instance: InstanceId, generation: str) -> bool:
        return self._dismissed.get(instance) == generation

    def welcome(self, instance: InstanceId) -> None:
        """Whoever is there may come back: another boot, or the operator's word."""
        self._dismissed.pop(instance, None)

    def remember(self, member: Member, now: float) -> None:
        self._gone.append((now, member))

    def recent(self, now: float, here: Container[InstanceId]) -> list[Member]:
        """Those that left within ``REMEMBER_S`` and are not ``here`` again, oldest first; each URL
        once, as its last boot there."""
        last: dict[InstanceId, Member] = {}
        for left_at, member in self._gone:
            if now - left_at <= REMEMBER_S:
                last.pop(member.id, None)
                last[member.id] = member
        return [member for member in last.values() if member.id not in here]
