"""One client's connection, bounded: uvicorn's HTTP protocol with limits that it lacks.

uvicorn's ``httptools`` protocol keeps whatever a head or a trailer carries, waits for the end of a
head for ever, and holds on to a client that never reads. Here

- a head (request line and headers) of more than ``head_bytes`` is answered 431, and so many bytes
  in a row that are no body (trailers, chunk extensions) end the connection;
- a head that is not whole ``head_s`` after it began, or after connecting, is answered 408;
- a client that takes nothing of what waits for it for ``stall_s`` is cut off. Its request ends as
  for any client that went away. Until then back-pressure holds: at most 64 KiB wait here, and the
  instance is not read from.

None of it costs a request anything whose head comes in one piece and whose client reads.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from http import HTTPStatus
from typing import ClassVar

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from .replies import error

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Bounds:
    """What one connection may cost. ``stall_s``: a client must take 48 KiB in that time."""

    head_bytes: int = 64 * 2**10
    head_s: float = 20.0
    stall_s: float = 60.0


class BoundedProtocol(HttpToolsProtocol):
    """See the module. ``bounded`` makes one with other bounds."""

    bounds: ClassVar[Bounds] = Bounds()

    _barren = 0
    _head_open = False
    _refused = False
    _head_timer: asyncio.TimerHandle | None = None
    _stall_timer: asyncio.TimerHandle | None = None

    # -- asyncio.Protocol --

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._head_timer = self.loop.call_later(self.bounds.head_s, self._late)

    def connection_lost(self, exc: Exception | None) -> None:
        self._cancel_head_timer()
        self._cancel_stall_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        self._barren += len(data)
        super().data_received(data)
        if self._refused or self.transport.is_closing():
            return
        if self._barren > self.bounds.head_bytes:
            self._refuse(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, "too many header bytes")
        elif self._head_open and self._head_timer is None:
            self._head_timer = self.loop.call_later(self.bounds.head_s, self._late)

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._stall_timer is None:
            self._stall_timer = self.loop.call_later(self.bounds.stall_s, self._stalled)

    def resume_writing(self) -> None:
        self._cancel_stall_timer()
        super().resume_writing()

    # -- httptools' callbacks --

    def on_message_begin(self) -> None:
        self._head_open = True
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._head_open = False
        self._cancel_head_timer()
        size = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
        if size > self.bounds.head_bytes:
            self._refuse(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, "too many header bytes")
            return
        self._barren = 0
        super().on_headers_complete()
        # Trailers, which may come behind the body, are none of the application's headers.
        self.headers = []

    def on_body(self, body: bytes) -> None:
        self._barren = 0
        if not self._refused:
            super().on_body(body)

    def on_message_complete(self) -> None:
        self._barren = 0
        if not self._refused:
            super().on_message_complete()

    # -- ends --

    def _late(self) -> None:
        self._head_timer = None
        if self._head_open:
            self._refuse(HTTPStatus.REQUEST_TIMEOUT, f"no whole head in {self.bounds.head_s:g} s")
        else:
            self.transport.close()

    def _stalled(self) -> None:
        self._stall_timer = None
        logger.warning("a client took nothing for %g s and was cut off", self.bounds.stall_s)
        # Closing would wait for it to take the rest.
        self.transport.abort()

    def _refuse(self, status: HTTPStatus, why: str) -> None:
        """Say no and close; if an answer is on its way already, cut the connection."""
        self._refused = True
        self._cancel_head_timer()
        if self.transport.is_closing():
            return
        if self.cycle is not None and not self.cycle.response_complete:
            self.transport.abort()
            return
        body = error(status, why).body
        head = (
            f"HTTP/1.1 {status.value} {status.phrase}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()

    def _cancel_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _cancel_stall_timer(self) -> None:
        if self._stall_timer is not None:
            self._stall_timer.cancel()
            self._stall_timer = None


def bounded(bounds: Bounds) -> type[BoundedProtocol]:
    """For ``uvicorn.Config(http=...)``."""
    return type("BoundedProtocol", (BoundedProtocol,), {"bounds": bounds})
