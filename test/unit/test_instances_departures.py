"""Instances that leave, are drained, and come back."""

from __future__ import annotations

import pytest
from sglang_memserve.errors import (
    ConfigError,
)
from sglang_memserve.router.members.member import Outcome, State
from sglang_memserve.types import Generation, InstanceId
from unit.fleets import LOAD, A, B, Fleet, info


@pytest.fixture
def fleet() -> Fleet:
    return Fleet()


def test_who_says_that_nobody_is_there_names_those_that_left(fleet: Fleet) -> None:
    fleet.instances.register(info(A))
    fleet.instances.register(info(B, generation="b1"))
    fleet.instances.dismiss(A, fleet.instances.drain(A))
    assert fleet.instances.absent() == {A: "left: was drained"}
    assert fleet.instances.absent([B]) == {B: "failed this request", A: "left: was drained"}
    fleet.instances.deregister(B, "b1")
    assert fleet.instances.absent() == {A: "left: was drained", B: "left: it deregistered"}
    for number in range(20):
        url = f"http://c:{number + 1}"
        fleet.instances.register(info(url, generation=f"c{number}"))
        fleet.instances.remove(InstanceId(url))
    assert len(fleet.instances.absent()) == 8, "a message has an end"


def test_a_listed_url_that_never_answered_has_not_left(fleet: Fleet) -> None:
    fleet.instances.add_static(B)
    fleet.instances.unreachable(B, "refused")
    fleet.instances.remove(B)
    assert fleet.instances.gone() == []


def test_those_that_left_are_shown_as_they_are_and_not_for_ever(fleet: Fleet) -> None:
    fleet.instances.register(info(A))
    fleet.instances.register(info(B, generation="b1"))
    flight = fleet.instances.begin(A, 100)
    fleet.instances.deregister(A, "g1")
    fleet.now = 5.0
    fleet.instances.deregister(B, "b1")
    flight.end(Outcome.SUCCEEDED)
    fleet.now = 9.0
    first, second = fleet.instances.gone()
    assert (first.id, first.silent_s, first.in_flight_requests) == (A, 9.0, 0)
    assert second.id == B
    fleet.instances.register(info(A, generation="g2"))
    assert [gone.id for gone in fleet.instances.gone()] == [B], "A is back"
    fleet.instances.deregister(A, "g2")
    assert [(gone.id, gone.generation) for gone in fleet.instances.gone()] == [(B, "b1"), (A, "g2")]
    fleet.now = 3606.0
    assert [gone.id for gone in fleet.instances.gone()] == [A]
    fleet.now = 4000.0
    assert fleet.instances.gone() == []


def test_a_drain_is_of_one_boot(fleet: Fleet) -> None:
    fleet.instances.register(info())
    drained = fleet.instances.drain(A)
    fleet.instances.register(info())
    fleet.beat()
    assert fleet.usable() == []
    assert fleet.instances.unavailable() == {A: "draining"}
    fleet.instances.register(info(generation="g2"))
    assert fleet.usable() == [A]
    fleet.instances.dismiss(A, drained)
    assert fleet.usable() == [A]
    fleet.instances.remove(A)
    with pytest.raises(ConfigError, match="unknown instance"):
        fleet.instances.drain(A)


def test_however_a_drain_ends_its_boot_stays_away(fleet: Fleet) -> None:
    def dismissed() -> None:
        fleet.instances.dismiss(A, Generation("g1"))

    def removed() -> None:
        fleet.instances.remove(A)

    def left() -> None:
        fleet.instances.deregister(A, "g1")

    def silent() -> None:
        fleet.now += 31.0
        fleet.instances.expire()
        fleet.instances.unreachable(A, "timed out")

    def without_mempool() -> None:
        fleet.instances.answered_plain(A, "model", LOAD)
        fleet.instances.unreachable(A, "timed out")

    for listed in (False, True):
        for end in (dismissed, removed, left, silent, *((without_mempool,) * listed)):
            fleet.instances.register(info(generation="g0"))
            fleet.instances.register(info())
            if listed:
                fleet.instances.add_static(A)
            fleet.instances.drain(A)
            end()
            assert fleet.instances.members() == [], (end, listed)
            assert [gone.state for gone in fleet.instances.gone()] == [State.LEFT]
            assert fleet.beat()
            fleet.instances.register(info())
            fleet.instances.answered(A, info())
            assert fleet.instances.members() == [], (end, listed)
            fleet.instances.register(info(generation="g2"))
            assert fleet.usable() == [A]
            fleet.instances.remove(A)


def test_added_by_hand_a_drained_instance_is_back(fleet: Fleet) -> None:
    fleet.instances.register(info())
    drained = fleet.instances.drain(A)
    fleet.instances.add_static(A)
    assert fleet.usable() == [A]
    fleet.instances.dismiss(A, drained)
    assert fleet.usable() == [A]
    fleet.instances.drain(A)
    fleet.instances.dismiss(A, drained)
    fleet.instances.add_static(A)
    assert fleet.member().state is State.STARTING
    fleet.instances.answered(A, info())
    assert fleet.usable() == [A]
    # One that was never heard of has nothing to be used for yet.
    fleet.instances.add_static(B)
    fleet.instances.drain(B)
    fleet.instances.add_static(B)
    assert fleet.member(B).state is State.STARTING
