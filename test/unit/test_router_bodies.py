"""Bodies to prompts, namespaces and request ids: what SGLang accepts, and what it refuses."""

from __future__ import annotations

from typing import Any

import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sglang_memserve.errors import ProtocolError
from sglang_memserve.router.prompt import bodies
from sglang_memserve.router.prompt.bodies import Chat, Opaque, Route, Texts, TokenIds

MESSAGES = [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize(
    ("route", "body", "source", "batched"),
    [
        (Route.GENERATE, {"text": "a"}, Texts(("a",)), False),
        (Route.GENERATE, {"text": ["a", "b"]}, Texts(("a", "b")), True),
        (Route.GENERATE, {"text": ["a"]}, Texts(("a",)), True),
        (Route.GENERATE, {"input_ids": [1, 2]}, TokenIds(([1, 2],)), False),
        (Route.GENERATE, {"input_ids": [[1], [2]]}, TokenIds(([1], [2])), True),
        # SGLang looks at the text first.
        (Route.GENERATE, {"text": "a", "input_ids": [1]}, Texts(("a",)), False),
        (Route.COMPLETIONS, {"prompt": "a"}, Texts(("a",)), False),
        (Route.COMPLETIONS, {"prompt": ["a", "b"]}, Texts(("a", "b")), True),
        (Route.COMPLETIONS, {"prompt": [1, 2]}, TokenIds(([1, 2],)), False),
        (Route.COMPLETIONS, {"prompt": [[1], [2]]}, TokenIds(([1], [2])), True),
        (Route.CHAT, {"messages": MESSAGES, "input_ids": [7]}, TokenIds(([7],)), False),
    ],
)
def test_prompts_are_found(
    route: Route, body: dict[str, Any], source: object, batched: bool
) -> None:
    request = bodies.read_request(route, body)
    assert request.source == source
    assert request.batched is batched


def test_chat_keeps_the_whole_body() -> None:
    body = {"messages": MESSAGES, "tools": []}
    assert bodies.read_request(Route.CHAT, body).source == Chat(body)


@pytest.mark.parametrize(
    ("route", "body"),
    [
        (Route.GENERATE, {}),
        (Route.GENERATE, {"text": ""}),
        (Route.GENERATE, {"text": 3}),
        (Route.GENERATE, {"text": []}),
        (Route.GENERATE, {"input_ids": []}),
        (Route.GENERATE, {"input_ids": [1, "a"]}),
        (Route.GENERATE, {"input_ids": [True]}),
        (Route.GENERATE, {"input_ids": [[1], []]}),
        (Route.GENERATE, {"input_embeds": [[0.5]]}),
        (Route.GENERATE, {"text": "a", "image_data": "x.png"}),
        (Route.GENERATE, {"text": "a", "session_params": {"id": "s"}}),
        (Route.GENERATE, {"text": "a", "lora_path": "adapter"}),
        (Route.GENERATE, {"text": "a", "cache_salt": 5}),
        (Route.GENERATE, {"text": "a", "return_logprob": True, "logprob_start_len": 0}),
        (Route.COMPLETIONS, {"prompt": "a", "echo": True, "logprobs": 3}),
        (Route.COMPLETIONS, {"prompt": {}}),
        (Route.CHAT, {"messages": []}),
        (Route.CHAT, {"messages": "hi"}),
    ],
)
def test_what_reuse_cannot_help_is_opaque(route: Route, body: dict[str, Any]) -> None:
    assert isinstance(bodies.read_request(route, body).source, Opaque)


def test_logprobs_of_generated_tokens_do_not_prevent_reuse() -> None:
    body = {"text": "a", "return_logprob": True, "logprob_start_len": -1}
    assert bodies.read_request(Route.GENERATE, body).source == Texts(("a",))


def test_scoring_a_tail_is_prefill_only_and_may_reuse() -> None:
    body = {
        "text": ["a b", "a c"],
        "sampling_params": {"max_new_tokens": 0},
        "return_logprob": True,
        "logprob_start_len": 1,
    }
    request = bodies.read_request(Route.GENERATE, body)
    assert request.prefill_only
    assert request.source == Texts(("a b", "a c"))


def test_empty_namespaces_mean_none_and_batches_have_one_each() -> None:
    single = bodies.read_request(Route.GENERATE, {"text": "a", "extra_key": "", "cache_salt": "s"})
    assert single.namespaces == ((None, "s"),)
    body = {"text": ["a", "b"], "extra_key": ["", "k"], "cache_salt": "s"}
    assert bodies.read_request(Route.GENERATE, body).namespaces == ((None, "s"), ("k", "s"))
    wrong = bodies.read_request(Route.GENERATE, {"text": ["a", "b"], "cache_salt": ["s"]})
    assert isinstance(wrong.source, Opaque)


def test_prefill_body_carries_the_namespace() -> None:
    request = bodies.read_request(
        Route.GENERATE, {"text": ["a", "b"], "cache_salt": ["", "s"], "priority": 3}
    )
    body = bodies.prefill_body(request, [[1, 2], [3]], "r")
    assert body == {
        "input_ids": [[1, 2], [3]],
        "sampling_params": {"max_new_tokens": 0},
        "rid": "r",
        "stream": False,
        "cache_salt": ["", "s"],
        "priority": 3,
    }
    alone = bodies.read_request(Route.CHAT, {"messages": MESSAGES, "extra_key": "k"})
    assert bodies.prefill_body(alone, [[1]], "r")["extra_key"] == "k"


@pytest.mark.parametrize(
    ("body", "rids"),
    [
        ({"text": "a", "rid": "x"}, ("x",)),
        ({"text": ["a", "b"], "rid": "x"}, ("x_0", "x_1")),
        ({"text": ["a", "b"], "rid": ["x", "y"]}, ("x", "y")),
        ({"text": "a", "rid": None}, ()),
        ({"text": "a"}, ()),
    ],
)
def test_request_ids_are_those_the_engine_uses(body: dict[str, Any], rids: tuple[str, ...]) -> None:
    request = bodies.read_request(Route.GENERATE, body)
    assert request.rid == rids
    assert request.rid_given is ("rid" in body)


@pytest.mark.parametrize("data", [b"", b"{", b"[1]", b"3", b'"a"', b'{"a": 1}x', b"\xff"])
def test_malformed_bodies_are_one_error(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        bodies.decode_body(data)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)
FIELDS = """text input_ids prompt messages rid sampling_params cache_salt extra_key stream model
return_logprob logprob_start_len echo logprobs image_data"""
fields = st.sampled_from(FIELDS.split())


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(Route), st.dictionaries(fields, json_values))
def test_no_body_is_too_strange_to_read(route: Route, body: dict[str, Any]) -> None:
    """It is read, or refused with the one error that becomes a 400."""
    try:
        request = bodies.read_request(route, body)
    except ProtocolError:
        return
    if not isinstance(request.source, Opaque):
        assert len(request.namespaces) >= 1


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(st.text(max_size=8), json_values, min_size=1), st.text(max_size=9))
def test_a_spliced_rid_changes_nothing_else(body: dict[str, Any], rid: str) -> None:
    body.pop("rid", None)
    if not body:
        return
    data = b" \n" + orjson.dumps(body)
    spliced = bodies.with_rid(data, rid)
    assert orjson.loads(spliced) == {"rid": rid, **body}
    assert spliced.endswith(data[data.index(b"{") + 1 :])
