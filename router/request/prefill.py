"""Computing prompts on a prefill instance that generates nothing."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from sglang_memserve.errors import PeerError, ProtocolError
from sglang_memserve.types import InstanceId

from ..cost.learned import CostModel
from ..cost.spells import Computed, Spells
from ..http.limits import StepDeadlines
from ..http.proxy import Refused, Upstream
from ..members.instances import Instances
from ..members.member import Outcome
from ..prompt.bodies import Request, engine_rids, prefill_body
from .live import Live, new_rid
from .placement import Holdings, Keyed


class Prefills:
    """``compute`` books what it does with the instance and with the cost model."""

    def __init__(
        self,
        upstream: Upstream,
        instances: Instances,
        costs: CostModel,
        deadlines: StepDeadlines,
    ) -> None:
        self._upstream = upstream
        self._instances = instances
        self._costs = costs
        self._deadlines = deadlines
        self._spells = Spells()

    async def compute(
        self,
        request: Request,
        keyed: Keyed,
        holdings: Holdings,
        prefill: InstanceId,
        live: Live,
        deadline_s: float,
    ) -> int:
        """P computes the prompts; returns the tokens it had cached. Raises PeerError,
        ProtocolError, NoInstance."""
        uncached = keyed.tokens - keyed.bounded_tokens(holdings.pages(prefill))
        rid = new_rid()
        rids = engine_rids(rid, len(keyed.chains), request.batched)
        body = prefill_body(request, [chain.ids for chain in keyed.chains], rid)
        with (
            self._instances.begin(prefill, uncached) as flight,
            live.at(prefill, rids),
            self._timed(prefill) as computed,
        ):
            try:
                answer = await self._upstream.call(
                    "POST",
                    f"{prefill}/generate",
                    body,
                    deadline_s=deadline_s,
                )
                cached = _cached_tokens(answer)
            except Refused as error:
                # Its own fault only if it says so: a 400 is about the request.
                if error.status >= 500:
                    flight.end(Outcome.FAILED, str(error))
                raise
            except (PeerError, ProtocolError) as error:
                flight.end(Outcome.FAILED, f"prefill: {error}")
                raise
            flight.end(Outcome.SUCCEEDED)
            if len(keyed.chains) == 1:
                computed.append(Computed(keyed.tokens - cached, cached))
        return cached

    @contextmanager
    def _timed(self, prefill: InstanceId) -> Iterator[list[Computed]]:
        """Learns from what the body says it computed, once all that went on there is over."""
        self._spells.begin(prefill, time.monotonic())
        view = next((v for v in self._instances.views({}) if v.id == prefill), None)
        if view is None or view.waiting_requests:
            self._spells.spoil(prefill)
        computed: list[Computed] = []
        try:
            yield computed
        finally:
            one = computed[0] if computed else None
            spell = self._spells.end(prefill, time.monotonic(), one)
            if spell is not None:
                self._costs.observe_spell(prefill, spell)

    def limit_s(self, keyed: Keyed, holdings: Holdings, prefill: InstanceId) -> float:
        """How long P may take before it is late: what is predicted, generously."""
        cached = keyed.bounded_tokens(holdings.pages(prefill))
        view = next((v for v in self._instances.views({}) if v.id == prefill), None)
        queued = view.in_flight_prefill_tokens if view is not None else 0
        predicted = self._costs.predict_backlog_s(prefill, queued)
        predicted += self._costs.predict_prefill_s(prefill, keyed.tokens - cached, cached)
        late = self._deadlines.late_factor * predicted + self._deadlines.least_prefill_s
        return min(self._deadlines.prefill_s, late)


def _cached_tokens(answer: object) -> int:
    """``meta_info.cached_tokens`` of a ``/generate`` answer, over all its prompts."""
    total = 0
    for one in answer if isinstance(answer, list) else [answer]:
        meta = one.get("meta_info") if isinstance(one, dict) else None
        if not isinstance(meta, dict):
            raise ProtocolError("prefill answered without meta_info")
        finish = meta.get("finish_reason")
        if isinstance(finish, dict) and finish.get("type") == "abort":
            raise ProtocolError("prefill was aborted")
        cached = meta.get("cached_tokens", 0)
        if not isinstance(cached, int) or cached < 0:
            raise ProtocolError("prefill answered without a number of cached_tokens")
        total += cached
    return total
