"""Membership, with a clock that only the test moves."""

from __future__ import annotations

import msgspec
import pytest
from sglang_memserve.errors import (
    ConfigError,
    NamespaceMismatch,
    NoInstance,
    ProtocolError,
    VersionMismatch,
)
from sglang_memserve.router.members.breaker import Breaker, BreakerSettings, BreakerState
from sglang_memserve.router.members.member import InFlight, Outcome, State
from sglang_memserve.router.values import Match
from sglang_memserve.types import InstanceId, Role
from unit.fleets import LOAD, SPLIT, WIDER, A, B, Fleet, info


@pytest.fixture
def fleet() -> Fleet:
    return Fleet()


def test_registered_instances_are_used(fleet: Fleet) -> None:
    reply = fleet.instances.register(info(A + "/"))
    assert (reply.heartbeat_s, reply.expire_s) == (2.0, 10.0)
    fleet.instances.register(info(A))
    assert fleet.recorder.told == [f"joined {A} g1"]
    assert fleet.beat()
    (view,) = fleet.instances.views({A: Match(5, 2), B: Match(9)})
    assert (view.id, view.generation, view.role, view.match) == (A, "g1", Role.BOTH, Match(5, 2))
    assert (view.running_requests, view.waiting_requests, view.free_tokens) == (2, 1, 70)
    assert view.can_fetch
    assert fleet.recorder.told[-1] == f"beat {A} 7"
    reference = fleet.instances.reference()
    assert reference is not None and reference.page_size == 16


def test_a_flap_keeps_the_pages_and_a_long_silence_does_not(fleet: Fleet) -> None:
    fleet.instances.register(info())
    fleet.now = 11.0
    fleet.instances.expire()
    assert fleet.usable() == []
    assert fleet.instances.unavailable() == {A: "unhealthy: no heartbeat for 11 s"}
    assert fleet.beat()
    assert fleet.member().state is State.READY and fleet.member().last_error == ""
    assert fleet.recorder.told == [f"joined {A} g1", f"beat {A} 7"]
    fleet.now = 42.0
    fleet.instances.expire()
    assert fleet.instances.members() == []
    assert fleet.recorder.told[-1] == f"left {A}"
    assert not fleet.beat()
    (gone,) = fleet.instances.gone()
    assert gone.state is State.LEFT and gone.last_error == "no heartbeat for 31 s"


def test_the_log_tells_who_comes_and_goes_once(
    fleet: Fleet, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "sglang_memserve.router.members.member")

    def told() -> list[str]:
        messages = [record.getMessage() for record in caplog.records]
        caplog.clear()
        return messages

    for _ in range(2):
        fleet.instances.register(info(A))
    assert told() == [f"{A} joined as both: model, boot g1"]
    for _ in range(2):
        fleet.beat(role="decode")
    assert told() == [f"{A} is for decode now, was for both"]
    for fleet.now in (11.0, 12.0):
        fleet.instances.expire()
    assert told() == [f"{A} is unhealthy: no heartbeat for 11 s"]
    fleet.beat(role="decode")
    fleet.instances.assign(A, Role.PREFILL)
    assert told() == [f"{A} is ready again", f"{A} is for prefill now, was for decode"]
    fleet.instances.dismiss(A, fleet.instances.drain(A))
    assert told() == [f"{A} drains, 0 requests in flight", f"{A} left: was drained"]
    fleet.instances.register(info(A, generation="g2"))
    fleet.instances.deregister(A, "g2")
    assert told() == [f"{A} joined as both: model, boot g2", f"{A} left: it deregistered"]
    fleet.instances.add_static(B)
    fleet.instances.unreachable(B, "refused")
    assert told() == []
    fleet.instances.answered_plain(B, "model", LOAD)
    fleet.instances.unreachable(B, "refused")
    fleet.instances.remove(B)
    assert told() == [
        f"{B} joined as both: model, without MemServe",
        f"{B} is unhealthy: refused",
        f"{B} left: was removed (refused)",
    ]


def test_another_boot_at_the_same_url_replaces_the_old_one(fleet: Fleet) -> None:
    fleet.instances.register(info())
    old = fleet.instances.begin(A, 100)
    fleet.instances.register(info(generation="g2"))
    assert fleet.recorder.told == [f"joined {A} g1", f"left {A}", f"joined {A} g2"]
    assert not fleet.beat(generation="g1")
    fleet.instances.deregister(A, "g1")
    assert fleet.usable() == [A]
    assert fleet.member().in_flight_requests == 0
    old.end(Outcome.FAILED, "connection reset")
    assert fleet.member().last_error == ""
    fleet.instances.deregister(A, "g2")
    assert fleet.usable() == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"served_model_name": "other"}, "serves model 'other', http://a:1 serves 'model'"),
        ({"namespace": WIDER}, "page_size: http://a:1 has 16, http://b:1 has 32"),
        ({"layout_hash": "0" * 16}, "layout_hash: http://a:1 has"),
        ({"page_size": 8}, "page_size: http://a:1 has 16, http://b:1 has 8"),
        ({"namespace": SPLIT}, "tp_size: http://a:1 has 1, http://b:1 has 2"),
    ],
)
def test_a_mismatch_is_refused_with_both_values(
    fleet: Fleet, changes: dict[str, object], message: str
) -> None:
    fleet.instances.register(info())
    with pytest.raises(NamespaceMismatch) as raised:
        fleet.instances.register(info(B, "g2", **changes))
    assert message in str(raised.value)
    assert fleet.usable() == [A]
    # The only one there may become something else.
    fleet.instances.register(info(A, "g3", **changes))


def test_malformed_registrations_are_refused(fleet: Fleet) -> None:
    with pytest.raises(VersionMismatch):
        fleet.instances.register(info(protocol=99))
    malformed: list[dict[str, object]] = [
        {"url": "nonsense"},
        {"role": "chef"},
        {"ranks": []},
        {"page_size": 0},
    ]
    for changes in malformed:
        with pytest.raises(ProtocolError):
            fleet.instances.register(msgspec.structs.replace(info(), **changes))
    with pytest.raises(ProtocolError, match="unknown role"):
        fleet.beat(role="chef")
    assert fleet.instances.members() == []


def test_roles_change_at_run_time(fleet: Fleet) -> None:
    fleet.instances.register(info(role="prefill"))
    assert fleet.member().role is Role.PREFILL
    fleet.beat(role="decode")
    assert fleet.member().role is Role.DECODE
    fleet.instances.set_role(A, Role.BOTH)
    assert fleet.member().role is Role.BOTH
    assert fleet.recorder.told == [f"joined {A} g1", f"beat {A} 7"]


def test_what_answers_without_mempool_now_is_plain_at_once(fleet: Fleet) -> None:
    fleet.instances.add_static(A)
    fleet.instances.answered(A, info())
    fleet.instances.answered_plain(A, "model", LOAD)
    assert fleet.usable() == [A]
    assert not fleet.member().has_mempool


def test_listed_urls(fleet: Fleet) -> None:
    fleet.instances.add_static(A + "/", Role.PREFILL)
    with pytest.raises(ConfigError):
        fleet.instances.add_static("nonsense")
    assert fleet.member().state is State.STARTING
    fleet.instances.unreachable(A, "connection refused")
    assert fleet.instances.unavailable() == {A: "starting: connection refused"}
    fleet.instances.answered(A, info("http://other-name:1", role="both"))
    assert fleet.recorder.told == [f"joined {A} g1"]
    assert fleet.member().role is Role.PREFILL
    fleet.beat(role="both")
    assert fleet.member().role is Role.PREFILL
    fleet.now = 15.0
    fleet.instances.expire()
    assert fleet.usable() == [A]
    fleet.instances.unreachable(A, "timed out")
    assert fleet.member().state is State.UNHEALTHY
    fleet.now = 40.0
    fleet.instances.unreachable(A, "timed out")
    assert fleet.recorder.told[-1] == f"left {A}"
    assert fleet.instances.statics() == [A]
    fleet.instances.answered(A, info())
    assert fleet.usable() == [A]
    fleet.instances.deregister(A, "g1")
    assert fleet.instances.unavailable() == {A: "unhealthy: has left"}


def test_one_instance_under_two_names_counts_once(fleet: Fleet) -> None:
    fleet.instances.add_static("http://localhost:1")
    fleet.instances.answered(InstanceId("http://localhost:1"), info())
    fleet.instances.register(info())
    assert fleet.usable() == [A]
    with pytest.raises(ConfigError, match="is here as http://a:1"):
        fleet.instances.answered(InstanceId("http://localhost:1"), info())


def test_plain_servers_serve_and_share_nothing(fleet: Fleet) -> None:
    fleet.instances.add_static(A, Role.DECODE)
    fleet.instances.answered_plain(A, "model", LOAD)
    (view,) = fleet.instances.views({A: Match(3)})
    assert (view.can_fetch, view.match, view.role) == (False, Match(0), Role.DECODE)
    assert fleet.recorder.told == []
    with pytest.raises(NamespaceMismatch, match="one router serves one model"):
        fleet.instances.register(info(B, "g2", served_model_name="other"))
    fleet.instances.register(info(B, "g2"))
    assert fleet.usable() == [A, B]
    # It comes back with MemServe.
    fleet.instances.answered(A, info())
    assert fleet.recorder.told[-1] == f"joined {A} g1"


def test_in_flight_work_is_booked_and_ends_once(fleet: Fleet) -> None:
    fleet.instances.register(info())
    works = [fleet.instances.begin(A, 100) for _ in range(4)]
    (view,) = fleet.instances.views({})
    assert (view.running_requests, view.in_flight_prefill_tokens) == (4, 400)
    works[0].computed()
    works[0].computed()
    assert fleet.member().in_flight_prefill_tokens == 300
    for work in works:
        work.end(Outcome.SUCCEEDED)
        work.end(Outcome.FAILED)
    assert fleet.member().in_flight_requests == 0
    with pytest.raises(RuntimeError), fleet.instances.begin(A, -5):
        raise RuntimeError
    assert fleet.member().in_flight_requests == 0
    with pytest.raises(NoInstance, match="has left"):
        fleet.instances.begin(B, 1)


def test_failures_in_a_row_open_the_breaker(fleet: Fleet) -> None:
    fleet.instances.register(info())
    fleet.instances.register(info(B, "g2"))

    def fail() -> None:
        fleet.instances.begin(A, 1).end(Outcome.FAILED, "connection reset")

    fail()
    fail()
    fleet.instances.begin(A, 1).end(Outcome.SUCCEEDED)
    fail()
    fail()
    assert fleet.usable() == [A, B]
    assert fleet.instances.unavailable(exclude=[A]) == {A: "failed this request: connection reset"}
    fail()
    assert fleet.usable() == [B]
    assert "3 failures in a row, tried again in 2.0 s (connection reset)" in str(
        fleet.instances.unavailable()
    )
    fleet.now = 2.5
    assert fleet.usable() == [A, B]
    trial: InFlight = fleet.instances.begin(A, 1)
    assert fleet.usable() == [B]
    trial.end(Outcome.CANCELLED)
    assert fleet.usable() == [A, B]
    fail()
    fleet.now = 5.0
    assert fleet.usable() == [B]
    fleet.now = 7.0
    fleet.instances.begin(A, 1).end(Outcome.SUCCEEDED)
    assert fleet.instances.members()[0].breaker is BreakerState.CLOSED


def test_where_all_breakers_are_open_trying_is_better_than_refusing(fleet: Fleet) -> None:
    fleet.instances.register(info())
    for _ in range(3):
        fleet.instances.begin(A, 1).end(Outcome.FAILED, "connection reset")
    assert fleet.member().breaker is BreakerState.OPEN
    assert fleet.usable() == [A]
    assert fleet.instances.views({}, exclude=[A]) == []


def test_requests_to_a_silent_instance_are_interrupted(fleet: Fleet) -> None:
    """Unless something came from it lately, in answer to one of them."""
    fleet.instances.register(info())
    told: list[str] = []
    quiet, lively = fleet.instances.begin(A, 1), fleet.instances.begin(A, 1)
    quiet.on_lost(lambda why: told.append(f"quiet: {why}"))
    lively.on_lost(lambda why: told.append(f"lively: {why}"))
    fleet.now = 5.0
    fleet.instances.expire()
    assert told == []
    fleet.now = 10.5
    lively.heard()
    fleet.instances.expire()
    assert told == ["quiet: nothing heard for 10 s"]
    for flight in (quiet, lively):
        flight.end(Outcome.CANCELLED)
    fleet.now = 40.0
    fleet.instances.expire()
    assert len(told) == 1


def test_the_breakers_pause_is_bounded() -> None:
    breaker = Breaker(BreakerSettings(failures=1, pause_s=1.0, longest_pause_s=4.0))
    now = 0.0
    for pause_s in (1.0, 2.0, 4.0, 4.0):
        breaker.started(now)
        breaker.failed(now)
        breaker.failed(now)
        breaker.check()
        assert breaker.state(now + pause_s - 0.1) is BreakerState.OPEN
        now += pause_s
        assert breaker.state(now) is BreakerState.HALF_OPEN
    breaker.succeeded()
    breaker.check()
