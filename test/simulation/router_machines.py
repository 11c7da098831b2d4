"""Remote machines that misbehave, for the router's service tests: real TCP, scripted answers.

A ``Machine`` speaks just enough HTTP/1.1 to stand for an instance on the network: it says what it
is, holds pages as its script says, and answers inference by a handler that may write any bytes,
stall, or cut the connection. Real engines are in ``test/integration``.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import msgspec
import orjson
import uvicorn
from sglang_memserve.hashing import namespace_seed, page_keys, short_key
from sglang_memserve.protocol.events import BlockStored, Snapshot, encode_snapshot
from sglang_memserve.protocol.handshake import layout_hash
from sglang_memserve.protocol.http import FetchResult, InstanceInfo, RankInfo
from sglang_memserve.router.app import running
from sglang_memserve.router.config import RouterConfig, StaticInstance
from sglang_memserve.router.http.connection import Bounds, bounded
from sglang_memserve.router.http.limits import Limits, StepDeadlines
from sglang_memserve.router.http.listening import listen
from sglang_memserve.types import InstanceId, Namespace, Role

PAGE = 4
WAIT_S = 20.0
POLL_S = 0.01
JSON = "application/json"
MODEL = "tiny"
NAMESPACE = Namespace(MODEL, "w", "bfloat16", PAGE, 1, 1, 8, 8, 0, 1)


@dataclass(frozen=True)
class Asked:
    """A request as it arrived."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return orjson.loads(self.body)


class Line:
    """The machine's side of one request: write what you like."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def answer(
        self, value: object, status: int = 200, kind: str = "application/json"
    ) -> None:
        data = value if isinstance(value, bytes) else msgspec.json.encode(value)
        head = f"HTTP/1.1 {status} X\r\nContent-Type: {kind}\r\nContent-Length: {len(data)}\r\n\r\n"
        await self.send(head.encode() + data)

    async def start_stream(self, kind: str = "text/event-stream; charset=utf-8") -> None:
        head = f"HTTP/1.1 200 OK\r\nContent-Type: {kind}\r\nX-Own: kept\r\n"
        await self.send(head.encode() + b"Transfer-Encoding: chunked\r\n\r\n")

    async def chunk(self, data: bytes) -> None:
        await self.send(b"%x\r\n%b\r\n" % (len(data), data))

    async def end_stream(self) -> None:
        await self.send(b"0\r\n\r\n")

    def cut(self) -> None:
        """A reset, as from a machine that died."""
        sock = self.writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
        self.writer.transport.abort()

    async def until_closed(self) -> None:
        while await asyncio.wait_for(self.reader.read(100), WAIT_S):
            pass


Handler = Callable[[Asked, Line], Awaitable[None]]


def generated(asked: Asked, cached: int = 0) -> object:
    """What SGLang answers to a ``/generate``, in short."""
    ids = (asked.json.get("input_ids") if asked.body else None) or [0]
    batch = isinstance(ids[0], list)
    one = {"text": "ok", "meta_info": {"cached_tokens": cached, "finish_reason": {"type": "stop"}}}
    return [one] * len(ids) if batch else one


async def well(asked: Asked, line: Line) -> None:
    await line.answer(generated(asked))


@dataclass
class Machine:
    """``holds``: token ids whose full pages it holds in DRAM from the start, ``in_hbm``: in HBM.
    ``fetched``: how many pages a fetch gets (None: all asked for)."""

    role: Role
    inference: Handler = well
    holds: tuple[list[int], ...] = ()
    in_hbm: tuple[list[int], ...] = ()
    fetch: Handler | None = None
    model: str = MODEL
    peers_status: int = 200
    context_length: int = 100_000
    url: str = ""
    asked: list[Asked] = field(default_factory=list)
    _server: asyncio.Server | None = None
    _lines: set[asyncio.Task[None]] = field(default_factory=set)

    async def start(self) -> None:
        await self.listen()

    async def listen(self, port: int = 0) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", port)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()
        for task in list(self._lines):
            task.cancel()
        await asyncio.gather(*self._lines, return_exceptions=True)

    def to(self, path: str) -> list[Asked]:
        return [asked for asked in self.asked if asked.path.split("?")[0] == path]

    async def wait_for(self, path: str, count: int = 1) -> list[Asked]:
        async with asyncio.timeout(WAIT_S):
            while len(self.to(path)) < count:  # noqa: ASYNC110 - the other side is a socket
                await asyncio.sleep(POLL_S)
        return self.to(path)

    def stats(self) -> object:
        return {"event_seq": -1, "instance": {}, "ranks": [{}]}

    def info(self) -> InstanceInfo:
        return InstanceInfo(
            protocol=1,
            url=self.url,
            generation=f"boot-{self.url}",
            role=self.role.value,
            model_path="/nowhere/tiny",
            served_model_name=self.model,
            layout_hash=layout_hash(NAMESPACE),
            namespace=NAMESPACE,
            page_size=PAGE,
            context_length=self.context_length,
            max_total_tokens=100_000,
            events_address="tcp://127.0.0.1:9",
            ranks=[RankInfo(0, "tcp://127.0.0.1:9", "tcp://127.0.0.1:9", 100, 128)],
        )

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._lines.add(task)
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
                method, path, _ = head[0].split(" ")
                pairs = (line.split(": ", 1) for line in head[1:] if line)
                headers = {name.lower(): value for name, value in pairs}
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                asked = Asked(method, path, headers, body)
                self.asked.append(asked)
                await self._route(asked, Line(reader, writer))
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass
        finally:
            self._lines.discard(task)
            writer.close()

    async def _route(self, asked: Asked, line: Line) -> None:
        path = asked.path.split("?")[0]
        if path == "/memserve/info":
            await line.answer(self.info())
        elif path == "/memserve/stats":
            await line.answer(self.stats())
        elif path == "/memserve/snapshot":
            await line.answer(encode_snapshot(self._snapshot()), kind="application/msgpack")
        elif path == "/memserve/fetch":
            await (self.fetch or _fetch_all)(asked, line)
        elif path == "/memserve/peers":
            await line.answer({"members": 0, "connected": 0}, self.peers_status)
        elif path == "/v1/loads":
            await line.answer({"loads": []})
        elif path == "/tokenize":
            await line.answer({"error": "no tokenizer"}, 400)
        elif path in ("/abort_request", "/flush_cache"):
            await line.answer(b"", kind="text/plain")
        else:
            await self.inference(asked, line)

    def _snapshot(self) -> Snapshot:
        events = []
        held = [("CPU_PINNED", ids) for ids in self.holds] + [("GPU", ids) for ids in self.in_hbm]
        for medium, ids in held:
            keys = [short_key(key) for key in page_keys(ids, PAGE, namespace_seed(None, None))]
            events.append(BlockStored(list(keys), None, [], PAGE, medium=medium))
        return Snapshot(f"boot-{self.url}", -1, list(events))


async def _fetch_all(asked: Asked, line: Line) -> None:
    pages = len(asked.json["keys"])
    await line.answer(FetchResult(pages, 0, pages, pages, pages * 128, 0.01, "complete"))


def fetch_of(pages: int, outcome: str = "missing") -> Handler:
    """A fetch that gets only so far."""

    async def fetch(asked: Asked, line: Line) -> None:
        wanted = len(asked.json["keys"])
        await line.answer(FetchResult(wanted, 0, pages, pages, pages * 128, 0.01, outcome))

    return fetch


@dataclass
class Router:
    url: str
    http: aiohttp.ClientSession
    server: uvicorn.Server | None

    async def until_healthy(self) -> None:
        async with asyncio.timeout(WAIT_S):
            while (await self.get("/health")).status != 200:  # noqa: ASYNC110 - as above
                await asyncio.sleep(POLL_S)

    async def metrics_with(self, line: str) -> str:
        """The metrics, as soon as they contain ``line``."""
        async with asyncio.timeout(WAIT_S):
            while True:
                text = await (await self.get("/metrics")).text()
                if line in text:
                    return text
                await asyncio.sleep(POLL_S)

    async def post(self, path: str, body: object, **more: Any) -> aiohttp.ClientResponse:
        response = await self.http.post(f"{self.url}{path}", json=body, **more)
        await response.read()
        return response

    async def get(self, path: str, **more: Any) -> aiohttp.ClientResponse:
        response = await self.http.get(f"{self.url}{path}", **more)
        await response.read()
        return response


@asynccontextmanager
async def router_over(
    *machines: Machine,
    extra: tuple[StaticInstance, ...] = (),
    limits: Limits | None = None,
    deadlines: StepDeadlines | None = None,
    bounds: Bounds = Bounds(),  # noqa: B008 - frozen
    **settings: Any,
) -> AsyncIterator[Router]:
    """The real router on a real socket, over machines that have been heard of and followed."""
    for machine in machines:
        await machine.start()
    listed = tuple(StaticInstance(InstanceId(machine.url)) for machine in machines) + extra
    merged: dict[str, Any] = {"policy": "round-robin", "bypass_tokens": 0, "heartbeat_s": 0.2}
    config = RouterConfig(instances=listed, **(merged | settings))
    listener = listen("127.0.0.1", 0)
    try:
        async with running(config, limits=limits, steps=deadlines) as app:
            server = uvicorn.Server(
                uvicorn.Config(
                    app,
                    http=bounded(bounds),
                    ws="none",
                    lifespan="off",
                    log_config=None,
                    timeout_graceful_shutdown=1,
                )
            )
            serving = asyncio.create_task(server.serve(sockets=[listener]))
            url = f"http://127.0.0.1:{listener.getsockname()[1]}"
            headers = {}
            if config.api_key:
                headers["Authorization"] = f"Bearer {config.api_key}"
            async with aiohttp.ClientSession(headers=headers) as http:
                try:
                    await _followed(http, url, len(machines))
                    yield Router(url, http, server)
                finally:
                    server.should_exit = True
                    await asyncio.wait_for(serving, WAIT_S)
    finally:
        listener.close()
        for machine in machines:
            await machine.stop()


async def _followed(http: aiohttp.ClientSession, url: str, count: int) -> None:
    async with asyncio.timeout(WAIT_S):
        while True:
            try:
                async with http.get(f"{url}/readiness") as response:
                    members = (await response.json())["members"]
            except aiohttp.ClientConnectionError:
                members = []
            if sum(m["source"] == "exact" and m["state"] == "ready" for m in members) >= count:
                return
            await asyncio.sleep(POLL_S)
