"""What counts as a failed transfer: pages that were to come and did not, and nothing else.

The router's machines are scripted; behind them ranks with real pools and agents fetch from each
other, so that what a fetch says is what fetches say.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import orjson
import pytest
from sglang_memserve.hashing import page_keys
from sglang_memserve.plugin.agent import _merge
from sglang_memserve.protocol.control import FetchRequest
from sglang_memserve.protocol.http import FetchSource
from sglang_memserve.transfer.faulty import Faults, FaultyTransport
from sglang_memserve.transfer.loopback import LoopbackTransport
from sglang_memserve.types import Role
from simulation.router_machines import (
    PAGE,
    WAIT_S,
    Asked,
    Handler,
    Line,
    Machine,
    router_over,
    well,
)
from simulation.test_router_service import KEYS, PROMPT, go
from unit.agents import LIMIT_S, MakeTransport, Rank, put

HALF = PROMPT[: 2 * PAGE]
FAILURES = "memserve_kv_transfer_failures_total{"
PARTIAL = "memserve_kv_transfer_partial_total"
# What is short is computed by D, which needs the pages of whoever has some first.
BYPASS_TOKENS = 100


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="ms-") as name:
        yield Path(name)


def faulty(name: str) -> FaultyTransport:
    return FaultyTransport(LoopbackTransport(name), Faults(read=1.0), seed=1)


def fetched_by(reader: Rank, holder: Rank) -> Handler:
    """``POST /memserve/fetch`` of an instance of one rank."""

    async def fetch(asked: Asked, line: Line) -> None:
        body = asked.json
        keys = [bytes.fromhex(key) for key in body["keys"]]
        wanted = FetchRequest.of(
            "holder", holder.agent.peer_address, keys, body["wait_s"], body["deadline_s"]
        )
        reply = await asyncio.to_thread(reader.agent.fetch(wanted).result, LIMIT_S)
        await line.answer(_merge([reply], [FetchSource(body["source"])], {}, len(keys)))

    return fetch


def counted(text: str) -> tuple[float, dict[str, float]]:
    """Partial fetches, and failures by their reason."""
    lines = [line.rpartition(" ") for line in text.splitlines() if not line.startswith("#")]
    failures = {name: float(value) for name, _, value in lines if name.startswith(FAILURES)}
    (partial_fetches,) = [float(value) for name, _, value in lines if name == PARTIAL]
    return partial_fetches, {name.split('"')[1]: value for name, value in failures.items()}


@pytest.mark.parametrize(
    ("told", "stored", "make", "expected", "words"),
    [
        (HALF, 2, LoopbackTransport, (1, {}), "fetched 2/4: partial"),
        (HALF, 3, LoopbackTransport, (1, {}), "fetched 3/4: partial"),
        (PROMPT, 4, LoopbackTransport, (0, {}), ""),
        (HALF, 0, LoopbackTransport, (0, {"miss": 1}), "fetched 0/4: miss"),
        (HALF, 1, LoopbackTransport, (0, {"miss": 1}), "fetched 1/4: miss"),
        (HALF, 2, faulty, (0, {"transfer_failed": 1}), "fetched 0/4: transfer_failed"),
    ],
    ids=["all-it-has", "more-than-told", "all-asked", "gone", "some-gone", "read-fails"],
)
def test_less_than_the_prompt_is_no_failure_and_less_than_promised_is(
    folder: Path,
    told: list[int],
    stored: int,
    make: MakeTransport,
    expected: tuple[float, dict[str, float]],
    words: str,
) -> None:
    """``told``: what the tree says P has; ``stored``: pages it really has."""

    async def scenario() -> None:
        with ExitStack() as stack:
            holder, reader = Rank(folder, LoopbackTransport), Rank(folder, make)
            stack.callback(holder.close)
            stack.callback(reader.close)
            put(holder.pool, page_keys(PROMPT, PAGE)[:stored])
            p = Machine(Role.PREFILL, holds=(told,))
            d = Machine(Role.DECODE, fetch=fetched_by(reader, holder))
            async with router_over(p, d, bypass_tokens=BYPASS_TOKENS) as router:
                response = await router.post("/generate", {"input_ids": PROMPT})
                assert response.status == 200
                assert not p.to("/generate")
                (fetch,) = d.to("/memserve/fetch")
                assert fetch.json["keys"] == KEYS, "the whole prompt is asked for"
                reason = response.headers["x-memserve-reason"]
                assert words in reason if words else "fetched" not in reason
                text = await router.metrics_with("memserve_recomputed_tokens_total{")
                assert counted(text) == expected
                state = await (await router.get("/dashboard/state")).json()
                (pair,) = state["pairs"]
                assert (pair["partial"], pair["short"]) == (expected[0], sum(expected[1].values()))
                assert state["totals"]["transfer_failures"] == sum(expected[1].values())
                assert state["totals"]["partial_transfers"] == expected[0]

    go(scenario())


async def cannot_compute(asked: Asked, line: Line) -> None:
    await line.answer({"error": "no"}, 500)


@pytest.mark.parametrize(
    ("computes", "stored", "expected"),
    [
        (well, 4, (0, {})),
        (well, 2, (0, {"miss": 1})),
        (cannot_compute, 2, (1, {})),
        (cannot_compute, 1, (0, {"miss": 1})),
    ],
    ids=["all", "some", "not-computed", "not-computed-and-gone"],
)
def test_what_p_computes_is_promised_too(
    folder: Path, computes: Handler, stored: int, expected: tuple[float, dict[str, float]]
) -> None:
    """P has two pages and is asked to compute the others."""

    async def scenario() -> None:
        with ExitStack() as stack:
            holder, reader = (Rank(folder, LoopbackTransport) for _ in range(2))
            stack.callback(holder.close)
            stack.callback(reader.close)
            put(holder.pool, page_keys(PROMPT, PAGE)[:stored])
            fetched = asyncio.Event()

            async def after_the_fetch(asked: Asked, line: Line) -> None:
                await asyncio.wait_for(fetched.wait(), WAIT_S)
                # A failure of P ends D's fetch: the router must have read its answer by then.
                await asyncio.sleep(0.1)
                await computes(asked, line)

            p = Machine(Role.PREFILL, after_the_fetch, holds=(HALF,))
            d = Machine(Role.DECODE, fetch=without_patience(fetched_by(reader, holder), fetched))
            async with router_over(p, d) as router:
                await router.post("/generate", {"input_ids": PROMPT})
                assert p.to("/generate")
                text = await router.metrics_with("memserve_recomputed_tokens_total{")
                assert counted(text) == expected

    go(scenario())


def without_patience(fetch: Handler, ended: asyncio.Event) -> Handler:
    """Does not wait for what will not be computed: these tests have no time to lose."""

    async def at_once(asked: Asked, line: Line) -> None:
        body = asked.json | {"wait_s": 0.0}
        await fetch(Asked(asked.method, asked.path, asked.headers, orjson.dumps(body)), line)
        ended.set()

    return at_once
