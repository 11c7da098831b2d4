"""Control routes by the names that users of sglang-router and SGLang know."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from sglang_memserve.errors import ConfigError
from sglang_memserve.types import InstanceId, Role
from starlette.requests import Request
from starlette.responses import Response

from ..http import replies
from ..http.replies import as_response, json_response
from ..members.instances import Instances
from ..members.member import MemberStatus, State
from ..prompt.bodies import decode_body
from ..request.client import read_body
from .registration import listed_role


@dataclass(frozen=True, slots=True)
class Aliases:
    """Handlers; ``app`` gives them their paths."""

    instances: Instances
    max_body_bytes: int

    async def add_worker(self, request: Request) -> Response:
        """``/add_worker?url=...``, or the same names in a JSON body."""
        named = await self._named(request)
        role = named.get("role", named.get("worker_type"))
        url = self.instances.add_static(self._url(named), listed_role(role))
        return json_response({"url": url, "message": f"Successfully added worker: {url}"})

    async def remove_worker(self, request: Request) -> Response:
        """``/remove_worker?url=...``, or the same in a JSON body."""
        url = InstanceId(self._url(await self._named(request)).rstrip("/"))
        if url not in [member.id for member in self.instances.members()]:
            return as_response(replies.error(404, f"unknown worker {url}"))
        self.instances.remove(url)
        return json_response({"url": url, "message": f"Successfully removed worker: {url}"})

    async def list_workers(self, _: Request) -> Response:
        return json_response({"urls": [member.id for member in self.instances.members()]})

    async def worker_loads(self, _: Request) -> Response:
        """``/get_loads``: tokens in each one's device pool, -1 where nothing is known of it."""
        workers = [
            {
                "worker": member.id,
                "worker_type": _worker_type(member),
                "load": member.load.used_tokens if member.state is State.READY else -1,
            }
            for member in self.instances.members()
        ]
        return json_response({"workers": workers})

    async def loads(self, _: Request) -> Response:
        """``/v1/loads``: SGLang's own, one entry an instance, as of its last heartbeat."""
        body = {
            "timestamp": datetime.now(UTC).isoformat(),
            "loads": list(_loads(self.instances.members())),
        }
        return json_response(body)

    async def _named(self, request: Request) -> dict[str, Any]:
        """What is named in the query, and in the body if there is one."""
        data = await read_body(request.receive, request.scope["headers"], self.max_body_bytes)
        return {**(decode_body(data) if data else {}), **request.query_params}

    def _url(self, named: dict[str, Any]) -> str:
        url = named.get("url")
        if not isinstance(url, str) or not url:
            raise ConfigError("name the worker: ?url=http://host:port")
        return url


def _loads(members: list[MemberStatus]) -> Iterator[dict[str, object]]:
    for rank, member in enumerate(members):
        load = member.load
        yield {
            "url": member.id,
            "role": member.role.value,
            "state": member.state.value,
            "dp_rank": rank,
            "num_running_reqs": load.running_requests,
            "num_waiting_reqs": load.waiting_requests,
            "num_used_tokens": load.used_tokens,
            "max_total_num_tokens": load.total_tokens,
            "token_usage": round(load.used_tokens / max(load.total_tokens, 1), 4),
        }


def _worker_type(member: MemberStatus) -> str:
    return "regular" if member.role is Role.BOTH else member.role.value
