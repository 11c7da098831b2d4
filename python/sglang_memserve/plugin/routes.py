"""``/memserve/*`` on SGLang's own FastAPI app (see ``protocol.http``), behind SGLang's API key."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, FastAPI, Request, Response
from sglang.srt.entrypoints import http_server
from sglang.srt.utils import kill_process_tree

from ..config import InstanceConfig
from ..errors import (
    ConfigError,
)
from ..protocol.http import FetchBody, Load, PeersBody
from ..types import Role
from .agent import EngineFacts, InstanceAgent
from .answers import json_answer, memserve_router, open_routes, read_body
from .pool_size import pool_routes
from .verb_routes import verb_routes

if TYPE_CHECKING:
    from sglang.srt.server_args import ServerArgs


EXIT_REFUSED = 2


class _SglangEngine:
    """The agent's view of the engine, over SGLang's tokenizer manager (same process)."""

    def __init__(self, server_args: ServerArgs) -> None:
        self._server_args = server_args

    async def load(self) -> Load:
        snapshots = await _manager().get_loads(include=["core"])
        return Load.counted(
            running=sum(s.num_running_reqs for s in snapshots),
            waiting=sum(s.num_waiting_reqs for s in snapshots),
            used=sum(s.num_used_tokens for s in snapshots),
            total=sum(s.max_total_num_tokens for s in snapshots),
        )

    def describe(self) -> EngineFacts:
        manager = _manager()
        return EngineFacts(
            model_path=manager.model_path,
            served_model_name=manager.served_model_name,
            context_length=int(manager.model_config.context_len),
            max_total_tokens=int(_state().scheduler_info["max_total_num_tokens"]),
            tp_size=self._server_args.tp_size,
        )


def _state() -> Any:
    state = http_server._global_state
    assert state is not None, "SGLang's HTTP server has not started"
    return state


def _manager() -> Any:
    return _state().tokenizer_manager


def mount(app: FastAPI, config: InstanceConfig, server_args: ServerArgs) -> InstanceAgent:
    """Add the routes to SGLang's app and let an agent live as long as the app does."""
    agent = InstanceAgent(
        config,
        _SglangEngine(server_args),
        on_refused=_give_up,
        api_key=server_args.api_key,
        admin_key=server_args.admin_api_key,
    )
    verbs = verb_routes(_manager, server_args.page_size)
    open_routes(app, _routes(agent), pool_routes(agent), verbs)
    sglang_lifespan = app.router.lifespan_context

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[Any]:
        async with sglang_lifespan(app) as state:
            await agent.start()
            try:
                yield state
            finally:
                await agent.stop()

    app.router.lifespan_context = lifespan
    return agent


def _give_up(reason: str) -> None:
    """A cluster we do not fit into is an operator's mistake: say so and leave, as for any other."""
    print(f"error: {reason}", file=sys.stderr, flush=True)
    kill_process_tree(os.getpid(), include_parent=False)
    os._exit(EXIT_REFUSED)


def _routes(agent: InstanceAgent) -> APIRouter:
    router = memserve_router()

    @router.get("/info")
    async def info() -> Response:
        return json_answer(await agent.info())

    @router.get("/snapshot")
    async def snapshot() -> Response:
        return Response(await agent.snapshot(), media_type="application/msgpack")

    @router.get("/stats")
    async def stats() -> Response:
        return json_answer(await agent.stats())

    @router.post("/fetch")
    async def fetch(request: Request) -> Response:
        return json_answer(await agent.fetch(await read_body(request, FetchBody)))

    @router.post("/peers")
    async def peers(request: Request) -> Response:
        return json_answer(await agent.introduce(await read_body(request, PeersBody)))

    @router.post("/role")
    async def role(request: Request) -> Response:
        wanted = (await read_body(request, dict[str, str])).get("role", "")
        try:
            found = Role(wanted)
        except ValueError as error:
            roles = ", ".join(role.value for role in Role)
            raise ConfigError(f"unknown role {wanted!r}, expected one of: {roles}") from error
        agent.set_role(found)
        return json_answer(await agent.info())

    return router
