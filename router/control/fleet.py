"""Probes and what goes to all instances: health, metrics, flush, abort, server information."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sglang_memserve.errors import MemServeError, PeerError, ProtocolError
from sglang_memserve.types import InstanceId, Role
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from ..http import replies
from ..http.proxy import Upstream
from ..http.replies import as_response, json_response
from ..members.instances import Instances
from ..members.member import State
from ..metrics.registry import CONTENT_TYPE, Metrics
from ..request.admission import Admission
from ..request.client import read_json
from ..request.live import LiveRequests
from .fan_out import Told, ask_all, listed
from .registration import SourceStates

ASK_S = 10.0
FLUSH_S = 60.0


@dataclass(frozen=True, slots=True)
class Control:
    """Handlers; ``app`` gives them their paths."""

    instances: Instances
    source_states: SourceStates
    upstream: Upstream
    live: LiveRequests
    metrics: Metrics
    admission: Admission
    max_body_bytes: int

    # -- probes --

    async def liveness(self, _: Request) -> Response:
        return Response(status_code=200)

    async def health(self, _: Request) -> Response:
        """200 when an instance may be used now."""
        return Response(status_code=200 if self._serving() else 503)

    def _serving(self) -> bool:
        return not self.admission.draining and bool(self.instances.views({}))

    async def health_generate(self, _: Request) -> Response:
        """Asks the instances themselves: 200 when one of them generates."""
        urls = [view.id for view in self.instances.views({})]
        asked = (self._status("GET", f"{url}/health_generate", ASK_S) for url in urls)
        answers = await asyncio.gather(*asked)
        return Response(status_code=200 if 200 in answers else 503)

    async def readiness(self, _: Request) -> Response:
        """``ready`` when requests can be served; ``can_prefill`` and ``can_decode`` say for which
        role there is an instance. Without one of a role, those of the other take its work."""
        views = self.instances.views({})
        can_prefill = any(view.role.can_prefill for view in views)
        can_decode = any(view.role.can_decode for view in views)
        states, reasons = self.source_states(), self.instances.unavailable()
        body = {
            "ready": self._serving(),
            "draining": self.admission.draining,
            "running": self.admission.running,
            "waiting": self.admission.waiting,
            "can_prefill": can_prefill,
            "can_decode": can_decode,
            "members": [
                {
                    "url": member.id,
                    "role": member.role.value,
                    "state": member.state.value,
                    "source": states.get(member.id),
                    "reason": reasons.get(member.id),
                }
                for member in self.instances.members()
            ],
        }
        return json_response(body, 200 if self._serving() else 503)

    async def expose_metrics(self, _: Request) -> Response:
        return Response(self.metrics.expose(), media_type=CONTENT_TYPE.decode())

    # -- fan-outs --

    async def flush_cache(self, request: Request) -> Response:
        """To every member that answers at all; 200 only if all did it."""
        query = f"?{request.url.query}" if request.url.query else ""
        members = [m.id for m in self.instances.members() if m.state is not State.STARTING]
        if not members:
            return as_response(replies.unavailable("nothing to flush", self.instances.absent()))
        failed = await self._failed(members, f"/flush_cache{query}", {}, FLUSH_S)
        if not failed:
            return PlainTextResponse("Cache flushed on all instances.\n")
        # 400 is SGLang's own answer while requests are running.
        status = 400 if all(one.status == 400 for one in failed.values()) else 502
        return as_response(replies.error(status, f"not flushed everywhere ({listed(failed)})"))

    async def abort_request(self, request: Request) -> Response:
        """``{"rid": ...}`` or ``{"abort_all": true}``, to every member that answers at all."""
        body = await read_json(request, dict[str, Any], self.max_body_bytes)
        rid = body.get("rid") or None
        if body.get("abort_all") is True:
            self.live.abort(None)
        elif isinstance(rid, str):
            self.live.abort(rid)
        else:
            raise ProtocolError("abort_request needs 'rid' or 'abort_all'")
        members = [m.id for m in self.instances.members() if m.state is not State.STARTING]
        failed = await self._failed(members, "/abort_request", body, ASK_S)
        if failed:
            return as_response(replies.error(502, f"not aborted everywhere ({listed(failed)})"))
        return Response(status_code=200)

    async def _failed(
        self, urls: Sequence[InstanceId], target: str, body: object, deadline_s: float
    ) -> dict[InstanceId, Told]:
        """POST to all of them; those that did not do it."""
        told = await ask_all(self.upstream, urls, "POST", target, body, deadline_s)
        return {url: one for url, one in told.items() if not one.done}

    async def _status(self, method: str, url: str, deadline_s: float) -> int:
        try:
            async with self.upstream.exchange(method, url, deadline_s=deadline_s) as response:
                return response.status
        except PeerError:
            return 0

    # -- what instances know about themselves --

    async def server_info(self, _: Request) -> Response:
        """A live instance's own, with all live ones under ``prefill`` and ``decode``."""
        views = self.instances.views({})
        if not views:
            return as_response(replies.unavailable("no instance answers", self.instances.absent()))
        answers = await asyncio.gather(
            *(
                self.upstream.call("GET", f"{view.id}/server_info", deadline_s=ASK_S)
                for view in views
            ),
            return_exceptions=True,
        )
        by_role: dict[str, list[dict[str, Any]]] = {"prefill": [], "decode": []}
        first: dict[str, Any] | None = None
        failed: dict[str, str] = {}
        for view, answer in zip(views, answers, strict=True):
            if isinstance(answer, MemServeError) or not isinstance(answer, dict | BaseException):
                failed[view.id] = str(answer)[:200]
                continue
            if isinstance(answer, BaseException):
                raise answer
            info = {"url": view.id, "role": view.role.value, **answer}
            if first is None or (view.role.can_decode and first["role"] == Role.PREFILL.value):
                first = info
            if view.role.can_prefill:
                by_role["prefill"].append(info)
            if view.role.can_decode:
                by_role["decode"].append(info)
        if first is None:
            return as_response(replies.unavailable("no instance answers", failed))
        return json_response({**first, **by_role, "router": True})
