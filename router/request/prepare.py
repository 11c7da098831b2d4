"""A request's prompt to where it goes: page keys, the plan, and all that comes before decode."""

from __future__ import annotations

from collections.abc import Sequence

from sglang_memserve.errors import PeerError

from ..cost.backlog import Ending
from ..cost.bookings import Bookings, Order
from ..http.headers import Verdict
from ..members.instances import Instances
from ..members.models import ModelNames
from ..metrics.registry import Funnel, Metrics
from ..policy.base import Policy, Rotation
from ..prompt.bodies import Chat, Opaque, Request, Source, Texts
from ..prompt.tokenize import Tokenization
from ..tree.merged import Matcher
from ..values import Plan
from .journal import Journal
from .placement import (
    Holdings,
    Keyed,
    decide,
    idlest_decode,
    key_prompts,
    look_up,
    opaque,
    prompt_of,
)
from .steps import Result, Steps
from .turn import Prepared, Turn

# More than any tokenizer puts into one token on average; runs of spaces come nearest.
CHARACTERS_PER_TOKEN = 128


class Preparation:
    """Plans requests and carries the plans out up to decode."""

    def __init__(
        self,
        *,
        instances: Instances,
        tree: Matcher,
        policy: Policy,
        policy_name: str,
        rotation: Rotation,
        tokenization: Tokenization,
        bookings: Bookings,
        steps: Steps,
        metrics: Metrics,
        journal: Journal,
    ) -> None:
        self._instances = instances
        self._tree = tree
        self._policy = policy
        self._policy_name = policy_name
        self._rotation = rotation
        self._tokenization = tokenization
        self._bookings = bookings
        self._steps = steps
        self._metrics = metrics
        self._journal = journal
        self._names = ModelNames(instances)

    def too_long(self, request: Request, size: int) -> str:
        """Why a text cannot fit the model's context whatever its tokens are; else nothing.

        ``size``: bytes of the whole body.
        Tokenizing it would take the time of everybody else, here and on the instance."""
        context_length = self._instances.context_length()
        source = request.source
        if not context_length or not isinstance(source, Texts | Chat):
            return ""
        limit = CHARACTERS_PER_TOKEN * context_length
        lengths = [len(text) for text in source.texts] if isinstance(source, Texts) else []
        length = max(lengths, default=size)
        if length <= limit:
            return ""
        return (
            f"The input ({length} characters) is longer than the model's context length "
            f"({context_length} tokens)."
        )

    async def key(self, request: Request) -> tuple[Keyed, str]:
        """The prompts' page keys, or why the tree cannot help."""
        reference = self._instances.reference()
        if reference is None:
            return opaque(1), "no mempool"
        with self._metrics.routing.labels("tokenize").time():
            tokenized = await self._tokenization.tokenize(self.source(request))
        ids = tokenized.ids
        if not ids or not all(ids):
            return opaque(reference.page_size), tokenized.reason or "empty prompt"
        if max(map(len, ids)) >= self._instances.context_length():
            return opaque(reference.page_size), "prompt too long"
        try:
            with self._metrics.routing.labels("hash").time():
                return key_prompts(ids, request.namespaces, reference.page_size), ""
        except ValueError:
            return opaque(reference.page_size), "malformed token ids"

    def source(self, request: Request) -> Source:
        """Where the prompts' ids come from: an adapter's pages are its own."""
        if request.model is not None and self._names.adapter(request.model):
            return Opaque("lora")
        return request.source

    async def prompt_ids(self, request: Request) -> Sequence[int]:
        """Token ids of the one prompt. Raises PeerError while nobody tells them."""
        tokenized = await self._tokenization.tokenize(self.source(request))
        if len(tokenized.ids) != 1 or not tokenized.ids[0]:
            raise PeerError(f"its prompt's tokens are not known: {tokenized.reason}")
        return tokenized.ids[0]

    async def prepare(self, turn: Turn, keyed: Keyed, reason: str) -> Prepared:
        """Plan, and do all that comes before decode. Raises NoInstance."""
        turn.book(None)
        if not keyed.chains:
            target = idlest_decode(
                self._instances, turn.failed, turn=self._rotation.turn, bookings=self._bookings
            )
            verdict = Verdict(turn.client.request_id, target, target, None, f"direct: {reason}")
            return Prepared(target, verdict, 0, 1, None)
        with self._metrics.routing.labels("plan").time():
            holdings = look_up(self._tree, keyed)
            session = turn.request.session
            plan, views = decide(
                self._instances,
                self._policy,
                keyed,
                holdings,
                session,
                turn.failed,
                self._bookings,
            )
            if turn.request.prefill_only:
                plan = prefill_alone(plan)
            booking = self._bookings.book(
                plan, Order(prompt_of(keyed, session), keyed.one_chain(), _ending(turn)), views
            )
        turn.book(booking)
        self._journal.planned(keyed, holdings)
        turn.verdict = Verdict(
            turn.client.request_id, plan.prefill, plan.decode, reason=plan.reason
        )
        result = await self._steps.run(turn.request, keyed, holdings, plan, turn.live, booking)
        self._journal.moved(result.fetched)
        return self._prepared(turn, keyed, holdings, plan, result)

    def _prepared(
        self, turn: Turn, keyed: Keyed, holdings: Holdings, plan: Plan, result: Result
    ) -> Prepared:
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
        return Prepared(target, verdict, left, len(keyed.chains), funnel)


def _ending(turn: Turn) -> Ending:
    tells = turn.request.stream or turn.request.prefill_only
    return Ending.SEEN if tells else Ending.ASSUMED


def prefill_alone(plan: Plan) -> Plan:
    """For a request that generates nothing, the prefill instance is where it ends."""
    if plan.prefill is None:
        return plan
    return Plan(
        decode=plan.prefill,
        decode_source=plan.prefill_source,
        held_pages=plan.held_pages,
        wait_s=plan.wait_s,
        reason=f"prefill only; {plan.reason}",
        terms=plan.terms,
    )
