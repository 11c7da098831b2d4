"""Event streams with a length, under an encoding, with odd frames; answers that have no body."""

from __future__ import annotations

import asyncio
import gzip
import logging
from collections.abc import Coroutine
from typing import Any

import aiohttp
import orjson
import pytest
from sglang_memserve.types import Role
from simulation.router_machines import Asked, Handler, Line, Machine, Router, router_over
from simulation.toy_engine import stream as toy_stream
from simulation.toy_instances import ToyInstance

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
GREEDY = {"temperature": 0, "max_new_tokens": 8}
BODY = {"input_ids": list(range(97, 110)), "sampling_params": GREEDY, "stream": True}
SAMPLED = {**BODY, "sampling_params": {}}
CHAT = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "hi"}],
    "stream": True,
    "temperature": 0,
    "max_tokens": 8,
}
DONE = b"data: [DONE]\n\n"
WHOLE = b"".join(toy_stream("/generate", BODY))


@pytest.fixture(autouse=True)
def no_traceback(caplog: pytest.LogCaptureFixture) -> Any:
    caplog.set_level(logging.INFO)
    yield
    assert [record.getMessage() for record in caplog.records if record.exc_info] == []


def go(scenario: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(scenario, 60))


def says(*parts: bytes) -> Handler:
    """Writes ``parts`` and dies."""

    async def handler(asked: Asked, line: Line) -> None:
        for part in parts:
            await line.send(part)
            await asyncio.sleep(0.02)
        line.cut()

    return handler


def frames(*values: object) -> bytes:
    return b"".join(b"data: " + orjson.dumps(value) + b"\n\n" for value in values)


async def streamed(router: Router, path: str, body: object) -> tuple[aiohttp.ClientResponse, bytes]:
    """As it came, without undoing an encoding. Raises aiohttp.ClientError where it was cut off."""
    async with (
        aiohttp.ClientSession(auto_decompress=False) as http,
        http.post(router.url + path, json=body) as response,
    ):
        return response, await response.read()


def ids_in(text: bytes) -> object:
    """Of the last frame but ``[DONE]``."""
    return orjson.loads(text.split(b"\n\n")[-3].removeprefix(b"data: "))["output_ids"]


def error_of(text: bytes) -> str:
    assert text.endswith(b"\n\n" + DONE), text
    last = text.removesuffix(b"\n\n" + DONE).split(b"data: ")[-1]
    return str(orjson.loads(last)["error"]["message"])


def test_a_stream_with_a_length_is_ended_in_frames() -> None:
    async def scenario() -> None:
        begun = WHOLE[: len(WHOLE) // 2]
        lying = says(HEAD + b"Content-Length: %d\r\n\r\n" % len(WHOLE), begun)
        async with router_over(Machine(Role.BOTH, lying)) as router:
            response, text = await streamed(router, "/generate", SAMPLED)
            assert "content-length" not in response.headers
            assert text.startswith(begun)
            assert "broke off" in error_of(text)

    go(scenario())


def test_a_stream_with_a_length_goes_on_elsewhere() -> None:
    async def scenario() -> None:
        bad = Machine(Role.BOTH, says(HEAD + b"Content-Length: 99999\r\n\r\n", WHOLE[:300]))
        good = ToyInstance(Role.BOTH)
        async with router_over(bad, good) as router:
            for _ in range(2):
                response, text = await streamed(router, "/generate", BODY)
                assert response.status == 200
                last = orjson.loads(text.split(b"\n\n")[-3].removeprefix(b"data: "))
                assert (
                    last["output_ids"] == orjson.loads(WHOLE.split(b"\n\n")[-3][6:])["output_ids"]
                )
            assert bad.to("/generate")

    go(scenario())


@pytest.mark.parametrize("body", [BODY, SAMPLED], ids=["greedy", "sampled"])
def test_an_encoded_stream_is_passed_on_and_never_spliced(body: object) -> None:
    async def scenario() -> None:
        data = gzip.compress(WHOLE)
        head = HEAD + b"Content-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(data)
        whole, half = Machine(Role.BOTH, says(head, data)), data[: len(data) // 2]
        async with router_over(whole) as router:
            response, text = await streamed(router, "/generate", body)
            assert response.headers["content-encoding"] == "gzip"
            assert gzip.decompress(text) == WHOLE
        breaks, other = Machine(Role.BOTH, says(head, half)), ToyInstance(Role.BOTH)
        async with router_over(breaks, other) as router:
            cut_off = 0
            for _ in range(2):
                try:
                    _, text = await streamed(router, "/generate", body)
                    assert text.endswith(DONE)
                except aiohttp.ClientError:
                    cut_off += 1
            assert cut_off == len(breaks.to("/generate")) == 1

    go(scenario())


def chat(**choice: object) -> dict[str, object]:
    return {"id": "x", "created": 1, "choices": [{"index": 0, "finish_reason": None, **choice}]}


def generated(**other: object) -> dict[str, object]:
    meta = {"id": "a", "prompt_tokens": 13, "completion_tokens": 1, "finish_reason": None}
    return {"text": "a", "output_ids": [97], "meta_info": meta, **other}


ODD = {
    "content is a list": ("/v1/chat/completions", CHAT, chat(delta={"content": [1]})),
    "content is a number": ("/v1/chat/completions", CHAT, chat(delta={"content": 5})),
    "content is an object": ("/v1/chat/completions", CHAT, chat(delta={"content": {"a": 1}})),
    "delta is a list": ("/v1/chat/completions", CHAT, chat(delta=[])),
    "choices of numbers": ("/v1/chat/completions", CHAT, {"id": "x", "choices": [5]}),
    "index is text": ("/v1/chat/completions", CHAT, chat(delta={"content": "a"}, index="b")),
    "counts are text": (
        *("/generate", BODY),
        generated(meta_info={"prompt_tokens": 13, "completion_tokens": "x"}),
    ),
    "ids are text": ("/generate", BODY, generated(output_ids=["x"])),
    "ids are lists": ("/generate", BODY, generated(output_ids=[[97, 98]])),
    "meta is a list": ("/generate", BODY, generated(meta_info=[])),
}


@pytest.mark.parametrize(("path", "body", "frame"), ODD.values(), ids=ODD.keys())
def test_odd_frames_end_with_an_error(path: str, body: object, frame: object) -> None:
    async def scenario() -> None:
        shown = frames(frame, frame)
        bad, good = Machine(Role.BOTH, says(HEAD + b"\r\n", shown)), ToyInstance(Role.BOTH)
        async with router_over(bad, good) as router:
            ends = [(await streamed(router, path, body))[1] for _ in range(2)]
        [text] = [end for end in ends if end.startswith(shown)]
        assert "could not go on elsewhere" in error_of(text)

    go(scenario())


def test_half_a_frame_of_another_kind_is_closed_before_the_error() -> None:
    async def scenario() -> None:
        shown = b'data: {"a": 1}\r\n\r\ndata: {"a'
        async with router_over(Machine(Role.BOTH, says(HEAD + b"\r\n", shown))) as router:
            _, text = await streamed(router, "/generate", BODY)
        assert text.startswith(shown + b"\n\n")
        assert "could not go on elsewhere" in error_of(text)

    go(scenario())


@pytest.mark.parametrize("path", ["/generate", "/v1/rerank"])
@pytest.mark.parametrize("status", [204, 304])
def test_an_answer_without_a_body_may_announce_one(status: int, path: str) -> None:
    async def scenario() -> None:
        async def answers(asked: Asked, line: Line) -> None:
            await line.send(b"HTTP/1.1 %d X\r\nContent-Length: 5\r\nETag: e\r\n\r\n" % status)

        async with router_over(Machine(Role.BOTH, answers)) as router:
            for _ in range(2):
                response, text = await streamed(router, path, {"input_ids": [1]})
                assert (response.status, text) == (status, b"")
                assert response.headers["etag"] == "e"
                assert "content-length" not in response.headers

    go(scenario())
