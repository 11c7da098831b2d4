"""SGLang's routes that change what an instance is or does: asked of one they change them all.

A cluster of which one instance alone had other weights, an adapter more or its generation paused
would give answers that depend on where a request went. So all instances get the request at the same
time, and the answer is 200 only when all of them did it. Routes that need something else of every
instance (weights out of a process group, from shared memory) are not among them: they are passed
through to one, as everything that the router knows nothing of.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import orjson
from sglang_memserve.errors import ProtocolError
from sglang_memserve.types import InstanceId
from starlette.requests import Request
from starlette.responses import Response

from ..http import replies
from ..http.proxy import Upstream
from ..http.replies import as_response, json_response
from ..members.instances import Instances
from ..members.member import State
from ..request.client import read_body
from .fan_out import Told, ask_all, listed

# Of SGLang 0.5.23.
PATHS = (
    "/load_lora_adapter",
    "/unload_lora_adapter",
    "/update_weights_from_disk",
    "/update_weight_version",
    "/begin_weight_update",
    "/end_weight_update",
    "/pause_generation",
    "/continue_generation",
    "/release_memory_occupation",
    "/resume_memory_occupation",
    "/set_internal_state",
    "/configure_logging",
    "/set_trace_level",
    "/start_profile",
    "/stop_profile",
    "/freeze_gc",
    "/slow_down",
)
# Weights from a slow disk take minutes.
ASK_S = 600.0


@dataclass(frozen=True, slots=True)
class Everywhere:
    """``ask`` is the handler of all ``PATHS``."""

    instances: Instances
    upstream: Upstream
    max_body_bytes: int

    async def ask(self, request: Request) -> Response:
        """An instance's own answer, with all of them under ``instances``. Where not all did it: 502
        (or the instances' status where they agree) with what each of them said."""
        data = await read_body(request.receive, request.scope["headers"], self.max_body_bytes)
        if data:
            _require_json(data)
        query = f"?{request.url.query}" if request.url.query else ""
        members = [m.id for m in self.instances.members() if m.state is not State.STARTING]
        if not members:
            return as_response(replies.unavailable("no instance to ask", self.instances.absent()))
        target = request.url.path + query
        return _answer(
            await ask_all(self.upstream, members, request.method, target, data or None, ASK_S)
        )


def _require_json(data: bytes) -> None:
    """Raises ProtocolError. What is wrong must not be refused by some and time out at others."""
    try:
        orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise ProtocolError(f"the body is no JSON: {error}") from error


def _answer(told: Mapping[InstanceId, Told]) -> Response:
    each = {url: {"status": one.status, "answer": _value(one)} for url, one in sorted(told.items())}
    failed = {url: one for url, one in told.items() if not one.done}
    if not failed:
        first = each[min(told)]["answer"]
        return json_response({**(first if isinstance(first, dict) else {}), "instances": each})
    statuses = {one.status for one in told.values()}
    status = statuses.pop() if len(statuses) == 1 and 0 not in statuses else 502
    message = f"{len(failed)} of {len(told)} instances did not do it ({listed(failed)})"
    body = {
        "success": False,
        "message": message,
        "error": {"message": message, "code": status},
        "instances": each,
    }
    return json_response(body, status)


def _value(one: Told) -> object:
    try:
        return orjson.loads(one.body)
    except orjson.JSONDecodeError:
        return one.text
