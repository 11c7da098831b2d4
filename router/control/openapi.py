"""What the router says of itself at ``/openapi.json``: paths, bodies, answers.

Written by hand where bodies are read without a framework. The engine judges what it is sent, so
bodies of inference are described as far as the router reads them and are open beyond that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

Schema = Mapping[str, Any]

TEXT: Schema = {"type": "string"}
COUNT: Schema = {"type": "integer", "minimum": 0}
FLAG: Schema = {"type": "boolean"}
OPEN: Schema = {"type": "object", "additionalProperties": True}


def _one_or_many(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "array", "items": schema, "minItems": 1}]}


def _object(required: Sequence[str] = (), **fields: Schema) -> Schema:
    return {
        "type": "object",
        "properties": fields,
        "required": list(required),
        "additionalProperties": True,
    }


TOKEN_IDS: Schema = {"type": "array", "items": COUNT, "minItems": 1}
MESSAGE = _object(
    ("role", "content"),
    role={"enum": ["system", "user", "assistant", "tool"]},
    content={
        "anyOf": [
            TEXT,
            {
                "type": "array",
                "items": _object(("type", "text"), type={"const": "text"}, text=TEXT),
            },
        ]
    },
)
MESSAGES: Schema = {"type": "array", "items": MESSAGE, "minItems": 1}
TENANT: Mapping[str, Schema] = {"cache_salt": TEXT, "extra_key": TEXT, "session_id": TEXT}
SAMPLING = _object(
    max_new_tokens=COUNT, temperature={"type": "number", "minimum": 0}, n={"const": 1}
)
GENERATE: Schema = {
    **_object(
        (),
        text=_one_or_many(TEXT),
        input_ids=_one_or_many(TOKEN_IDS),
        sampling_params=_one_or_many(SAMPLING),
        rid=TEXT,
        stream=FLAG,
        return_logprob=FLAG,
        logprob_start_len={"type": "integer", "minimum": -1},
        **TENANT,
    ),
    "anyOf": [{"required": ["text"]}, {"required": ["input_ids"]}],
}
COMPLETION = _object(
    ("model", "prompt"),
    model=TEXT,
    prompt={"anyOf": [_one_or_many(TEXT), _one_or_many(TOKEN_IDS)]},
    max_tokens=COUNT,
    n={"type": "integer", "minimum": 1, "maximum": 8},
    stream=FLAG,
    echo=FLAG,
    logprobs=COUNT,
    **TENANT,
)
CHAT = _object(
    ("model", "messages"),
    model=TEXT,
    messages=MESSAGES,
    tools={"type": "array", "items": _object(("type", "function"), type=TEXT, function=OPEN)},
    tool_choice={"anyOf": [TEXT, OPEN]},
    max_tokens=COUNT,
    n={"type": "integer", "minimum": 1, "maximum": 8},
    stream=FLAG,
    chat_template_kwargs=OPEN,
    reasoning_effort=TEXT,
    continue_final_message=FLAG,
    **TENANT,
)
WORKER = _object(("url",), url=TEXT, role={"enum": ["prefill", "decode", "both"]})
ROLE = _object(("role",), role={"enum": ["prefill", "decode", "both"]})
ABORT = _object(rid=TEXT, abort_all=FLAG)
BOOT = _object(("url", "generation"), url=TEXT, generation=TEXT)
LOAD = _object(
    ("running_requests", "waiting_requests", "used_tokens", "total_tokens"),
    running_requests=COUNT,
    waiting_requests=COUNT,
    used_tokens=COUNT,
    total_tokens=COUNT,
)
HEARTBEAT = _object(
    ("url", "generation", "role", "load"),
    url=TEXT,
    generation=TEXT,
    role=TEXT,
    load=LOAD,
    event_seq={"type": "integer", "minimum": -1},
)
REGISTRATION = _object(("info",), info=OPEN)

INFERENCE: Mapping[str, tuple[str, Schema]] = {
    "/generate": ("SGLang's own interface: prompts as text or token ids", GENERATE),
    "/v1/completions": ("OpenAI's completions", COMPLETION),
    "/v1/chat/completions": ("OpenAI's chat", CHAT),
}
PASSED_THROUGH: Mapping[str, Schema] = {
    "/v1/embeddings": OPEN,
    "/v1/messages": OPEN,
    "/v1/messages/count_tokens": OPEN,
    "/v1/responses": OPEN,
    "/v1/rerank": OPEN,
    "/v1/score": OPEN,
    "/v1/classify": OPEN,
    "/v1/tokenize": OPEN,
    "/v1/detokenize": OPEN,
    "/tokenize": OPEN,
    "/detokenize": OPEN,
}
BODIES: Mapping[tuple[str, str], Schema] = {
    ("/workers", "post"): WORKER,
    ("/workers/{url}", "patch"): ROLE,
    ("/abort_request", "post"): ABORT,
    ("/memserve/explain", "post"): GENERATE,
    ("/memserve/register", "post"): REGISTRATION,
    ("/memserve/heartbeat", "post"): HEARTBEAT,
    ("/memserve/deregister", "post"): BOOT,
}
NAMED_WORKER = [
    {"name": "url", "in": "query", "required": True, "schema": TEXT},
    {"name": "role", "in": "query", "schema": TEXT},
]
ONE_WORKER = [{"name": "url", "in": "path", "required": True, "schema": TEXT}]
ERRORS = {
    "400": "the request is wrong",
    "404": "there is no such thing",
    "413": "the body is too large",
    "429": "too many requests are in flight",
    "503": "no instance can serve: each with its reason",
}


def describe(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document of ``app``, made once."""
    if app.openapi_schema is not None:
        return app.openapi_schema
    document = get_openapi(title=app.title, version=app.version, routes=app.routes)
    paths = document["paths"]
    for path, operations in paths.items():
        for method, operation in operations.items():
            body = BODIES.get((path, method))
            if body is not None:
                operation["requestBody"] = _body(body)
            if path in ("/add_worker", "/remove_worker"):
                operation["parameters"] = NAMED_WORKER
            elif path == "/workers/{url}":
                operation["parameters"] = ONE_WORKER
    for path, (summary, body) in INFERENCE.items():
        paths[path] = {"post": _operation(path, summary, body)}
    for path, body in PASSED_THROUGH.items():
        paths.setdefault(path, {})["post"] = _operation(path, "passed on to an instance", body)
    for operations in paths.values():
        for operation in operations.values():
            for status, meaning in ERRORS.items():
                operation["responses"].setdefault(status, {"description": meaning})
    app.openapi_schema = document
    return document


def _operation(path: str, summary: str, body: Schema) -> dict[str, Any]:
    return {
        "operationId": path.strip("/").replace("/", "_"),
        "summary": summary,
        "requestBody": _body(body),
        "responses": {"200": {"description": "the instance's answer"}},
    }


def _body(schema: Schema) -> dict[str, Any]:
    return {"required": True, "content": {"application/json": {"schema": schema}}}
