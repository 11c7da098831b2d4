"""A decode instance dies in mid-stream: the client's stream goes on, or says that it does not."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import orjson
import pytest
from simulation import toy_engine as toy
from simulation.router_machines import Router, router_over
from simulation.toy_instances import ToyInstance

PROMPT = "the prompt of this test"
CHAT = {"messages": [{"role": "user", "content": PROMPT}], "model": "tiny", "temperature": 0}
ASKED: dict[str, dict[str, Any]] = {
    "/generate": {"text": PROMPT, "sampling_params": {"temperature": 0, "max_new_tokens": 30}},
    "/v1/completions": {"prompt": PROMPT, "model": "tiny", "temperature": 0, "max_tokens": 30},
    "/v1/chat/completions": {**CHAT, "max_tokens": 30},
}


def go(scenario: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(scenario, 60))


def asked(path: str, **more: Any) -> dict[str, Any]:
    """A request that generates 30 tokens whatever they are."""
    body = {**ASKED[path], "stream": True, **more}
    return body if path == "/generate" else {**body, "stream_options": {"include_usage": True}}


async def frames(router: Router, path: str, body: dict[str, Any]) -> list[Any]:
    """The stream's frames but the last, which is ``[DONE]``."""
    response = await router.post(path, body)
    assert response.status == 200, await response.text()
    parts = (await response.read()).split(b"\n\n")
    assert parts[-2:] == [b"data: [DONE]", b""], parts[-3:]
    return [orjson.loads(part.removeprefix(b"data: ")) for part in parts[:-2]]


def told(path: str, values: list[Any]) -> Any:
    """Text, ids and counts as the client has them in the end."""
    if path == "/generate":
        meta = {k: v for k, v in values[-1]["meta_info"].items() if k != "id"}
        finish = meta.pop("finish_reason")
        return values[-1]["text"], values[-1]["output_ids"], meta, finish["type"]
    choices = [choice for value in values for choice in value["choices"]]
    said = [choice.get("delta", choice) for choice in choices]
    text = "".join(one.get("content", one.get("text")) or "" for one in said)
    reasons = [c["finish_reason"] for c in choices if c["finish_reason"]]
    return text, reasons, [v["usage"] for v in values if v.get("usage")]


def expected(path: str, body: dict[str, Any]) -> Any:
    parts = b"".join(toy.stream(path, body)).split(b"\n\n")[:-2]
    return told(path, [orjson.loads(part.removeprefix(b"data: ")) for part in parts])


@pytest.mark.parametrize("path", list(ASKED))
@pytest.mark.parametrize("deaths", [[0], [1], [2], [9], [3, 5], [25, 0]], ids=str)
def test_a_stream_goes_on_where_another_instance_is(path: str, deaths: list[int]) -> None:
    async def scenario() -> None:
        first, *rest = [ToyInstance(dies_after=[after]) for after in deaths]
        async with router_over(first, *rest, ToyInstance()) as router:
            body = asked(path)
            for _ in range(len(deaths) + 1):  # whoever has its turn
                got = await frames(router, path, body)
                assert told(path, got) == expected(path, body)
                ids = {one.get("id") or one["meta_info"]["id"] for one in got}
                assert len(ids) == 1
            assert not any(machine.dies_after for machine in (first, *rest))
            if max(deaths) > 2:
                await router.metrics_with('memserve_resumes_total{outcome="resumed"}')

    go(scenario())


@pytest.mark.parametrize("path", list(ASKED))
def test_a_stream_that_stalls_goes_on_elsewhere(path: str) -> None:
    async def scenario() -> None:
        bad, good = ToyInstance(stalls_after=[5]), ToyInstance()
        async with router_over(bad, good, stall_timeout_s=0.3) as router:
            body = asked(path)
            for _ in range(2):
                assert told(path, await frames(router, path, body)) == expected(path, body)
            assert not bad.stalls_after

    go(scenario())


@pytest.mark.parametrize("path", list(ASKED))
def test_a_stream_goes_on_though_nobody_told_its_tokens_before(path: str) -> None:
    async def scenario() -> None:
        toys = [ToyInstance(dies_after=[5]), ToyInstance(dies_after=[5])]
        async with router_over(*toys) as router:
            for one in toys:
                one.wont_tokenize = 1
            body = asked(path)
            assert told(path, await frames(router, path, body)) == expected(path, body)
            assert [one.wont_tokenize for one in toys] == [0, 0]

    go(scenario())


def test_an_instance_that_freezes_is_not_waited_for() -> None:
    """No stall deadline is near: that its heartbeats are gone says enough. Neither does a request
    that is not streamed wait for it."""

    async def scenario() -> None:
        instances = [ToyInstance(step_s=0.02), ToyInstance(step_s=0.02)]
        async with router_over(*instances, heartbeat_s=0.1, expire_s=0.5) as router:
            streamed, whole = asked("/generate"), {**asked("/generate"), "stream": False}
            stream = asyncio.create_task(frames(router, "/generate", streamed))
            other = asyncio.create_task(router.post("/generate", whole))
            for instance in instances:
                await instance.wait_for("/generate")
            instances[0].freeze()
            got, answer = await stream, await other
            assert told("/generate", got) == expected("/generate", streamed)
            assert (await answer.json())["output_ids"] == got[-1]["output_ids"]
            instances[0].thaw()

    go(scenario())


def test_a_lone_instance_whose_connection_broke_goes_on_itself() -> None:
    async def scenario() -> None:
        async with router_over(ToyInstance(dies_after=[7])) as router:
            body = asked("/generate")
            got = await frames(router, "/generate", body)
            assert told("/generate", got) == expected("/generate", body)

    go(scenario())


@pytest.mark.parametrize(
    ("path", "more", "word"),
    [
        ("/v1/chat/completions", {"temperature": 0.5}, "broke off"),
        ("/v1/completions", {"frequency_penalty": 0.5}, "broke off"),
        ("/generate", {"return_logprob": False, "return_hidden_states": True}, "broke off"),
        (
            "/generate",
            {"sampling_params": {"temperature": 1, "sampling_seed": 5, "max_new_tokens": 30}},
            "does not sample by seed",
        ),
    ],
)
def test_what_cannot_be_resumed_ends_with_an_error(
    path: str, more: dict[str, Any], word: str
) -> None:
    async def scenario() -> None:
        instances = [ToyInstance(dies_after=[4]), ToyInstance(dies_after=[4])]
        async with router_over(*instances) as router:
            got = await frames(router, path, {**asked(path), **more})
            assert len(got) == 5
            assert word in got[-1]["error"]["message"]
            assert sum(len(machine.dies_after) for machine in instances) == 1

    go(scenario())


def test_a_seeded_stream_goes_on_where_engines_honour_seeds() -> None:
    async def scenario() -> None:
        instances = [ToyInstance(dies_after=[4], deterministic=True) for _ in range(2)]
        async with router_over(*instances) as router:
            params = {"temperature": 1, "sampling_seed": 5, "max_new_tokens": 30}
            body = {"text": PROMPT, "stream": True, "sampling_params": params}
            instances[1].dies_after.clear()
            for _ in range(2):
                got = await frames(router, "/generate", body)
                assert told("/generate", got) == expected("/generate", body)

    go(scenario())


@pytest.mark.parametrize("path", list(ASKED))
def test_other_tokens_are_never_passed_off_as_the_rest(path: str) -> None:
    """The second instance computes something else: of that the client sees nothing where its
    tokens are known; of text alone, the new instance is asked whether it would have said it."""

    async def scenario() -> None:
        first, liar = ToyInstance(dies_after=[8]), ToyInstance(lies=True)
        async with router_over(first) as router:
            await liar.start()
            work = asyncio.create_task(frames(router, path, asked(path)))
            await first.wait_for(path)
            await router.post("/workers", {"url": liar.url})
            got = await work
            assert not first.dies_after
            await liar.stop()
            if path == "/generate" and "error" in got[-1]:
                shown = [one["output_ids"] for one in got[:-1]]
                whole = expected(path, asked(path))[1]
                assert all(ids == whole[: len(ids)] for ids in shown)

    go(scenario())


class Unsure(ToyInstance):
    """What it makes of a text is not what the text was made of: bytes that are no UTF-8, say."""

    def _tokenize(self, body: dict[str, Any]) -> list[int]:
        ids = super()._tokenize(body)
        return ids if "messages" in body or body["prompt"] == PROMPT else (ids * 9)[::-1]


@pytest.mark.parametrize("path", list(ASKED)[1:])
@pytest.mark.parametrize("deaths", [[9], [1, 20], [25, 3], [29, 29]], ids=str)
def test_a_stream_whose_tokens_cannot_be_told_is_generated_anew(
    path: str, deaths: list[int]
) -> None:
    async def scenario() -> None:
        instances = [Unsure(dies_after=[after]) for after in deaths]
        async with router_over(*instances, Unsure()) as router:
            body = asked(path)
            for _ in range(len(deaths) + 1):  # whoever has its turn
                assert told(path, await frames(router, path, body)) == expected(path, body)
            assert not any(one.dies_after for one in instances)

    go(scenario())


@pytest.mark.parametrize("path", list(ASKED)[1:])
def test_text_of_other_tokens_is_not_passed_off_as_the_rest(path: str) -> None:
    async def scenario() -> None:
        dying, liar = Unsure(dies_after=[20]), Unsure(lies=True)
        async with router_over(dying) as router:
            await liar.start()
            work = asyncio.create_task(frames(router, path, asked(path)))
            await dying.wait_for(path)
            await router.post("/workers", {"url": liar.url})
            got = await work
            await liar.stop()
            assert not dying.dies_after
            if "error" in got[-1]:
                assert "does not continue as it began" in got[-1]["error"]["message"]
            else:
                assert told(path, got) == expected(path, asked(path))

    go(scenario())
