"""How far a match is counted on while its source is not complete."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from sglang_memserve.router.tree.source import SourceState
from sglang_memserve.router.tree.trust import TrustedTree, discounted
from sglang_memserve.router.values import Match
from sglang_memserve.types import InstanceId

A, B, C = (InstanceId(f"http://{name}:1") for name in "abc")


@st.composite
def matches(draw: st.DrawFn) -> Match:
    pages = draw(st.integers(1, 1000))
    return Match(pages, draw(st.integers(0, pages)), draw(st.integers(0, pages)))


@given(match=matches(), state=st.sampled_from(SourceState))
def test_a_discounted_match_is_a_leading_part_of_it(match: Match, state: SourceState) -> None:
    less = discounted(match, state)
    assert 0 <= less.pages <= match.pages
    assert less.hbm_pages == min(match.hbm_pages, less.pages)
    assert less.movable_pages == min(match.movable_pages, less.pages)
    if state in (SourceState.EXACT, SourceState.SYNCING):
        assert less == match
    assert (less.pages == 0) == (
        state is SourceState.STALE or (state is SourceState.DEGRADED and match.pages == 1)
    )


def test_doubts_about_one_leave_the_others() -> None:
    class Tree:
        def match(self, _: object) -> dict[InstanceId, Match]:
            return {A: Match(8, 8, 4), B: Match(8), C: Match(8)}

    trusted = TrustedTree(Tree(), lambda: {A: SourceState.DEGRADED, C: SourceState.STALE})
    assert trusted.match([]) == {A: Match(6, 6, 2), B: Match(8)}
