"""Event streams of instances that mean no good: whatever a frame holds, a stream is passed on as it
is, goes on, or says in its own words that it cannot."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable, Iterator
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sglang_memserve.errors import PeerError
from sglang_memserve.router.prompt.bodies import Route, read_request
from sglang_memserve.router.request.frames import count_in
from sglang_memserve.router.request.resumable import Unresumable
from sglang_memserve.router.request.streams import make_stream
from simulation import toy_engine as toy

PROMPT = {"text": "x", "prompt": "x", "messages": [{"role": "user", "content": "x"}]}
LENGTHS = {"max_tokens": 6, "sampling_params": {"temperature": 0, "max_new_tokens": 6}}
BODY = {**PROMPT, **LENGTHS, "stream": True, "temperature": 0}
FIELDS = {
    Route.GENERATE: ("text", "input_ids", "sampling_params", "stream"),
    Route.COMPLETIONS: ("prompt", "max_tokens", "stream", "temperature"),
    Route.CHAT: ("messages", "max_tokens", "stream", "temperature"),
}
LEAVES = st.none() | st.booleans() | st.integers(-5, 5) | st.floats(-2, 2) | st.text(max_size=3)
JSON = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=2), inner)
)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Of every value within ``value``."""
    if path:
        yield path
    items: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    for key, one in items:
        yield from places(one, (*path, key))


def changed(data: st.DataObject, frame: dict[str, Any]) -> dict[str, Any]:
    odd: Any = copy.deepcopy(frame)
    *way, last = data.draw(st.sampled_from(list(places(frame))))
    inner = odd
    for key in way:
        inner = inner[key]
    inner[last] = data.draw(JSON | st.just([copy.deepcopy(inner[last])] * 2))
    return dict(odd)


def frames_of(data: st.DataObject, route: Route, body: dict[str, Any]) -> list[bytes]:
    """A stream of which some frames have something else in one place."""
    frames = [
        orjson.loads(frame.removeprefix(b"data: "))
        for frame in toy.stream(route.value, body)
        if b"[DONE]" not in frame
    ]
    odd = data.draw(st.sets(st.integers(0, len(frames) - 1), max_size=2))
    shown = [changed(data, one) if i in odd else one for i, one in enumerate(frames)]
    return [b"data: " + orjson.dumps(one) + b"\n\n" for one in shown]


@pytest.mark.parametrize("route", list(Route))
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_whatever_a_frame_holds_is_passed_on_or_refused(route: Route, data: st.DataObject) -> None:
    body = {name: BODY[name] for name in FIELDS[route] if name in BODY}
    stream = make_stream(read_request(route, body))
    shown = frames_of(data, route, body)
    kept = data.draw(st.integers(0, len(shown)))
    for frame in shown[:kept]:
        assert stream.feed(frame) == frame
    with contextlib.suppress(Unresumable, PeerError):
        if stream.finished:
            return
        so_far = stream.so_far()
        if so_far.text and so_far.ids is None and data.draw(st.booleans()):
            stream.conclude(1, 6)
            return
        ids = so_far.ids if so_far.ids is not None else toy.encode(so_far.text)
        stream.go_on(ids if data.draw(st.booleans()) else ())
        for frame in frames_of(data, route, body):
            stream.feed(frame)
        stream.feed(b"data: [DONE]\n\n")
        stream.at_end()


@pytest.mark.parametrize(
    ("usage", "counted"),
    [
        (
            {
                "prompt_tokens": 9,
                "completion_tokens": 2,
                "prompt_tokens_details": {"cached_tokens": 8},
            },
            {
                "prompt_tokens": 6,
                "completion_tokens": 5,
                "prompt_tokens_details": {"cached_tokens": 6},
            },
        ),
        ({"prompt_tokens": "9"}, {"prompt_tokens": "9"}),
        ({"prompt_tokens_details": {"cached_tokens": 8}},) * 2,
        ({"prompt_tokens_details": [1], "completion_tokens": True},) * 2,
    ],
)
def test_tokens_move_from_the_prompt_to_what_was_generated(
    usage: dict[str, Any], counted: dict[str, Any]
) -> None:
    usage = copy.deepcopy(usage)
    count_in(usage, 3)
    assert usage == counted
