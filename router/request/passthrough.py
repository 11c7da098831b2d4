"""Every SGLang route that the router has no opinion on: to one instance, and its answer back.

Any method, body unparsed (but for the model's name under ``/v1/``). The idlest decode-capable
instance gets it; what only describes the model may come from any instance.
"""

from __future__ import annotations

import asyncio
import logging

import orjson
from sglang_memserve.errors import LimitExceeded, NoInstance, PeerError, ShuttingDown
from sglang_memserve.types import InstanceId

from ..http import replies
from ..http.headers import Verdict, to_instance
from ..http.proxy import Upstream
from ..http.replies import Receive, Scope, Send
from ..http.security import Keys
from ..members.instances import Instances
from ..members.member import Outcome
from ..members.models import ModelNames
from ..metrics.registry import Metrics
from ..policy.base import Rotation
from .admission import Admission
from .client import Broken, Client, ClientGone, read_body, refusal, until_gone
from .placement import idlest_decode

logger = logging.getLogger(__name__)

# Answers that are the same everywhere: a prefill instance may give them where no other is.
DESCRIBING = frozenset({"/v1/models", "/get_model_info", "/model_info"})
# Other error shapes than OpenAI's; the instance judges the model's name itself.
NOT_OPENAI = "/v1/messages"
# An instance keeps the responses that it gave; another one has never heard of them.
KEPT_WHERE_MADE = "/v1/responses"
# An instance's own: of whichever instance it would be, the client could not tell.
OF_INSTANCES = "/memserve/"
ATTEMPTS = 2


class _Elsewhere(Exception):
    """The instance does not know what is asked for, and another one may."""


class Passthrough:
    """``__call__`` is ASGI."""

    def __init__(
        self,
        instances: Instances,
        upstream: Upstream,
        metrics: Metrics,
        rotation: Rotation,
        admission: Admission,
        max_body_bytes: int,
        keys: Keys,
    ) -> None:
        self._instances = instances
        self._upstream = upstream
        self._metrics = metrics
        self._rotation = rotation
        self._admission = admission
        self._max_body_bytes = max_body_bytes
        self._keys = keys
        self._names = ModelNames(instances)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        client = Client(scope, send)
        try:
            data = await read_body(receive, client.headers, self._max_body_bytes)
        except ClientGone:
            return
        except LimitExceeded as error:
            await client.reply(refusal(error))
            return
        if client.path.startswith(OF_INSTANCES):
            await client.reply(replies.not_here(client.path))
            return
        unknown = self._unknown_model(client, data)
        if unknown is not None:
            await client.reply(replies.unknown_model(unknown))
            return
        work = asyncio.create_task(self._admit(client, data))
        gone = asyncio.create_task(until_gone(receive))
        try:
            await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
            if client.complete:
                await asyncio.wait((work,))
        finally:
            for task in (work, gone):
                task.cancel()
            await asyncio.gather(work, gone, return_exceptions=True)
            self._metrics.requests.labels("other", str(client.status or 499)).inc()
        if work.cancelled():
            return
        try:
            work.result()
        except Broken as error:
            # Returning without having ended the answer makes the server cut the connection.
            logger.warning("%s broke off: %s", client.request_id, error)

    async def _admit(self, client: Client, data: bytes) -> None:
        if client.path in DESCRIBING:
            await self._serve(client, data)
            return
        try:
            async with self._admission.slot():
                await self._serve(client, data)
        except LimitExceeded as error:
            await client.reply(replies.too_many(str(error)))
        except ShuttingDown as error:
            await client.reply(replies.shutting_down(str(error)))

    async def _serve(self, client: Client, data: bytes) -> None:
        failed: set[InstanceId] = set()
        error: PeerError | None = None
        attempts = 0
        while attempts < ATTEMPTS:
            try:
                target = self._choose(client.path, failed)
                await self._forward(client, data, target, failed)
                return
            except _Elsewhere:
                failed.add(target)
            except NoInstance as nobody:
                reasons = nobody.reasons
                await client.reply(replies.unavailable("no instance can serve", reasons))
                return
            except PeerError as failure:
                if client.answered:
                    return
                error = failure
                attempts += 1
                failed.add(target)
                logger.warning("%s %s failed: %s", client.request_id, target, failure)
        reasons = self._instances.absent(failed)
        await client.reply(replies.unavailable(f"every attempt failed: {error}", reasons))

    async def _forward(
        self, client: Client, data: bytes, target: InstanceId, tried: set[InstanceId]
    ) -> None:
        """Raises PeerError, NoInstance, Broken, _Elsewhere."""
        self._rotation.advance()
        key = self._keys.towards(client.path)
        headers = to_instance(client.headers, client.request_id, key)
        verdict = Verdict(client.request_id, decode=target, reason="passed through")
        with self._instances.begin(target, 0) as flight:
            try:
                answer = await self._upstream.open(
                    client.method, target + client.target, headers, data or None
                )
                async with answer:
                    kept = client.path.startswith(KEPT_WHERE_MADE)
                    if kept and answer.status == 404 and self._able({*tried, target}):
                        flight.end(Outcome.SUCCEEDED)
                        raise _Elsewhere
                    await client.relay(answer, verdict.headers())
            except (PeerError, Broken) as error:
                flight.end(Outcome.FAILED, str(error))
                raise
            flight.end(Outcome.SUCCEEDED)

    def _able(self, tried: set[InstanceId]) -> bool:
        return any(view.role.can_decode for view in self._instances.views({}, tried))

    def _choose(self, path: str, failed: set[InstanceId]) -> InstanceId:
        """Raises NoInstance."""
        try:
            return idlest_decode(self._instances, failed, turn=self._rotation.turn)
        except NoInstance:
            views = self._instances.views({}, failed)
            if path not in DESCRIBING or not views:
                raise
            return views[0].id

    def _unknown_model(self, client: Client, data: bytes) -> str | None:
        if not data or not client.path.startswith("/v1/") or client.path.startswith(NOT_OPENAI):
            return None
        try:
            body = orjson.loads(data)
        except orjson.JSONDecodeError:
            return None
        model = body.get("model") if isinstance(body, dict) else None
        return model if isinstance(model, str) and not self._names.known(model) else None
