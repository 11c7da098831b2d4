"""``POST /memserve/match``, ``/memserve/swap_out`` and ``/memserve/swap_in``."""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
from fastapi import APIRouter, Request, Response

from ..errors import MemServeError, ProtocolError
from ..protocol.http import PrefixBody
from .answers import error_answer, json_answer
from .engine_messages import Verb
from .engine_verbs import EngineVerbs


def verb_routes(manager: Callable[[], Any], page_size: int) -> APIRouter:
    """``manager`` gives SGLang's tokenizer manager, which is there once the engine has started."""
    router = APIRouter(prefix="/memserve")
    engine = functools.cache(lambda: EngineVerbs(manager(), page_size))

    def handler(verb: Verb) -> Callable[[Request], Awaitable[Response]]:
        async def handle(request: Request) -> Response:
            try:
                body = msgspec.json.decode(await request.body(), type=PrefixBody)
                return json_answer(await engine().run(verb, body))
            except (msgspec.MsgspecError, RecursionError) as error:
                return error_answer(ProtocolError(str(error)))
            except MemServeError as error:
                return error_answer(error)

        return handle

    for verb in Verb:
        router.add_api_route(f"/{verb.value}", handler(verb), methods=["POST"], name=verb.value)
    return router
