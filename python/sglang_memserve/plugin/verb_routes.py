"""``POST /memserve/match``, ``/memserve/swap_out`` and ``/memserve/swap_in``."""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import APIRouter, Request, Response

from ..protocol.http import PrefixBody
from .answers import json_answer, memserve_router, read_body
from .engine_messages import Verb
from .engine_verbs import EngineVerbs


def verb_routes(manager: Callable[[], Any], page_size: int) -> APIRouter:
    """``manager`` gives SGLang's tokenizer manager, which is there once the engine has started."""
    router = memserve_router()
    engine = functools.cache(lambda: EngineVerbs(manager(), page_size))

    def handler(verb: Verb) -> Callable[[Request], Awaitable[Response]]:
        async def handle(request: Request) -> Response:
            body = await read_body(request, PrefixBody)
            return json_answer(await engine().run(verb, body))

        return handle

    for verb in Verb:
        router.add_api_route(f"/{verb.value}", handler(verb), methods=["POST"], name=verb.value)
    return router
