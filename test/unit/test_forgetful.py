"""The benchmark's instance without a cache: what its pool forgets and what it must keep."""

from __future__ import annotations

from pathlib import Path

import pytest
from sglang_memserve.mempool import MemPool
from sglang_memserve.types import Generation, Namespace, PageKey, Role

from benchmark.serving import servers
from benchmark.serving.forgetful_linker import forget
from benchmark.serving.servers import Given, Sizes
from benchmark.serving.setups import SETUPS

NAMESPACE = Namespace("m", "w", "bfloat16", 16, 2, 1, 8, 8, 0, 1)


def keys(*numbers: int) -> list[PageKey]:
    return [PageKey(number.to_bytes(32, "big")) for number in numbers]


@pytest.fixture
def pool() -> MemPool:
    found = MemPool(NAMESPACE, arena_bytes=2**16, generation=Generation("g"))
    for number in (1, 2, 3):
        found.insert(keys(number), found.alloc_mem(1))
    return found


def test_what_nobody_holds_is_forgotten(pool: MemPool) -> None:
    assert forget(pool) == 3
    assert not pool.match(keys(1, 2, 3))
    pool.check()
    assert forget(pool) == 0


def test_what_is_leased_or_waits_for_its_request_stays(pool: MemPool) -> None:
    lease = pool.acquire(keys(2), owner="o", ttl_s=60)
    hold = pool.prepare_hold(keys(3))
    hold.complete(60)
    assert forget(pool) == 1
    assert [len(pool.match(keys(number))) for number in (1, 2, 3)] == [0, 1, 1]
    lease.release()
    pool.claim_hold(keys(3))
    assert forget(pool) == 2
    pool.check()


def test_only_decode_instances_forget() -> None:
    fleet = SETUPS["1p1d-caching-1"].fleet
    given = Given(Path("model"), Sizes())
    started = {
        role: servers._argv(fleet, role, 1, 2, given)[2] for role in (Role.PREFILL, Role.DECODE)
    }
    assert started[Role.PREFILL] == "sglang_memserve.launch_server"
    assert started[Role.DECODE] == "benchmark.serving.forgetful"
