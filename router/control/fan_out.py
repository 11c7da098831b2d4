"""One question of the router's own to many instances at the same time."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass

import aiohttp
from sglang_memserve.errors import PeerError
from sglang_memserve.types import InstanceId

from ..http.proxy import Upstream

MAX_ANSWER_BYTES = 2**20
MAX_TEXT_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Told:
    """What one instance answered, at most ``MAX_ANSWER_BYTES`` of it; status 0 and the reason where
    nothing came."""

    status: int
    body: bytes

    @property
    def done(self) -> bool:
        return 200 <= self.status < 300

    @property
    def text(self) -> str:
        return self.body[:MAX_TEXT_BYTES].decode("utf-8", "replace").strip()


async def ask_all(
    upstream: Upstream,
    urls: Iterable[InstanceId],
    method: str,
    target: str,
    body: object | None,
    deadline_s: float,
) -> dict[InstanceId, Told]:
    """``target``: path and query. ``body``: bytes of JSON, or what JSON is made of."""

    async def one(url: InstanceId) -> Told:
        try:
            async with upstream.exchange(
                method, url + target, body, deadline_s=deadline_s
            ) as response:
                return Told(response.status, await _beginning(response))
        except PeerError as error:
            return Told(0, str(error).encode())

    asked = list(urls)
    answers = await asyncio.gather(*map(one, asked))
    return dict(zip(asked, answers, strict=True))


async def _beginning(response: aiohttp.ClientResponse) -> bytes:
    """All of a short answer; of a longer one what was there when it became too long."""
    body = b""
    async for part in response.content.iter_any():
        body += part
        if len(body) >= MAX_ANSWER_BYTES:
            break
    return body[:MAX_ANSWER_BYTES]


def listed(told: dict[InstanceId, Told]) -> str:
    """One line: each instance and what it said."""
    return "; ".join(f"{url}: {one.text or one.status}" for url, one in told.items())
