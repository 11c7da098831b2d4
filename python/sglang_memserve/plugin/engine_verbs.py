"""The HTTP process's end of the device verbs: text to tokens to keys, and the way to the ranks.

Keys are computed here rather than on the scheduler thread. An answer comes from rank 0 and speaks
for all ranks (see ``engine_messages``).
"""

from __future__ import annotations

import asyncio
import itertools
import time
from typing import Any

from sglang.utils import TypeBasedDispatcher

from ..errors import ConfigError, LimitExceeded, MemServeError, PeerUnreachable
from ..hashing import namespace_seed, page_keys
from ..protocol.control import KEY_BYTES
from ..protocol.http import PrefixBody, PrefixResult
from . import engine_messages
from .engine_messages import Outcome, PrefixVerbReqInput, PrefixVerbReqOutput, Verb

MAX_DEADLINE_S = 120.0
# The scheduler looks at its messages between two steps; a step may be a long prefill.
ANSWER_GRACE_S = 10.0
MAX_CALLS = 64
MAX_TEXT_CHARACTERS = 4_000_000


class EngineVerbs:
    """``manager`` is SGLang's tokenizer manager. For one event loop."""

    def __init__(self, manager: Any, page_size: int) -> None:
        engine_messages.register()
        self._manager = manager
        self._page_size = page_size
        self._ids = itertools.count(1)
        self._calls: dict[int, asyncio.Future[PrefixVerbReqOutput]] = {}
        manager._result_dispatcher += TypeBasedDispatcher([(PrefixVerbReqOutput, self._received)])

    async def run(self, verb: Verb, body: PrefixBody) -> PrefixResult:
        """Raises ConfigError for a body that makes no sense, LimitExceeded when too many run,
        PeerUnreachable when the scheduler does not answer in time."""
        started_s = time.monotonic()
        request = await self._request(verb, body)
        answer = await self._call(request, body.deadline_s + ANSWER_GRACE_S)
        outcome = Outcome(answer.outcome)
        if outcome is Outcome.LIMIT_EXCEEDED:
            raise LimitExceeded(f"the scheduler runs as many verbs as it may; {verb.value} refused")
        if outcome is Outcome.UNSUPPORTED:
            raise ConfigError("device verbs do not work with speculative decoding")
        if outcome is Outcome.INTERNAL_ERROR:
            raise MemServeError(f"{verb.value} failed; the scheduler's log says why")
        known = bool(request.tokens)
        return PrefixResult(
            outcome=outcome.value,
            page_size=self._page_size,
            pages=len(request.keys),
            hbm_pages=answer.hbm_pages if known else None,
            dram_pages=answer.dram_pages,
            both_pages=min(answer.hbm_pages, answer.dram_pages) if known else None,
            reusable_pages=answer.reusable_pages if known else None,
            moved_pages=answer.moved_pages,
            stored_pages=answer.stored_pages,
            continued_pages=answer.continued_pages,
            seconds=time.monotonic() - started_s,
        )

    async def _request(self, verb: Verb, body: PrefixBody) -> PrefixVerbReqInput:
        if not 0 < body.deadline_s <= MAX_DEADLINE_S:
            raise ConfigError(f"deadline_s must be in 0..{MAX_DEADLINE_S:g}, got {body.deadline_s}")
        given = [body.input_ids is not None, body.text is not None, body.keys is not None]
        if sum(given) != 1:
            raise ConfigError("give exactly one of input_ids, text and keys")
        if body.keys is not None:
            tokens, keys = [], self._given_keys(verb, body)
        else:
            tokens = await self._tokens(body)
            # SGLang takes an empty salt for none.
            seed = namespace_seed(body.extra_key, body.cache_salt or None)
            keys = [bytes(key) for key in page_keys(tokens, self._page_size, seed)]
        return PrefixVerbReqInput(
            call_id=next(self._ids),
            verb=verb.value,
            tokens=tokens,
            keys=keys,
            extra_key=body.extra_key,
            cache_salt=body.cache_salt or None,
            deadline_s=body.deadline_s,
        )

    def _given_keys(self, verb: Verb, body: PrefixBody) -> list[bytes]:
        if verb is not Verb.MATCH:
            raise ConfigError(
                f"{verb.value} needs input_ids or text: SGLang's tree in HBM is searched by "
                "tokens, and a key does not tell them"
            )
        if body.extra_key is not None or body.cache_salt is not None:
            raise ConfigError("keys contain their namespace: no extra_key or cache_salt with them")
        try:
            keys = [bytes.fromhex(key) for key in body.keys or ()]
        except ValueError as error:
            raise ConfigError(f"page keys must be hex strings: {error}") from error
        if any(len(key) != KEY_BYTES for key in keys):
            raise ConfigError(f"page keys must be {KEY_BYTES} bytes")
        self._require_length(len(keys) * self._page_size)
        return keys

    async def _tokens(self, body: PrefixBody) -> list[int]:
        if body.text is not None:
            if not body.text or len(body.text) > MAX_TEXT_CHARACTERS:
                raise ConfigError(f"text must have 1..{MAX_TEXT_CHARACTERS} characters")
            if self._manager.tokenizer is None:
                raise ConfigError("this instance has no tokenizer: give input_ids")
            tokens, _ = await self._manager._tokenize_texts(body.text)
        else:
            tokens = body.input_ids
        if not tokens:
            raise ConfigError("there are no tokens")
        vocabulary = self._manager.model_config.vocab_size
        if min(tokens) < 0 or max(tokens) >= vocabulary:
            raise ConfigError(f"token ids must be in 0..{vocabulary - 1}")
        self._require_length(len(tokens))
        return list(tokens)

    def _require_length(self, tokens: int) -> None:
        longest = self._manager.model_config.context_len
        if tokens > longest:
            raise ConfigError(f"{tokens} tokens are more than the context's {longest}")

    async def _call(self, request: PrefixVerbReqInput, limit_s: float) -> PrefixVerbReqOutput:
        if len(self._calls) >= MAX_CALLS:
            raise LimitExceeded(f"{len(self._calls)} device verbs are under way")
        answer: asyncio.Future[PrefixVerbReqOutput] = asyncio.get_running_loop().create_future()
        self._calls[request.call_id] = answer
        try:
            self._manager.auto_create_handle_loop()
            self._manager._dispatch_to_scheduler(request)
            async with asyncio.timeout(limit_s):
                return await answer
        except TimeoutError as error:
            raise PeerUnreachable(f"the scheduler did not answer in {limit_s:g} s") from error
        finally:
            del self._calls[request.call_id]

    def _received(self, answer: PrefixVerbReqOutput) -> None:
        waiting = self._calls.get(answer.call_id)
        if waiting is not None and not waiting.done():
            waiting.set_result(answer)
