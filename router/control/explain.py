"""``POST /memserve/explain`` and ``GET /memserve/models``: why requests go where they go.

Explaining takes the same way as serving, up to the plan, and stops there: nothing is sent, booked,
or moved on. The words are those of ``x-memserve-reason`` and the log. No text, token id or page key
is shown.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sglang_memserve.errors import NoInstance
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from ..cost.bookings import Bookings
from ..cost.learned import CostModel
from ..http.replies import as_response, bad_request, json_response, unavailable
from ..members.instances import Instances
from ..policy.base import Policy, Rotation, Weighing
from ..prompt import bodies
from ..prompt.bodies import Body, Request, Route
from ..request.client import read_body
from ..request.placement import Keyed, decide, idlest_decode, look_up, prompt_of
from ..request.prepare import Preparation, prefill_alone
from ..tree.merged import Matcher
from ..values import InstanceView, Plan

MOST_CANDIDATES = 32


@dataclass(frozen=True, slots=True)
class Explain:
    """Handlers; ``app`` gives them their paths."""

    preparation: Preparation
    instances: Instances
    tree: Matcher
    policy: Policy
    policy_name: str
    rotation: Rotation
    bookings: Bookings
    costs: CostModel
    max_body_bytes: int

    async def models(self, _: HttpRequest) -> Response:
        """What the fits are now: see ``cost.CostModel.explain``."""
        return json_response(self.costs.explain())

    async def explain(self, http: HttpRequest) -> Response:
        """For a body as ``/generate``, completions or chat take it: the candidates, what each is
        predicted to take, and the choice. 503 with the reasons when nobody can serve."""
        data = await read_body(http.receive, http.scope["headers"], self.max_body_bytes)
        body = bodies.decode_body(data)
        request = bodies.read_request(route_of(body), body)
        too_long = self.preparation.too_long(request, len(data))
        if too_long:
            return as_response(bad_request(too_long))
        keyed, reason = await self.preparation.key(request)
        try:
            if not keyed.chains:
                return json_response(self._unknown(request, reason))
            return json_response(self._known(request, keyed))
        except NoInstance as nobody:
            return as_response(unavailable("no instance can serve", nobody.reasons))

    def _unknown(self, request: Request, reason: str) -> dict[str, Any]:
        """The prompt is unknown to the router: the idlest decode instance gets it whole."""
        turn = self.rotation.turn
        target = idlest_decode(self.instances, turn=turn, bookings=self.bookings)
        plan = Plan(target, reason=f"direct: {reason}")
        views = self.instances.views({}, (), self.bookings)
        return self._told(request, None, plan, [], views)

    def _known(self, request: Request, keyed: Keyed) -> dict[str, Any]:
        holdings = look_up(self.tree, keyed)
        session = request.session
        plan, views = decide(
            self.instances, self.policy, keyed, holdings, session, (), self.bookings
        )
        candidates = [plan]
        if isinstance(self.policy, Weighing):
            prompt = prompt_of(keyed, session)
            candidates = self.policy.candidates(prompt, views, MOST_CANDIDATES)
        if request.prefill_only:
            plan = prefill_alone(plan)
        return self._told(request, keyed, plan, candidates, views)

    def _told(
        self,
        request: Request,
        keyed: Keyed | None,
        plan: Plan,
        candidates: Sequence[Plan],
        views: Sequence[InstanceView],
    ) -> dict[str, Any]:
        return {
            "route": request.route.value,
            "policy": self.policy_name,
            "prompt": {
                "prompts": len(keyed.chains) if keyed is not None else None,
                "tokens": keyed.tokens if keyed is not None else None,
                "pages": keyed.pages if keyed is not None else None,
                "page_size": keyed.page_size if keyed is not None else None,
            },
            "choice": _plan(plan),
            "candidates": [_plan(candidate) for candidate in candidates],
            "instances": {view.id: self._view(view) for view in views},
            "unavailable": self.instances.unavailable(),
        }

    def _view(self, view: InstanceView) -> dict[str, Any]:
        return {
            "role": view.role.value,
            "held_pages": view.match.pages,
            "held_pages_hbm": view.match.hbm_pages,
            "coming_pages": view.coming_pages,
            "coming_s": view.coming_s,
            "queue_s": view.queue_s,
            "running_requests": view.running_requests,
            "waiting_requests": view.waiting_requests,
            "free_tokens": view.free_tokens,
            "total_tokens": view.total_tokens,
            "can_fetch": view.can_fetch,
        }


def route_of(body: Body) -> Route:
    """Whose body it is, by the field that holds the prompt."""
    if "messages" in body:
        return Route.CHAT
    return Route.COMPLETIONS if "prompt" in body else Route.GENERATE


def _plan(plan: Plan) -> dict[str, Any]:
    return {
        "prefill": plan.prefill,
        "decode": plan.decode,
        "source": plan.prefill_source if plan.prefill is not None else plan.decode_source,
        "held_pages": plan.held_pages,
        "wait_s": plan.wait_s,
        "reason": plan.reason,
        "seconds": plan.terms,
    }
