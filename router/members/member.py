"""One instance as the router knows it, and one request in flight to it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from types import TracebackType

from sglang_memserve.protocol.http import InstanceInfo, Load
from sglang_memserve.types import Generation, InstanceId, Role

from ..cost.bookings import NO_SHARE, Share
from ..values import InstanceView, Match
from .breaker import Breaker, BreakerState

logger = logging.getLogger(__name__)

Interrupt = Callable[[str], None]

IDLE = Load(running_requests=0, waiting_requests=0, used_tokens=0, total_tokens=0)


class State(Enum):
    """STARTING: listed by the operator, never answered yet. UNHEALTHY: silent or refused; its
    pages stay in the tree for a while. DRAINING: finishes what it has. LEFT: gone."""

    STARTING = "starting"
    READY = "ready"
    UNHEALTHY = "unhealthy"
    DRAINING = "draining"
    LEFT = "left"


class Outcome(Enum):
    """How a request to an instance ended, as far as it tells of the instance."""

    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class MemberStatus:
    """A member for people (``GET /workers``). ``model`` is the served name, "" if unknown."""

    id: InstanceId
    generation: Generation
    role: Role
    state: State
    last_error: str
    static: bool
    has_mempool: bool
    model: str
    load: Load
    in_flight_requests: int
    in_flight_prefill_tokens: int
    breaker: BreakerState
    silent_s: float


@dataclass(slots=True, eq=False)
class Member:
    """Mutable record, owned by ``Instances``. ``info`` is None before the first answer and for a
    plain SGLang server. ``attached``: its pages are being followed. ``reached``: it
    has answered at least once."""

    id: InstanceId
    generation: Generation
    role: Role
    breaker: Breaker
    seen_at: float
    state: State = State.STARTING
    info: InstanceInfo | None = None
    model: str = ""
    static: bool = False
    fixed_role: Role | None = None
    attached: bool = False
    draining: bool = False
    reached: bool = False
    last_error: str = ""
    load: Load = field(default=IDLE)
    in_flight_requests: int = 0
    in_flight_prefill_tokens: int = 0
    flights: set[InFlight] = field(default_factory=set)

    def view(self, match: Match, share: Share = NO_SHARE) -> InstanceView:
        return InstanceView(
            id=self.id,
            generation=self.generation,
            role=self.role,
            running_requests=share.seats + max(self.in_flight_requests, self.load.running_requests),
            waiting_requests=self.load.waiting_requests,
            in_flight_prefill_tokens=self.in_flight_prefill_tokens,
            free_tokens=max(self.load.total_tokens - self.load.used_tokens - share.tokens, 0),
            total_tokens=self.load.total_tokens,
            queue_s=share.queue_s,
            coming_pages=share.coming_pages,
            coming_s=share.coming_s,
            match=match,
            can_fetch=self.info is not None,
        )

    def turn(self, state: State, why: str = "") -> None:
        """Another state, which the log is told of; the same again changes nothing."""
        before, self.state = self.state, state
        if state is before:
            return
        if state is State.READY and before is State.STARTING:
            boot = f"boot {self.generation}" if self.info is not None else "without MemServe"
            logger.info("%s joined as %s: %s, %s", self.id, self.role.value, self.model, boot)
        elif state is State.READY:
            logger.info("%s is ready again", self.id)
        elif state is State.DRAINING:
            logger.info("%s drains, %d requests in flight", self.id, self.in_flight_requests)
        else:
            logger.info(
                "%s %s: %s", self.id, "left" if state is State.LEFT else "is unhealthy", why
            )

    def take(self, role: Role) -> None:
        """Another role, which the log is told of."""
        before, self.role = self.role, role
        if role is not before and self.state is not State.STARTING:
            logger.info("%s is for %s now, was for %s", self.id, role.value, before.value)

    def unavailable(self, now: float) -> str | None:
        """Why nothing may be sent there now; None when something may."""
        if self.state is not State.READY:
            why = f": {self.last_error}" if self.last_error else ""
            return f"{self.state.value}{why}"
        if not self.breaker.allows(now):
            why = f" ({self.last_error})" if self.last_error else ""
            return self.breaker.reason(now) + why
        return None

    def status(self, now: float) -> MemberStatus:
        return MemberStatus(
            id=self.id,
            generation=self.generation,
            role=self.role,
            state=self.state,
            last_error=self.last_error,
            static=self.static,
            has_mempool=self.info is not None,
            model=self.model,
            load=self.load,
            in_flight_requests=self.in_flight_requests,
            in_flight_prefill_tokens=self.in_flight_prefill_tokens,
            breaker=self.breaker.state(now),
            silent_s=max(now - self.seen_at, 0.0),
        )


class InFlight:
    """A request that an instance is working on. ``end`` counts once; leaving the context without
    it means that the request was cancelled."""

    def __init__(self, member: Member, prefill_tokens: int, clock: Callable[[], float]) -> None:
        self._member = member
        self._prefill_tokens = max(prefill_tokens, 0)
        self._clock = clock
        self._ended = False
        self._heard_at = clock()
        self._interrupt: Interrupt | None = None
        member.flights.add(self)
        member.in_flight_requests += 1
        member.in_flight_prefill_tokens += self._prefill_tokens
        member.breaker.started(clock())

    @property
    def instance(self) -> InstanceId:
        return self._member.id

    def heard(self) -> None:
        """Something came from the instance."""
        self._heard_at = self._clock()

    def on_lost(self, interrupt: Interrupt | None) -> None:
        """What to call, with the reason, when nothing comes from the instance any more."""
        self._interrupt = interrupt

    def lose(self, silent_s: float, why: str) -> None:
        """The instance is silent; this request too if it was for ``silent_s``."""
        if self._interrupt is not None and self._clock() - self._heard_at > silent_s:
            self._interrupt(why)

    def computed(self) -> None:
        """The prompt is computed (the first token came): it is no longer queued work."""
        self._member.in_flight_prefill_tokens -= self._prefill_tokens
        self._prefill_tokens = 0

    def end(self, outcome: Outcome, error: str = "") -> None:
        """``error``: one line that says what failed, kept as the instance's last error."""
        if self._ended:
            return
        self._ended = True
        self._member.flights.discard(self)
        self.computed()
        self._member.in_flight_requests -= 1
        if outcome is Outcome.SUCCEEDED:
            self._member.breaker.succeeded()
        elif outcome is Outcome.FAILED:
            self._member.breaker.failed(self._clock())
            self._member.last_error = error or self._member.last_error
        else:
            self._member.breaker.abandoned()

    def __enter__(self) -> InFlight:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.end(Outcome.CANCELLED)
