"""The client's own request to the decode instance, and the instance's answer to the client."""

from __future__ import annotations

import time

from sglang_memserve.errors import PeerError
from sglang_memserve.types import InstanceId

from ..cost.learned import CostModel
from ..http.headers import as_json, to_instance
from ..http.proxy import Answer, Upstream
from ..http.security import Keys
from ..members.instances import Instances
from ..members.member import InFlight, Outcome
from ..metrics.registry import Funnel, Metrics
from ..prompt import bodies
from ..prompt.bodies import Request
from .client import Broken
from .interrupts import Interruptible
from .live import new_rid
from .turn import Prepared, Turn

RETRIED_STATUS = 503
# What a server says when it cannot do its work; a 500 may be about the request.
FAILED_STATUSES = (502, 503, 504)


class Forwarding:
    """Sends prepared requests on."""

    def __init__(
        self,
        instances: Instances,
        upstream: Upstream,
        costs: CostModel,
        metrics: Metrics,
        keys: Keys,
    ) -> None:
        self._instances = instances
        self._upstream = upstream
        self._costs = costs
        self._metrics = metrics
        self._keys = keys

    async def forward(self, turn: Turn, prepared: Prepared) -> None:
        """The client's request to ``target``, the answer to the client.

        Raises PeerError; whether another instance may still be tried tells ``client.answered``,
        unless ``turn.stream`` goes on elsewhere. A client that was answered before gets the rest
        of its stream.
        """
        turn.verdict = prepared.verdict
        client, target = turn.client, prepared.target
        data, rids = _abortable(turn, prepared.prompts)
        key = self._keys.towards(client.path)
        headers = as_json(to_instance(client.headers, client.request_id, key))
        idle = self._is_idle(target)
        sent_at = time.monotonic()
        with self._instances.begin(target, prepared.uncached_tokens) as flight:
            if turn.booking is not None:
                turn.booking.arrived()
            try:
                with Interruptible(flight), turn.live.at(target, rids):
                    answer = await self._upstream.open(
                        client.method, target + client.target, headers, data
                    )
                    async with answer:
                        flight.computed()
                        if turn.booking is not None:
                            turn.booking.computed()
                        if idle and answer.status == 200 and _tells_prefill(turn.request):
                            self._observe(turn, prepared, time.monotonic() - sent_at)
                        if answer.status == RETRIED_STATUS and self._others(turn, target):
                            raise PeerError(f"answered {answer.status}")
                        await self._relay(turn, prepared, answer, flight)
            except (PeerError, Broken) as error:
                flight.end(Outcome.FAILED, str(error))
                raise
            failed = answer.status in FAILED_STATUSES
            outcome = Outcome.FAILED if failed else Outcome.SUCCEEDED
            flight.end(outcome, f"answered {answer.status}" if failed else "")

    async def _relay(
        self, turn: Turn, prepared: Prepared, answer: Answer, flight: InFlight
    ) -> None:
        """Raises PeerError, Broken."""
        answer.on_bytes(flight.heard)
        headers = prepared.verdict.headers()
        streams = answer.status == 200 and answer.has_frames
        if turn.client.answered:
            if not streams:
                raise PeerError(f"answered {answer.status} and no frames instead of going on")
        else:
            self._first_byte(turn, prepared.funnel)
        if turn.stream is not None and streams:
            await turn.client.relay_frames(answer, headers, turn.stream)
        else:
            turn.stream = None
            await turn.client.relay(answer, headers)

    def _is_idle(self, target: InstanceId) -> bool:
        view = next((v for v in self._instances.views({}) if v.id == target), None)
        return view is not None and not (view.running_requests or view.waiting_requests)

    def _observe(self, turn: Turn, prepared: Prepared, seconds: float) -> None:
        new = prepared.uncached_tokens
        self._costs.observe_prefill(prepared.target, new, turn.prompt_tokens - new, seconds)

    def _others(self, turn: Turn, target: InstanceId) -> bool:
        return bool(self._instances.views({}, {*turn.failed, target}))

    def _first_byte(self, turn: Turn, funnel: Funnel | None) -> None:
        turn.first_byte_s = time.monotonic() - turn.started
        self._metrics.ttft.labels(turn.route.value).observe(turn.first_byte_s)
        if funnel is not None:
            self._metrics.book(funnel)


def _tells_prefill(request: Request) -> bool:
    """Whether the first byte comes when the prompt is computed (and one token, at most)."""
    return not request.batched and (request.stream or request.prefill_only)


def _abortable(turn: Turn, count: int) -> tuple[bytes, tuple[str, ...]]:
    """The body to send, and the ids by which the instance can be told to abort.

    A stream needs no id (closing the connection ends it at once), several samples of a prompt
    get ids of the engine's own.
    """
    request = turn.request
    if request.rid_given or request.stream or request.samples > 1 or not request.body:
        return turn.data, request.rid
    rid = new_rid()
    return bodies.with_rid(turn.data, rid), bodies.engine_rids(rid, count, request.batched)
