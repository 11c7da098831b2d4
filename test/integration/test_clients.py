"""The clients people have: the openai SDK and SGLang's frontend language, against the router."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import openai
import pytest
import requests
import sglang as sgl
from integration.harness import REQUEST_LIMIT_S, RunningCluster, Server
from openai.types.chat import ChatCompletionMessageParam

pytestmark = pytest.mark.integration

PREAMBLE = "You are a careful librarian. Answer in few words. " * 6


@pytest.fixture
def client(cluster: RunningCluster) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=f"{cluster.url}/v1", api_key="none", timeout=REQUEST_LIMIT_S, max_retries=0
    ) as client:
        yield client


@pytest.fixture
def backend(cluster: RunningCluster) -> sgl.RuntimeEndpoint:
    endpoint = sgl.RuntimeEndpoint(cluster.url)
    sgl.set_default_backend(endpoint)
    return endpoint


def test_models_and_chat_stream(client: openai.OpenAI) -> None:
    model = client.models.list().data[0].id
    messages: list[ChatCompletionMessageParam] = [{"role": "user", "content": PREAMBLE}]
    whole = client.chat.completions.create(
        model=model,
        messages=messages,
        max_tokens=12,
        temperature=0,
        extra_body={"ignore_eos": True},
    )
    assert whole.usage is not None and whole.usage.completion_tokens == 12
    pieces = client.chat.completions.create(
        model=model,
        messages=messages,
        max_tokens=12,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True},
    )
    text, usage = "", None
    for piece in pieces:
        text += (piece.choices[0].delta.content or "") if piece.choices else ""
        usage = piece.usage or usage
    assert text == whole.choices[0].message.content
    assert usage is not None and usage.prompt_tokens == whole.usage.prompt_tokens


def test_chat_continues(client: openai.OpenAI, cluster: RunningCluster) -> None:
    """The second turn carries the first; the cluster computes only what is new."""
    model = client.models.list().data[0].id
    messages: list[ChatCompletionMessageParam] = [
        {"role": "user", "content": PREAMBLE + "First question?"}
    ]
    first = client.chat.completions.create(model=model, messages=messages, max_tokens=40)
    messages += [
        {"role": "assistant", "content": first.choices[0].message.content or ""},
        {"role": "user", "content": "And the second question?"},
    ]
    second = client.chat.completions.with_raw_response.create(
        model=model, messages=messages, max_tokens=8
    )
    assert first.usage is not None
    cached = int(second.headers["x-memserve-cached-tokens"])
    assert cached >= (first.usage.prompt_tokens // 16 - 1) * 16
    assert second.headers["x-memserve-decode"] == cluster.one("decode").url


def test_completions_and_n(client: openai.OpenAI) -> None:
    model = client.models.list().data[0].id
    answer = client.completions.create(
        model=model, prompt=[PREAMBLE, PREAMBLE + "More."], max_tokens=4, n=2, temperature=0.7
    )
    assert len(answer.choices) == 4


def test_logprobs(client: openai.OpenAI) -> None:
    model = client.models.list().data[0].id
    answer = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": PREAMBLE}],
        max_tokens=3,
        logprobs=True,
        top_logprobs=2,
    )
    logprobs = answer.choices[0].logprobs
    assert (
        logprobs is not None and logprobs.content is not None and logprobs.content[0].top_logprobs
    )


def test_unknown_model_is_404(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="no-such-model"):
        client.chat.completions.create(
            model="no-such-model", messages=[{"role": "user", "content": "hi"}]
        )


@pytest.mark.parametrize(
    "body",
    [b"{", b"[]", b'{"text": 5}', b'{"sampling_params": {}}', b'{"input_ids": ["x"]}'],
    ids=["truncated", "array", "number", "no prompt", "wrong ids"],
)
def test_malformed_generate_is_the_clients_fault(
    cluster: RunningCluster, stock: Server, body: bytes
) -> None:
    headers = {"Content-Type": "application/json"}
    ours = requests.post(f"{cluster.url}/generate", data=body, headers=headers, timeout=30)
    theirs = requests.post(f"{stock.url}/generate", data=body, headers=headers, timeout=30)
    assert 400 <= ours.status_code < 500
    assert ours.status_code == theirs.status_code
    assert isinstance(ours.json(), dict)


@pytest.mark.parametrize(
    "body",
    [
        {"text": ""},
        {"input_ids": []},
        {"input_ids": [99_999_999]},
        {"input_ids": [-1]},
        {"text": "some words", "return_logprob": True, "logprob_start_len": -5},
        {"text": "some words", "sampling_params": []},
        {"text": "some words", "rid": []},
    ],
    ids=["no text", "no ids", "huge id", "negative id", "negative start", "params", "rid"],
)
def test_hostile_generate_is_400_and_harms_nobody(
    cluster: RunningCluster, body: dict[str, object]
) -> None:
    for url in (cluster.url, cluster.one("decode").url):
        if url != cluster.url and ("rid" in body or "sampling_params" in body):
            continue  # SGLang's own answer there is a 500, and harms nobody
        answer = requests.post(f"{url}/generate", json=body, timeout=30)
        assert answer.status_code == 400, f"{url}: {answer.text}"
    assert requests.post(f"{cluster.url}/generate", json={"text": "fine"}, timeout=60).ok


def test_regex_is_honoured(cluster: RunningCluster) -> None:
    body = {
        "text": PREAMBLE + "A year:",
        "sampling_params": {"max_new_tokens": 8, "regex": "(19|20)[0-9]{2}", "temperature": 0},
    }
    answer = requests.post(f"{cluster.url}/generate", json=body, timeout=REQUEST_LIMIT_S).json()
    assert len(answer["text"]) == 4 and answer["text"][:2] in ("19", "20"), answer["text"]


def test_passed_through_routes(cluster: RunningCluster) -> None:
    tokenized = requests.post(
        f"{cluster.url}/v1/tokenize", json={"model": "default", "prompt": "hello"}, timeout=30
    )
    assert tokenized.status_code == 200 and tokenized.json()["tokens"]
    info = requests.get(f"{cluster.url}/server_info", timeout=30).json()
    assert info["internal_states"] and info["prefill"] and info["decode"]
    assert requests.get(f"{cluster.url}/get_model_info", timeout=30).json()["is_generation"]
    assert "memserve_" in requests.get(f"{cluster.url}/metrics", timeout=30).text


@sgl.function
def _forked(s, question):  # type: ignore[no-untyped-def]  # the frontend language has no types
    s += PREAMBLE + question
    forks = s.fork(3)
    for index, fork in enumerate(forks):
        fork += f" Option {index}: "
        fork += sgl.gen("text", max_tokens=6, temperature=0)
    forks.join()
    s += " Chosen: " + sgl.select("choice", choices=["one", "two"])


def test_frontend_program(backend: sgl.RuntimeEndpoint) -> None:
    state = _forked.run(question="Which one?")
    assert state["choice"] in ("one", "two")


@sgl.function
def _short(s, question):  # type: ignore[no-untyped-def]
    s += PREAMBLE + question + sgl.gen("answer", max_tokens=6, temperature=0)


def test_frontend_batch(backend: sgl.RuntimeEndpoint) -> None:
    """``run_batch`` announces the shared prefix first, then opens many connections at once."""
    questions = [{"question": f"Number {index}?"} for index in range(12)]
    states = _short.run_batch(questions, num_threads=12, progress_bar=False)
    assert all(isinstance(state["answer"], str) for state in states)


def test_frontend_stream(backend: sgl.RuntimeEndpoint) -> None:
    state = _short.run(question="Stream?", stream=True)
    assert "".join(state.text_iter()).startswith(PREAMBLE)


def test_stream_is_sglangs(cluster: RunningCluster, stock: Server) -> None:
    """Cumulative texts that end where one stock instance ends. How many tokens share a frame is a
    matter of timing; that frames pass unchanged is shown in ``test/simulation``."""
    body = {
        "text": PREAMBLE + "Frames.",
        "stream": True,
        "sampling_params": {"temperature": 0, "max_new_tokens": 6, "ignore_eos": True},
    }

    def texts(url: str) -> list[str]:
        with requests.post(f"{url}/generate", json=body, stream=True, timeout=60) as response:
            assert response.headers["content-type"].startswith("text/event-stream")
            raw = b"".join(response.iter_content(None)).decode()
        assert raw.endswith("data: [DONE]\n\n")
        events = raw.removesuffix("data: [DONE]\n\n").split("\n\n")[:-1]
        return [json.loads(event.removeprefix("data: "))["text"] for event in events]

    ours = texts(cluster.url)
    assert all(later.startswith(text) for text, later in pairwise(ours))
    assert ours[-1] == texts(stock.url)[-1]


def test_concurrent_requests_equal_stock(cluster: RunningCluster, stock: Server) -> None:
    def ask(url: str, index: int) -> str:
        body = {
            "text": PREAMBLE * (1 + index % 3) + f"Question {index}.",
            "sampling_params": {"temperature": 0, "max_new_tokens": 8, "ignore_eos": True},
        }
        response = requests.post(f"{url}/generate", json=body, timeout=REQUEST_LIMIT_S)
        assert response.status_code == 200, response.text
        return str(response.json()["text"])

    # One at a time where the numbers come from: batching changes bf16 sums.
    expected = [ask(stock.url, index) for index in range(12)]
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(lambda index: ask(cluster.url, index), range(12)))
    assert sum(a == b for a, b in zip(got, expected, strict=True)) >= 11
