"""Requests to an ASGI application of this process, without a network."""

from __future__ import annotations

import asyncio

import msgspec

from .replies import App, Message, Scope, Send


class Call(msgspec.Struct, frozen=True, array_like=True):
    """A request. ``path`` is decoded, ``query`` is not."""

    method: str
    path: str
    query: bytes
    body: bytes

    def scope(self) -> Scope:
        headers = [(b"content-length", str(len(self.body)).encode())]
        return {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": self.method,
            "scheme": "http",
            "path": self.path,
            "raw_path": self.path.encode(),
            "query_string": self.query,
            "root_path": "",
            "headers": headers,
            "client": None,
            "server": None,
        }


class Answer(msgspec.Struct, frozen=True, array_like=True):
    """What came of it; names of ``headers`` are lower case."""

    status: int
    headers: list[tuple[bytes, bytes]]
    body: bytes

    @property
    def succeeded(self) -> bool:
        return 200 <= self.status < 300

    async def send(self, send: Send) -> None:
        kept = [(name, value) for name, value in self.headers if name != b"content-length"]
        kept.append((b"content-length", str(len(self.body)).encode()))
        await send({"type": "http.response.start", "status": self.status, "headers": kept})
        await send({"type": "http.response.body", "body": self.body})


async def ask(app: App, call: Call, scope: Scope | None = None) -> Answer:
    """``app``'s whole answer. ``scope``: of the request that ``call`` was made from, if any."""
    status, headers, parts = 500, [], []
    body: Message = {"type": "http.request", "body": call.body, "more_body": False}
    waiting = [body]

    async def receive() -> Message:
        if waiting:
            return waiting.pop()
        # Nobody goes away: who asks has a deadline of its own.
        nothing: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        return await nothing

    async def send(message: Message) -> None:
        nonlocal status, headers
        if message["type"] == "http.response.start":
            status, headers = message["status"], [tuple(h) for h in message.get("headers", ())]
        else:
            parts.append(message.get("body", b""))

    await app(scope if scope is not None else call.scope(), receive, send)
    return Answer(status, headers, b"".join(parts))
