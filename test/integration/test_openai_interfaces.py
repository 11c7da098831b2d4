"""Every interface of OpenAI's that SGLang has, through the router: what stock SGLang answers, the
router answers. Official SDKs ask, so that the shapes are theirs to judge."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import anthropic
import openai
import pytest
import requests
from anthropic.types import MessageParam
from integration.harness import REQUEST_LIMIT_S, RunningCluster, Server

pytestmark = pytest.mark.integration

TEXT = "Of all the ships in the harbour, the smallest one left first. " * 4
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Today's weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": ["Oslo", "Rome"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
COLOUR = {"type": "json_schema", "json_schema": {"name": "c", "schema": {"enum": ["red", "blue"]}}}
Ask = Callable[[openai.OpenAI], Any]


def sdk(url: str) -> openai.OpenAI:
    return openai.OpenAI(
        base_url=f"{url}/v1", api_key="none", timeout=REQUEST_LIMIT_S, max_retries=0
    )


def anthropic_client(url: str) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=url, api_key="none", timeout=REQUEST_LIMIT_S, max_retries=0)


def both(cluster: RunningCluster, stock: Server, ask: Ask) -> tuple[Any, Any]:
    """The router's answer and stock SGLang's, an error's status and message for an error."""

    def of(url: str) -> Any:
        try:
            with sdk(url) as client:
                return ask(client)
        except openai.APIStatusError as error:
            return error.status_code, error.response.json()

    return of(cluster.url), of(stock.url)


def chat(**fields: Any) -> Ask:
    """What of a chat's answer does not depend on the time of day."""

    def ask(client: openai.OpenAI) -> Any:
        body: dict[str, Any] = {
            "model": "default",
            "messages": [{"role": "system", "content": TEXT}, {"role": "user", "content": "Why?"}],
            "temperature": 0,
            "max_tokens": 12,
            **fields,
        }
        answer = client.chat.completions.create(**body)
        return [
            (
                choice.index,
                choice.finish_reason,
                choice.message.content,
                [
                    (call.function.name, call.function.arguments)
                    for call in choice.message.tool_calls or []
                    if call.type == "function"
                ],
                [token.token for token in choice.logprobs.content or []]
                if choice.logprobs
                else None,
            )
            for choice in answer.choices
        ], answer.usage.completion_tokens if answer.usage else None

    return ask


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [WEATHER], "tool_choice": "none"},
        {"tools": [WEATHER], "tool_choice": "auto"},
        {"tools": [WEATHER], "tool_choice": "required", "max_tokens": 60},
        {
            "tools": [WEATHER],
            "tool_choice": {"type": "function", "function": {"name": "weather"}},
            "max_tokens": 60,
        },
        {"logprobs": True, "top_logprobs": 3},
        {"n": 3},
        {"response_format": COLOUR},
        {"response_format": {"type": "json_object"}},
        {"extra_body": {"regex": "(yes|no)"}},
        {"stop": ["e"], "seed": 7},
        {"logit_bias": {"70": 100}, "max_tokens": 3},
        {"frequency_penalty": 1.5, "presence_penalty": 0.5},
        {"extra_body": {"chat_template_kwargs": {"x": 1}, "separate_reasoning": False}},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": TEXT}]}]},
        {
            "messages": [
                {"role": "user", "content": "Start."},
                {"role": "assistant", "content": "The harbour"},
            ],
            "extra_body": {"continue_final_message": True},
        },
        {"messages": []},
        {"max_tokens": -1},
        {"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "x"}}},
    ],
    ids=[
        "tools none",
        "tools auto",
        "tools required",
        "tool named",
        "logprobs",
        "n",
        "json_schema",
        "json_object",
        "regex",
        "stop",
        "logit_bias",
        "penalties",
        "template kwargs",
        "parts",
        "continue",
        "no messages",
        "negative",
        "unknown tool",
    ],
)
def test_chats(cluster: RunningCluster, stock: Server, fields: dict[str, Any]) -> None:
    ours, theirs = both(cluster, stock, chat(**fields))
    assert ours == theirs


def test_a_schema_is_kept(cluster: RunningCluster, stock: Server) -> None:
    with sdk(cluster.url) as client:
        answer, _ = chat(response_format=COLOUR)(client)
    assert answer[0][2] in ('"red"', '"blue"')


def test_chat_streams_end_like_wholes(cluster: RunningCluster, stock: Server) -> None:
    def streamed(client: openai.OpenAI) -> Any:
        texts: dict[int, str] = {}
        usage = None
        for piece in client.chat.completions.create(
            model="default",
            messages=[{"role": "user", "content": TEXT}],
            temperature=0,
            max_tokens=12,
            n=2,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"ignore_eos": True},
        ):
            for choice in piece.choices:
                texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
            usage = piece.usage or usage
        assert usage is not None
        return texts, usage.prompt_tokens, usage.completion_tokens

    ours, theirs = both(cluster, stock, streamed)
    assert ours == theirs
    assert ours[2] == 24


@pytest.mark.parametrize(
    "fields",
    [
        {"logprobs": 2},
        {"echo": True},
        {"echo": True, "logprobs": 1},
        {"suffix": "The end."},
        {"n": 2, "prompt": [TEXT, "Another one."]},
        {"prompt": list(TEXT.encode()), "max_tokens": 4},
        {"prompt": [[70, 71, 72], [73, 74]], "max_tokens": 4},
        {"prompt": []},
        {"max_tokens": 10**9},
    ],
    ids=["logprobs", "echo", "echo logprobs", "suffix", "n", "ids", "id lists", "none", "too many"],
)
def test_completions(cluster: RunningCluster, stock: Server, fields: dict[str, Any]) -> None:
    def ask(client: openai.OpenAI) -> Any:
        body = {"model": "default", "prompt": TEXT, "temperature": 0, "max_tokens": 8, **fields}
        answer = client.completions.create(**body)
        return [
            (
                choice.index,
                choice.text,
                choice.finish_reason,
                choice.logprobs.tokens if choice.logprobs else None,
            )
            for choice in answer.choices
        ]

    ours, theirs = both(cluster, stock, ask)
    assert ours == theirs


def test_embeddings_of_a_model_that_has_none_are_a_clear_error(
    cluster: RunningCluster, stock: Server
) -> None:
    ours, theirs = both(
        cluster, stock, lambda c: c.embeddings.create(model="default", input="hello")
    )
    assert ours == theirs
    assert ours[0] == 400


def test_messages(cluster: RunningCluster, stock: Server) -> None:
    def whole(url: str) -> Any:
        with anthropic_client(url) as client:
            answer = client.messages.create(
                model="default",
                max_tokens=10,
                extra_body={"temperature": 0},
                system="Be brief.",
                messages=[{"role": "user", "content": TEXT}],
            )
        return [block.text for block in answer.content if block.type == "text"], answer.usage

    def streamed(url: str) -> str:
        with (
            anthropic_client(url) as client,
            client.messages.stream(
                model="default",
                max_tokens=10,
                extra_body={"temperature": 0},
                system="Be brief.",
                messages=[{"role": "user", "content": TEXT}],
            ) as stream,
        ):
            return "".join(stream.text_stream)

    def counted(url: str) -> int:
        messages: list[MessageParam] = [{"role": "user", "content": TEXT}]
        with anthropic_client(url) as client:
            return client.messages.count_tokens(model="default", messages=messages).input_tokens

    ours, theirs = whole(cluster.url), whole(stock.url)
    assert ours[0] == theirs[0]
    assert ours[1].output_tokens == theirs[1].output_tokens
    assert streamed(cluster.url) == "".join(ours[0])
    assert counted(cluster.url) == counted(stock.url) > len(TEXT)


def test_responses(cluster: RunningCluster, stock: Server) -> None:
    def ask(client: openai.OpenAI) -> Any:
        answer = client.responses.create(
            model="default", input=TEXT, temperature=0, max_output_tokens=10
        )
        return answer.output_text, answer.status

    ours, theirs = both(cluster, stock, ask)
    assert ours == theirs


def test_the_small_routes(cluster: RunningCluster, stock: Server) -> None:
    """Tokenizers and error shapes are the instances' own."""
    for path, body in (
        ("/v1/tokenize", {"model": "default", "prompt": TEXT}),
        ("/v1/detokenize", {"model": "default", "tokens": [70, 71, 72]}),
        ("/v1/score", {"model": "default", "query": "a", "items": ["b"], "label_token_ids": [70]}),
        ("/v1/rerank", {"query": "a", "documents": ["b"]}),
        ("/v1/classify", {"model": "default", "input": "a"}),
        ("/no/such/route", {}),
    ):
        answers = [
            requests.post(f"{url}{path}", json=body, timeout=REQUEST_LIMIT_S)
            for url in (cluster.url, stock.url)
        ]
        assert answers[0].status_code == answers[1].status_code, path
        if path.endswith("tokenize"):
            assert answers[0].json() == answers[1].json(), path
