"""One request on its way through the router, and where it goes next."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from sglang_memserve.types import InstanceId

from ..cost.bookings import Booking
from ..http.headers import Verdict
from ..metrics.registry import Funnel
from ..prompt.bodies import Request, Route
from .client import Client
from .live import Live
from .streams import Stream


@dataclass(slots=True)
class Turn:
    """What is known about one request so far; ends as its log line.

    ``stream``: of a request whose stream may go on elsewhere if it breaks."""

    route: Route
    client: Client
    data: bytes
    request: Request
    live: Live
    started: float
    prompt_tokens: int = 0
    prompt_ids: Sequence[int] = ()
    stream: Stream | None = None
    verdict: Verdict = field(default_factory=lambda: Verdict(""))
    first_byte_s: float | None = None
    failed: set[InstanceId] = field(default_factory=set)
    booking: Booking | None = None
    errors: dict[str, str] = field(default_factory=dict)

    def book(self, booking: Booking | None) -> None:
        """What is decided for it now, in place of what was."""
        if self.booking is not None:
            self.booking.release()
        self.booking = booking


@dataclass(frozen=True, slots=True)
class Prepared:
    """Where the request goes now. ``uncached_tokens``: what is left to compute there."""

    target: InstanceId
    verdict: Verdict
    uncached_tokens: int
    prompts: int
    funnel: Funnel | None
