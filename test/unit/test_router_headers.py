"""Headers between client, router and instances; error shapes."""

from __future__ import annotations

import orjson
import pytest
from sglang_memserve.router.http import headers, replies


def test_hop_by_hop_headers_stay_on_their_hop() -> None:
    raw = [
        (b"host", b"router"),
        (b"connection", b"keep-alive, X-Private"),
        (b"x-private", b"1"),
        (b"transfer-encoding", b"chunked"),
        (b"content-length", b"3"),
        (b"content-type", b"application/json"),
        (b"authorization", b"Bearer theirs"),
        (b"x-request-id", b"old"),
    ]
    assert headers.to_instance(raw, "new", None) == [
        ("content-type", "application/json"),
        ("authorization", "Bearer theirs"),
        ("x-request-id", "new"),
    ]
    assert ("authorization", "Bearer ours") in headers.to_instance(raw, "new", "ours")
    assert ("authorization", "Bearer theirs") not in headers.to_instance(raw, "new", "ours")


def test_a_response_keeps_the_instances_headers() -> None:
    raw = [
        (b"Date", b"today"),
        (b"Server", b"uvicorn"),
        (b"Content-Type", b"text/event-stream; charset=utf-8"),
        (b"Transfer-Encoding", b"chunked"),
        (b"X-Own", b"1"),
    ]
    verdict = headers.Verdict("id", prefill="http://p", decode="http://d", cached_tokens=32)
    assert headers.to_client(raw, verdict.headers()) == [
        (b"content-type", b"text/event-stream; charset=utf-8"),
        (b"x-own", b"1"),
        (b"x-request-id", b"id"),
        (b"x-memserve-decode", b"http://d"),
        (b"x-memserve-prefill", b"http://p"),
        (b"x-memserve-cached-tokens", b"32"),
    ]


def test_a_reason_cannot_break_out_of_its_header() -> None:
    pairs = headers.Verdict("id", reason="a\r\nset-cookie: x\u2026").headers()
    assert pairs[-1] == (b"x-memserve-reason", b"a set-cookie: x?")


@pytest.mark.parametrize("given", [b"", b" ", b"a\x01b", b"x" * 300, "ü".encode()])
def test_strange_request_ids_are_replaced(given: bytes) -> None:
    assert len(headers.request_id([(b"x-request-id", given)])) == 32


def test_a_request_id_is_echoed() -> None:
    assert headers.request_id([(b"x-request-id", b"abc-1")]) == "abc-1"


def test_error_shapes() -> None:
    body = orjson.loads(replies.bad_request("no").body)
    assert body == {
        "object": "error",
        "message": "no",
        "type": "Bad Request",
        "param": None,
        "code": 400,
    }
    unknown = replies.unknown_model("m")
    assert unknown.status == 404
    assert orjson.loads(unknown.body)["error"]["code"] == "model_not_found"
    nobody = replies.unavailable("nobody can", {"http://a": "not ready"})
    assert nobody.status == 503
    assert orjson.loads(nobody.body)["instances"] == [{"url": "http://a", "reason": "not ready"}]
    assert "http://a: not ready" in orjson.loads(nobody.body)["message"]
    assert (b"retry-after", b"1") in replies.too_many("3 requests run").headers


@pytest.mark.parametrize(
    ("tail", "start"),
    [(b"", b"data: "), (b"data: {}\n\n", b"data: "), (b'data: {"te', b"\n\ndata: ")],
)
def test_a_broken_stream_ends_with_an_error_frame_of_its_own(tail: bytes, start: bytes) -> None:
    end = replies.stream_error("gone", tail)
    assert end.startswith(start)
    assert end.endswith(b"\n\ndata: [DONE]\n\n")
    frame = end.split(b"data: ")[1].strip()
    assert orjson.loads(frame)["error"]["message"] == "gone"


def test_a_length_of_ours_is_not_the_instances() -> None:
    raw = [(b"Content-Length", b"5"), (b"ETag", b"e")]
    assert headers.to_client(raw, []) == [(b"content-length", b"5"), (b"etag", b"e")]
    assert headers.to_client(raw, [], headers.Length.OURS) == [(b"etag", b"e")]


def test_what_is_encoded() -> None:
    assert not headers.is_encoded([(b"Content-Type", b"text/event-stream")])
    assert not headers.is_encoded([(b"Content-Encoding", b" Identity ")])
    assert headers.is_encoded([(b"Content-Encoding", b"gzip")])
    assert headers.is_encoded([(b"Content-Encoding", b""), (b"content-encoding", b"br")])
