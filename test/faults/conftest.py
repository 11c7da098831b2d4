from __future__ import annotations

from collections.abc import Iterator

import pytest
from faults.ranks import Ranks


@pytest.fixture
def ranks() -> Iterator[Ranks]:
    """Starts rank processes; all are gone after the test."""
    all_ranks = Ranks()
    try:
        yield all_ranks
    finally:
        all_ranks.close()
