"""Whom several routers name as peers, together. Pure.

Each router says all that it knows; what one has not heard of yet must not undo what another said.
So the lists are kept by router, each for as long as it is good, and the ranks are told of their
union.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..protocol.http import PeerInfo

MAX_ROUTERS = 32


@dataclass(frozen=True, slots=True)
class _Said:
    peers: tuple[PeerInfo, ...]
    until_s: float


class Acquaintances:
    def __init__(self) -> None:
        self._said: dict[str, _Said] = {}

    def told(
        self, router: str, peers: Sequence[PeerInfo], valid_s: float, now: float
    ) -> tuple[list[PeerInfo], float]:
        """``router`` names its members, for ``valid_s`` > 0. All that are named by anybody, and for
        how many seconds; of two boots of one URL the one that was named last."""
        self._said.pop(router, None)
        self._said[router] = _Said(tuple(peers), now + valid_s)
        self._said = {name: said for name, said in self._said.items() if said.until_s > now}
        while len(self._said) > MAX_ROUTERS:
            del self._said[next(iter(self._said))]
        union = {peer.url: peer for said in self._said.values() for peer in said.peers}
        longest = max(said.until_s for said in self._said.values()) - now
        return sorted(union.values(), key=lambda peer: peer.url), longest
