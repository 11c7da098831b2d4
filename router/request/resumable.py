"""Which streams can go on elsewhere when their instance dies, and the request that does it. Pure.

A stream may go on where the rest follows from the prompt and the tokens so far alone: greedy
decoding, or sampling by seed where the engine honours seeds, without penalties, grammars,
logprobs or anything else that remembers more. Fields that are not known to be harmless are taken
for harmful (decision 0013).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..prompt.bodies import Chat, Request, Route, Texts, TokenIds

DEFAULT_MAX_TOKENS = {Route.GENERATE: 128, Route.COMPLETIONS: 16, Route.CHAT: None}
_LENGTHS = ("max_new_tokens", "max_tokens", "max_completion_tokens")
_LEAST_LENGTHS = ("min_new_tokens", "min_tokens")
# Fields that a continuation means the same by. Any other one that says something is too much.
_SAMPLING = frozenset(
    {
        *_LENGTHS,
        *_LEAST_LENGTHS,
        *("temperature", "top_p", "top_k", "min_p", "seed", "sampling_seed", "logit_bias"),
        *("stop", "stop_token_ids", "ignore_eos", "no_stop_trim"),
        *("skip_special_tokens", "spaces_between_special_tokens"),
    }
)
_BODY = {
    Route.GENERATE: frozenset(
        {"text", "input_ids", "sampling_params", "stream", "rid", "model", "priority"}
        | {"extra_key", "cache_salt", "session_id", "log_metrics", "top_logprobs_num"}
        | {"logprob_start_len", "return_text_in_logprobs"}
    ),
    Route.COMPLETIONS: _SAMPLING
    | {"prompt", "stream", "stream_options", "rid", "model", "user", "priority"}
    | {"extra_key", "cache_salt", "session_id"},
    Route.CHAT: _SAMPLING
    | {"messages", "input_ids", "stream", "stream_options", "rid", "model", "user", "priority"}
    | {"extra_key", "cache_salt", "session_id", "chat_template_kwargs", "parallel_tool_calls"}
    | {"separate_reasoning", "stream_reasoning", "top_logprobs"},
}
_NEUTRAL: Mapping[str, object] = {
    "n": 1,
    "best_of": 1,
    "repetition_penalty": 1,
    "response_format": {"type": "text"},
    "tool_choice": "none",
}


class Unresumable(Exception):
    """The stream cannot go on elsewhere; one line that says why."""


class OnlyAnew(Unresumable):
    """It cannot go on from its tokens; running the request anew may give the same text."""


def is_greedy(request: Request) -> bool:
    params = sampling(request)
    temperature = params.get("temperature")
    return params.get("top_k") == 1 or (type(temperature) in (int, float) and temperature == 0)


def is_seeded(request: Request) -> bool:
    params = sampling(request)
    return type(params.get("sampling_seed", params.get("seed"))) is int


def why_not(request: Request) -> str:
    """Why a stream of this request could not go on elsewhere; nothing if it could."""
    body = request.body
    if not request.stream or request.batched or request.samples != 1 or request.prefill_only:
        return "not one stream of one prompt"
    if not isinstance(request.source, Texts | TokenIds | Chat):
        return "its prompt is unknown here"
    params = sampling(request)
    if params is not body and not isinstance(body.get("sampling_params", {}), dict):
        return "malformed sampling_params"
    extra = _surplus(body, _BODY[request.route])
    if params is not body:
        extra += _surplus(params, _SAMPLING)
    if extra:
        return f"{extra[0]} is set"
    if is_greedy(request) or (request.route is Route.GENERATE and is_seeded(request)):
        return ""
    return "sampled without a seed"


def continued_body(
    request: Request, prompt_ids: Sequence[int], ids: Sequence[int]
) -> dict[str, Any]:
    """The client's request from after ``ids`` on. Raises Unresumable when nothing is left."""
    body: dict[str, Any] = dict(request.body)
    params = body
    if request.route is Route.GENERATE:
        body.pop("text", None)
        params = body["sampling_params"] = dict(body.get("sampling_params") or {})
    body["prompt" if request.route is Route.COMPLETIONS else "input_ids"] = [*prompt_ids, *ids]
    given = [name for name in _LENGTHS if type(params.get(name)) is int]
    default = DEFAULT_MAX_TOKENS[request.route]
    if not given and default is not None:
        given = ["max_new_tokens" if request.route is Route.GENERATE else "max_tokens"]
        params[given[0]] = default
    for name in given:
        params[name] -= len(ids)
        if params[name] <= 0:
            raise Unresumable("all its tokens were generated")
    for name in _LEAST_LENGTHS:
        if type(params.get(name)) is int:
            params[name] = max(params[name] - len(ids), 0)
    return body


def all_generated(request: Request, tokens: int) -> bool:
    """Whether ``tokens`` are as many as the request allows: it was about to end by its length."""
    params = sampling(request)
    given = [params[name] for name in _LENGTHS if type(params.get(name)) is int]
    default = DEFAULT_MAX_TOKENS[request.route]
    limits = given or ([] if default is None else [default])
    return any(tokens >= limit for limit in limits)


def sampling(request: Request) -> Mapping[str, Any]:
    if request.route is not Route.GENERATE:
        return request.body
    params = request.body.get("sampling_params")
    return params if isinstance(params, dict) else {}


def _surplus(fields: Mapping[str, Any], known: frozenset[str]) -> list[str]:
    """Fields that say something a continuation might get wrong."""
    return [
        name
        for name, value in fields.items()
        if name not in known and value and value != _NEUTRAL.get(name)
    ]


def stop_strings(params: Mapping[str, Any]) -> tuple[str, ...]:
    stop = params.get("stop")
    listed = [stop] if isinstance(stop, str) else stop if isinstance(stop, list) else []
    return tuple(one for one in listed if isinstance(one, str))
