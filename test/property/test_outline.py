"""The drawing of the merged tree against what it is drawn from: widths always add up."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from sglang_memserve.router.dashboard.outline import Span, outline
from sglang_memserve.types import ShortKey


@st.composite
def forests(draw: st.DrawFn) -> list[Span]:
    """Runs below earlier runs, below pages nobody holds, or roots; shuffled."""
    spans: list[Span] = []
    for i in range(draw(st.integers(0, 30))):
        pages = draw(st.integers(1, 9))
        above = draw(st.sampled_from([None, ShortKey(-5), *(span.last for span in spans)]))
        holders = draw(st.dictionaries(st.integers(0, 3), st.integers(1, 3), max_size=3))
        spans.append(
            Span(ShortKey(100 * i), ShortKey(100 * i + pages - 1), pages, above, holders, hits=i)
        )
    return draw(st.permutations(spans))


@given(forests(), st.integers(1, 12))
def test_everything_is_drawn_or_lumped(spans: list[Span], most: int) -> None:
    drawn = outline(spans, most)
    whole = [node for node in drawn if node.key]
    assert len(whole) == min(most, len(spans))
    assert sum(node.pages for node in drawn) == sum(span.pages for span in spans)
    assert sum(node.weight for node in drawn if node.above < 0) == sum(s.pages for s in spans)
    assert sum(node.hits for node in drawn if node.above < 0) == sum(s.hits for s in spans)
    assert sum(node.runs for node in drawn if node.above < 0) == len(spans)
    for place, node in enumerate(drawn):
        assert node.above < place
        below = [child for child in drawn if child.above == place]
        assert node.weight == node.pages * bool(node.key) + sum(c.weight for c in below) or not (
            node.key
        )
        if node.above >= 0:
            above = drawn[node.above]
            assert node.start == above.start + above.pages
        assert sum(1 for child in below if not child.key) <= 1


def test_runs_that_hang_below_themselves_do_no_harm() -> None:
    a = Span(ShortKey(1), ShortKey(2), 2, ShortKey(4), {0: 1})
    b = Span(ShortKey(3), ShortKey(4), 2, ShortKey(2), {0: 1})
    alone = Span(ShortKey(9), ShortKey(9), 1, ShortKey(9), {0: 1})
    assert [node.key for node in outline([a, b, alone])] == [f"{9:016x}"]


def test_a_run_seen_twice_is_drawn_once() -> None:
    before = Span(ShortKey(1), ShortKey(5), 5, None, {0: 1})
    after = Span(ShortKey(1), ShortKey(2), 2, None, {0: 2})
    [node] = outline([before, after])
    assert (node.pages, node.holders) == (2, {0: 2})
