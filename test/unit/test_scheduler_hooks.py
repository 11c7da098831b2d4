"""What the hooks on SGLang's scheduler do, with a scheduler that is not SGLang's."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.managers.io_struct import msgpack_decode, msgpack_encode
from sglang.utils import TypeBasedDispatcher
from sglang_memserve.plugin import engine_messages, scheduler_hooks
from sglang_memserve.plugin.engine_messages import PrefixVerbReqInput, PrefixVerbReqOutput


class Verbs:
    def __init__(self) -> None:
        self.busy = True
        self.log: list[str] = []

    def submit(self, request: PrefixVerbReqInput) -> None:
        self.log.append(f"submit {request.verb}")

    def advance(self) -> list[Any]:
        return [("request", "answer")]

    def abandon(self) -> list[Any]:
        self.busy = False
        return [("request", "flushed")]

    def pause(self, limit_s: float) -> None:
        self.log.append("pause")


class Scheduler:
    """Idle but for the verbs."""

    def __init__(self) -> None:
        self.tree_cache = SimpleNamespace()
        self._request_dispatcher = TypeBasedDispatcher([])
        self._engine_paused = False
        self.has_requests = False
        self.sent: list[tuple[Any, Any]] = []
        self.flushed = 0

    def send_control_output(self, answer: Any, request: Any) -> None:
        self.sent.append((answer, request))

    def is_fully_idle(self, ignore_waiting: bool = False) -> bool:
        return scheduler_hooks._after_fully_idle(not self.has_requests, self, ignore_waiting)

    def flush(self) -> bool:
        if not self.is_fully_idle():
            return False
        self.flushed += 1
        return True


def request() -> PrefixVerbReqInput:
    return PrefixVerbReqInput(
        call_id=1, verb="match", tokens=[1], keys=[], extra_key=None, cache_salt=None, deadline_s=1
    )


@pytest.fixture
def scheduler(monkeypatch: pytest.MonkeyPatch) -> Scheduler:
    made = Scheduler()
    linker = SimpleNamespace(verb_ports=lambda tree: "ports")
    made.tree_cache.linker = SimpleNamespace(cache_linker=linker)
    monkeypatch.setattr(scheduler_hooks, "DeviceTree", lambda cache: "tree")
    monkeypatch.setattr(scheduler_hooks, "PrefixVerbs", lambda ports: Verbs())
    scheduler_hooks._after_dispatcher(None, made)
    return made


def verbs(scheduler: Scheduler) -> Any:
    found = scheduler_hooks._verbs(scheduler)
    assert found is not None
    return found.verbs


def test_requests_reach_the_verbs_and_answers_the_asker(scheduler: Scheduler) -> None:
    scheduler._request_dispatcher(request())
    assert verbs(scheduler).log == ["submit match"]
    scheduler_hooks._after_cache_events(None, scheduler.tree_cache)
    assert scheduler.sent == [("answer", "request")]


def test_verb_under_way_is_not_idle_and_does_not_spin(scheduler: Scheduler) -> None:
    assert not scheduler.is_fully_idle()
    scheduler_hooks._after_idle(None, scheduler)
    assert verbs(scheduler).log == ["pause"]
    verbs(scheduler).busy = False
    assert scheduler.is_fully_idle()
    scheduler_hooks._after_idle(None, scheduler)
    assert verbs(scheduler).log == ["pause"]


def test_flush_ends_verbs_first(scheduler: Scheduler) -> None:
    assert scheduler_hooks._around_flush(Scheduler.flush, scheduler)
    assert scheduler.flushed == 1 and scheduler.sent == [("flushed", "request")]
    assert scheduler_hooks._around_flush(Scheduler.flush, scheduler)


def test_flush_that_is_refused_leaves_verbs_alone(scheduler: Scheduler) -> None:
    scheduler.has_requests = True
    assert not scheduler_hooks._around_flush(Scheduler.flush, scheduler)
    assert verbs(scheduler).busy and scheduler.sent == []


def test_scheduler_without_our_linker_is_left_alone() -> None:
    for cache in (SimpleNamespace(), SimpleNamespace(linker=None)):
        stock = Scheduler()
        stock.tree_cache = cache
        scheduler_hooks._after_dispatcher(None, stock)
        scheduler_hooks._after_cache_events(None, cache)
        scheduler_hooks._after_idle(None, stock)
        assert stock.is_fully_idle() and scheduler_hooks._around_flush(Scheduler.flush, stock)
        with pytest.raises(ValueError, match="Invalid object"):
            stock._request_dispatcher(request())


def test_messages_travel_on_sglangs_channel() -> None:
    engine_messages.register()
    engine_messages.register()
    assert msgpack_decode(msgpack_encode(request())) == request()
    answer = PrefixVerbReqOutput(call_id=1, outcome="complete", hbm_pages=3)
    assert msgpack_decode(msgpack_encode(answer)) == answer
