"""Clients that mean harm, or are broken: the router refuses in time, in words, and stays small."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import orjson
import pytest
from sglang_memserve.router.http.connection import Bounds
from sglang_memserve.router.request import client
from sglang_memserve.types import Role
from simulation.router_machines import PAGE, WAIT_S, Asked, Line, Machine, Router, router_over
from yarl import URL

PROMPT = list(range(1, 4 * PAGE + 2))
BODY = {"input_ids": PROMPT}
QUICK = Bounds(head_bytes=4096, head_s=0.3, stall_s=0.5)


def go(scenario: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(scenario, 60))


@asynccontextmanager
async def line_to(router: Router) -> AsyncIterator[tuple[asyncio.StreamReader, Any]]:
    url = URL(router.url)
    reader, writer = await asyncio.open_connection(url.host, url.port)
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


async def answer_to(router: Router, data: bytes) -> bytes:
    """Everything the router says to ``data`` until it closes the connection."""
    async with line_to(router) as (reader, writer):
        writer.write(data)
        try:
            return await asyncio.wait_for(reader.read(), WAIT_S)
        except ConnectionResetError:
            return b""


async def serves(router: Router) -> None:
    assert (await router.post("/generate", BODY)).status == 200


def head(*lines: str, path: str = "/generate") -> bytes:
    return "\r\n".join([f"POST {path} HTTP/1.1", "Host: x", *lines, "", ""]).encode()


HEADER_FLOODS = {
    "one endless header": b"POST /generate HTTP/1.1\r\nX: " + b"a" * 100_000,
    "many headers": head(*(f"X-{i}: y" for i in range(2000))),
    "endless names": head(*(f"{'n' * 500}{i}: y" for i in range(20))),
    "endless path": head(path="/" + "p" * 100_000),
    "trailers": head("Transfer-Encoding: chunked")
    + b"1\r\n{\r\n0\r\n"
    + b"".join(b"T-%d: %b\r\n" % (i, b"t" * 100) for i in range(6000)),
    "a chunk extension": head("Transfer-Encoding: chunked") + b"1;" + b"e" * 600_000,
}


@pytest.mark.parametrize("data", HEADER_FLOODS.values(), ids=HEADER_FLOODS.keys())
def test_a_flood_of_headers_is_refused(data: bytes) -> None:
    async def scenario() -> None:
        async with router_over(Machine(Role.BOTH), bounds=QUICK) as router:
            said = await answer_to(router, data)
            # A request that is being served already can only be cut off.
            assert said == b"" or b" 431 " in said, said[:200]
            await serves(router)

    go(scenario())


NO_HTTP = {
    "noise": bytes(range(256)),
    "tls": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 32,
    "http2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "two lengths": head("Content-Length: 1", "Content-Length: 2") + b"{}",
    "length and chunks": head("Content-Length: 4", "Transfer-Encoding: chunked") + b"0\r\n\r\n",
    "negative length": head("Content-Length: -1"),
    "a chunk of no size": head("Transfer-Encoding: chunked") + b"zz\r\n",
    "a header without a name": head(": x"),
    "a split header": head("X\r\n : y"),
}


@pytest.mark.parametrize("data", NO_HTTP.values(), ids=NO_HTTP.keys())
def test_what_is_no_http_is_a_400(data: bytes) -> None:
    async def scenario() -> None:
        async with router_over(Machine(Role.BOTH), bounds=QUICK) as router:
            said = await answer_to(router, data)
            assert said == b"" or b" 400 " in said, said[:200]
            await serves(router)

    go(scenario())


@pytest.mark.parametrize(
    ("data", "status"),
    [(b"", b""), (b"POST /gen", b" 408 "), (head()[:-2] + b"X: ", b" 408 ")],
    ids=["nothing", "half a line", "half a head"],
)
def test_a_head_that_does_not_come_is_not_waited_for(data: bytes, status: bytes) -> None:
    async def scenario() -> None:
        async with router_over(Machine(Role.BOTH), bounds=QUICK) as router:
            assert status in await answer_to(router, data)
            if data:  # the same behind a good request on the same connection
                good = b"GET /liveness HTTP/1.1\r\nHost: x\r\n\r\n"
                said = await answer_to(router, good + data)
                assert b" 200 " in said and status in said
            await serves(router)

    go(scenario())


@pytest.mark.parametrize("path", ["/generate", "/v1/rerank", "/memserve/register", "/workers"])
def test_a_body_that_trickles_is_a_408(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        monkeypatch.setattr(client, "BODY_GRACE_S", 0.3)
        async with router_over(Machine(Role.BOTH)) as router, line_to(router) as (reader, writer):
            writer.write(head("Content-Length: 1000", path=path))
            said = asyncio.create_task(reader.read(4096))
            while not said.done():
                writer.write(b" ")
                await asyncio.sleep(0.05)
            assert b" 408 " in said.result() and b"in time" in said.result()
            await serves(router)

    go(scenario())


BAD_BODIES = {
    "nothing": b"",
    "not JSON": b"text=hello",
    "an array": b"[]",
    "null": b"null",
    "truncated": b'{"text": "a',
    "not UTF-8": b'{"text": "\xff\xfe"}',
    "a lone surrogate": b'{"text": "\\ud800"}',
    "NaN": b'{"text": "a", "x": NaN}',
    "nested": b'{"text":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "nested objects": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "two objects": b'{"text": "a"}{"text": "b"}',
    "a huge number of digits": b'{"text": ' + b"9" * 5000 + b"x}",
}


@pytest.mark.parametrize("data", BAD_BODIES.values(), ids=BAD_BODIES.keys())
def test_a_body_that_is_no_json_object_is_a_400(data: bytes) -> None:
    async def scenario() -> None:
        d = Machine(Role.BOTH)
        async with router_over(d) as router:
            for path in ("/generate", "/v1/completions", "/v1/chat/completions"):
                async with router.http.post(f"{router.url}{path}", data=data) as response:
                    assert response.status == 400
                    error = orjson.loads(await response.read())
                    assert error["code"] == 400 and error["message"]
                assert d.to(path) == []

    go(scenario())


ODD: list[object] = [
    None,
    True,
    -1,
    0,
    1.5,
    2**70,
    "",
    "x",
    "\x00",
    [],
    {},
    [[]],
    [None],
    {"a": []},
    ["x"],
    [1],
]
ODD_FIELDS = {
    "/generate": "text input_ids sampling_params rid stream return_logprob logprob_start_len "
    "extra_key cache_salt session_id session_params priority lora_path image_data input_embeds",
    "/v1/completions": "model prompt n stream echo logprobs rid cache_salt stream_options",
    "/v1/chat/completions": "model messages tools tool_choice n stream input_ids cache_salt "
    "chat_template_kwargs reasoning_effort reasoning continue_final_message",
}


@pytest.mark.parametrize("path", ODD_FIELDS)
def test_fields_of_any_type_are_judged_by_somebody_and_never_a_500(path: str) -> None:
    """What the router does not understand goes to an instance; it breaks on none of it."""

    async def scenario() -> None:
        bodies: dict[str, dict[str, object]] = {
            "/generate": {**BODY},
            "/v1/completions": {"prompt": PROMPT},
            "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}]},
        }
        whole = bodies[path]
        async with router_over(Machine(Role.PREFILL), Machine(Role.DECODE, fine)) as router:
            for field in ODD_FIELDS[path].split():
                for value in ODD:
                    body = json.dumps({**whole, field: value})
                    async with router.http.post(f"{router.url}{path}", data=body) as response:
                        text = await response.text()
                        assert response.status in (200, 400, 404), (field, value, text)

    go(scenario())


async def fine(asked: Asked, line: Line) -> None:
    await line.answer({"text": "ok"})


def test_of_two_equal_keys_router_and_instance_see_the_same() -> None:
    """A tenant's salt that is named twice: the last one counts, as in the engine."""

    async def scenario() -> None:
        d = Machine(Role.BOTH, holds=(PROMPT,))
        async with router_over(d) as router:
            data = b'{"input_ids": %b, "cache_salt": null, "cache_salt": "b"}'
            async with router.http.post(
                f"{router.url}/generate", data=data % orjson.dumps(PROMPT)
            ) as response:
                assert response.headers["x-memserve-cached-tokens"] == "0"
            assert d.to("/generate")[0].json["cache_salt"] == "b"

    go(scenario())


def test_a_client_that_never_reads_stops_the_instance_and_is_cut_off() -> None:
    async def scenario() -> None:
        sent, closed = 0, asyncio.Event()

        async def endless(asked: Asked, line: Line) -> None:
            nonlocal sent
            await line.start_stream()
            try:
                while True:
                    await line.chunk(b"data: " + b"x" * 65_000 + b"\n\n")
                    sent += 65_000
            except ConnectionError:
                closed.set()

        d = Machine(Role.BOTH, endless)
        async with router_over(d, bounds=QUICK) as router, line_to(router) as (_, writer):
            body = orjson.dumps({**BODY, "stream": True})
            writer.write(head(f"Content-Length: {len(body)}") + body)
            await asyncio.wait_for(closed.wait(), WAIT_S)
            # What sockets' buffers take, and little more.
            assert sent < 64 * 2**20, sent
            await router.metrics_with("memserve_requests_in_flight 0.0")

    go(scenario())


def test_a_client_that_reads_slowly_is_served_to_the_end() -> None:
    async def scenario() -> None:
        async def large(asked: Asked, line: Line) -> None:
            await line.start_stream()
            for _ in range(200):
                await line.chunk(b"x" * 65_536)
            await line.end_stream()

        d = Machine(Role.BOTH, large)
        async with router_over(d, bounds=Bounds(stall_s=5)) as router:
            got = 0
            async with router.http.post(f"{router.url}/generate", json=BODY) as response:
                async for part in response.content.iter_chunked(2**20):
                    got += len(part)
                    await asyncio.sleep(0.02)
            assert got == 200 * 65_536

    go(scenario())


def test_a_websocket_is_refused() -> None:
    async def scenario() -> None:
        d = Machine(Role.BOTH, fine)
        async with router_over(d, api_key="secret") as router:
            lines = ("Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13")
            data = head(*lines, "Sec-WebSocket-Key: x", "Connection: close", path="/v1/realtime")
            assert b" 401 " in await answer_to(router, data.replace(b"POST", b"GET"))

    go(scenario())
