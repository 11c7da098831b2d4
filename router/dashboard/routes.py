"""The page, its data as JSON, and its stream of events.

A stream sends ``state`` every second and ``tree`` whenever there is a new drawing. Nothing is
queued for a slow reader: what is current when it can take more is what it gets. A stream ends by
itself after ``STREAM_S`` and the page asks again, so that an open page holds up no shutdown.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from importlib import resources

import orjson
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from ..http import replies
from ..http.replies import as_response
from ..http.security import ADMIN
from .survey import Surveyor
from .view import Sources, Text, state_view, tree_view

INTERVAL_S = 1.0
STREAM_S = 10.0
MOST_STREAMS = 32

KINDS = {
    "html": "text/html; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "svg": "image/svg+xml",
}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}
DATA_HEADERS = {"cache-control": "no-store", "x-content-type-options": "nosniff"}


def pages() -> dict[str, tuple[bytes, str]]:
    """The page's files by name: bytes and content type. Read once, never by a name asked for."""
    folder = resources.files(__package__) / "static"
    return {
        file.name: (file.read_bytes(), KINDS[file.name.rpartition(".")[2]])
        for file in folder.iterdir()
        if file.name.rpartition(".")[2] in KINDS
    }


@dataclass(slots=True)
class Dashboard:
    """Handlers; ``app`` gives them their paths."""

    sources: Sources
    surveyor: Surveyor
    _pages: dict[str, tuple[bytes, str]] = field(default_factory=pages)
    _streams: int = 0
    _views: dict[Text, tuple[float, bytes]] = field(default_factory=dict)
    _trees: tuple[int, bytes] = (-1, b"")

    async def page(self, request: Request) -> Response:
        name = request.path_params.get("name", "index.html")
        found = self._pages.get(name)
        if found is None:
            return as_response(replies.error(404, f"no page {name!r}"))
        return Response(found[0], media_type=found[1], headers=HEADERS)

    async def state(self, request: Request) -> Response:
        data = self._state(_text_for(request))
        return Response(data, media_type="application/json", headers=DATA_HEADERS)

    async def tree(self, _: Request) -> Response:
        survey = await self.surveyor.fresh()
        data = orjson.dumps(tree_view(survey))
        return Response(data, media_type="application/json", headers=DATA_HEADERS)

    async def events(self, request: Request) -> Response:
        if self._streams >= MOST_STREAMS:
            reply = replies.error(503, f"{MOST_STREAMS} dashboards are open already")
            reply.headers.append((b"retry-after", b"10"))
            return as_response(reply)
        stream = self._stream(_text_for(request))
        return StreamingResponse(stream, media_type="text/event-stream", headers=DATA_HEADERS)

    async def _stream(self, text: Text) -> AsyncIterator[bytes]:
        self._streams += 1
        try:
            until = time.monotonic() + STREAM_S
            drawn = -1
            while True:
                yield b"event: state\ndata: " + self._state(text) + b"\n\n"
                number, data = self._tree()
                if number != drawn:
                    drawn = number
                    yield b"event: tree\ndata: " + data + b"\n\n"
                if time.monotonic() >= until:
                    return
                await asyncio.sleep(INTERVAL_S)
        finally:
            self._streams -= 1

    def _state(self, text: Text) -> bytes:
        """Made at most once in half an interval, however many look."""
        now = time.time()
        made_at, data = self._views.get(text, (0.0, b""))
        if not 0 <= now - made_at < INTERVAL_S / 2:
            data = orjson.dumps(state_view(self.sources, now, text))
            self._views[text] = (now, data)
        return data

    def _tree(self) -> tuple[int, bytes]:
        survey = self.surveyor.latest()
        if survey.number != self._trees[0]:
            self._trees = (survey.number, orjson.dumps(tree_view(survey)))
        return self._trees


def _text_for(request: Request) -> Text:
    return Text.SHOWN if request.scope.get(ADMIN) else Text.HIDDEN
