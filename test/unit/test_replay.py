"""The benchmark's client: causal order, own times, and what becomes of answers that do not come."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import pytest
import uvloop
from aiohttp import web
from sglang_memserve.errors import ConfigError

from benchmark.results import merged
from benchmark.serving.__main__ import Plan, in_turns
from benchmark.serving.proxy import Proxy
from benchmark.serving.replay import Sample, Target, replay
from benchmark.serving.setups import SETUPS, Salt, choose
from benchmark.serving.summary import difference, quantile, summarize
from benchmark.tables import table
from benchmark.workloads.request import Message, Turn, Workload

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def turn(conversation: str, number: int, after: int | None, arrival_s: float = 0.0) -> Turn:
    return Turn(
        conversation=conversation,
        turn=number,
        arrival_s=arrival_s,
        messages=(Message("user", f"{conversation}{number}"),),
        max_tokens=2,
        after=after,
        session=conversation,
    )


@dataclass(slots=True)
class Server:
    """Answers two tokens, ``x`` and the last message's text; says nothing to "silent", breaks
    "broken" off. ``asked``: bodies in the order of their arrival."""

    asked: list[dict] = field(default_factory=list)
    answered: int = 0
    url: str = ""

    async def chat(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        body["answered_before"] = self.answered
        self.asked.append(body)
        said = body["messages"][-1]["content"]
        if said.startswith("refused"):
            return web.json_response({"error": "no"}, status=503)
        response = web.StreamResponse()
        await response.prepare(request)
        if said.startswith("silent"):
            await asyncio.sleep(30)
        frames: list[dict] = [{"choices": [{"delta": {"role": "assistant", "content": ""}}]}]
        frames += [{"choices": [{"delta": {"content": text}}]} for text in ("x", said)]
        details = {"cached_tokens": 3}
        usage = {"prompt_tokens": 7, "completion_tokens": 2, "prompt_tokens_details": details}
        frames.append({"choices": [], "usage": usage})
        for frame in frames[: 2 if said.startswith("broken") else None]:
            await response.write(f"data: {json.dumps(frame)}\n\n".encode())
        if not said.startswith("broken"):
            await response.write(b"data: [DONE]\n\n")
        self.answered += 1
        return response


async def serve(handler: Handler) -> tuple[web.AppRunner, str]:
    app = web.Application()
    app.router.add_post("/v1/chat/completions", handler)
    return await listen(app)


async def listen(app: web.Application) -> tuple[web.AppRunner, str]:
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    return runner, f"http://127.0.0.1:{port}"


def run(*turns: Turn, salt: Salt = Salt.NONE, limit_s: float = 20.0) -> tuple[Server, list[Sample]]:
    server = Server()

    async def go() -> list[Sample]:
        runner, url = await serve(server.chat)
        try:
            target = Target(url, "m", salt)
            return await replay(target, Workload("w", "", turns), 1.0, limit_s)
        finally:
            await runner.cleanup()

    # SGLang makes uvloop the loop of the process it is imported in; its timers may end early.
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as loop:
        return server, loop.run(go())


def test_a_turn_waits_for_the_answer_it_comes_after() -> None:
    server, samples = run(turn("a", 0, None), turn("b", 0, None), turn("a", 1, 0), turn("a", 2, 0))
    assert [sample.error for sample in samples] == [""] * 4
    late = [body for body in server.asked if len(body["messages"]) > 1]
    for body, said in zip(late, ("a1", "a2"), strict=True):
        assert [m["content"] for m in body["messages"]] == ["a0", "xa0", said]
        assert body["answered_before"] >= 1
    assert all(body["min_tokens"] == body["max_tokens"] == 2 for body in server.asked)
    assert {body["session_id"] for body in server.asked} == {"a", "b"}


def test_a_turn_waits_for_its_time() -> None:
    _, (first, second) = run(turn("a", 0, None), turn("a", 1, 0, arrival_s=0.3))
    assert max(0.3, first.done_s) <= second.sent_s
    assert 0 < second.ttft_s <= second.jct_s
    assert (second.prompt_tokens, second.cached_tokens, second.generated_tokens) == (7, 3, 2)


@pytest.mark.parametrize(
    ("name", "says"),
    [("refused", "503"), ("broken", "ended early"), ("silent", "not answered in time")],
)
def test_what_fails_is_counted_with_all_that_follows_it(name: str, says: str) -> None:
    limit_s = 1.0 if name == "silent" else 20.0
    _, samples = run(turn(name, 0, None), turn(name, 1, 0), turn("ok", 0, None), limit_s=limit_s)
    assert says in samples[0].error
    assert samples[1].error
    result = summarize(samples)
    assert (result["requests"], result["failed"], result["ttft_ms"]["p99"] > 0) == (3, 2, True)


def test_salted_requests_share_nothing() -> None:
    server, _ = run(turn("a", 0, None), turn("a", 1, 0), salt=Salt.EACH_REQUEST)
    assert len({body["cache_salt"] for body in server.asked}) == 2


def test_figures_of_known_samples() -> None:
    samples = [Sample("c", n, 0.0, 0.1 * (n + 1), 1.1 + n, 10, 5, 11) for n in range(11)]
    result = summarize(samples)
    assert result["ttft_ms"] == {"mean": 600.0, "p50": 600.0, "p90": 1000.0, "p99": 1090.0}
    assert (result["cached_share"], result["generated_tokens"]) == (0.5, 121)
    assert quantile([1.0], 0.99) == 1.0
    assert difference({"a": 1.0}, {"a": 3.0, "b": 2.0}) == {"a": 2, "b": 2}
    run_of = {"workload": "w", "rate": 1.0, "setup": "s", **result}
    other = {**run_of, "ttft_ms": {**result["ttft_ms"], "mean": 1000.0}}
    (both,) = merged([run_of, other])
    assert both["ttft_ms"]["mean"] == 800.0
    assert len(both["samples"]["jct_ms"]) == 22
    assert "| w | 1 | `s` | 0.80 | 0.60 |" in table([both])


def test_setups_of_one_fleet_come_together() -> None:
    chosen = choose("pool,stock:chat+own,no-pool")
    assert [one.takes("react") for one in chosen] == [True, True, False]
    names = [one.setup.name for one in chosen]
    assert names == ["pool", "no-pool", "stock"]
    assert all(setup.about for setup in SETUPS.values())
    with pytest.raises(ConfigError, match="no set-up 'best'"):
        choose("stock,best")


def test_set_ups_take_turns_and_every_second_round_the_other_way_round() -> None:
    workloads = tuple(Workload(name, "", (turn("a", 0, None),)) for name in "vw")
    plan = Plan(workloads, (1.0,), rounds=2, limit_s=1.0)
    turns = in_turns(choose("pool,no-pool:w,stock"), plan)
    assert [(number, workload.name, one.setup.name) for number, workload, one in turns] == [
        (0, "v", "pool"),
        (0, "v", "stock"),
        (0, "w", "pool"),
        (0, "w", "no-pool"),
        (0, "w", "stock"),
        (1, "v", "stock"),
        (1, "v", "pool"),
        (1, "w", "stock"),
        (1, "w", "no-pool"),
        (1, "w", "pool"),
    ]


def test_the_plain_proxy_keeps_a_client_where_it_is() -> None:
    servers = [Server(), Server()]

    async def go() -> list[Sample]:
        upstreams = [await serve(server.chat) for server in servers]
        proxy, url = await listen(Proxy([url for _, url in upstreams], [], []).application())
        turns = [turn(name, 0, None) for name in "abcd"] + [turn(name, 1, 0) for name in "abcd"]
        try:
            return await replay(Target(url, "m"), Workload("w", "", tuple(turns)), 1.0, 20.0)
        finally:
            for runner in (proxy, *(runner for runner, _ in upstreams)):
                await runner.cleanup()

    samples = asyncio.run(go())
    assert [sample.error for sample in samples] == [""] * 8
    homes = [{body["messages"][0]["content"] for body in server.asked} for server in servers]
    assert not homes[0] & homes[1]
    assert len(homes[0] | homes[1]) == 4


def test_the_plain_proxy_hands_over_what_prefill_says() -> None:
    async def prefill(request: web.Request) -> web.StreamResponse:
        body = await request.json()
        assert (body["max_tokens"], body["stream"]) == (1, False)
        assert body["kv_transfer_params"]["do_remote_decode"]
        return web.json_response({"kv_transfer_params": {"remote_block_ids": [4]}})

    decode = Server()

    async def go() -> list[Sample]:
        (one, first), (two, second) = await serve(prefill), await serve(decode.chat)
        proxy, url = await listen(Proxy([], [first], [second]).application())
        try:
            workload = Workload("w", "", (turn("a", 0, None),))
            return await replay(Target(url, "m"), workload, 1.0, 20.0)
        finally:
            for runner in (proxy, one, two):
                await runner.cleanup()

    (sample,) = asyncio.run(go())
    assert not sample.error
    assert decode.asked[0]["kv_transfer_params"] == {"remote_block_ids": [4]}
