"""Where a subscriber stands: what is new, what is old, what is missing."""

from __future__ import annotations

from sglang_memserve.protocol.position import Position, Step


def test_in_order_from_the_snapshot_on() -> None:
    at = Position()
    at.restart(4)
    assert at.judge(5) is Step.NEXT
    at.taken()
    assert at.judge(7) is Step.GAP
    assert at.judge(6) is Step.NEXT


def test_batches_from_before_the_snapshot_are_old_until_a_newer_came() -> None:
    at = Position()
    at.restart(4)
    assert [at.judge(seq) for seq in (2, 3, 4)] == [Step.STALE] * 3
    # Falling numbers are another sender's.
    assert at.judge(1) is Step.GAP
    at.restart(4)
    assert at.judge(5) is Step.NEXT
    at.taken()
    assert at.judge(4) is Step.GAP


def test_before_the_first_batch() -> None:
    assert Position().judge(0) is Step.NEXT
    assert Position().judge(1) is Step.GAP


def test_a_lost_end_shows_by_what_is_told() -> None:
    at = Position()
    at.restart(3)
    assert not at.lags(0.0, 1.0)
    at.told_of(4)
    assert not at.lags(10.0, 1.0) and not at.lags(11.0, 1.0) and at.lags(11.5, 1.0)
    assert at.judge(4) is Step.NEXT
    at.taken()
    assert not at.lags(20.0, 1.0)
    at.told_of(2)
    assert at.known_seq == 4
