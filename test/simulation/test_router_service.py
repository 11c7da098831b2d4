"""The router in front of machines that work, as far as the network can tell: what goes where."""

from __future__ import annotations

import asyncio
import io
import socket
from collections.abc import Coroutine
from typing import Any
from urllib.parse import quote

import orjson
import pytest
from sglang_memserve.hashing import namespace_seed, page_keys
from sglang_memserve.router.config import StaticInstance
from sglang_memserve.router.http.limits import Limits, StepDeadlines
from sglang_memserve.types import InstanceId, Role
from simulation.router_machines import (
    MODEL,
    PAGE,
    WAIT_S,
    Asked,
    Line,
    Machine,
    fetch_of,
    generated,
    router_over,
    well,
)
from yarl import URL

PROMPT = list(range(1, 4 * PAGE + 2))  # four full pages and a token
KEYS = [key.hex() for key in page_keys(PROMPT, PAGE)]


def go(scenario: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(scenario, 60))


def test_prefill_on_p_fetch_to_d_and_the_clients_own_bytes_to_d() -> None:
    async def scenario() -> None:
        async def cached(asked: Asked, line: Line) -> None:
            await line.answer(generated(asked, cached=8))

        p, d = Machine(Role.PREFILL, cached), Machine(Role.DECODE)
        async with router_over(p, d) as router:
            sent = b'{ "input_ids": %b, "odd":  1.50, "stream": true}' % orjson.dumps(PROMPT)
            response = await router.http.post(
                URL(f"{router.url}/generate?x=1%2F2", encoded=True),
                data=sent,
                headers={"x-request-id": "mine", "Content-Type": "application/json"},
            )
            assert response.status == 200
            assert response.headers["x-request-id"] == "mine"
            assert response.headers["x-memserve-prefill"] == p.url
            assert response.headers["x-memserve-decode"] == d.url
            assert response.headers["x-memserve-cached-tokens"] == "8"
            [at_p] = p.to("/generate")
            assert at_p.json["input_ids"] == PROMPT
            assert at_p.json["sampling_params"] == {"max_new_tokens": 0}
            [fetch] = d.to("/memserve/fetch")
            assert (fetch.json["source"], fetch.json["keys"]) == (p.url, KEYS)
            assert fetch.json["source_ranks"] == ["tcp://127.0.0.1:9"]
            assert fetch.json["hold_s"] == StepDeadlines().hold_s > 0
            [at_d] = d.to("/generate")
            assert at_d.body == sent
            assert at_d.path == "/generate?x=1%2F2"
            assert at_d.headers["x-request-id"] == "mine"

    go(scenario())


def test_a_request_that_is_not_streamed_gets_a_rid_and_nothing_else() -> None:
    async def scenario() -> None:
        d = Machine(Role.BOTH)
        async with router_over(d) as router:
            sent = b' {"input_ids": %b, "b": 2}' % orjson.dumps(PROMPT)
            await router.http.post(f"{router.url}/generate", data=sent)
            [asked] = d.to("/generate")
            rid = asked.json["rid"]
            assert asked.body == sent.replace(b"{", b'{"rid":"%b",' % rid.encode(), 1)

    go(scenario())


def test_p_is_not_asked_to_compute_what_it_holds() -> None:
    async def scenario() -> None:
        p, d = Machine(Role.PREFILL, holds=(PROMPT,)), Machine(Role.DECODE)
        async with router_over(p, d) as router:
            response = await router.post("/generate", {"input_ids": PROMPT})
            assert p.to("/generate") == []
            assert len(d.to("/memserve/fetch")) == 1
            assert response.headers["x-memserve-cached-tokens"] == "16"
            # The one token that was left.
            assert response.headers["x-memserve-prefill"] == d.url

    go(scenario())


def test_d_that_holds_everything_is_asked_alone() -> None:
    async def scenario() -> None:
        p, d = Machine(Role.PREFILL), Machine(Role.DECODE, holds=(PROMPT,))
        async with router_over(p, d) as router:
            response = await router.post("/generate", {"input_ids": PROMPT})
            assert p.to("/generate") == d.to("/memserve/fetch") == []
            assert response.headers["x-memserve-cached-tokens"] == "16"
            # Another tenant's equal prompt shares nothing with it.
            salted = await router.post("/generate", {"input_ids": PROMPT, "cache_salt": "b"})
            assert salted.headers["x-memserve-cached-tokens"] == "0"
            [at_p] = p.to("/generate")
            assert at_p.json["cache_salt"] == "b"
            seed = namespace_seed(None, "b")
            [fetch] = d.to("/memserve/fetch")
            assert fetch.json["keys"] == [key.hex() for key in page_keys(PROMPT, PAGE, seed)]

    go(scenario())


def test_a_batch_is_prefilled_in_one_call_and_fetched_prompt_by_prompt() -> None:
    async def scenario() -> None:
        p, d = Machine(Role.PREFILL), Machine(Role.DECODE)
        async with router_over(p, d) as router:
            batch = [PROMPT, PROMPT[:9], [7] * 9]
            body = {"prompt": batch, "model": MODEL}
            assert (await router.post("/v1/completions", body)).status == 200
            [at_p] = p.to("/generate")
            assert at_p.json["input_ids"] == batch
            fetched = sorted(len(asked.json["keys"]) for asked in d.to("/memserve/fetch"))
            assert fetched == [2, 2, 4]

    go(scenario())


def test_announcing_a_prefix_ends_at_p() -> None:
    async def scenario() -> None:
        p, d = Machine(Role.PREFILL), Machine(Role.DECODE)
        async with router_over(p, d) as router:
            body = {"input_ids": PROMPT, "sampling_params": {"max_new_tokens": 0}}
            response = await router.post("/generate", body)
            assert response.headers["x-memserve-prefill"] == p.url
            assert "x-memserve-decode" not in response.headers
            assert d.to("/generate") == d.to("/memserve/fetch") == []

    go(scenario())


def test_without_a_tokenizer_a_text_goes_straight_to_d() -> None:
    async def scenario() -> None:
        p, d = Machine(Role.PREFILL), Machine(Role.DECODE)
        async with router_over(p, d) as router:
            response = await router.post("/generate", {"text": "hello"})
            assert response.status == 200
            assert "no tokenizer" in response.headers["x-memserve-reason"]
            assert p.to("/generate") == []
            image = {"text": "a", "image_data": "x"}
            response = await router.post("/generate", image)
            assert response.headers["x-memserve-reason"] == "direct: multimodal"

    go(scenario())


@pytest.mark.parametrize("sizes", [[1, 1, 1], [5000, 1, 70_000], [300_000]])
def test_streams_pass_byte_for_byte(sizes: list[int]) -> None:
    async def scenario() -> None:
        parts = [bytes([65 + i]) * size for i, size in enumerate(sizes)] + [b"data: [DONE]\n\n"]

        async def stream(asked: Asked, line: Line) -> None:
            await line.start_stream()
            for part in parts:
                await line.chunk(part)
                await asyncio.sleep(0.002)
            await line.end_stream()

        d = Machine(Role.BOTH, stream)
        async with router_over(d) as router:
            response = await router.post("/generate", {"input_ids": PROMPT, "stream": True})
            assert await response.read() == b"".join(parts)
            assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
            assert response.headers["x-own"] == "kept"

    go(scenario())


def test_a_first_chunk_is_passed_on_while_the_rest_is_still_to_come() -> None:
    async def scenario() -> None:
        seen = asyncio.Event()

        async def stream(asked: Asked, line: Line) -> None:
            await line.start_stream()
            await line.chunk(b"data: 1\n\n")
            await asyncio.wait_for(seen.wait(), WAIT_S)
            await line.end_stream()

        d = Machine(Role.BOTH, stream)
        async with router_over(d) as router:
            body = {"input_ids": PROMPT, "stream": True}
            async with router.http.post(f"{router.url}/generate", json=body) as response:
                assert await response.content.readany() == b"data: 1\n\n"
                seen.set()
                assert await response.content.readany() == b""
            assert router.server is not None
            [connection] = router.server.server_state.connections
            sock = connection.transport.get_extra_info("socket")
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)

    go(scenario())


def test_errors_of_the_instance_are_the_clients() -> None:
    async def scenario() -> None:
        async def refuse(asked: Asked, line: Line) -> None:
            await line.answer({"object": "error", "message": "no"}, 400)

        d = Machine(Role.BOTH, refuse)
        async with router_over(d) as router:
            response = await router.post("/generate", {"input_ids": PROMPT})
            assert response.status == 400
            assert await response.json() == {"object": "error", "message": "no"}

    go(scenario())


def test_bad_requests_are_the_routers_own_to_refuse() -> None:
    async def scenario() -> None:
        d = Machine(Role.BOTH)
        async with router_over(d, limits=Limits(max_body_bytes=1000)) as router:
            broken = await router.http.post(f"{router.url}/generate", data=b'{"text": ')
            assert broken.status == 400
            assert (await broken.json())["type"] == "Bad Request"
            large = await router.http.post(f"{router.url}/generate", data=b"x" * 1001)
            assert large.status == 413

            async def unannounced() -> Any:
                for _ in range(11):
                    yield b"x" * 100

            large = await router.http.post(f"{router.url}/generate", data=unannounced())
            assert large.status == 413
            chat = {"model": "gpt-x", "messages": [{"role": "user", "content": "x"}]}
            for path in ("/v1/chat/completions", "/v1/embeddings"):
                unknown = await router.post(path, chat)
                assert unknown.status == 404
                assert (await unknown.json())["error"]["code"] == "model_not_found"
            for name in (MODEL, "/nowhere/tiny", "default"):
                chat["model"] = name
                assert (await router.post("/v1/chat/completions", chat)).status == 200

    go(scenario())


def test_too_many_requests_at_once() -> None:
    async def scenario() -> None:
        release = asyncio.Event()

        async def slow(asked: Asked, line: Line) -> None:
            await asyncio.wait_for(release.wait(), WAIT_S)
            await well(asked, line)

        d = Machine(Role.BOTH, slow)
        async with router_over(d, limits=Limits(max_in_flight=1, max_waiting=0)) as router:
            first = asyncio.create_task(router.post("/generate", {"input_ids": PROMPT}))
            await d.wait_for("/generate")
            second = await router.post("/generate", {"input_ids": PROMPT})
            assert (second.status, second.headers["retry-after"]) == (429, "1")
            release.set()
            assert (await first).status == 200

    go(scenario())


def test_nobody_to_serve_says_why() -> None:
    async def scenario() -> None:
        gone = StaticInstance(InstanceId("http://127.0.0.1:9"))
        async with router_over(extra=(gone,)) as router:
            response = await router.post("/generate", {"input_ids": PROMPT})
            assert response.status == 503
            reasons = {one["url"]: one["reason"] for one in (await response.json())["instances"]}
            assert reasons["http://127.0.0.1:9"].startswith("starting")
            assert (await router.get("/health")).status == 503
            assert (await router.get("/readiness")).status == 503

    go(scenario())


def test_without_a_decode_instance_the_others_serve() -> None:
    async def scenario() -> None:
        p = Machine(Role.PREFILL)
        async with router_over(p) as router:
            response = await router.post("/generate", {"input_ids": PROMPT})
            assert response.status == 200
            assert response.headers["x-memserve-decode"] == p.url
            assert "no decode instance" in response.headers["x-memserve-reason"]
            assert (await router.get("/health")).status == 200
            ready = await (await router.get("/readiness")).json()
            assert (ready["ready"], ready["can_prefill"], ready["can_decode"]) == (
                True,
                True,
                False,
            )

    go(scenario())


def test_a_text_that_cannot_fit_is_refused_at_once() -> None:
    async def scenario() -> None:
        d = Machine(Role.DECODE)
        async with router_over(d) as router:
            body = io.BytesIO(b'{"text": "%b"}' % (b"a" * 20_000_000))
            async with router.http.post(f"{router.url}/generate", data=body) as response:
                assert response.status == 400
                assert "context length" in await response.text()
            assert not [asked for asked in d.asked if asked.path == "/generate"]

    go(scenario())


def test_deep_nesting_is_the_senders_fault() -> None:
    async def scenario() -> None:
        d = Machine(Role.DECODE)
        async with router_over(d) as router:
            nested = b'{"text":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
            for path in ("/generate", "/memserve/register", "/memserve/heartbeat"):
                url = f"{router.url}{path}"
                async with router.http.post(url, data=nested) as response:
                    assert response.status == 400, path

    go(scenario())


def test_the_key_is_asked_for_and_passed_on() -> None:
    async def scenario() -> None:
        p, d = Machine(Role.PREFILL), Machine(Role.DECODE)
        async with router_over(p, d, api_key="secret") as router:
            assert (await router.post("/generate", {"input_ids": PROMPT})).status == 200
            for machine in (p, d):
                assert all(a.headers["authorization"] == "Bearer secret" for a in machine.asked)
            wrong = {"Authorization": "Bearer other"}
            for path in ("/generate", "/workers", "/memserve/register", "/anything"):
                response = await router.post(path, {}, headers=wrong)
                assert response.status == 401, path
            for path in ("/health", "/readiness", "/liveness", "/metrics"):
                assert (await router.get(path, headers=wrong)).status == 200, path

    go(scenario())


def test_workers_are_listed_added_and_removed() -> None:
    async def scenario() -> None:
        p, d = Machine(Role.PREFILL), Machine(Role.DECODE)
        await d.start()
        async with router_over(p) as router:
            assert (await router.post("/workers", {"url": d.url, "role": "decode"})).status == 202
            async with asyncio.timeout(WAIT_S):
                while not (await (await router.get("/readiness")).json())["can_decode"]:  # noqa: ASYNC110
                    await asyncio.sleep(0.02)  # another server says so
            listed = await (await router.get("/workers")).json()
            found = {one["url"]: (one["role"], one["state"]) for one in listed["workers"]}
            assert found == {p.url: ("prefill", "ready"), d.url: ("decode", "ready")}
            path = f"{router.url}/workers/{quote(d.url, safe='')}"
            assert (await router.http.delete(path)).status == 200
            assert (await router.http.delete(path)).status == 404
            assert (await router.post("/workers", {"url": "nonsense"})).status == 400
            assert not (await (await router.get("/readiness")).json())["can_decode"]
        await d.stop()

    go(scenario())


def test_fan_outs_and_what_is_passed_through() -> None:
    async def scenario() -> None:
        async def echo(asked: Asked, line: Line) -> None:
            if asked.path == "/server_info":
                await line.answer({"internal_states": [{}], "version": "x"})
            else:
                await line.answer(asked.body or b"{}", 207)

        p, d = Machine(Role.PREFILL, echo), Machine(Role.DECODE, echo)
        async with router_over(p, d) as router:
            assert (await router.post("/flush_cache", {})).status == 200
            assert (await router.post("/abort_request", {"rid": "r"})).status == 200
            assert (await router.post("/abort_request", {})).status == 400
            for machine in (p, d):
                assert len(machine.to("/flush_cache")) == 1
                assert machine.to("/abort_request")[0].json == {"rid": "r"}
            info = await (await router.get("/server_info")).json()
            assert info["internal_states"] == [{}]
            assert [one["url"] for one in info["prefill"]] == [p.url]
            assert [one["url"] for one in info["decode"]] == [d.url]
            response = await router.post("/v1/rerank?a=b", {"query": "q"})
            assert response.status == 207
            assert d.to("/v1/rerank")[0].path == "/v1/rerank?a=b"
            assert (await router.http.request("PATCH", f"{router.url}/some/route")).status == 207
            tree = await (await router.get("/memserve/tree")).json()
            assert tree["sources"] == {p.url: "exact", d.url: "exact"}

    go(scenario())


@pytest.mark.parametrize("kind", ["application/x-www-form-urlencoded", None, "APPLICATION/JSON"])
def test_what_was_read_as_json_is_passed_on_as_json(kind: str | None) -> None:
    """curl calls a body a form unless it is told otherwise, and SGLang would refuse it after all
    the work of prefill."""

    async def scenario() -> None:
        d = Machine(Role.DECODE)
        async with router_over(d) as router:
            headers = {} if kind is None else {"content-type": kind}
            body = orjson.dumps({"input_ids": PROMPT, "sampling_params": {"max_new_tokens": 1}})
            response = await router.http.post(
                f"{router.url}/generate",
                data=body,
                headers=headers,
                skip_auto_headers=("content-type",),
            )
            assert response.status == 200, await response.text()
            (asked,) = d.to("/generate")
            assert asked.headers["content-type"].lower() == "application/json"
            assert asked.body == body or asked.json["input_ids"] == PROMPT

    go(scenario())


@pytest.mark.parametrize("path", ["/memserve/pool", "/memserve/match", "/memserve/nothing"])
def test_what_is_an_instances_own_is_not_answered_for_it(path: str) -> None:
    async def scenario() -> None:
        d = Machine(Role.DECODE)
        async with router_over(d) as router:
            response = await router.post(path, {"dram": "1GiB"})
            assert response.status == 404 and "ask an instance" in await response.text()
            assert not d.to(path)

    go(scenario())


def test_what_was_decided_is_counted() -> None:
    async def scenario() -> None:
        p, d = Machine(Role.PREFILL, holds=(PROMPT,)), Machine(Role.DECODE, fetch=fetch_of(3))
        async with router_over(p, d) as router:
            response = await router.post("/generate", {"input_ids": PROMPT})
            assert response.headers["x-memserve-cached-tokens"] == "12"
            # The request is counted right after its last byte.
            counted = 'memserve_requests_total{code="200",route="/generate"} 1.0'
            text = await router.metrics_with(counted)
            who = 'model="tiny",policy="round-robin",role="decode"'
            pair = f'{{dst="{d.url}",src="{p.url}"}}'
            for line in (
                f"memserve_prompt_tokens_total{{{who}}} 17.0",
                f"memserve_fleet_best_match_tokens_total{{{who}}} 16.0",
                f"memserve_engine_cached_tokens_total{{{who}}} 12.0",
                f"memserve_recomputed_tokens_total{{{who}}} 5.0",
                f"memserve_transferred_tokens_total{pair} 12.0",
                'memserve_kv_transfer_failures_total{reason="missing"} 1.0',
                f'memserve_tree_blocks{{instance="{p.url}",tier="dram"}} 4.0',
                f'memserve_source_state{{instance="{d.url}",state="exact"}} 1.0',
            ):
                assert line in text, line

    go(scenario())
