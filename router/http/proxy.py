"""HTTP to instances: one shared aiohttp session, raw bytes in and out.

Nagle's algorithm must be off on both sides, or a first streamed byte waits 40 ms for a delayed
acknowledgement. On this side asyncio and uvloop see to it; for clients ``__main__.listen`` does.

What goes wrong with an instance is a PeerError: PeerUnreachable when no connection came about or
no answer came in time, PeerError itself when the connection broke.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import aiohttp
import orjson
from sglang_memserve.errors import PeerError, PeerUnreachable
from yarl import URL

from .faults import plainly
from .headers import RawHeaders, is_encoded, unfit
from .security import Keys

MAX_ERROR_BYTES = 4096
MAX_JSON_BYTES = 16 * 2**20
# uvicorn closes idle connections after 5 s; ours end first, so that we seldom race with it.
IDLE_CONNECTION_S = 3.0
# A name that cannot be looked up is a UnicodeError: getaddrinfo encodes it first.
FAULTS = (aiohttp.ClientError, TimeoutError, OSError, UnicodeError)


@dataclass(frozen=True, slots=True)
class Deadlines:
    """Seconds. ``stall_s``: between two frames of an event stream. The first one may take as long
    as the prompt takes to compute."""

    connect_s: float = 3.0
    stall_s: float = 120.0
    total_s: float = 3600.0


# What is asked there holds prompts and salts, and engines like to quote what they refuse: their
# words would come into logs and to whoever asks how an instance is.
_WITH_PROMPTS = frozenset({"/generate", "/tokenize"})


class Refused(PeerError):
    """An instance answered, and not with success; ``status`` is its HTTP status."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Answer:
    """An instance's answer whose status, headers and first bytes are here.

    ``chunks`` yields the body as it comes, ``first`` first. Closing it before the end closes the
    connection, by which the instance learns that nobody wants the rest.
    """

    def __init__(
        self, response: aiohttp.ClientResponse, first: bytes, deadline: float, stall_s: float
    ) -> None:
        self._response = response
        self._first = first
        self._deadline = deadline
        self._stall_s = stall_s
        self._on_bytes: Callable[[], None] | None = None
        self.status = response.status
        self.headers: RawHeaders = response.raw_headers

    @property
    def is_event_stream(self) -> bool:
        return self._response.content_type == "text/event-stream"

    @property
    def has_frames(self) -> bool:
        """Whether it is an event stream whose frames can be read, and one of ours put behind."""
        return self.is_event_stream and not is_encoded(self.headers)

    def on_bytes(self, call: Callable[[], None]) -> None:
        """Called for whatever comes."""
        self._on_bytes = call

    async def chunks(self) -> AsyncIterator[bytes]:
        """Raises PeerError when the body breaks off, PeerUnreachable when it stalls."""
        chunk = self._first
        while chunk:
            if self._on_bytes is not None:
                self._on_bytes()
            yield chunk
            until = self._deadline
            if self.is_event_stream:
                until = min(until, time.monotonic() + self._stall_s)
            chunk = await _read(self._response, until)

    async def __aenter__(self) -> Answer:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # A connection whose body was read to the end is already back in the pool.
        self._response.close()


class Upstream:
    """The one HTTP client of the router. Create it inside the event loop; close it there."""

    def __init__(
        self,
        deadlines: Deadlines,
        keys: Keys = Keys(),  # noqa: B008 - frozen
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._deadlines = deadlines
        self._keys = keys
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                limit=0,
                keepalive_timeout=IDLE_CONNECTION_S,
                ttl_dns_cache=60,
                ssl=tls or True,
            ),
            timeout=aiohttp.ClientTimeout(
                total=None,
                sock_connect=deadlines.connect_s,
            ),
            auto_decompress=False,
            cookie_jar=aiohttp.DummyCookieJar(),
            skip_auto_headers=("Accept", "Accept-Encoding", "Content-Type", "User-Agent"),
        )

    async def open(
        self,
        method: str,
        url: str,
        headers: Iterable[tuple[str, str]],
        body: bytes | None,
    ) -> Answer:
        """Send a request and wait for the answer's first bytes. ``url`` is encoded already.

        Whatever the status is, it is an answer; raises PeerError when there is none.
        """
        target = _target(url)
        deadline = time.monotonic() + self._deadlines.total_s
        response: aiohttp.ClientResponse | None = None
        try:
            async with asyncio.timeout(self._deadlines.total_s):
                response = await self._session.request(
                    method,
                    target,
                    headers=list(headers),
                    data=body,
                    allow_redirects=False,
                )
            wrong = unfit(response.status, response.raw_headers)
            if wrong:
                raise PeerError(wrong)
            first = await _read(response, deadline)
        except BaseException as error:
            if response is not None:
                response.close()
            if isinstance(error, FAULTS):
                raise _peer_error(error) from error
            raise
        return Answer(response, first, deadline, self._deadlines.stall_s)

    async def call(
        self,
        method: str,
        url: str,
        body: object | None = None,
        *,
        deadline_s: float,
        max_bytes: int = MAX_JSON_BYTES,
    ) -> Any:
        """One of the router's own questions: JSON (or bytes) out, decoded JSON back.

        Raises PeerError for anything but a 2xx answer with JSON before the deadline.
        """
        async with self.exchange(method, url, body, deadline_s=deadline_s) as response:
            data = await _read_all(response, max_bytes)
            if not 200 <= response.status < 300:
                said = "" if URL(url).path in _WITH_PROMPTS else f": {_excerpt(data)}"
                raise Refused(response.status, f"{url} answered {response.status}{said}")
        try:
            return orjson.loads(data) if data else None
        except orjson.JSONDecodeError as error:
            raise PeerError(f"{url} answered no JSON: {error}") from error

    @asynccontextmanager
    async def exchange(
        self, method: str, url: str, body: object | None = None, *, deadline_s: float
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """Any answer of an instance to a question of our own, all within the deadline."""
        data = body if isinstance(body, bytes) or body is None else orjson.dumps(body)
        target = _target(url)
        key = self._keys.towards(target.path)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        if data is not None:
            headers["Content-Type"] = "application/json"
        try:
            async with (
                asyncio.timeout(deadline_s),
                self._session.request(
                    method,
                    target,
                    headers=headers,
                    data=data,
                    # What an instance is asked is for nobody else, and nobody else may answer.
                    allow_redirects=False,
                    timeout=aiohttp.ClientTimeout(
                        total=deadline_s, sock_connect=min(deadline_s, self._deadlines.connect_s)
                    ),
                ) as response,
            ):
                yield response
        except FAULTS as error:
            raise _peer_error(error) from error

    async def close(self) -> None:
        await self._session.close()


def _target(url: str) -> URL:
    """Raises PeerUnreachable for what is no URL."""
    try:
        return URL(url, encoded=True)
    except ValueError as error:
        raise PeerUnreachable(f"{url}: {error}") from error


async def _read(response: aiohttp.ClientResponse, deadline: float) -> bytes:
    """The next bytes as they came, empty at the end."""
    try:
        async with asyncio.timeout(max(deadline - time.monotonic(), 0.0)):
            return await response.content.readany()
    except FAULTS as error:
        raise _peer_error(error) from error


async def _read_all(response: aiohttp.ClientResponse, limit: int) -> bytes:
    parts = []
    size = 0
    async for chunk in response.content.iter_any():
        size += len(chunk)
        if size > limit:
            raise PeerError(f"{response.url} answered more than {limit} bytes")
        parts.append(chunk)
    return b"".join(parts)


def _peer_error(error: Exception) -> PeerError:
    unreachable = isinstance(error, TimeoutError | aiohttp.ClientConnectorError | UnicodeError)
    return (PeerUnreachable if unreachable else PeerError)(plainly(error))


def _excerpt(data: bytes) -> str:
    return data[:MAX_ERROR_BYTES].decode("utf-8", "replace")[:300]
