"""What ``/memserve/*`` answers: JSON, and errors in SGLang's (OpenAI's) shape."""

from __future__ import annotations

from typing import Any

import msgspec
from fastapi import Response

from ..errors import (
    ConfigError,
    LimitExceeded,
    MemServeError,
    PeerError,
    PeerUnreachable,
    ProtocolError,
)


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
