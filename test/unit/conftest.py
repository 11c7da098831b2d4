"""Fixtures that several files share."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from sglang_memserve.transfer.loopback import LoopbackTransport
from sglang_memserve.transfer.nixl import NixlTransport
from unit.agents import (
    MakeTransport,
    Rank,
)


@pytest.fixture
def folder() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="ms-"))
    yield path
    shutil.rmtree(path)


@pytest.fixture
def ranks(folder: Path) -> Iterator[Callable[..., Rank]]:
    with ExitStack() as stack:

        def start(make: MakeTransport = LoopbackTransport, **options: object) -> Rank:
            rank = Rank(folder, make, **options)  # type: ignore[arg-type]
            stack.callback(rank.close)
            return rank

        yield start


@pytest.fixture(params=[LoopbackTransport, NixlTransport], ids=["loopback", "nixl"])
def pair(request: pytest.FixtureRequest, ranks: Callable[..., Rank]) -> tuple[Rank, Rank]:
    """Holder and reader."""
    return ranks(request.param), ranks(request.param)


@pytest.fixture
def two(ranks: Callable[..., Rank]) -> tuple[Rank, Rank]:
    return ranks(), ranks()
