"""What several routers say of an instance's peers adds up."""

from __future__ import annotations

import pytest
from sglang_memserve.plugin.acquaintances import MAX_ROUTERS, Acquaintances
from sglang_memserve.protocol.http import PeerInfo


def peer(name: str, generation: str = "g") -> PeerInfo:
    return PeerInfo(f"http://{name}:1", generation, ["tcp://127.0.0.1:9"])


def test_one_router_does_not_undo_what_another_said() -> None:
    known = Acquaintances()
    assert known.told("one", [peer("a"), peer("b")], 120.0, 0.0) == ([peer("a"), peer("b")], 120.0)
    assert known.told("two", [peer("b")], 60.0, 10.0) == ([peer("a"), peer("b")], 110.0)
    assert known.told("one", [], 120.0, 20.0) == ([peer("b")], 120.0)


def test_a_router_that_is_gone_is_forgotten_with_what_it_said() -> None:
    known = Acquaintances()
    known.told("gone", [peer("a")], 30.0, 0.0)
    assert known.told("here", [peer("b")], 30.0, 29.0)[0] == [peer("a"), peer("b")]
    assert known.told("here", [peer("b")], 30.0, 30.0) == ([peer("b")], 30.0)


def test_of_two_boots_the_last_that_was_named_counts() -> None:
    known = Acquaintances()
    known.told("one", [peer("a", "old")], 120.0, 0.0)
    assert known.told("two", [peer("a", "new")], 120.0, 1.0)[0] == [peer("a", "new")]
    assert known.told("one", [peer("a", "new")], 120.0, 2.0)[0] == [peer("a", "new")]


def test_it_does_not_grow_without_bound() -> None:
    known = Acquaintances()
    for number in range(3 * MAX_ROUTERS):
        peers, valid_s = known.told(str(number), [peer(str(number))], 1000.0, float(number))
    assert len(peers) == MAX_ROUTERS
    assert valid_s == pytest.approx(1000.0)
