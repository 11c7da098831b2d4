"""What ``POST /memserve/fetch`` says over several sources and ranks."""

from __future__ import annotations

from sglang_memserve.errors import PeerUnreachable
from sglang_memserve.plugin.agent import _merge
from sglang_memserve.protocol.control import FetchReply, SourceReply
from sglang_memserve.protocol.http import FetchBody, FetchSource, SourceResult


def test_one_source_is_short_for_a_list() -> None:
    assert FetchBody([], "u", source_ranks=["r"]).all_sources() == [FetchSource("u", ranks=["r"])]
    both = FetchBody([], "u", sources=[FetchSource("v", 3, 4)]).all_sources()
    assert [source.url for source in both] == ["u", "v"]


def test_ranks_and_sources_are_merged() -> None:
    sources = [FetchSource("a"), FetchSource("gone"), FetchSource("b", 5)]
    one = FetchReply(
        0, 9, 9, 900, 1.0, "complete", [SourceReply("a", 5, "complete"), SourceReply("b", 4, "x")]
    )
    two = FetchReply(
        0, 5, 5, 500, 2.0, "miss", [SourceReply("a", 5, "complete"), SourceReply("b", 0, "miss")]
    )
    result = _merge([one, two], sources, {1: PeerUnreachable("why")}, 9)
    assert (result.readable_pages, result.fetched_bytes, result.outcome) == (5, 1400, "miss")
    assert result.sources == [
        SourceResult("a", 5, "complete"),
        SourceResult("gone", 0, "peer_unreachable", "why"),
        SourceResult("b", 0, "x"),
    ]


def test_the_outcome_is_that_of_the_rank_with_the_fewest_pages() -> None:
    """What fails behind the first hole is not why the hole is there, in whatever order."""
    ahead = FetchReply(0, 7, 7, 700, 1.0, "miss", [SourceReply("a", 7, "miss")])
    behind = FetchReply(0, 3, 3, 300, 1.0, "transfer_failed", [SourceReply("a", 3, "failed")])
    for replies in ([ahead, behind], [behind, ahead]):
        result = _merge(replies, [FetchSource("a")], {}, 9)
        assert (result.readable_pages, result.outcome) == (3, "transfer_failed")
