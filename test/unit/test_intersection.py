"""The pages that all ranks of an instance hold: cases to read; the property test has the rest."""

from __future__ import annotations

from sglang_memserve.index.chains import chains
from sglang_memserve.index.intersection import Intersection
from sglang_memserve.protocol.events import AllBlocksCleared, BlockRemoved, BlockStored
from sglang_memserve.types import Tier

DRAM = Tier.DRAM.value


def stored(*keys: int, parent: int | None = None, medium: str | None = DRAM) -> BlockStored:
    return BlockStored(list(keys), parent, [], 16, medium=medium)


def test_a_page_is_there_once_the_last_rank_has_it() -> None:
    merged = Intersection(2)
    assert merged.apply(0, [stored(1, 2, 3)]) is None
    assert merged.apply(1, [stored(1, 2)]) == (0, [stored(1, 2)])
    assert merged.apply(1, [stored(3, parent=2)]) == (1, [stored(3, parent=2)])
    assert merged.stats()["residency_partial_pages"] == 0


def test_a_page_is_gone_once_the_first_rank_has_lost_it() -> None:
    merged = Intersection(2)
    merged.apply(0, [stored(1, 2)])
    merged.apply(1, [stored(1, 2)])
    assert merged.apply(1, [BlockRemoved([2, 9], DRAM)]) == (1, [BlockRemoved([2], DRAM)])
    assert merged.apply(0, [BlockRemoved([2], DRAM)]) is None
    assert merged.apply(0, [AllBlocksCleared()]) == (2, [AllBlocksCleared()])
    assert merged.apply(1, [AllBlocksCleared()]) is None
    assert merged.snapshot() == (2, [])


def test_tiers_are_apart() -> None:
    merged = Intersection(2)
    assert merged.apply(0, [stored(1)]) is None
    assert merged.apply(1, [stored(1, medium=None)]) is None
    assert merged.apply(0, [stored(1, medium="GPU")]) == (0, [stored(1, medium="GPU")])
    assert merged.apply(0, [stored(7, medium="DISK")]) is None
    assert merged.stats()["residency_ignored_events_total"] == 1


def test_a_run_with_a_hole_names_each_parent() -> None:
    merged = Intersection(2)
    merged.apply(0, [stored(1, 2), stored(4, parent=3)])
    answer = merged.apply(1, [stored(1, 2, 3, 4)])
    assert answer == (0, [stored(1, 2), stored(4, parent=3)])


def test_a_snapshot_tells_what_was_missed_and_nothing_else() -> None:
    merged = Intersection(2)
    for rank in range(2):
        merged.apply(rank, [stored(1, 2, 3)])
    answer = merged.replace(1, [stored(1, 2), stored(8, parent=1)])
    assert answer is not None and answer.events == [BlockRemoved([3], DRAM)]
    assert merged.replace(1, [stored(1, 2), stored(8, parent=1)]) is None
    assert merged.snapshot()[1] == [stored(1, 2)]


def test_more_pages_than_allowed_are_left_out() -> None:
    merged = Intersection(2, max_pages=3)
    merged.apply(0, [stored(1, 2, 3, 4, 5)])
    merged.apply(1, [stored(1)])
    assert merged.snapshot()[1] == [stored(1)]
    assert merged.stats()["residency_ignored_pages_total"] == 2
    merged.check()


def test_one_rank_is_itself() -> None:
    merged = Intersection(1)
    assert merged.apply(0, [stored(1)]) == (0, [stored(1)])


def test_chains_put_parents_first() -> None:
    keys, parents = [5, 6, 1, 2, 3, 9], [2, 5, None, 1, 2, 77]
    ordered = chains(keys, parents)
    assert sorted((list(run), parent) for run, parent in ordered) == sorted(
        [([1, 2, 3], None), ([5, 6], 2), ([9], 77)], key=lambda item: item[0]
    )
    assert [run[0] for run, _ in ordered].index(1) < [run[0] for run, _ in ordered].index(5)
    assert chains([], []) == []
