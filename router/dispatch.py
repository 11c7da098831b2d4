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
from dataclasses import dataclass, field

from sglang_memserve.errors import LimitExceeded, NoInstance, PeerError, ProtocolError
from sglang_memserve.types import InstanceId

from . import prompts, replies
from .asgi import Broken, Client, ClientGone, read_body, until_gone
from .cost import CostModel
from .headers import Verdict, to_instance
from .instances import Instances
from .live import Live, LiveRequests, new_rid
from .member import Outcome
from .merged_tree import MergedTree
from .metrics import Funnel, Metrics
from .models import ModelNames
from .placement import Holdings, Keyed, decide, idlest_decode, key_prompts, look_up, opaque
from .policy.base import Policy, Rotation
from .prompts import Chat, Opaque, Request, Route, Texts
from .proxy import Upstream
from .replies import Receive, Scope, Send
from .steps import Result, Steps
from .tokenize import Tokenization
from .values import Plan

logger = logging.getLogger(__name__)

RETRIED_STATUS = 503
# More than any tokenizer puts into one token on average; runs of spaces come nearest.
CHARACTERS_PER_TOKEN = 128
# What a server says when it cannot do its work; a 500 may be about the request.
FAILED_STATUSES = (502, 503, 504)


@dataclass(frozen=True, slots=True)
class Limits:
    """``attempts``: decode instances tried for one request."""

    max_body_bytes: int = 64 * 2**20
    max_in_flight: int = 4096
    attempts: int = 3


@dataclass(slots=True)
class _Turn:
    """What is known about one request so far; ends as its log line."""

    route: Route
    client: Client
    data: bytes
    request: Request
    live: Live
    started: float
    prompt_tokens: int = 0
    verdict: Verdict = field(default_factory=lambda: Verdict(""))
    first_byte_s: float | None = None
    failed: set[InstanceId] = field(default_factory=set)
    errors: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Prepared:
    """Where the request goes now. ``uncached_tokens``: what is left to compute there."""

    target: InstanceId
    verdict: Verdict
    uncached_tokens: int
    prompts: int
    funnel: Funnel | None


class Dispatcher:
    """Serves the three routes. ``__call__`` is ASGI."""

    def __init__(
        self,
        *,
        instances: Instances,
        tree: MergedTree,
        policy: Policy,
        policy_name: str,
        rotation: Rotation,
        costs: CostModel,
        tokenization: Tokenization,
        upstream: Upstream,
        steps: Steps,
        live: LiveRequests,
        metrics: Metrics,
        limits: Limits,
        api_key: str | None,
    ) -> None:
        self._instances = instances
        self._tree = tree
        self._policy = policy
        self._policy_name = policy_name
        self._rotation = rotation
        self._costs = costs
        self._tokenization = tokenization
        self._upstream = upstream
        self._steps = steps
        self._live = live
        self._metrics = metrics
        self._limits = limits
        self._api_key = api_key
        self._names = ModelNames(instances)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = time.monotonic()
        client = Client(scope, send)
        route = Route(client.path)
        try:
            data = await read_body(receive, client.headers, self._limits.max_body_bytes)
            request = prompts.read_request(route, prompts.decode_body(data))
        except ClientGone:
            return
        except (LimitExceeded, ProtocolError) as error:
            too_big = isinstance(error, LimitExceeded)
            limit = self._limits.max_body_bytes
            await client.reply(
                replies.too_large(limit) if too_big else replies.bad_request(str(error))
            )
            self._count(route, client)
            return
        try:
            with self._live.enter(request.rid) as live:
                turn = _Turn(route, client, data, request, live, started)
                await self._while_client_stays(turn, receive)
        except LimitExceeded:
            await client.reply(replies.too_many(self._limits.max_in_flight))
        finally:
            self._count(route, client)

    async def _while_client_stays(self, turn: _Turn, receive: Receive) -> None:
        """Serve the request; drop everything the moment the client goes away."""
        self._metrics.in_flight.inc()
        work = asyncio.create_task(self._serve(turn))
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
            self._log(turn)
        if work.cancelled():
            return
        try:
            work.result()
        except Broken as error:
            # Returning without having ended the answer makes the server cut the connection.
            logger.warning("%s broke off: %s", turn.client.request_id, error)

    # -- one request --

    async def _serve(self, turn: _Turn) -> None:
        model = turn.request.model if turn.route is not Route.GENERATE else None
        if model is not None and not self._names.known(model):
            await turn.client.reply(replies.unknown_model(model))
            return
        too_long = self._too_long(turn)
        if too_long:
            await turn.client.reply(replies.bad_request(too_long))
            return
        keyed, reason = await self._key(turn)
        turn.prompt_tokens = keyed.tokens
        self._rotation.advance()
        second_chance = True
        error: PeerError | None = None
        for _ in range(self._limits.attempts + 1):
            try:
                prepared = await self._prepare(turn, keyed, reason)
            except NoInstance as nobody:
                if turn.failed and second_chance and not turn.live.aborted:
                    # A connection that broke says little about an instance that is alone.
                    second_chance = False
                    turn.failed.clear()
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
                await self._forward(turn, prepared)
                return
            except PeerError as failure:
                error = failure
                if turn.client.answered:
                    return
                turn.failed.add(prepared.target)
                turn.errors[prepared.target] = str(failure)
                self._metrics.retries.labels(type(failure).__name__).inc()
                logger.warning("%s %s failed: %s", turn.client.request_id, prepared.target, failure)
        reasons = {**self._instances.unavailable(turn.failed), **turn.errors}
        await turn.client.reply(replies.unavailable(f"every attempt failed: {error}", reasons))

    def _too_long(self, turn: _Turn) -> str:
        """Why a text cannot fit the model's context whatever its tokens are; else nothing.

        Tokenizing it would take the time of everybody else, here and on the instance."""
        reference = self._instances.reference()
        source = turn.request.source
        if reference is None or not isinstance(source, Texts | Chat):
            return ""
        limit = CHARACTERS_PER_TOKEN * reference.context_length
        lengths = [len(text) for text in source.texts] if isinstance(source, Texts) else []
        length = max(lengths, default=len(turn.data))
        if length <= limit:
            return ""
        return (
            f"The input ({length} characters) is longer than the model's context length "
            f"({reference.context_length} tokens)."
        )

    async def _key(self, turn: _Turn) -> tuple[Keyed, str]:
        """The prompts' page keys, or why the tree cannot help."""
        reference = self._instances.reference()
        if reference is None:
            return opaque(1), "no mempool"
        source = turn.request.source
        if turn.request.model is not None and self._names.adapter(turn.request.model):
            source = Opaque("lora")
        with self._metrics.routing.labels("tokenize").time():
            tokenized = await self._tokenization.tokenize(source)
        ids = tokenized.ids
        if not ids or not all(ids):
            return opaque(reference.page_size), tokenized.reason or "empty prompt"
        if any(len(one) >= reference.context_length for one in ids):
            return opaque(reference.page_size), "prompt too long"
        try:
            with self._metrics.routing.labels("hash").time():
                return key_prompts(ids, turn.request.namespaces, reference.page_size), ""
        except ValueError:
            return opaque(reference.page_size), "malformed token ids"

    async def _prepare(self, turn: _Turn, keyed: Keyed, reason: str) -> _Prepared:
        """Plan, and do all that comes before decode. Raises NoInstance."""
        if not keyed.chains:
            target = idlest_decode(self._instances, turn.failed, turn=self._rotation.turn)
            verdict = Verdict(turn.client.request_id, target, target, None, f"direct: {reason}")
            return _Prepared(target, verdict, 0, 1, None)
        with self._metrics.routing.labels("plan").time():
            holdings = look_up(self._tree, keyed)
            session = turn.request.session
            plan, _ = decide(self._instances, self._policy, keyed, holdings, session, turn.failed)
        if turn.request.prefill_only:
            plan = _prefill_alone(plan)
        result = await self._steps.run(turn.request, keyed, holdings, plan, turn.live)
        return self._prepared(turn, keyed, holdings, plan, result)

    def _prepared(
        self, turn: _Turn, keyed: Keyed, holdings: Holdings, plan: Plan, result: Result
    ) -> _Prepared:
        target = plan.decode
        cached = result.cached_tokens(keyed)
        supplied = result.computed_cached_tokens is not None or any(
            fetched.source == plan.prefill for fetched in result.fetched
        )
        computing = plan.prefill if plan.prefill is not None and supplied else target
        alone = turn.request.prefill_only
        verdict = Verdict(
            turn.client.request_id,
            prefill=computing,
            decode=None if alone else target,
            cached_tokens=cached,
            reason="; ".join([plan.reason, *result.notes]),
        )
        tiers = holdings.tiers(plan.prefill or target)
        reference = self._instances.reference()
        funnel = Funnel(
            model=reference.served_model_name if reference is not None else "",
            policy=self._policy_name,
            role="prefill" if computing != target or alone else "decode",
            prompt=keyed.tokens,
            best_match=keyed.bounded_tokens(holdings.best_pages()),
            selected={tier: pages * keyed.page_size for tier, pages in tiers.items()},
            cached=cached,
            fetched=tuple(result.fetched),
            page_size=keyed.page_size,
        )
        left = keyed.tokens - keyed.bounded_tokens(result.decode_pages)
        return _Prepared(target, verdict, left, len(keyed.chains), funnel)

    async def _forward(self, turn: _Turn, prepared: _Prepared) -> None:
        """The client's request to ``target``, the answer to the client.

        Raises PeerError; whether another instance may still be tried tells ``client.answered``.
        """
        turn.verdict = prepared.verdict
        client, target = turn.client, prepared.target
        data, rids = _abortable(turn, prepared.prompts)
        headers = to_instance(client.headers, client.request_id, self._api_key)
        idle = self._is_idle(target)
        sent_at = time.monotonic()
        with self._instances.begin(target, prepared.uncached_tokens) as flight:
            try:
                with turn.live.at(target, rids):
                    answer = await self._upstream.open(
                        client.method, target + client.target, headers, data
                    )
                    async with answer:
                        flight.computed()
                        if idle and answer.status == 200 and _tells_prefill(turn.request):
                            self._observe(turn, prepared, time.monotonic() - sent_at)
                        if answer.status == RETRIED_STATUS and self._others(turn, target):
                            raise PeerError(f"answered {answer.status}")
                        self._first_byte(turn, prepared.funnel)
                        await client.relay(answer, prepared.verdict.headers())
            except (PeerError, Broken) as error:
                flight.end(Outcome.FAILED, str(error))
                raise
            failed = answer.status in FAILED_STATUSES
            outcome = Outcome.FAILED if failed else Outcome.SUCCEEDED
            flight.end(outcome, f"answered {answer.status}" if failed else "")

    def _is_idle(self, target: InstanceId) -> bool:
        view = next((v for v in self._instances.views({}) if v.id == target), None)
        return view is not None and not (view.running_requests or view.waiting_requests)

    def _observe(self, turn: _Turn, prepared: _Prepared, seconds: float) -> None:
        new = prepared.uncached_tokens
        self._costs.observe_prefill(prepared.target, new, turn.prompt_tokens - new, seconds)

    def _others(self, turn: _Turn, target: InstanceId) -> bool:
        return bool(self._instances.views({}, {*turn.failed, target}))

    # -- counting --

    def _first_byte(self, turn: _Turn, funnel: Funnel | None) -> None:
        turn.first_byte_s = time.monotonic() - turn.started
        self._metrics.ttft.labels(turn.route.value).observe(turn.first_byte_s)
        if funnel is not None:
            self._metrics.book(funnel)

    def _count(self, route: Route, client: Client) -> None:
        # 499: the client went away first (nginx's number).
        self._metrics.requests.labels(route.value, str(client.status or 499)).inc()

    def _log(self, turn: _Turn) -> None:
        total_s = time.monotonic() - turn.started
        self._metrics.jct.labels(turn.route.value).observe(total_s)
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


def _prefill_alone(plan: Plan) -> Plan:
    """For a request that generates nothing, the prefill instance is where it ends."""
    if plan.prefill is None:
        return plan
    return Plan(
        decode=plan.prefill,
        decode_source=plan.prefill_source,
        reason=f"prefill only; {plan.reason}",
        terms=plan.terms,
    )


def _tells_prefill(request: Request) -> bool:
    """Whether the first byte comes when the prompt is computed (and one token, at most)."""
    return not request.batched and (request.stream or request.prefill_only)


def _abortable(turn: _Turn, count: int) -> tuple[bytes, tuple[str, ...]]:
    """The body to send, and the ids by which the instance can be told to abort.

    A stream needs no id (closing the connection ends it at once), several samples of a prompt
    get ids of the engine's own.
    """
    request = turn.request
    if request.rid_given or request.stream or request.samples > 1 or not request.body:
        return turn.data, request.rid
    rid = new_rid()
    return prompts.with_rid(turn.data, rid), prompts.engine_rids(rid, count, request.batched)
