"""A plain proxy for peers that bring none: what vLLM's own examples do, and no more.

    python -m benchmark.serving.proxy --port N --both URL --both URL
    python -m benchmark.serving.proxy --port N --prefill URL --decode URL

Instances for both: a new client goes where the fewest requests run and stays there. Separate roles:
prefill computes the prompt (``max_tokens`` 1), what it says of its pages (``kv_transfer_params``,
vLLM's NixlConnector) goes with the request to decode. Clients are told apart by ``session_id``.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Sequence
from typing import Any

import aiohttp
from aiohttp import web

_LIMIT_S = 600.0
_MAX_CLIENTS = 65536
_REMOTE = ("remote_engine_id", "remote_block_ids", "remote_host", "remote_port")
_SESSION: web.AppKey[aiohttp.ClientSession] = web.AppKey("session", aiohttp.ClientSession)


class Homes:
    """Which of ``urls`` a client goes to."""

    def __init__(self, urls: Sequence[str]) -> None:
        self._urls = urls
        self._homes: OrderedDict[str, str] = OrderedDict()
        self.running: Counter[str] = Counter()

    def home(self, client: str) -> str:
        if client not in self._homes:
            self._homes[client] = min(self._urls, key=lambda url: self.running[url])
            if len(self._homes) > _MAX_CLIENTS:
                self._homes.popitem(last=False)
        return self._homes[client]


class Proxy:
    def __init__(self, both: Sequence[str], prefill: Sequence[str], decode: Sequence[str]) -> None:
        self._prefills = Homes(prefill) if prefill else None
        self._decodes = Homes([*both, *decode])

    def application(self) -> web.Application:
        app = web.Application(client_max_size=2**26)
        app.router.add_post("/v1/chat/completions", self._chat)
        app.router.add_get("/readiness", self._ready)
        app.cleanup_ctx.append(_client_session)
        return app

    async def _ready(self, request: web.Request) -> web.Response:
        return web.Response()

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        client = str(body.pop("session_id", ""))
        session = request.app[_SESSION]
        try:
            if self._prefills is not None:
                body["kv_transfer_params"] = await self._prefill(session, client, body)
            return await self._decode(request, session, client, body)
        except (aiohttp.ClientError, TimeoutError) as error:
            return web.json_response({"error": str(error)}, status=502)

    async def _prefill(
        self, session: aiohttp.ClientSession, client: str, body: dict[str, Any]
    ) -> dict[str, Any]:
        assert self._prefills is not None
        url = self._prefills.home(client)
        asked = dict.fromkeys(_REMOTE) | {"do_remote_decode": True, "do_remote_prefill": False}
        short = {k: v for k, v in body.items() if k not in ("stream_options", "min_tokens")}
        short |= {"stream": False, "max_tokens": 1, "kv_transfer_params": asked}
        self._prefills.running[url] += 1
        try:
            async with session.post(f"{url}/v1/chat/completions", json=short) as response:
                response.raise_for_status()
                answer = await response.json()
        finally:
            self._prefills.running[url] -= 1
        params: dict[str, Any] = answer["kv_transfer_params"]
        return params

    async def _decode(
        self,
        request: web.Request,
        session: aiohttp.ClientSession,
        client: str,
        body: dict[str, Any],
    ) -> web.StreamResponse:
        url = self._decodes.home(client)
        self._decodes.running[url] += 1
        try:
            async with session.post(f"{url}/v1/chat/completions", json=body) as upstream:
                headers = {"Content-Type": upstream.headers.get("Content-Type", "text/plain")}
                response = web.StreamResponse(status=upstream.status, headers=headers)
                await response.prepare(request)
                async for piece in upstream.content.iter_any():
                    await response.write(piece)
                await response.write_eof()
                return response
        finally:
            self._decodes.running[url] -= 1


async def _client_session(app: web.Application) -> AsyncIterator[None]:
    timeout = aiohttp.ClientTimeout(total=_LIMIT_S)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
        app[_SESSION] = session
        yield


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmark.serving.proxy", description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    for role in ("both", "prefill", "decode"):
        parser.add_argument(f"--{role}", action="append", default=[], metavar="URL")
    options = parser.parse_args()
    if bool(options.prefill) != bool(options.decode) or not (options.both or options.decode):
        parser.error("give --both, or --prefill and --decode")
    proxy = Proxy(options.both, options.prefill, options.decode)
    web.run_app(proxy.application(), host="127.0.0.1", port=options.port, print=None)
    return 0


if __name__ == "__main__":
    sys.exit(main())
