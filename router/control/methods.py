"""Other methods on the router's own paths: refused here, never asked of an instance."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from starlette.routing import BaseRoute, Route

from ..http import replies
from ..http.replies import Receive, Scope, Send


@dataclass(frozen=True, slots=True)
class OtherMethod:
    """``__call__`` is ASGI."""

    methods: frozenset[str]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await replies.other_method(scope["method"], scope["path"], self.methods).send(send)


def other_methods(routes: Iterable[BaseRoute]) -> list[Route]:
    """To stand behind ``routes``: one for each path of them, for all methods that they have not."""
    known: dict[str, set[str]] = {}
    for route in routes:
        path, methods = getattr(route, "path", None), getattr(route, "methods", None)
        if path is not None and methods:
            known.setdefault(path, set()).update(methods)
    return [Route(path, OtherMethod(frozenset(methods))) for path, methods in known.items()]
