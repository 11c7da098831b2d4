"""Programs of SGLang's frontend language run against the router as against one instance."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator

import pytest
import requests
import sglang as sgl
from integration.harness import RunningCluster, Server, flush, stats, wait_until

pytestmark = pytest.mark.integration

PAGE = 16
RULES = "The court meets at noon. Nobody speaks before the judge has spoken. " * 5


@pytest.fixture
def backend(cluster: RunningCluster) -> Iterator[sgl.RuntimeEndpoint]:
    endpoint = sgl.RuntimeEndpoint(cluster.url)
    sgl.set_default_backend(endpoint)
    yield endpoint
    sgl.set_default_backend(None)


@pytest.fixture
def reference(stock: Server) -> sgl.RuntimeEndpoint:
    return sgl.RuntimeEndpoint(stock.url)


@sgl.function
def _roles(s, question):  # type: ignore[no-untyped-def]  # the frontend language has no types
    s += sgl.system(RULES)
    s += sgl.user(question)
    s += sgl.assistant(sgl.gen("first", max_tokens=8, temperature=0, ignore_eos=True))
    s += sgl.user("And then?")
    s += sgl.assistant(sgl.gen("second", max_tokens=8, temperature=0, ignore_eos=True))


@sgl.function
def _constrained(s):  # type: ignore[no-untyped-def]
    s += RULES + "The year: " + sgl.gen("year", max_tokens=8, regex="(18|19)[0-9]{2}")
    s += " Verdict: "
    schema = json.dumps({"type": "string", "enum": ["guilty", "free"]})
    s += sgl.gen("verdict", max_tokens=16, json_schema=schema, temperature=0)
    s += " Times: " + sgl.gen_int("times", max_tokens=4, temperature=0)


@sgl.function
def _forked(s):  # type: ignore[no-untyped-def]
    s += RULES
    forks = s.fork(3)
    for index, fork in enumerate(forks):
        fork += f" Witness {index}: " + sgl.gen("words", max_tokens=6, temperature=0)
    forks.join()
    s += " Summary: " + sgl.gen("summary", max_tokens=6, temperature=0)


@sgl.function
def _selected(s):  # type: ignore[no-untyped-def]
    s += RULES + "The accused is " + sgl.select("choice", choices=["free", "guilty", "absent"])


@sgl.function
def _short(s, question):  # type: ignore[no-untyped-def]
    s += RULES + question + sgl.gen("answer", max_tokens=6, temperature=0, ignore_eos=True)


def test_roles(backend: sgl.RuntimeEndpoint, reference: sgl.RuntimeEndpoint) -> None:
    ours = _roles.run(question="Who speaks?", backend=backend)
    theirs = _roles.run(question="Who speaks?", backend=reference)
    assert ours["first"] == theirs["first"]
    assert ours["second"] == theirs["second"]
    assert [message["role"] for message in ours.messages()] == [
        "system",
        "user",
        "assistant",
        "user",
        "assistant",
    ]


def test_constraints(backend: sgl.RuntimeEndpoint) -> None:
    state = _constrained.run(backend=backend)
    assert len(state["year"]) == 4 and state["year"][:2] in ("18", "19")
    assert json.loads(state["verdict"]) in ("guilty", "free")
    assert int(state["times"]) is not None


def test_select(backend: sgl.RuntimeEndpoint, reference: sgl.RuntimeEndpoint) -> None:
    ours, theirs = _selected.run(backend=backend), _selected.run(backend=reference)
    assert ours["choice"] == theirs["choice"]
    scores = [
        state.get_meta_info("choice")["normalized_prompt_logprobs"] for state in (ours, theirs)
    ]
    assert scores[0] == pytest.approx(scores[1], abs=0.05)


def test_fork_and_join(backend: sgl.RuntimeEndpoint) -> None:
    state = _forked.run(backend=backend)
    assert isinstance(state["summary"], str) and state.text().startswith(RULES)


def test_what_a_batch_announces_is_kept_and_found(
    cluster: RunningCluster, backend: sgl.RuntimeEndpoint
) -> None:
    """``run_batch`` sends the shared prefix first, with nothing to generate: it is computed once,
    on a prefill instance, and every program finds it."""
    flush(cluster.url)
    wait_until(lambda: _held(cluster) == 0, 20, "flushed everywhere")
    questions = [{"question": f"Number {index}?"} for index in range(8)]
    states = _short.run_batch(questions, num_threads=8, progress_bar=False, backend=backend)
    whole_pages = len(RULES) // PAGE * PAGE
    for state in states:
        assert state.get_meta_info("answer")["cached_tokens"] >= whole_pages
    held = {server.url: stats(server)["ready_blocks"] for server in cluster.instances}
    assert all(held[server.url] for server in cluster.all("decode")), held
    assert any(held[server.url] for server in cluster.all("prefill")), held


def _held(cluster: RunningCluster) -> int:
    tree = requests.get(f"{cluster.url}/memserve/tree", timeout=10).json()
    return int(tree["total_pages"])


def test_streams(backend: sgl.RuntimeEndpoint, reference: sgl.RuntimeEndpoint) -> None:
    state = _short.run(question="Stream?", stream=True, backend=backend)
    pieces = list(state.text_iter("answer"))
    whole = _short.run(question="Stream?", backend=reference)
    assert "".join(pieces) == whole["answer"]

    async def collected() -> str:
        state = _short.run(question="Stream?", stream=True, backend=backend)
        return "".join([piece async for piece in state.text_async_iter("answer")])

    assert asyncio.run(collected()) == whole["answer"]


def test_a_backend_flushes_and_describes(backend: sgl.RuntimeEndpoint) -> None:
    assert backend.get_server_info()["internal_states"]
    assert backend.get_model_name()
    backend.flush_cache()
