"""The way around the web framework for paths that are asked all the time. Plain ASGI."""

from __future__ import annotations

from collections.abc import Mapping

from .replies import App, Receive, Scope, Send


class Shortcut:
    """``paths`` go to their applications at once, with any method of ``methods``; all else to
    ``app``. What the framework's eight layers do to a request, these do for themselves."""

    def __init__(self, app: App, paths: Mapping[str, App], methods: frozenset[str]) -> None:
        self._app = app
        self._paths = dict(paths)
        self._methods = methods

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app = self._app
        if scope["type"] == "http" and scope["method"] in self._methods:
            app = self._paths.get(scope["path"], app)
        await app(scope, receive, send)
