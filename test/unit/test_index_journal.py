"""Numbered batches, and the events that rebuild an index."""

from __future__ import annotations

import hashlib

from hypothesis import given
from hypothesis import strategies as st
from sglang_memserve.hashing import short_key
from sglang_memserve.index.journal import (
    Cleared,
    Dropped,
    Journal,
    Record,
    Stored,
    rebuild,
    to_events,
)
from sglang_memserve.protocol.events import (
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    EventBatch,
    decode_frames,
    encode_frames,
)
from sglang_memserve.types import PageKey, Tier


def key(number: int) -> PageKey:
    return PageKey(hashlib.sha256(str(number).encode()).digest())


def test_numbers_have_no_holes() -> None:
    journal = Journal(1000)
    assert journal.last_seq == -1 and journal.drain() == []
    journal.write((Cleared(),))
    journal.write((Dropped([key(1)]), Cleared()))
    assert [batch.seq for batch in journal.drain()] == [0, 1]
    journal.write((Cleared(),))
    journal.check()
    assert [batch.seq for batch in journal.drain()] == [2]
    assert journal.last_seq == 2 and journal.dropped_batches == 0


def test_oldest_batches_go_when_nobody_drains() -> None:
    journal = Journal(100)
    for number in range(50):
        journal.write((Stored([key(number), key(-number)], None),))
        journal.check()
    drained = journal.drain()
    assert [batch.seq for batch in drained] == list(range(50 - len(drained), 50))
    assert len(drained) == 33
    assert journal.dropped_batches == 17


def test_a_batch_over_the_limit_is_a_hole() -> None:
    journal = Journal(4)
    journal.write((Dropped([key(number) for number in range(9)]),))
    journal.check()
    assert journal.drain() == [] and journal.last_seq == 0


def test_events_are_those_of_sglang() -> None:
    records: list[Record] = [
        Stored([key(1), key(2)], key(0)),
        Dropped([key(2)]),
        Cleared(),
        Stored([key(3)], None),
        Stored([key(4)], None, Tier.HBM),
        Dropped([key(4)], Tier.HBM),
    ]
    events = to_events(records, 16)
    one, two, three, four = (short_key(key(number)) for number in (1, 2, 3, 4))
    assert events == [
        BlockStored([one, two], short_key(key(0)), [], 16, medium="CPU_PINNED"),
        BlockRemoved([two], medium="CPU_PINNED"),
        AllBlocksCleared(),
        BlockStored([three], None, [], 16, medium="CPU_PINNED"),
        BlockStored([four], None, [], 16, medium="GPU"),
        BlockRemoved([four], medium="GPU"),
    ]
    assert decode_frames(encode_frames(7, EventBatch(0.5, events))) == (7, EventBatch(0.5, events))


@given(
    parents=st.lists(st.integers(-3, 30), max_size=30),
    order=st.randoms(use_true_random=False),
)
def test_rebuild_names_every_page_once_and_parents_first(parents: list[int], order: object) -> None:
    """Page i hangs under an earlier page, under a page that is not there, or under nothing."""
    tree = [
        None if parent < 0 else key(parent % i) if i and parent < 25 else key(1000 + parent)
        for i, parent in enumerate(parents)
    ]
    pages = [(key(i), parent) for i, parent in enumerate(tree)]
    order.shuffle(pages)  # type: ignore[attr-defined]
    seen: dict[PageKey, PageKey | None] = {}
    resident = {page for page, _ in pages}
    for record in rebuild([page for page, _ in pages], [parent for _, parent in pages]):
        above = record.parent
        for page in record.keys:
            assert page not in seen
            assert above is None or above not in resident or above in seen
            seen[page] = above
            above = page
    assert seen == dict(pages)


def test_rebuild_keeps_chains_together() -> None:
    keys = [key(number) for number in range(6)]
    parents = [None, keys[0], keys[1], keys[1], keys[3], key(99)]
    records = rebuild(keys, parents)
    assert sorted(len(record.keys) for record in records) == [1, 2, 3]
    assert rebuild([], []) == []
