"""The client's side of a request: its body, its leaving, and what it has been sent."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import TypeVar

from sglang_memserve.errors import LimitExceeded, MemServeError, PeerError
from sglang_memserve.protocol.http import decode
from starlette.requests import Request

from ..http import headers as header
from ..http import replies
from ..http.proxy import Answer
from ..http.replies import Receive, Reply, Scope, Send, stream_error
from .streams import Stream

DONE = b"data: [DONE]\n\n"
TAIL_BYTES = len(DONE)
FRAME = b"data: "
# A body may take this long, and as much longer as its bytes need at the pace of a poor line.
BODY_GRACE_S = 30.0
BODY_BYTES_PER_S = 32 * 2**10

T = TypeVar("T")


class ClientGone(Exception):
    """The client closed its connection."""


class SlowBody(LimitExceeded):
    """A body that comes too slowly to be waited for."""


class Broken(Exception):
    """An answer broke off after parts of it were sent: the connection must not look well ended."""


async def read_body(receive: Receive, raw_headers: header.RawHeaders, limit: int) -> bytes:
    """The whole body. Raises LimitExceeded beyond ``limit`` bytes, SlowBody, ClientGone."""
    announced = header.get(raw_headers, b"content-length")
    too_large = f"the request body is larger than {limit} bytes"
    if announced is not None and announced.isdigit() and int(announced) > limit:
        raise LimitExceeded(too_large)
    parts: list[bytes] = []
    size = 0
    began = asyncio.get_running_loop().time()
    try:
        async with asyncio.timeout_at(began + BODY_GRACE_S) as deadline:
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientGone
                part = message.get("body", b"")
                size += len(part)
                if size > limit:
                    raise LimitExceeded(too_large)
                parts.append(part)
                if not message.get("more_body", False):
                    return parts[0] if len(parts) == 1 else b"".join(parts)
                deadline.reschedule(began + BODY_GRACE_S + size / BODY_BYTES_PER_S)
    except TimeoutError as error:
        raise SlowBody(f"only {size} bytes of the request body came in time") from error


def refusal(error: MemServeError) -> Reply:
    """What a client is told whose body was not accepted."""
    match error:
        case SlowBody():
            return replies.closing(408, str(error))
        case LimitExceeded():
            return replies.closing(413, str(error))
    return replies.bad_request(str(error))


async def read_json(request: Request, kind: type[T], limit: int) -> T:
    """The body as ``kind``. Raises ProtocolError, LimitExceeded, ClientGone."""
    data = await read_body(request.receive, request.scope["headers"], limit)
    return decode(data, kind, "request body")


async def until_gone(receive: Receive) -> None:
    """Returns when the client has gone (or the response is complete)."""
    while (await receive())["type"] != "http.disconnect":
        pass


class Client:
    """Where the answer goes, and whether any of it has gone there yet."""

    def __init__(self, scope: Scope, send: Send) -> None:
        self.method: str = scope["method"]
        self.headers: header.RawHeaders = scope["headers"]
        raw_path = scope.get("raw_path") or scope["path"].encode()
        query = scope.get("query_string", b"")
        self.target = (raw_path + (b"?" + query if query else b"")).decode("ascii", "replace")
        self.path: str = scope["path"]
        self.request_id = header.request_id(self.headers)
        self.status = 0
        self.complete = False
        self.frames = 0
        self._send = send

    @property
    def answered(self) -> bool:
        return self.status != 0

    async def reply(self, reply: Reply, verdict: header.Verdict | None = None) -> None:
        """An answer of our own."""
        self.status = reply.status
        self.complete = True
        verdict = verdict or header.Verdict(self.request_id)
        await reply.send(self._send, verdict.headers())

    async def relay(self, answer: Answer, extra: Iterable[tuple[bytes, bytes]]) -> None:
        """An instance's answer, byte for byte and as it comes.

        An event stream that breaks is ended by an error frame. Raises Broken when any other
        answer does, an encoded stream too: only a cut connection can tell the client.
        """
        await self._start(answer, extra)
        tail = b""
        framed = answer.has_frames
        try:
            async for chunk in answer.chunks():
                if framed:
                    self.frames += chunk.count(FRAME)
                await self._send({"type": "http.response.body", "body": chunk, "more_body": True})
                tail = (
                    (tail + chunk)[-TAIL_BYTES:] if len(chunk) < TAIL_BYTES else chunk[-TAIL_BYTES:]
                )
                # Clients hang up when they have read this, before the instance ends the body.
                self.complete = framed and tail == DONE
        except PeerError as error:
            if not framed:
                raise Broken(str(error)) from error
            await self.break_off(str(error), tail)
            raise
        self.complete = True
        await self._send({"type": "http.response.body", "body": b""})

    async def relay_frames(
        self, answer: Answer, extra: Iterable[tuple[bytes, bytes]], stream: Stream
    ) -> None:
        """An event stream by whole frames, or what continues one that broke.

        Raises PeerError when it breaks, ends before ``[DONE]`` or does not fit, and leaves the
        client's stream open: it may go on elsewhere.
        """
        if not self.answered:
            await self._start(answer, extra)
        async for chunk in answer.chunks():
            data = stream.feed(chunk)
            self.frames += data.count(FRAME)
            self.complete = stream.done
            if data:
                await self._send({"type": "http.response.body", "body": data, "more_body": True})
        last = stream.at_end()
        self.frames += last.count(FRAME)
        self.complete = True
        await self._send({"type": "http.response.body", "body": last})

    async def end_stream(self, last: bytes = b"") -> None:
        """All but ``last`` and the end had come."""
        self.complete = True
        await self._send({"type": "http.response.body", "body": last + DONE})

    async def break_off(self, why: str, tail: bytes) -> None:
        """End an event stream that goes on nowhere. ``tail``: the last bytes sent."""
        self.complete = True
        message = f"request {self.request_id}: the instance broke off: {why}"
        end = stream_error(message, tail)
        await self._send({"type": "http.response.body", "body": end})

    async def _start(self, answer: Answer, extra: Iterable[tuple[bytes, bytes]]) -> None:
        self.status = answer.status
        ours = answer.is_event_stream or answer.status in header.BODILESS
        length = header.Length.OURS if ours else header.Length.ANNOUNCED
        headers = header.to_client(answer.headers, extra, length)
        await self._send(
            {"type": "http.response.start", "status": answer.status, "headers": headers}
        )
