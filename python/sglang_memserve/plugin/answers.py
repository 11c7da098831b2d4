"""How ``/memserve/*`` reads and answers: JSON, and errors in SGLang's (OpenAI's) shape."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import msgspec
from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.routing import APIRoute
from sglang.srt.utils.auth import AuthLevel, auth_level

from ..errors import (
    ConfigError,
    LimitExceeded,
    MemServeError,
    PeerError,
    PeerUnreachable,
    ProtocolError,
)
from ..protocol.access import needs_admin_key
from ..protocol.http import decode

# 8,000,000 tokens of page keys of 16 tokens, in hexadecimal: far more than a fetch may name.
MAX_BODY_BYTES = 32 * 2**20
_T = TypeVar("_T")


class _Route(APIRoute):
    """What a handler raises is answered as an error; control takes the admin key, as SGLang's own
    control routes do."""

    def __init__(self, path: str, endpoint: Callable[..., Any], **options: Any) -> None:
        if needs_admin_key(path):
            # SGLang's middleware reads the mark.
            auth_level(AuthLevel.ADMIN_OPTIONAL)(endpoint)
        super().__init__(path, endpoint, **options)

    def get_route_handler(self) -> Callable[[Request], Awaitable[Response]]:  # type: ignore[override]
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            try:
                return await handler(request)
            except MemServeError as error:
                return error_answer(error)

        return handle


def memserve_router() -> APIRouter:
    return APIRouter(prefix="/memserve", route_class=_Route)


def open_routes(app: FastAPI, *routers: APIRouter) -> None:
    """Not ``include_router``: it hides an endpoint's mark from SGLang's middleware."""
    for router in routers:
        app.router.routes.extend(router.routes)


async def read_body(request: Request, kind: type[_T]) -> _T:
    """The body as ``kind``. Raises ProtocolError, LimitExceeded beyond MAX_BODY_BYTES."""
    data = bytearray()
    async for part in request.stream():
        data += part
        if len(data) > MAX_BODY_BYTES:
            raise LimitExceeded(f"a body of more than {MAX_BODY_BYTES} bytes")
    return decode(bytes(data), kind, "request body")


def json_answer(value: Any, status: int = 200) -> Response:
    return Response(msgspec.json.encode(value), status, media_type="application/json")


def error_answer(error: MemServeError) -> Response:
    if isinstance(error, ConfigError | ProtocolError):
        status = 400
    elif isinstance(error, LimitExceeded):
        status = 429
    elif isinstance(error, PeerUnreachable):
        status = 504
    elif isinstance(error, PeerError):
        status = 502
    else:
        status = 500
    body = {"error": {"message": str(error), "type": type(error).__name__, "code": status}}
    return json_answer(body, status)
