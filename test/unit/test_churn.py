"""Agents that fetch from each other in all directions, with deadlines that pass at any moment,
while their pages come and go under them. Seconds of it; `CHURN_S` makes it longer."""

from __future__ import annotations

import ctypes
import os
import random
import threading
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path

import pytest
from sglang_memserve.config import Limits
from sglang_memserve.protocol.control import FetchRequest
from sglang_memserve.transfer.loopback import LoopbackTransport
from sglang_memserve.transfer.nixl import NixlTransport
from sglang_memserve.transfer.port import FetchSettings
from sglang_memserve.types import Checksums, PageKey
from unit.agents import BLOCK, KEYS, MakeTransport, Rank, content, put, until

CHURN_S = float(os.environ.get("CHURN_S", "4"))
_WORKERS = 3
_SETTINGS = FetchSettings(grace_s=0.05, max_pages_per_lease=3, reply_timeout_s=0.5)
_LIMITS = Limits(peer_idle_s=0.5, max_peers=2, max_fetches=6, max_queued_fetches=6)
_ENDED = (
    "leases",
    "stores",
    "filling_blocks",
    "orphan_blocks",
    "pinned_blocks",
    "transfer_fetches_active",
    "transfer_fetches_queued",
    "transfer_quarantined_blocks",
    "transfer_leases_held_by_peers",
)


class Churn:
    def __init__(self, ranks: Sequence[Rank], seed: int) -> None:
        self.ranks = ranks
        self.seed = seed
        self.outcomes: Counter[str] = Counter()
        self._stop = threading.Event()

    def run(self, seconds: float) -> None:
        with ThreadPoolExecutor(_WORKERS) as workers:
            work = [workers.submit(self._work, number) for number in range(_WORKERS)]
            wait(work, seconds, return_when=FIRST_EXCEPTION)
            self._stop.set()
            for each in work:
                each.result(30)

    def _work(self, number: int) -> None:
        draw = random.Random(self.seed * 10 + number)
        verbs = [self._fetch, self._fetch, self._fetch, self._store, self._read, self._drop]
        while not self._stop.is_set():
            start = draw.choice([0, 0, 10])
            keys = KEYS[start : start + draw.randrange(1, 20)]
            draw.choice(verbs)(draw, draw.choice(self.ranks), keys)

    def _fetch(self, draw: random.Random, rank: Rank, keys: list[PageKey]) -> None:
        others = [other for other in self.ranks if other is not rank]
        draw.shuffle(others)
        sources = [other.source() for other in others[: draw.choice([1, 2])]]
        deadline_s = draw.choice([0.002, 0.01, 0.05, 1.0])
        request = FetchRequest(sources, list(keys), draw.choice([0.0, 0.01]), deadline_s)
        # LimitExceeded cannot be: fewer threads than fetches that may wait.
        reply = rank.agent.fetch(request).result(20)
        self.outcomes[reply.outcome] += 1

    def _store(self, draw: random.Random, rank: Rank, keys: list[PageKey]) -> None:
        put(rank.pool, keys)

    def _read(self, draw: random.Random, rank: Rank, keys: list[PageKey]) -> None:
        with rank.pool.acquire(keys, owner="test", ttl_s=5.0) as lease:
            for key, block in zip(keys, lease.blocks, strict=False):
                found = ctypes.string_at(rank.pool.address(block), BLOCK)
                assert found == content(key) or not lease.valid(), "other bytes under a lease"

    def _drop(self, draw: random.Random, rank: Rank, keys: list[PageKey]) -> None:
        if draw.random() < 0.3:
            rank.pool.clear()
        else:
            rank.pool.delete(draw.sample(keys, (len(keys) + 1) // 2))
        rank.pool.check()


def idle(rank: Rank) -> bool:
    stats = rank.stats()
    return not any(stats[name] for name in _ENDED)


@pytest.mark.parametrize("make", [LoopbackTransport, NixlTransport], ids=["loopback", "nixl"])
def test_agents_survive_whatever_ends_when(tmp_path: Path, make: MakeTransport) -> None:
    seed = random.randrange(1_000_000)
    print(f"seed {seed}")
    ranks = [
        Rank(
            tmp_path,
            make,
            blocks=blocks,
            limits=_LIMITS,
            settings=_SETTINGS,
            checksums=Checksums.ON,
        )
        for blocks in (6, 24, 60)
    ]
    try:
        churn = Churn(ranks, seed)
        churn.run(CHURN_S)
        assert churn.outcomes["complete"] and churn.outcomes["deadline"], churn.outcomes
        for rank in ranks:
            until(partial(idle, rank))
            rank.pool.check()
            stats = rank.stats()
            assert rank.agent.alive and stats["transfer_internal_errors_total"] == 0
            assert stats["transfer_damaged_reads_total"] == 0
    finally:
        for rank in ranks:
            rank.close()
