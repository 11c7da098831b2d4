"""A stream that breaks anywhere, however often, reads like one that did not."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sglang_memserve.router.prompt.bodies import Request, Route, read_request
from sglang_memserve.router.request.frames import Diverged
from sglang_memserve.router.request.resumable import OnlyAnew, Unresumable, continued_body, why_not
from sglang_memserve.router.request.streams import Stream, make_stream
from simulation import toy_engine as toy


def bodies() -> st.SearchStrategy[tuple[Route, dict[str, Any]]]:
    text = st.text("abc xyz", min_size=1, max_size=12)
    limit = st.integers(1, 40)
    stop = st.one_of(st.none(), st.sampled_from(["ab", "p <", "ea", "<"]))
    usage = st.booleans()

    def build(
        route: Route, prompt: str, limit: int, stop: str | None, usage: bool
    ) -> tuple[Route, dict[str, Any]]:
        params: dict[str, Any] = {"temperature": 0, **({"stop": stop} if stop else {})}
        if route is Route.GENERATE:
            params |= {"max_new_tokens": limit}
            return route, {"text": prompt, "stream": True, "sampling_params": params}
        params |= {"max_tokens": limit, "stream_options": {"include_usage": usage}}
        if route is Route.COMPLETIONS:
            return route, {"prompt": prompt, "stream": True, **params}
        messages = [{"role": "user", "content": prompt}]
        return route, {"messages": messages, "stream": True, **params}

    return st.builds(build, st.sampled_from(Route), text, limit, stop, usage)


def pieces(data: bytes, cuts: Sequence[int]) -> Iterator[bytes]:
    last = 0
    for cut in sorted({cut % (len(data) + 1) for cut in cuts}):
        yield data[last:cut]
        last = cut
    yield data[last:]


def values(data: bytes) -> list[Any]:
    frames = data.split(b"\n\n")
    assert frames.pop() == b""
    assert frames.pop() == b"data: [DONE]"
    return [orjson.loads(frame.removeprefix(b"data: ")) for frame in frames]


def meaning(route: Route, frames: list[Any]) -> Any:
    """What a client makes of it. Where tokens of one text come in other frames is no difference."""
    if route is Route.GENERATE:
        ids = [(frame["text"], frame["output_ids"]) for frame in frames]
        assert all(a[1] == b[1][: len(a[1])] for a, b in itertools.pairwise(ids))
        last = frames[-1]
        meta = {k: v for k, v in last["meta_info"].items() if k != "id"}
        reason = dict(meta.pop("finish_reason"))
        assert len({frame["meta_info"]["id"] for frame in frames}) == 1
        return last["text"], last["output_ids"], meta, reason
    assert len({frame["id"] for frame in frames}) == 1
    text, roles, reasons, usages = "", [], [], []
    for frame in frames:
        if frame.get("usage"):
            usages.append(frame["usage"])
        for choice in frame["choices"]:
            delta = choice.get("delta", choice)
            text += delta.get("content", delta.get("text")) or ""
            roles += [delta["role"]] if "role" in delta else []
            reasons += [choice["finish_reason"]] if choice["finish_reason"] else []
    return text, roles, reasons, usages


def ids_for(stream: Stream) -> Sequence[int]:
    so_far = stream.so_far()
    return so_far.ids if so_far.ids is not None else toy.encode(so_far.text)


def broken(
    request: Request,
    prompt: list[int],
    breaks: Sequence[int],
    cuts: Sequence[int],
    anew: bool = False,
) -> bytes:
    """The client's bytes when the first instances die after so many bytes. ``anew``: from the start
    each time, as where the tokens cannot be told."""
    stream = make_stream(request)
    body: dict[str, Any] = dict(request.body)
    sent = b""
    for limit in [*breaks, None]:
        data = b"".join(toy.stream(request.route.value, body))[:limit]
        for piece in pieces(data, cuts):
            sent += stream.feed(piece)
        if stream.done:
            return sent
        if stream.finished:
            return sent + b"data: [DONE]\n\n"
        try:
            ids = () if anew else ids_for(stream)
        except OnlyAnew:
            anew, ids = True, ()
        body = continued_body(request, prompt, ids)
        stream.go_on(ids)
    raise AssertionError("the last instance did not die")


@settings(max_examples=300, deadline=None)
@given(
    bodies(),
    st.lists(st.integers(0, 4000), max_size=3),
    st.lists(st.integers(0, 10**6), max_size=4),
    st.booleans(),
)
def test_a_stream_that_breaks_reads_like_one_that_does_not(
    asked: tuple[Route, dict[str, Any]], breaks: list[int], cuts: list[int], anew: bool
) -> None:
    route, body = asked
    request = read_request(route, body)
    assert why_not(request) == ""
    expected = meaning(route, values(b"".join(toy.stream(route.value, body))))
    try:
        got = broken(request, toy.prompt_of(route.value, body), breaks, cuts, anew)
    except Unresumable as error:
        allowed = ("were generated", "for the usage")
        assert any(word in str(error) for word in allowed), error
        return
    assert meaning(route, values(got)) == expected


def test_a_text_that_lags_behind_its_tokens_breaks_twice() -> None:
    """The second instance's first frame for the client ends amid a character."""
    sampling = {"temperature": 0, "max_new_tokens": 7}
    body = {"text": "xx", "stream": True, "sampling_params": sampling}
    request = read_request(Route.GENERATE, body)
    whole = values(b"".join(toy.stream("/generate", body)))
    assert whole[3]["text"] == whole[2]["text"], "the toy engine's fourth token ends no character"
    got = broken(request, toy.encode("xx"), [620, 625], [])
    assert meaning(Route.GENERATE, values(got)) == meaning(Route.GENERATE, whole)


@settings(max_examples=100, deadline=None)
@given(bodies(), st.integers(1, 4000), st.integers(97, 110))
def test_other_tokens_than_those_shown_are_never_passed_on(
    asked: tuple[Route, dict[str, Any]], broken_at: int, other: int
) -> None:
    """The second instance computes something else: the client gets nothing of it."""
    route, body = asked
    request = read_request(route, body)
    if route is not Route.GENERATE:
        return
    stream = make_stream(request)
    data = b"".join(toy.stream(route.value, body))
    shown = stream.feed(data[: broken_at % len(data)])
    if stream.done or stream.finished:
        return
    try:
        ids = ids_for(stream)
        wrong = {**continued_body(request, [other, other], ids)}
    except Unresumable:
        return
    stream.go_on(ids)
    seen = values(shown + b"data: [DONE]\n\n") if shown else []
    same = toy.whole(route.value, wrong)["output_ids"]
    before = [] if not seen else seen[-1]["output_ids"]
    if [*ids, *same][: len(before)] == before:
        return
    with pytest.raises(Diverged):
        for frame in toy.stream(route.value, wrong):
            assert stream.feed(frame) == b""


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"stream": False}, "not one stream"),
        ({"temperature": 0.7}, "without a seed"),
        ({"temperature": None}, "without a seed"),
        ({"frequency_penalty": 0.5}, "frequency_penalty"),
        ({"repetition_penalty": 1.1}, "repetition_penalty"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"regex": "a+"}, "regex"),
        ({"logprobs": True}, "logprobs"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"n": 2}, "not one stream"),
        ({"something_new": {"a": 1}}, "something_new"),
    ],
)
def test_what_remembers_more_than_its_tokens_is_not_resumed(
    change: dict[str, Any], word: str
) -> None:
    messages = [{"role": "user", "content": "x"}]
    body = {"messages": messages, "stream": True, "temperature": 0, "n": 1, "repetition_penalty": 1}
    assert why_not(read_request(Route.CHAT, body)) == ""
    assert word in why_not(read_request(Route.CHAT, {**body, **change}))


@pytest.mark.parametrize(
    "data",
    [
        b"data: {}\n\ndata: [DONE]\n\n",
        b"data: [1]\r\n\r\ndata: [DONE]\n\n",
        b"data: [1]\r\n\r\ndata: [DONE]\r\n\r\n",
        b": ping\n\ndata: nonsense\n\ndata: [DONE]\n\n",
        b'data: {"choices": [1]}\n\nevent: x\ndata: {}\n\ndata: [DONE]\n\n',
        b'data: {"error": {"message": "m"}}\n\ndata: [DONE]\n\n',
    ],
)
@pytest.mark.parametrize("route", list(Route))
@pytest.mark.parametrize("step", [1, 7, 1000])
def test_frames_of_another_kind_are_passed_on_as_they_are(
    data: bytes, route: Route, step: int
) -> None:
    body = {"text": "x", "prompt": "x", "messages": [{"role": "user", "content": "x"}]}
    request = read_request(route, {**body, "stream": True, "temperature": 0})
    stream = make_stream(request)
    got = b"".join(stream.feed(data[i : i + step]) for i in range(0, len(data), step))
    assert got == data
    assert stream.done
