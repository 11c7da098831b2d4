"""Schemathesis asks the router everything its OpenAPI document allows, and what it forbids: no 500.

The document is the one the router serves; behind it stand machines that answer everything.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import requests
from hypothesis import HealthCheck, Phase, given, settings
from sglang_memserve.types import Role
from simulation.router_machines import WAIT_S, Machine, router_over

schemathesis = pytest.importorskip("schemathesis", reason="run make setup")

EXAMPLES = 12
# Nobody there: an instance that was added by a test case, or the last one removed by it.
EXPECTED = (502, 503)


@pytest.fixture(scope="module")
def router_url() -> Iterator[str]:
    """A router in a thread of its own."""
    told: list[str] = []
    ready, leave = threading.Event(), threading.Event()

    async def serve() -> None:
        async with router_over(Machine(Role.PREFILL), Machine(Role.DECODE)) as router:
            told.append(router.url)
            ready.set()
            while not leave.is_set():  # noqa: ASYNC110 - set by another thread
                await asyncio.sleep(0.05)

    thread = threading.Thread(target=lambda: asyncio.run(serve()), name="router")
    thread.start()
    try:
        assert ready.wait(WAIT_S), "the router did not start"
        yield told[0]
    finally:
        leave.set()
        thread.join(WAIT_S)
        assert not thread.is_alive()


def test_the_document_names_the_routers_own_paths(router_url: str) -> None:
    paths = requests.get(f"{router_url}/openapi.json", timeout=10).json()["paths"]
    for path in ("/generate", "/v1/chat/completions", "/v1/messages", "/workers", "/v1/loads"):
        assert path in paths


@pytest.mark.parametrize("mode", ["positive", "negative"])
def test_no_request_makes_the_router_break(router_url: str, mode: str) -> None:
    document = schemathesis.openapi.from_url(f"{router_url}/openapi.json")
    operations = [result.ok() for result in document.get_all_operations()]
    assert len(operations) > 30
    for operation in operations:
        if mode == "negative" and not (operation.body or operation.query):
            continue  # there is nothing to get wrong

        @given(case=operation.as_strategy(generation_mode=schemathesis.GenerationMode(mode)))
        @settings(
            max_examples=EXAMPLES,
            deadline=None,
            phases=[Phase.generate, Phase.shrink],
            suppress_health_check=list(HealthCheck),
        )
        def ask(case: Any) -> None:
            response = case.call(base_url=router_url, timeout=WAIT_S)
            status = response.status_code
            assert status < 500 or status in EXPECTED, (case.as_curl_command(), response.text)

        ask()
    assert requests.get(f"{router_url}/liveness", timeout=10).ok
