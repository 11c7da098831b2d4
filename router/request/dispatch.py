"""The life of an inference request: ``/generate``, completions and chat. A plain ASGI application.

    read, check, tokenize, hash -> match in the tree -> plan (policy) -> steps before decode
        -> the client's own request to D, D's answer to the client -> one log line

The request is sent on with its bytes unchanged, except that one which is not streamed gets a
``rid``, where it has none, so that it can be aborted. A decode instance that refuses or dies before
the first byte of its answer is left out and the request planned anew.
"""

from __future__ import annotations

import asyncio
import logging
import time

from sglang_memserve.errors import (
    LimitExceeded,
    NoInstance,
    PeerError,
    ProtocolError,
    ShuttingDown,
)

from ..http import replies
from ..http.headers import Verdict
from ..http.limits import Limits
from ..http.replies import Receive, Scope, Send
from ..members.instances import Instances
from ..members.models import ModelNames
from ..metrics.registry import Metrics
from ..policy.base import Rotation
from ..prompt import bodies
from ..prompt.bodies import Opaque, Route
from .admission import Admission
from .client import Broken, Client, ClientGone, read_body, refusal, until_gone
from .forward import Forwarding
from .journal import Journal
from .live import DuplicateRid, LiveRequests
from .patience import PAUSES_S, Patience
from .prepare import Preparation
from .resumable import why_not
from .resume import Resumption
from .streams import make_stream
from .turn import Turn

logger = logging.getLogger(__name__)


class Dispatcher:
    """Serves the three routes. ``__call__`` is ASGI."""

    def __init__(
        self,
        *,
        preparation: Preparation,
        forwarding: Forwarding,
        resumption: Resumption,
        instances: Instances,
        rotation: Rotation,
        admission: Admission,
        live: LiveRequests,
        metrics: Metrics,
        journal: Journal,
        limits: Limits,
    ) -> None:
        self._preparation = preparation
        self._forwarding = forwarding
        self._resumption = resumption
        self._instances = instances
        self._rotation = rotation
        self._admission = admission
        self._live = live
        self._metrics = metrics
        self._journal = journal
        self._limits = limits
        self._names = ModelNames(instances)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = time.monotonic()
        client = Client(scope, send)
        route = Route(client.path)
        try:
            data = await read_body(receive, client.headers, self._limits.max_body_bytes)
            request = bodies.read_request(route, bodies.decode_body(data))
        except ClientGone:
            return
        except (LimitExceeded, ProtocolError) as error:
            await client.reply(refusal(error))
            self._count(route, client)
            return
        try:
            with self._live.enter(request.rid, lambda: client.complete) as live:
                turn = Turn(route, client, data, request, live, started)
                await self._while_client_stays(turn, receive)
        except DuplicateRid as error:
            await client.reply(refusal(error))
        except LimitExceeded:
            await client.reply(replies.too_many("too many requests are here"))
        finally:
            self._count(route, client)

    async def _while_client_stays(self, turn: Turn, receive: Receive) -> None:
        """Serve the request; drop everything the moment the client goes away."""
        self._metrics.in_flight.inc()
        self._journal.entered(turn)
        work = asyncio.create_task(self._admit(turn))
        gone = asyncio.create_task(until_gone(receive))
        try:
            await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
            if turn.client.complete:
                # The last byte and "disconnected" come together.
                await asyncio.wait((work,))
            elif not work.done():
                self._metrics.aborts.inc()
                logger.info("%s client went away", turn.client.request_id)
        finally:
            self._metrics.in_flight.dec()
            for task in (work, gone):
                task.cancel()
            await asyncio.gather(work, gone, return_exceptions=True)
            turn.book(None)
            self._log(turn)
        if work.cancelled():
            return
        try:
            work.result()
        except Broken as error:
            # Returning without having ended the answer makes the server cut the connection.
            logger.warning("%s broke off: %s", turn.client.request_id, error)

    # -- one request --

    async def _admit(self, turn: Turn) -> None:
        try:
            async with self._admission.slot():
                await self._serve(turn)
        except LimitExceeded as error:
            await turn.client.reply(replies.too_many(str(error)))
        except ShuttingDown as error:
            await turn.client.reply(replies.shutting_down(str(error)))

    async def _serve(self, turn: Turn) -> None:
        model = turn.request.model if turn.route is not Route.GENERATE else None
        if model is not None and not self._names.known(model):
            await turn.client.reply(replies.unknown_model(model))
            return
        too_long = self._preparation.too_long(turn.request, len(turn.data))
        if too_long:
            await turn.client.reply(replies.bad_request(too_long))
            return
        keyed, reason = await self._preparation.key(turn.request)
        turn.prompt_tokens = keyed.tokens
        known = not isinstance(self._preparation.source(turn.request), Opaque)
        if known and not why_not(turn.request):
            # Ids that nobody told just now are asked for again when they are needed.
            turn.prompt_ids = keyed.chains[0].ids if keyed.chains else ()
            turn.stream = make_stream(turn.request)
        self._rotation.advance()
        patience = Patience()
        error: PeerError | None = None
        for _ in range(self._limits.attempts + len(PAUSES_S)):
            try:
                prepared = await self._preparation.prepare(turn, keyed, reason)
            except NoInstance as nobody:
                if await patience.again(turn):
                    continue
                turn.verdict = Verdict(turn.client.request_id, reason=str(nobody))
                await turn.client.reply(
                    replies.unavailable("no instance can serve", nobody.reasons)
                )
                return
            if turn.live.aborted:
                await turn.client.reply(replies.error(400, "aborted before decoding", "abort"))
                return
            try:
                await self._forwarding.forward(turn, prepared)
                return
            except PeerError as failure:
                error = failure
                turn.failed.add(prepared.target)
                if turn.client.answered:
                    if turn.stream is not None:
                        turn.errors[prepared.target] = str(failure)
                        await self._resumption.go_on(turn, turn.stream, failure)
                    return
                turn.errors[prepared.target] = str(failure)
                self._metrics.retries.labels(type(failure).__name__).inc()
                logger.warning("%s %s failed: %s", turn.client.request_id, prepared.target, failure)
        reasons = {**self._instances.absent(turn.failed), **turn.errors}
        await turn.client.reply(replies.unavailable(f"every attempt failed: {error}", reasons))

    # -- counting --

    def _count(self, route: Route, client: Client) -> None:
        # 499: the client went away first (nginx's number).
        self._metrics.requests.labels(route.value, str(client.status or 499)).inc()

    def _log(self, turn: Turn) -> None:
        total_s = time.monotonic() - turn.started
        self._metrics.jct.labels(turn.route.value).observe(total_s)
        if turn.first_byte_s is not None:
            # Neither the first frame nor the last, [DONE], is a step between two tokens.
            streamed_s = total_s - turn.first_byte_s
            self._metrics.book_stream(turn.route.value, turn.client.frames - 2, streamed_s)
        self._journal.left(turn, total_s)
        verdict = turn.verdict
        logger.info(
            "%s %s %s prompt=%d cached=%s ttft=%s total=%.0fms prefill=%s decode=%s (%s)",
            turn.client.request_id,
            turn.route.value,
            turn.client.status or 499,
            turn.prompt_tokens,
            "?" if verdict.cached_tokens is None else verdict.cached_tokens,
            "-" if turn.first_byte_s is None else f"{turn.first_byte_s * 1e3:.0f}ms",
            total_s * 1e3,
            verdict.prefill,
            verdict.decode,
            verdict.reason,
        )
