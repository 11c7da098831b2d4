"""Membership over HTTP: instances that register themselves, workers an operator adds, the tree."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

import msgspec
from sglang_memserve.config import parse_role
from sglang_memserve.errors import ConfigError
from sglang_memserve.protocol.http import Heartbeat, Registration
from sglang_memserve.types import InstanceId, Role
from starlette.requests import Request
from starlette.responses import Response

from ..http import replies
from ..http.replies import as_response, json_response
from ..members.instances import Instances
from ..members.member import MemberStatus
from ..request.client import read_json
from ..tree.merged import MergedTree
from ..tree.metrics import Statuses, described

MAX_DUMPED_NODES = 10_000
MAX_DUMPED_KEYS = 500_000

SourceStates = Callable[[], Mapping[str, str]]
"""Each followed instance and the state of its event stream."""


@dataclass(frozen=True, slots=True)
class Members:
    """Handlers; ``app`` gives them their paths."""

    instances: Instances
    source_states: SourceStates
    tree: MergedTree
    max_body_bytes: int
    statuses: Statuses

    # -- membership: instances' own words --

    async def register(self, request: Request) -> Response:
        registration = await read_json(request, Registration, self.max_body_bytes)
        return json_response(self.instances.register(registration.info))

    async def heartbeat(self, request: Request) -> Response:
        beat = await read_json(request, Heartbeat, self.max_body_bytes)
        return json_response(self.instances.heartbeat(beat))

    async def deregister(self, request: Request) -> Response:
        body = await read_json(request, dict[str, str], self.max_body_bytes)
        self.instances.deregister(body.get("url", ""), body.get("generation", ""))
        return json_response({})

    # -- membership: the operator's words --

    async def workers(self, _: Request) -> Response:
        events = {status.instance: described(status) for status in self.statuses()}
        members = [_worker(member, events) for member in self.instances.members()]
        gone = [_worker(member, {}) for member in self.instances.gone()]
        return json_response({"workers": members, "left": gone, "total": len(members)})

    async def worker(self, request: Request) -> Response:
        """One entry of ``workers``; 404 for a URL that is not among them."""
        url = named_worker(request)
        member = next((one for one in self.instances.members() if one.id == url), None)
        if member is None:
            return unknown_worker(url)
        events = {status.instance: described(status) for status in self.statuses()}
        return json_response(_worker(member, events))

    async def add_worker(self, request: Request) -> Response:
        """``{"url": ..., "role": "prefill"|"decode"|"both"}``; the role is the instance's own
        where none is given."""
        body = await read_json(request, dict[str, Any], self.max_body_bytes)
        url = body.get("url")
        role = listed_role(body.get("role", body.get("worker_type")))
        if not isinstance(url, str):
            raise ConfigError("a worker needs a 'url', and maybe a 'role'")
        return json_response({"url": self.instances.add_static(url, role)}, 202)

    async def dump_tree(self, _: Request) -> Response:
        """The merged tree, at most ``MAX_DUMPED_NODES`` nodes and ``MAX_DUMPED_KEYS``
        keys of it. Keys, never text."""
        stats = self.tree.stats()
        nodes: list[dict[str, object]] = []
        keys = 0
        for node in self.tree.nodes():
            keys += len(node.keys)
            if len(nodes) >= MAX_DUMPED_NODES or keys > MAX_DUMPED_KEYS:
                break
            nodes.append(
                {
                    "keys": [str(key) for key in node.keys],
                    "parent": None if node.parent_key is None else str(node.parent_key),
                    "holders": {
                        holder: sorted(tier.name.lower() for tier in tiers)
                        for holder, tiers in node.holders.items()
                    },
                }
            )
        held = {
            instance: {tier.name.lower(): pages for tier, pages in tiers.items()}
            for instance, tiers in stats.held.items()
        }
        return json_response(
            {
                "nodes": nodes,
                "truncated": len(nodes) < stats.nodes,
                "total_nodes": stats.nodes,
                "total_pages": stats.pages,
                "held": held,
                "sources": dict(self.source_states()),
            }
        )


def named_worker(request: Request) -> InstanceId:
    """The URL, percent-encoded or not, in a path ``/workers/{url}``."""
    return InstanceId(unquote(request.path_params["url"]).rstrip("/"))


def unknown_worker(url: InstanceId) -> Response:
    return as_response(replies.error(404, f"unknown worker {url}"))


def listed_role(given: object) -> Role | None:
    """The role an operator gives a worker; None leaves it to the worker. Raises ConfigError."""
    if given is None or given == "regular":
        return None
    if not isinstance(given, str):
        raise ConfigError("a worker's 'role' must be a word")
    return parse_role(given)


def _worker(
    member: MemberStatus, events: Mapping[InstanceId, Mapping[str, object]]
) -> dict[str, object]:
    source = events.get(member.id)
    return {
        "url": member.id,
        "role": member.role.value,
        "state": member.state.value,
        "generation": member.generation,
        "model": member.model,
        "static": member.static,
        "mempool": member.has_mempool,
        "source": None if source is None else source["state"],
        "events": source,
        "breaker": member.breaker.value,
        "last_error": member.last_error or None,
        "silent_s": round(member.silent_s, 3),
        "in_flight_requests": member.in_flight_requests,
        "in_flight_prefill_tokens": member.in_flight_prefill_tokens,
        "load": msgspec.to_builtins(member.load),
    }
