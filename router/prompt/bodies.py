"""What a request body asks for: its prompts, and what routing must know about it. Pure.

Follows how SGLang 0.5.23 reads the same fields (``io_struct.GenerateReqInput``,
``openai.protocol``). A body that this module does not understand is *opaque*: it is forwarded
unchanged and the instance judges it, so being too careful here costs a missed hit, never a wrong
answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import orjson
from sglang_memserve.errors import ProtocolError

Body = Mapping[str, Any]
"""A decoded JSON object; its values are whatever the client sent."""

MEDIA_FIELDS = ("image_data", "video_data", "audio_data")


class Route(Enum):
    """The three routes whose prompts the router understands."""

    GENERATE = "/generate"
    COMPLETIONS = "/v1/completions"
    CHAT = "/v1/chat/completions"


@dataclass(frozen=True, slots=True)
class Texts:
    """Prompts to be tokenized with the tokenizer's own special tokens (a BOS, say)."""

    texts: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class TokenIds:
    """Prompts that are token ids already."""

    ids: tuple[Sequence[int], ...]


@dataclass(frozen=True, slots=True)
class Chat:
    """Messages that go through the model's chat template. ``body`` is the whole request."""

    body: Body


@dataclass(frozen=True, slots=True)
class Opaque:
    """Prompts the prefix tree cannot help with; ``reason`` is one word or two for people."""

    reason: str


Source = Texts | TokenIds | Chat | Opaque


@dataclass(frozen=True, slots=True)
class Request:
    """One inference request, as far as routing cares.

    ``namespaces``: (extra_key, cache_salt) of each prompt. ``batched``: the body holds a list of
    prompts, even if only one. ``rid``: the client's own request id(s), else empty.
    ``prefill_only``: nothing is to be generated. ``samples``: parallel samples a prompt.
    """

    route: Route
    body: Body
    model: str | None
    source: Source
    batched: bool
    namespaces: tuple[tuple[str | None, str | None], ...]
    rid: tuple[str, ...]
    rid_given: bool
    stream: bool
    samples: int
    prefill_only: bool
    session: str | None


def decode_body(data: bytes) -> Body:
    """Raises ProtocolError (a 400 for the client) when ``data`` is no JSON object."""
    try:
        body = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise ProtocolError(f"JSON decode error: {error}") from error
    if not isinstance(body, dict):
        raise ProtocolError("the request body must be a JSON object")
    return body


def read_request(route: Route, body: Body) -> Request:
    """Raises ProtocolError for a body that SGLang could not read either."""
    source, batched = _source(route, body)
    source = _usable(route, body, source)
    count = _count(source)
    _require_shapes(route, body, batched)
    namespaces = _namespaces(body, count, batched)
    if namespaces is None:
        source, namespaces = Opaque("malformed namespace"), ()
    model = body.get("model")
    rid = body.get("rid")
    session = body.get("session_id")
    return Request(
        route=route,
        body=body,
        model=model if isinstance(model, str) else None,
        source=source,
        batched=batched,
        namespaces=namespaces,
        rid=_rids(rid, count, batched),
        rid_given="rid" in body,
        stream=body.get("stream") is True,
        samples=_samples(route, body),
        prefill_only=_prefill_only(route, body),
        session=session if isinstance(session, str) and session else None,
    )


def _require_shapes(route: Route, body: Body, batched: bool) -> None:
    """Raises ProtocolError where SGLang would answer 500 instead of 400."""
    rid = body.get("rid")
    if rid is not None and not isinstance(rid, str) and not (batched and _list_of(rid, str)):
        raise ProtocolError("rid must be a string, or for a list of prompts a list of strings")
    params = body.get("sampling_params")
    if route is not Route.GENERATE or params is None or isinstance(params, dict):
        return
    if not (isinstance(params, list) and params and all(isinstance(p, dict) for p in params)):
        raise ProtocolError("sampling_params must be an object or a list of objects")


def with_rid(data: bytes, rid: str) -> bytes:
    """``data`` (a JSON object with at least one member) with a first member ``rid`` put in.

    All other bytes stay as they are.
    """
    opening = data.index(b"{") + 1
    return b'%b"rid":%b,%b' % (data[:opening], orjson.dumps(rid), data[opening:])


def engine_rids(rid: str, prompts: int, batched: bool) -> tuple[str, ...]:
    """The ids SGLang knows the parts of a request by (``GenerateReqInput._normalize_rid``)."""
    return tuple(f"{rid}_{i}" for i in range(prompts)) if batched else (rid,)


def prefill_body(request: Request, prompts: Sequence[Sequence[int]], rid: str) -> dict[str, object]:
    """A ``/generate`` body that computes ``prompts`` and generates nothing.

    The namespace goes along: pages of another one would be of no use to anybody.
    """
    body: dict[str, object] = {
        "input_ids": [list(ids) for ids in prompts] if request.batched else list(prompts[0]),
        "sampling_params": {"max_new_tokens": 0},
        "rid": rid,
        "stream": False,
    }
    for position, name in enumerate(("extra_key", "cache_salt")):
        values = [namespace[position] for namespace in request.namespaces]
        if any(values):
            body[name] = [value or "" for value in values] if request.batched else values[0]
    priority = request.body.get("priority")
    if isinstance(priority, int) and not isinstance(priority, bool):
        body["priority"] = priority
    return body


def _source(route: Route, body: Body) -> tuple[Source, bool]:
    if route is Route.CHAT:
        return _chat_source(body), False
    if route is Route.COMPLETIONS:
        return _prompt_source(body.get("prompt"))
    if body.get("text") is not None:
        text = body["text"]
        if isinstance(text, str) or _list_of(text, str):
            return _prompt_source(text)
        return Opaque("malformed text"), isinstance(text, list)
    if body.get("input_ids") is not None:
        ids = body["input_ids"]
        if isinstance(ids, list) and not _list_of(ids, str):
            return _prompt_source(ids)
        return Opaque("malformed input_ids"), False
    return Opaque("no text prompt"), False


def _prompt_source(prompt: object) -> tuple[Source, bool]:
    """``prompt``: str, list of str, list of int or list of lists of int."""
    if isinstance(prompt, str):
        return (Texts((prompt,)) if prompt else Opaque("empty prompt")), False
    if not isinstance(prompt, list) or not prompt:
        return Opaque("no prompt"), isinstance(prompt, list)
    if _list_of(prompt, str):
        return Texts(tuple(prompt)), True
    if _token_list(prompt):
        return TokenIds((prompt,)), False
    if all(_token_list(ids) for ids in prompt):
        return TokenIds(tuple(prompt)), True
    return Opaque("malformed prompt"), True


def _chat_source(body: Body) -> Source:
    ids = body.get("input_ids")
    if ids is not None:
        return TokenIds((ids,)) if _token_list(ids) else Opaque("malformed input_ids")
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        return Opaque("no messages")
    return Chat(body)


def _usable(route: Route, body: Body, source: Source) -> Source:
    """``source`` unless something in the body makes reuse impossible or useless."""
    if body.get("input_embeds") is not None:
        return Opaque("input_embeds")
    if any(body.get(field) for field in MEDIA_FIELDS):
        return Opaque("multimodal")
    if body.get("session_params"):
        return Opaque("session_params")
    if body.get("lora_path") or body.get("lora_id"):
        return Opaque("lora")
    if body.get("bootstrap_room") is not None or body.get("positional_embed_overrides"):
        return Opaque("engine internals")
    if _wants_prompt_logprobs(route, body):
        return Opaque("prompt logprobs")
    return source


def _wants_prompt_logprobs(route: Route, body: Body) -> bool:
    """Whether logprobs of (nearly) the whole prompt are asked for: cached pages have none."""
    if route is Route.COMPLETIONS:
        return bool(body.get("echo")) and bool(body.get("logprobs"))
    if route is not Route.GENERATE:
        return False
    wanted = body.get("return_logprob")
    starts = body.get("logprob_start_len")
    if not (any(wanted) if isinstance(wanted, list) else wanted):
        return False
    if _prefill_only(route, body):
        # Scoring a tail (``sglang.lang`` select): what comes before it may well be cached.
        return not (isinstance(starts, int) and starts > 0)
    return any(
        isinstance(start, int) and start >= 0
        for start in (starts if isinstance(starts, list) else [starts])
    )


def _prefill_only(route: Route, body: Body) -> bool:
    if route is not Route.GENERATE:
        return False
    params = body.get("sampling_params")
    every = params if isinstance(params, list) else [params]
    return bool(every) and all(
        isinstance(one, dict) and one.get("max_new_tokens") == 0 for one in every
    )


def _samples(route: Route, body: Body) -> int:
    params = body.get("sampling_params") if route is Route.GENERATE else body
    if isinstance(params, list):
        params = params[0] if params else None
    count = params.get("n", 1) if isinstance(params, dict) else 1
    return count if isinstance(count, int) and count > 0 else 1


def _count(source: Source) -> int:
    match source:
        case Texts(texts):
            return len(texts)
        case TokenIds(ids):
            return len(ids)
    return 1


def _namespaces(
    body: Body, count: int, batched: bool
) -> tuple[tuple[str | None, str | None], ...] | None:
    """(extra_key, cache_salt) of every prompt, None for a shape SGLang refuses.

    As in SGLang, an empty string means none.
    """
    columns = []
    for name in ("extra_key", "cache_salt"):
        value = body.get(name)
        if value is None or isinstance(value, str):
            columns.append([value or None] * count)
        elif batched and _list_of(value, str) and len(value) == count:
            columns.append([one or None for one in value])
        else:
            return None
    return tuple(zip(columns[0], columns[1], strict=True))


def _rids(rid: object, count: int, batched: bool) -> tuple[str, ...]:
    if isinstance(rid, str) and rid:
        return engine_rids(rid, count, batched)
    if isinstance(rid, list):
        return tuple(one for one in rid if isinstance(one, str))
    return ()


def _list_of(value: object, kind: type) -> bool:
    return isinstance(value, list) and bool(value) and all(type(one) is kind for one in value)


def _token_list(value: object) -> bool:
    # ``type() is int`` keeps booleans out.
    return isinstance(value, list) and bool(value) and all(type(one) is int for one in value)
