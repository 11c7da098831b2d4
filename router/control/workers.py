"""What an operator does to one worker: its role, its end. Handlers; ``app`` gives them paths."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from sglang_memserve.errors import ConfigError, PeerError
from sglang_memserve.types import InstanceId
from starlette.requests import Request
from starlette.responses import Response

from ..http import replies
from ..http.proxy import Upstream
from ..http.replies import as_response, json_response
from ..members.instances import Instances
from ..request.client import read_json
from .drain import Leaving
from .registration import listed_role, named_worker, unknown_worker

ASK_S = 10.0
DRAIN_S = 300.0
MOST_DRAIN_S = 86400.0


@dataclass(frozen=True, slots=True)
class Workers:
    instances: Instances
    upstream: Upstream
    leaving: Leaving
    max_body_bytes: int

    async def remove(self, request: Request) -> Response:
        """At once; with ``?drain=true`` when it has done what it has, ``timeout_s`` later at most.

        An instance that was drained stays away until it is started again or added by hand; another
        may register again."""
        url = self._known(request)
        if url is None:
            return unknown_worker(named_worker(request))
        drain = request.query_params.get("drain", "false").lower()
        if drain not in ("true", "false", "1", "0"):
            raise ConfigError(f"drain must be true or false, got {drain!r}")
        if drain in ("false", "0"):
            self.instances.remove(url)
            return json_response({"url": url})
        self.leaving.begin(url, _seconds(request.query_params.get("timeout_s")))
        return json_response({"url": url, "state": "draining"}, 202)

    async def change(self, request: Request) -> Response:
        """``{"role": "prefill"|"decode"|"both"}``: an assignment to the instance itself, which
        tells all its routers. A plain SGLang server has a role in this router only."""
        url = self._known(request)
        if url is None:
            return unknown_worker(named_worker(request))
        body = await read_json(request, dict[str, Any], self.max_body_bytes)
        role = listed_role(body.get("role"))
        if role is None or set(body) != {"role"}:
            raise ConfigError("a worker can be given a 'role', and nothing else")
        if self.instances.info(url) is not None:
            try:
                await self.upstream.call(
                    "POST", f"{url}/memserve/role", {"role": role.value}, deadline_s=ASK_S
                )
            except PeerError as error:
                return as_response(replies.error(502, f"{url} keeps its role: {error}"))
        self.instances.assign(url, role)
        return json_response({"url": url, "role": role.value})

    def _known(self, request: Request) -> InstanceId | None:
        url = named_worker(request)
        return url if any(member.id == url for member in self.instances.members()) else None


def _seconds(text: str | None) -> float:
    """Raises ConfigError."""
    try:
        value = DRAIN_S if text is None else float(text)
    except ValueError as error:
        raise ConfigError(f"timeout_s must be a number, got {text!r}") from error
    if not 0 <= value <= MOST_DRAIN_S or math.isnan(value):
        raise ConfigError(f"timeout_s must be in 0..{MOST_DRAIN_S:g}, got {text}")
    return value
