"""From pages and their parents to chains, parents first: what a snapshot is written as."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from itertools import pairwise
from typing import TypeVar

Key = TypeVar("Key", bound=Hashable)


def chains(
    keys: Sequence[Key], parents: Sequence[Key | None]
) -> list[tuple[Sequence[Key], Key | None]]:
    """``keys[i]`` hangs under ``parents[i]``: runs of pages, each with the page it hangs under,
    parents before children. Pages that follow their parent directly share its run.

    Keys in order of insertion make few runs, and one pass over neighbours in memory: with a
    million pages a map of all of them would cost seconds.
    """
    bounds = [i for i in range(1, len(keys)) if parents[i] is None or parents[i] != keys[i - 1]]
    bounds = [0, *bounds, len(keys)] if keys else []
    runs = [keys[start:stop] for start, stop in pairwise(bounds)]
    heads = [parents[start] for start in bounds[:-1]]
    # Runs by the page they hang under; those left at the end hang under none of ours.
    under: dict[Key | None, list[int]] = {}
    for number, parent in enumerate(heads):
        under.setdefault(parent, []).append(number)
    branches: list[list[int]] = [[] for _ in runs]
    for number, run in enumerate(runs):
        for key in run:
            if key in under:
                branches[number] += under.pop(key)
    waiting = [number for numbers in under.values() for number in numbers]
    ordered: list[tuple[Sequence[Key], Key | None]] = []
    while waiting:
        number = waiting.pop()
        ordered.append((runs[number], heads[number]))
        waiting += branches[number]
    return ordered
