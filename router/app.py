"""The router as one ASGI application: parts put together, paths given, started and stopped.

Inference is a plain ASGI application mounted as a route; nothing that would wrap a stream
(``BaseHTTPMiddleware``) stands before it.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
from fastapi import FastAPI
from fastapi.routing import APIRoute
from sglang_memserve.errors import (
    ConfigError,
    LimitExceeded,
    MemServeError,
    NamespaceMismatch,
    NoInstance,
    PeerError,
    ProtocolError,
    VersionMismatch,
)
from sglang_memserve.protocol.http import InstanceInfo
from sglang_memserve.types import Generation, InstanceId
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route as Mount

from .config import RouterConfig
from .control.aliases import Aliases
from .control.drain import Leaving
from .control.everywhere import PATHS as EVERYWHERE
from .control.everywhere import Everywhere
from .control.explain import Explain
from .control.fleet import Control
from .control.methods import other_methods
from .control.openapi import describe
from .control.registration import Members
from .control.workers import Workers
from .cost.bookings import Bookings
from .cost.learned import CostModel
from .http import replies
from .http.limits import Limits, StepDeadlines
from .http.proxy import Deadlines, Upstream
from .http.replies import App
from .http.security import Guard, with_cors
from .http.shortcut import Shortcut
from .members.instances import Instances
from .members.introductions import Introductions
from .members.polling import Poller
from .metrics.registry import Metrics, TreeCollector
from .policy.base import Rotation
from .policy.registry import make_policy
from .prompt.bodies import Route
from .prompt.tokenize import Tokenization
from .request.admission import Admission
from .request.client import ClientGone, SlowBody
from .request.dispatch import Dispatcher
from .request.forward import Forwarding
from .request.live import GivenRids, LiveRequests
from .request.passthrough import Passthrough
from .request.prepare import Preparation
from .request.resume import Resumption
from .request.steps import Steps
from .tree.feed import Feed
from .tree.merged import merged_tree
from .tree.metrics import SourceCollector
from .tree.trust import TrustedTree
from .watching import Watching

logger = logging.getLogger(__name__)

ASK_S = 10.0
MOST_ASKED = 4
JUST_ANSWERED = 256
INFERENCE_METHODS = frozenset({"POST", "PUT"})
STATUS_OF: tuple[tuple[type[MemServeError], int], ...] = (
    (NamespaceMismatch, 409),
    (VersionMismatch, 409),
    (ProtocolError, 400),
    (ConfigError, 400),
    (SlowBody, 408),
    (LimitExceeded, 413),
    (NoInstance, 503),
    (PeerError, 502),
)


@asynccontextmanager
async def running(
    config: RouterConfig,
    *,
    limits: Limits | None = None,
    steps: StepDeadlines | None = None,
    admission: Admission | None = None,
    around: Callable[[App], App] = lambda app: app,
) -> AsyncIterator[App]:
    """A router that works, as an ASGI application, until the block is left.

    ``limits`` and ``steps`` override what ``config`` says, for tests mostly. ``admission``: the
    door, for whoever wants to close it. ``around``: what to put between the keys' guard and the
    rest (``siblings``).
    """
    limits = limits or (admission.limits if admission is not None else config.limits)
    admission = admission or Admission(limits)
    steps = steps or StepDeadlines(
        fetch_s=config.fetch_timeout_s,
        grace_s=config.fetch_timeout_s,
        prefill_s=min(StepDeadlines().prefill_s, config.request_timeout_s),
        hold_s=min(StepDeadlines().hold_s, config.request_timeout_s),
    )
    async with AsyncExitStack() as stack:
        app = await _assemble(config, admission, steps, stack)
        yield with_cors(Guard(around(app), config.keys), config.cors_origins)


async def _assemble(
    config: RouterConfig, admission: Admission, deadlines: StepDeadlines, stack: AsyncExitStack
) -> App:
    limits = admission.limits
    total_s = config.request_timeout_s
    keys, trusted = config.keys, config.tls.instance_context()
    deadlines_of_http = Deadlines(config.connect_timeout_s, config.stall_timeout_s, total_s)
    upstream = Upstream(deadlines_of_http, keys, trusted)
    stack.push_async_callback(upstream.close)
    key = {"Authorization": f"Bearer {config.api_key}"} if config.api_key else {}
    connector = aiohttp.TCPConnector(ssl=trusted or True)
    session = await stack.enter_async_context(aiohttp.ClientSession(connector=connector))
    tree, metrics, costs, rotation = merged_tree(), Metrics(), CostModel(), Rotation()
    policy = make_policy(
        config.policy, rotation, costs, config.bypass_tokens, deadlines.most_wait_s
    )
    feed = Feed(tree, session, clock=time.monotonic, wall_clock=time.time, headers=key)
    stack.push_async_callback(feed.close)
    bookings = Bookings(time.monotonic, costs)
    watching = Watching(config, upstream, metrics)
    stack.push_async_callback(watching.close)
    newcomers = Newcomers(costs, bookings)
    introductions = Introductions(upstream, f"{socket.gethostname()}:{config.port}")
    stack.push_async_callback(introductions.close)
    instances = Instances(
        time.monotonic,
        [feed, newcomers, introductions, watching],
        heartbeat_s=config.heartbeat_s,
        expire_s=config.expire_s,
        moves=config.moves,
    )
    asker = EngineTokenizer(instances, upstream)
    folder = Path(config.model_path) if config.model_path else None
    tokenization = Tokenization(asker.ask, folder=folder)
    stack.callback(tokenization.close)
    newcomers.tokenization = tokenization
    stack.push_async_callback(newcomers.close)
    # Those that were answered a moment ago are here still.
    here = limits.max_in_flight + limits.max_waiting + JUST_ANSWERED
    given = GivenRids.OURS_ALONE if config.processes == 1 else GivenRids.SHARED
    live = LiveRequests(upstream, here, given)
    stack.push_async_callback(live.close)
    for listed in config.instances:
        instances.add_static(listed.url, listed.role)
    poller = Poller(instances, session, interval_s=config.heartbeat_s, headers=key)
    polling = asyncio.create_task(poller.run(), name="polling")
    polling.add_done_callback(_report)
    stack.push_async_callback(_stop, polling)
    preparation = Preparation(
        instances=instances,
        tree=TrustedTree(tree, feed.doubts),
        policy=policy,
        policy_name=config.policy,
        rotation=rotation,
        tokenization=tokenization,
        bookings=bookings,
        steps=Steps(upstream, instances, costs, metrics, deadlines),
        metrics=metrics,
        journal=watching.journal,
    )
    forwarding = Forwarding(instances, upstream, costs, metrics, keys)
    dispatcher = Dispatcher(
        preparation=preparation,
        forwarding=forwarding,
        resumption=Resumption(
            preparation, forwarding, upstream, asker.ask, metrics, limits.attempts
        ),
        instances=instances,
        rotation=rotation,
        admission=admission,
        live=live,
        metrics=metrics,
        journal=watching.journal,
        limits=limits,
    )

    def source_states() -> Mapping[str, str]:
        return {status.instance: status.state.value for status in feed.status()}

    metrics.registry.register(TreeCollector(tree, source_states))
    metrics.registry.register(SourceCollector(feed.status))
    most = limits.max_body_bytes
    control = Control(instances, source_states, upstream, live, metrics, admission, most)
    members = Members(instances, source_states, tree, most, feed.status)
    leaving = Leaving(instances)
    stack.push_async_callback(leaving.close)
    workers = Workers(instances, upstream, leaving, most)
    rest = Passthrough(instances, upstream, metrics, rotation, admission, most, keys)
    inference = {route.value: dispatcher for route in Route}
    explain = Explain(
        preparation=preparation,
        instances=instances,
        tree=TrustedTree(tree, feed.doubts),
        policy=policy,
        policy_name=config.policy,
        rotation=rotation,
        bookings=bookings,
        costs=costs,
        max_body_bytes=most,
    )
    aliases = Aliases(instances, most)
    everywhere = Everywhere(instances, upstream, most)
    app = _application(dispatcher, control, everywhere, members, workers, aliases, explain)
    app.router.routes[:0] = [
        APIRoute(path, handler, methods=methods, response_model=None, include_in_schema=False)
        for path, handler, methods in watching.open(instances, tree, source_states)
    ]
    app.router.routes += [*other_methods(app.router.routes), Mount("/{path:path}", rest)]
    return Shortcut(app, inference, INFERENCE_METHODS)


def _application(
    dispatcher: Dispatcher,
    control: Control,
    everywhere: Everywhere,
    members: Members,
    workers: Workers,
    aliases: Aliases,
    explain: Explain,
) -> FastAPI:
    app = FastAPI(title="MemServe router", docs_url=None, redoc_url=None)
    app.add_exception_handler(MemServeError, _on_error)
    app.add_exception_handler(ClientGone, _on_client_gone)
    for route in Route:
        app.router.routes.append(Mount(route.value, dispatcher, methods=[*INFERENCE_METHODS]))
    get, post = ["GET"], ["POST"]
    paths: Sequence[tuple[str, Any, list[str]]] = (
        ("/liveness", control.liveness, get),
        ("/health", control.health, get),
        ("/health_generate", control.health_generate, get),
        ("/ready", control.readiness, get),
        ("/readiness", control.readiness, get),
        ("/metrics", control.expose_metrics, get),
        ("/flush_cache", control.flush_cache, get),
        ("/flush_cache", control.flush_cache, post),
        ("/abort_request", control.abort_request, post),
        ("/server_info", control.server_info, get),
        ("/get_server_info", control.server_info, get),
        ("/workers", members.workers, get),
        ("/workers", members.add_worker, post),
        ("/workers/{url:path}", members.worker, get),
        ("/workers/{url:path}", workers.remove, ["DELETE"]),
        ("/workers/{url:path}", workers.change, ["PATCH"]),
        ("/add_worker", aliases.add_worker, post),
        ("/remove_worker", aliases.remove_worker, post),
        ("/list_workers", aliases.list_workers, get),
        ("/get_loads", aliases.worker_loads, get),
        ("/v1/loads", aliases.loads, get),
        ("/memserve/register", members.register, post),
        ("/memserve/heartbeat", members.heartbeat, post),
        ("/memserve/deregister", members.deregister, post),
        ("/memserve/tree", members.dump_tree, get),
        ("/memserve/explain", explain.explain, post),
        ("/memserve/models", explain.models, get),
    )
    for path, handler, methods in paths:
        app.add_api_route(path, handler, methods=methods, response_model=None)
    for path in EVERYWHERE:
        app.add_api_route(
            path,
            everywhere.ask,
            methods=[*get, *post, "PUT"],
            response_model=None,
            include_in_schema=False,
        )
    app.openapi = lambda: describe(app)  # type: ignore[method-assign]
    return app


async def _on_error(request: Request, error: Exception) -> Response:
    status = next((code for kind, code in STATUS_OF if isinstance(error, kind)), 500)
    if request.url.path.startswith("/memserve/"):
        body = {"error": {"message": str(error), "type": type(error).__name__, "code": status}}
        response = replies.json_response(body, status)
    else:
        response = replies.as_response(replies.error(status, str(error), type(error).__name__))
    if isinstance(error, LimitExceeded):
        # The rest of the body is not read.
        response.headers["connection"] = "close"
    return response


async def _on_client_gone(request: Request, error: Exception) -> Response:
    # Nobody reads it; the server wants an answer all the same.
    return Response(status_code=400)


class Newcomers:
    """A ``Listener`` that gets ready for an instance's model and prices when it joins."""

    def __init__(self, costs: CostModel, bookings: Bookings) -> None:
        self.tokenization: Tokenization | None = None
        self._costs = costs
        self._bookings = bookings
        self._tasks: set[asyncio.Task[None]] = set()

    def joined(self, info: InstanceInfo) -> None:
        self._costs.page_bytes = info.namespace.block_bytes * len(info.ranks)
        if self.tokenization is None:
            return
        task = asyncio.create_task(self.tokenization.prepare(info.model_path), name="tokenizer")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(_report)

    def left(self, instance: InstanceId) -> None:
        self._costs.forget(instance)
        self._bookings.forget(instance)

    def beat(self, instance: InstanceId, generation: Generation, event_seq: int) -> None:
        pass

    async def close(self) -> None:
        for task in list(self._tasks):
            await _stop(task)


class EngineTokenizer:
    """Asks any usable instance's ``/tokenize``."""

    def __init__(self, instances: Instances, upstream: Upstream) -> None:
        self._instances = instances
        self._upstream = upstream

    async def ask(self, question: Mapping[str, Any]) -> Sequence[int]:
        """Ids of a prompt or a chat. Raises PeerError when nobody answers."""
        error: PeerError = PeerError("no instance to ask")
        views = sorted(self._instances.views({}), key=lambda view: view.running_requests)
        for view in views[:MOST_ASKED]:
            try:
                return await self._ask_one(view.id, question)
            except PeerError as failure:
                error = failure
        raise error

    async def _ask_one(self, instance: InstanceId, question: Mapping[str, Any]) -> Sequence[int]:
        url = f"{instance}/tokenize"
        answer = await self._upstream.call("POST", url, dict(question), deadline_s=ASK_S)
        tokens = answer.get("tokens") if isinstance(answer, dict) else None
        if not isinstance(tokens, list) or not all(type(token) is int for token in tokens):
            raise PeerError(f"{url} answered without tokens")
        return tokens


async def _stop(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def _report(task: asyncio.Task[None]) -> None:
    """A task that serves all requests must not die unheard."""
    if not task.cancelled() and (error := task.exception()) is not None:
        logger.error("%s stopped", task.get_name(), exc_info=error)
