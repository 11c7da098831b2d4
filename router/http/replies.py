"""The router's own answers, in SGLang's and OpenAI's shapes, as ASGI messages."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping, MutableMapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

import msgspec
import orjson
from starlette.responses import Response

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

JSON = b"application/json"
NOBODY_HERE = ": start instances with --router-url, or add running ones with POST /workers"


@dataclass(frozen=True, slots=True)
class Reply:
    """A whole answer of ours. ``headers`` come on top of content type and length."""

    status: int
    body: bytes
    content_type: bytes = JSON
    headers: list[tuple[bytes, bytes]] = field(default_factory=list)

    async def send(self, send: Send, extra: Iterable[tuple[bytes, bytes]] = ()) -> None:
        head = [
            (b"content-type", self.content_type),
            (b"content-length", str(len(self.body)).encode()),
            *self.headers,
            *extra,
        ]
        await send({"type": "http.response.start", "status": self.status, "headers": head})
        await send({"type": "http.response.body", "body": self.body})


def as_response(reply: Reply) -> Response:
    """For handlers that return Starlette's kind of answer."""
    names = {name.decode(): value.decode() for name, value in reply.headers}
    return Response(reply.body, reply.status, names, media_type=reply.content_type.decode())


def json_response(value: object, status: int = 200) -> Response:
    """``value`` may contain msgspec structs."""
    return Response(msgspec.json.encode(value), status, media_type="application/json")


def json_reply(value: object, status: int = 200) -> Reply:
    return Reply(status, orjson.dumps(value))


def error(status: int, message: str, kind: str | None = None) -> Reply:
    """SGLang's ``ErrorResponse`` shape (``http_server.validation_exception_handler``)."""
    return json_reply(error_body(status, message, kind), status)


def error_body(status: int, message: str, kind: str | None = None) -> dict[str, object]:
    return {
        "object": "error",
        "message": message,
        "type": kind or HTTPStatus(status).phrase,
        "param": None,
        "code": status,
    }


def bad_request(message: str) -> Reply:
    return error(400, message)


def unauthorized() -> Reply:
    """SGLang's own words for a missing or wrong key."""
    return json_reply({"error": "Unauthorized"}, 401)


def unknown_model(model: str) -> Reply:
    """OpenAI's shape; the SDK turns it into NotFoundError."""
    return json_reply(
        {
            "error": {
                "message": f"The model '{model}' does not exist",
                "type": "invalid_request_error",
                "param": "model",
                "code": "model_not_found",
            }
        },
        404,
    )


def other_method(method: str, path: str, methods: Iterable[str]) -> Reply:
    """A path of the router's own, and a method that it does not have."""
    allowed = ", ".join(sorted(methods))
    reply = error(405, f"{path} takes {allowed}, not {method}")
    reply.headers.append((b"allow", allowed.encode()))
    return reply


def not_here(path: str) -> Reply:
    return error(
        404,
        f"the router has no {path}: ask an instance for it (GET /workers lists their URLs)",
        "NotFound",
    )


def unavailable(message: str, instances: Mapping[str, str]) -> Reply:
    """No instance can serve: ``instances`` maps each one's URL to the reason why it cannot.

    Where all of them have left, or there never was one, the message says what to do."""
    listed = "; ".join(f"{url}: {why}" for url, why in instances.items()) or "none is known"
    nobody = all(why.startswith("left") for why in instances.values())
    body = error_body(503, f"{message} ({listed}){NOBODY_HERE if nobody else ''}")
    body["instances"] = [{"url": url, "reason": why} for url, why in instances.items()]
    reply = json_reply(body, 503)
    reply.headers.append((b"retry-after", b"1"))
    return reply


def closing(status: int, message: str) -> Reply:
    """For a request whose body is not read to its end."""
    reply = error(status, message)
    reply.headers.append((b"connection", b"close"))
    return reply


def too_many(why: str) -> Reply:
    reply = error(429, f"{why}: try again")
    reply.headers.append((b"retry-after", b"1"))
    return reply


def shutting_down(why: str) -> Reply:
    """For another router, or for this one when it is back."""
    reply = error(503, f"{why}: try again")
    reply.headers.extend([(b"retry-after", b"5"), (b"connection", b"close")])
    return reply


def stream_error(message: str, tail: bytes) -> bytes:
    """What ends an event stream that broke. ``tail``: the last bytes sent before.

    A frame that was cut short is closed first, so that ours is read as one of its own.
    """
    gap = b"" if not tail or tail.endswith((b"\n\n", b"\r\n\r\n")) else b"\n\n"
    frame = orjson.dumps({"error": error_body(502, message)})
    return gap + b"data: " + frame + b"\n\ndata: [DONE]\n\n"
