"""What aiohttp says of a lost connection, put plainly: caused for real."""

from __future__ import annotations

import asyncio
import re
import ssl
from collections.abc import Awaitable, Callable

import aiohttp
import pytest
from sglang_memserve.errors import PeerError
from sglang_memserve.router.http.proxy import Deadlines, Upstream
from unit.certificates import Authority

Talk = Callable[[asyncio.StreamWriter], Awaitable[None]]
INTERNALS = re.compile(r"ssl:|<|>|Error|_ssl|\[SSL|payload|Errno")


def told(talk: Talk, scheme: str = "http", tls: ssl.SSLContext | None = None) -> str:
    async def scenario() -> str:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            await talk(writer)
            await writer.drain()
            writer.close()

        server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=tls)
        upstream = Upstream(Deadlines(connect_s=5.0, stall_s=5.0, total_s=5.0))
        url = f"{scheme}://127.0.0.1:{server.sockets[0].getsockname()[1]}/x"
        try:
            with pytest.raises(PeerError) as caught:
                async with await upstream.open("GET", url, (), None) as answer:
                    async for _ in answer.chunks():
                        pass
            return str(caught.value)
        finally:
            await upstream.close()
            server.close()
            await server.wait_closed()

    return asyncio.run(asyncio.wait_for(scenario(), 30))


def saying(data: bytes) -> Talk:
    async def talk(writer: asyncio.StreamWriter) -> None:
        writer.write(data)

    return talk


CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n"
COUNTED = b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nabc"


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (CHUNKED, "connection broke in the middle of the answer"),
        (COUNTED, "connection broke in the middle of the answer"),
        (b"", "connection broke before an answer"),
        (b"hello\r\n\r\n", "connection broke: the answer is no HTTP"),
    ],
)
def test_a_broken_answer(data: bytes, words: str) -> None:
    assert told(saying(data)) == words


def test_nobody_listens() -> None:
    async def scenario() -> str:
        upstream = Upstream(Deadlines(connect_s=5.0, stall_s=5.0, total_s=5.0))
        try:
            with pytest.raises(PeerError) as caught:
                await upstream.open("GET", "http://127.0.0.1:9/x", (), None)
            return str(caught.value)
        finally:
            await upstream.close()

    assert asyncio.run(scenario()) == "cannot connect to 127.0.0.1:9: Connection refused"


def test_a_certificate_that_nobody_vouches_for(tmp_path_factory: pytest.TempPathFactory) -> None:
    own = Authority(tmp_path_factory.mktemp("ca")).issue("127.0.0.1")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(own.certfile, own.keyfile)
    said = told(saying(b""), "https", context)
    assert said.startswith("its certificate is not trusted: ")
    assert not INTERNALS.search(said), said


def test_tls_to_who_does_not_speak_it() -> None:
    said = told(saying(COUNTED), "https")
    assert said.startswith(("cannot connect to 127.0.0.1:", "no answer in time"))
    assert not INTERNALS.search(said), said


def test_aiohttp_is_the_one_that_was_read() -> None:
    assert issubclass(aiohttp.ClientConnectorDNSError, aiohttp.ClientConnectorError)
