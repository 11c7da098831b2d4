"""How the device verbs, and the watch over the device tree, run on SGLang's scheduler thread.

    init_request_dispatcher   after: our request type is handed to the verbs
    check_hicache_events      after: once a round, where SGLang itself looks after its cache
    is_fully_idle             after: not while a verb runs. SGLang checks its pool for leaks when
                              idle, and slots that are being filled belong to nobody in the tree
    on_idle                   after: instead of spinning, a wait of at most ``PAUSE_S`` for a copy
    flush_cache               around: verbs end before the tree is emptied

A scheduler without our linker is left alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sglang.srt.plugins.hook_registry import HookRegistry, HookType
from sglang.utils import TypeBasedDispatcher

from . import engine_messages
from .device_tree import DeviceTree
from .engine_messages import PrefixVerbReqInput
from .prefix_verbs import Answer, PrefixVerbs
from .swaps import Ports

_SCHEDULER = "sglang.srt.managers.scheduler.Scheduler"
_CACHE = "sglang.srt.mem_cache.unified_radix_cache.UnifiedRadixCache"
PAUSE_S = 0.001
_VERBS = "memserve_verbs"


def register() -> None:
    """Called where a linker is built, which is before the dispatcher is. Safe to call twice."""
    engine_messages.register()
    for target, hook, kind in (
        (f"{_SCHEDULER}.init_request_dispatcher", _after_dispatcher, HookType.AFTER),
        (f"{_SCHEDULER}.is_fully_idle", _after_fully_idle, HookType.AFTER),
        (f"{_SCHEDULER}.on_idle", _after_idle, HookType.AFTER),
        (f"{_SCHEDULER}.flush_cache", _around_flush, HookType.AROUND),
        (f"{_CACHE}.check_hicache_events", _after_cache_events, HookType.AFTER),
    ):
        if not any(known is hook for _, known, _ in HookRegistry._hooks.get(target, [])):
            HookRegistry.register(target, hook, kind)
    HookRegistry.apply_hooks()


class SchedulerVerbs:
    """The verbs of one scheduler process and the scheduler that answers for them."""

    def __init__(self, scheduler: Any, verbs: PrefixVerbs) -> None:
        self._scheduler = scheduler
        self.verbs = verbs
        self.flushing = False

    def receive(self, request: PrefixVerbReqInput) -> Any:
        return self.verbs.submit(request)

    def advance(self) -> None:
        self._send(self.verbs.advance())

    def abandon(self) -> None:
        self._send(self.verbs.abandon())

    def _send(self, answers: list[Answer]) -> None:
        for request, answer in answers:
            self._scheduler.send_control_output(answer, request)


def _after_dispatcher(_: None, scheduler: Any) -> None:
    linker = _linker(scheduler.tree_cache)
    if linker is None or not hasattr(linker, "verb_ports"):
        return
    ports: Ports = linker.verb_ports(DeviceTree(scheduler.tree_cache))
    verbs = SchedulerVerbs(scheduler, PrefixVerbs(ports))
    setattr(scheduler, _VERBS, verbs)
    setattr(scheduler.tree_cache, _VERBS, verbs)
    scheduler._request_dispatcher += TypeBasedDispatcher([(PrefixVerbReqInput, verbs.receive)])


def _verbs(owner: Any) -> SchedulerVerbs | None:
    verbs: SchedulerVerbs | None = getattr(owner, _VERBS, None)
    return verbs


def _linker(cache: Any) -> Any:
    return getattr(getattr(cache, "linker", None), "cache_linker", None)


def _after_cache_events(_: None, cache: Any) -> None:
    verbs = _verbs(cache)
    if verbs is not None:
        verbs.advance()
    # After the verbs, which change the tree too.
    linker = _linker(cache)
    if hasattr(linker, "after_round"):
        linker.after_round(cache.evictable_size() + cache.protected_size())


def _after_fully_idle(idle: bool, scheduler: Any, *_: Any, **__: Any) -> bool:
    verbs = _verbs(scheduler)
    return idle and (verbs is None or verbs.flushing or not verbs.verbs.busy)


def _after_idle(_: None, scheduler: Any) -> None:
    verbs = _verbs(scheduler)
    if verbs is not None and verbs.verbs.busy:
        verbs.verbs.pause(PAUSE_S)


def _around_flush(
    flush: Callable[..., bool], scheduler: Any, *arguments: Any, **options: Any
) -> bool:
    verbs = _verbs(scheduler)
    if verbs is None or not verbs.verbs.busy:
        return flush(scheduler, *arguments, **options)
    verbs.flushing = True
    try:
        # A scheduler with requests refuses to flush; verbs then go on.
        if scheduler.is_fully_idle(ignore_waiting=scheduler._engine_paused):
            verbs.abandon()
        return flush(scheduler, *arguments, **options)
    finally:
        verbs.flushing = False
