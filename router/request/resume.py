"""A decode stream whose instance died goes on at another one (decision 0013).

    stream breaks -> where may it go on? -> tokens so far -> plan anew, without the dead
        -> (text only: ask the new instance whether greedy decoding gives just these tokens)
        -> the rest of the client's request there -> joined to what the client has

Where the tokens cannot be told from a greedy stream's text, the whole request runs anew there, and
what the client has is compared and left out.

What cannot be resumed, or does not go on as it began, ends with an error frame.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import orjson
from sglang_memserve.errors import NoInstance, PeerError
from sglang_memserve.types import InstanceId

from ..http.proxy import Upstream
from ..metrics.registry import Metrics, short_reason
from ..prompt.bodies import Route, read_request
from ..prompt.tokenize import AskEngine
from .forward import Forwarding
from .frames import Diverged
from .patience import PAUSES_S, Patience
from .prepare import Preparation
from .resumable import OnlyAnew, Unresumable, all_generated, continued_body, is_greedy
from .streams import Continuation, Stream
from .turn import Prepared, Turn

logger = logging.getLogger(__name__)

CONFIRM_S = 60.0
ASK_S = 5.0
ASK_PAUSE_S = 0.1
# Prefill and decode may round differently: a token this close to the best one was the best one.
TIE_NATS = 0.1


class Resumption:
    """``ask``: an engine's tokenizer."""

    def __init__(
        self,
        preparation: Preparation,
        forwarding: Forwarding,
        upstream: Upstream,
        ask: AskEngine,
        metrics: Metrics,
        attempts: int,
    ) -> None:
        self._preparation = preparation
        self._forwarding = forwarding
        self._upstream = upstream
        self._ask = ask
        self._metrics = metrics
        self._attempts = attempts

    async def go_on(self, turn: Turn, stream: Stream, failure: PeerError) -> None:
        """See the client's stream to an end, one way or the other. Raises nothing but
        cancellation."""
        turn.book(None)
        why: Exception = failure
        patience = Patience()
        anew = False
        for _ in range(self._attempts + len(PAUSES_S)):
            if turn.live.aborted:
                break
            failed = len(turn.failed)
            try:
                if stream.finished:
                    await turn.client.end_stream()
                    self._metrics.resumes.labels("finished").inc()
                    return
                await self._once(turn, stream, anew)
            except NoInstance as error:
                why = error
                if not await patience.again(turn):
                    break
                continue
            except OnlyAnew as error:
                why = error
                if anew or not is_greedy(turn.request):
                    break
                anew = True
                continue
            except (Unresumable, Diverged) as error:
                why = error
                break
            except PeerError as error:
                why = error
                if len(turn.failed) == failed:
                    # Nobody is to blame that is left out next time: the tokenizer did not answer.
                    await asyncio.sleep(ASK_PAUSE_S)
                continue
            self._metrics.resumes.labels("resumed").inc()
            return
        label = type(why).__name__ if isinstance(why, PeerError | NoInstance) else str(why)
        self._metrics.resumes.labels(short_reason(label)).inc()
        logger.warning("%s could not go on: %s", turn.client.request_id, why)
        text = f"{failure}; it could not go on elsewhere: {why}"
        await turn.client.break_off(text, stream.tail)

    async def _once(self, turn: Turn, stream: Stream, anew: bool) -> None:
        """``anew``: its tokens cannot be told, so that all of it is generated once more, and the
        client gets what it lacks."""
        so_far = Continuation("", ()) if anew else stream.so_far()
        ids = await self._ids(so_far)
        turn.prompt_ids = turn.prompt_ids or await self._preparation.prompt_ids(turn.request)
        # Where nothing is left but to say so, the plan is for who can tell that it is true.
        over = so_far.ids is None and all_generated(turn.request, len(ids))
        if over and all_generated(turn.request, len(ids) - 1):
            raise OnlyAnew("its text has more tokens than were asked for")
        body = continued_body(turn.request, turn.prompt_ids, ids[:-1] if over else ids)
        again = Turn(
            turn.route,
            turn.client,
            orjson.dumps(body),
            read_request(turn.route, body),
            turn.live,
            turn.started,
            stream=stream,
            failed=turn.failed,
            errors=turn.errors,
        )
        keyed, reason = await self._preparation.key(again.request)
        try:
            prepared = await self._preparation.prepare(again, keyed, reason)
            if over:
                await self._conclude(turn, stream, prepared.target, ids)
            else:
                await self._join(turn, again, prepared, so_far, ids)
        finally:
            again.book(None)
            if again.verdict.decode is not None:
                turn.verdict = again.verdict

    async def _join(
        self,
        turn: Turn,
        again: Turn,
        prepared: Prepared,
        so_far: Continuation,
        ids: Sequence[int],
    ) -> None:
        assert turn.stream is not None
        target = prepared.target
        try:
            if so_far.ids is None:
                await self._confirm(turn, target, ids)
            if turn.route is Route.GENERATE and not is_greedy(turn.request):
                await self._require_seeds(target)
            turn.stream.go_on(ids)
            logger.info(
                "%s goes on at %s after %d tokens", turn.client.request_id, target, len(ids)
            )
            await self._forwarding.forward(again, prepared)
        except PeerError as error:
            turn.failed.add(target)
            turn.errors[target] = str(error)
            raise

    async def _conclude(
        self, turn: Turn, stream: Stream, target: InstanceId, ids: Sequence[int]
    ) -> None:
        try:
            await self._confirm(turn, target, ids)
        except PeerError:
            turn.failed.add(target)
            raise
        frames = stream.conclude(len(turn.prompt_ids), len(ids))
        await turn.client.end_stream(frames)

    async def _ids(self, so_far: Continuation) -> Sequence[int]:
        if so_far.ids is not None:
            return so_far.ids
        return await self._ask({"prompt": so_far.text, "add_special_tokens": False})

    async def _confirm(self, turn: Turn, target: InstanceId, ids: Sequence[int]) -> None:
        """Whether greedy decoding of the prompt gives just ``ids``, by one prefill.

        Raises Unresumable if not (their text may be made of other tokens), PeerError."""
        (namespace,) = turn.request.namespaces
        body: dict[str, object] = {
            "input_ids": [*turn.prompt_ids, *ids],
            "sampling_params": {"max_new_tokens": 0, "temperature": 0},
            "return_logprob": True,
            "logprob_start_len": len(turn.prompt_ids) - 1,
            "top_logprobs_num": 1,
        }
        names = ("extra_key", "cache_salt")
        body.update({name: one for name, one in zip(names, namespace, strict=True) if one})
        answer = await self._upstream.call("POST", f"{target}/generate", body, deadline_s=CONFIRM_S)
        if not _is_greedy_path(answer, ids):
            raise OnlyAnew("its tokens cannot be told from its text")

    async def _require_seeds(self, target: InstanceId) -> None:
        """Raises Unresumable where the engine ignores seeds, PeerError."""
        info = await self._upstream.call("GET", f"{target}/server_info", deadline_s=ASK_S)
        if not (isinstance(info, dict) and info.get("enable_deterministic_inference") is True):
            raise Unresumable("the engine does not sample by seed")


def _is_greedy_path(answer: object, ids: Sequence[int]) -> bool:
    """Whether each of ``ids`` was the most likely token. ``answer``: of ``/generate``, whose
    logprobs are lists of [logprob, token id, text]."""
    meta = answer.get("meta_info") if isinstance(answer, dict) else None
    if not isinstance(meta, Mapping):
        return False
    scored: Any = meta.get("input_token_logprobs")
    best: Any = meta.get("input_top_logprobs")
    try:
        pairs = list(zip(scored[-len(ids) :], best[-len(ids) :], strict=True))
        if [entry[1] for entry, _ in pairs] != list(ids):
            return False
        return all(
            top[0][1] == entry[1] or top[0][0] - entry[0] <= TIE_NATS for entry, top in pairs
        )
    except (TypeError, IndexError, ValueError):
        return False
