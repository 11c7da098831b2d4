"""Starts the processes of a plan, waits until they serve, watches them, ends them.

A process that dies while the cluster starts fails the start. Later, the others go on serving: the
death of an instance is reported, that of the router or of the last instance ends the cluster.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from ..errors import MemServeError
from . import probe
from .plan import ClusterPlan
from .probe import Stage
from .process import GRACE_S, GuardedProcess, end_all
from .table import Progress, Row

_POLL_S = 0.3
_TAIL_LINES = 15


class StartFailed(MemServeError):
    """A process died or was not ready in time; the message ends with its log's last lines."""


class StopAsked(MemServeError):
    """A signal arrived while the cluster was starting."""


@dataclass(slots=True)
class _Member:
    process: GuardedProcess
    role: str
    url: str
    stage: Stage = Stage.STARTING


class Cluster:
    """``stop_asked`` is looked at several times a second. ``release()`` is idempotent."""

    def __init__(
        self,
        plan: ClusterPlan,
        progress: Progress,
        stop_asked: Callable[[], bool],
        api_key: str | None = None,
    ) -> None:
        self._plan = plan
        self._progress = progress
        self._stop_asked = stop_asked
        self._api_key = api_key
        self._router: _Member | None = None
        self._instances: list[_Member] = []

    def start(self, deadline_s: float) -> None:
        """Returns when requests will be served. Raises StartFailed or StopAsked."""
        deadline = time.monotonic() + deadline_s
        self._router = _Member(GuardedProcess(self._plan.router), "", self._plan.router_url)
        for instance in self._plan.instances:
            process = GuardedProcess(instance.command)
            self._instances.append(_Member(process, instance.role.value, instance.url))
        while True:
            self._look()
            self._progress.show(self._rows())
            self._fail_on_death()
            if all(member.stage is Stage.READY for member in self._members()):
                return
            if self._stop_asked():
                raise StopAsked("stopped while starting")
            if time.monotonic() > deadline:
                raise StartFailed(self._why_late(deadline_s))
            time.sleep(_POLL_S)

    def supervise(self) -> int:
        """Until a stop is asked for (0) or nothing can be served any more (1)."""
        reported: set[str] = set()
        while not self._stop_asked():
            for member in self._members():
                if member.process.poll() is not None and member.process.name not in reported:
                    reported.add(member.process.name)
                    self._progress.say(self._obituary(member))
            assert self._router is not None
            if self._router.process.poll() is not None:
                self._progress.say("the router is gone: stopping")
                return 1
            if len(reported) == len(self._instances):
                self._progress.say("no instance is left: stopping")
                return 1
            time.sleep(_POLL_S)
        return 0

    def describe(self) -> dict[str, object]:
        """For scripts: process id, URL and log of each process."""
        assert self._router is not None
        return {
            "url": self._plan.router_url,
            "pid": os.getpid(),
            "router": self._describe_member(self._router),
            "instances": [self._describe_member(member) for member in self._instances],
        }

    def release(self) -> None:
        """End all: the instances first, so that they can take their leave of the router."""
        end_all([member.process for member in self._instances])
        if self._router is not None:
            end_all([self._router.process], grace_s=GRACE_S / 3)

    def __enter__(self) -> Cluster:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()

    def _members(self) -> list[_Member]:
        return [*([self._router] if self._router else []), *self._instances]

    def _look(self) -> None:
        """Bring every member's stage up to date."""
        assert self._router is not None
        answers = probe.router_answers(self._router.url)
        registered = probe.ready_workers(self._router.url, self._api_key) if answers else set()
        for member in self._instances:
            # Not again once it is up: SGLang answers /health by generating a token.
            if member.stage not in (Stage.UP, Stage.READY):
                member.stage = probe.instance_stage(member.url)
            # Both must say so: a router's word alone may be about one that has just died.
            if member.stage is Stage.UP and member.url in registered:
                member.stage = Stage.READY
        if answers:
            all_ready = all(member.stage is Stage.READY for member in self._instances)
            serves = all_ready and probe.router_ready(self._router.url)
            self._router.stage = Stage.READY if serves else Stage.UP
        for member in self._members():
            if member.process.poll() is not None:
                member.stage = Stage.DEAD

    def _rows(self) -> list[Row]:
        return [
            Row(
                member.process.name,
                member.role,
                member.url,
                member.stage,
                member.process.log_tail(1).strip(),
            )
            for member in self._members()
        ]

    def _fail_on_death(self) -> None:
        dead = [member for member in self._members() if member.stage is Stage.DEAD]
        if dead:
            raise StartFailed("\n".join(self._obituary(member) for member in dead))

    def _why_late(self, deadline_s: float) -> str:
        late = [member for member in self._members() if member.stage is not Stage.READY]
        first = late[-1]
        states = ", ".join(f"{member.process.name} is {member.stage.value}" for member in late)
        return f"not ready within {deadline_s:.0f} s: {states}\n" + self._log_end(first)

    def _obituary(self, member: _Member) -> str:
        code = member.process.poll()
        how = f"signal {code - 128}" if code is not None and code > 128 else f"exit status {code}"
        return f"{member.process.name} died ({how})\n" + self._log_end(member)

    def _log_end(self, member: _Member) -> str:
        tail = member.process.log_tail(_TAIL_LINES)
        indented = "\n".join(f"    {line}" for line in tail.splitlines())
        return f"{indented}\n    log: {member.process.command.log}"

    @staticmethod
    def _describe_member(member: _Member) -> dict[str, object]:
        return {
            "name": member.process.name,
            "role": member.role,
            "url": member.url,
            "pid": member.process.pid,
            "log": str(member.process.command.log),
        }


def write_json(path: Path, value: dict[str, object]) -> None:
    """Written whole or not at all, so that a reader who waits for the file can trust it."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_text(json.dumps(value, indent=1) + "\n")
    draft.replace(path)
