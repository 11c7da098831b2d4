"""What decisions make of instances whose events are not complete.

Eviction takes leaves first, so of a prefix that was there a moment ago the leading part is the part
that most likely still is. Of a degraded source the last quarter of each match is not counted on; of
a stale one nothing is. Too little trust costs a fetch or a prefill that was not needed, too much a
fetch that finds less.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction

from sglang_memserve.types import InstanceId, ShortKey

from ..values import Match
from .merged import Matcher
from .source import SourceState

TRUSTED_SHARE = {SourceState.DEGRADED: Fraction(3, 4), SourceState.STALE: Fraction(0)}


class TrustedTree:
    """A tree's matches, less what is not to be trusted. ``doubts``: the sources that are not
    complete; asked for at every match."""

    def __init__(
        self, tree: Matcher, doubts: Callable[[], Mapping[InstanceId, SourceState]]
    ) -> None:
        self._tree = tree
        self._doubts = doubts

    def match(self, keys: Sequence[ShortKey]) -> dict[InstanceId, Match]:
        found = self._tree.match(keys)
        for instance, state in self._doubts().items():
            match = found.pop(instance, None)
            if match is not None and (less := discounted(match, state)).pages:
                found[instance] = less
        return found


def discounted(match: Match, state: SourceState) -> Match:
    """The leading part of ``match`` that ``state`` lets one count on."""
    pages = int(match.pages * TRUSTED_SHARE.get(state, Fraction(1)))
    movable = min(match.movable_pages, pages)
    return Match(pages, min(match.hbm_pages, pages), pages - movable)
