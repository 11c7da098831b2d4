"""The dashboard in a real browser, over a real router before scripted instances."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from browser.chromium import Page, installed, page
from sglang_memserve.types import Role
from simulation.router_machines import PAGE, Asked, Line, Machine, Router, generated, router_over

PICTURE_BYTES = 20_000


def go(scenario: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(scenario, 120))


@dataclass
class Busy(Machine):
    """A machine that says how full it is."""

    fill: float = 0.5

    async def _route(self, asked: Asked, line: Line) -> None:
        path = asked.path.split("?")[0]
        if path == "/memserve/stats":
            total = 4096.0
            rank = {
                "total_blocks": total,
                "free_blocks": total * (1 - self.fill),
                "ready_blocks": total * self.fill,
                "block_bytes": 368_640.0,
                "evicted_pages_total": 77.0,
            }
            await line.answer({"event_seq": -1, "instance": {}, "ranks": [rank]})
        elif path == "/v1/loads":
            load = {
                "num_running_reqs": int(8 * self.fill),
                "num_waiting_reqs": 0,
                "num_used_tokens": int(20_000 * self.fill),
                "max_total_num_tokens": 20_000,
            }
            await line.answer({"loads": [load]})
        else:
            await super()._route(asked, line)


def prompts() -> list[list[int]]:
    """A system prompt, three documents below it, questions below those."""
    system = list(range(1, 40 * PAGE + 1))
    documents = [system + [1000 + d] * (30 + 25 * d) * PAGE for d in range(3)]
    questions = [
        document + [2000 + 10 * d + q] * (6 + 4 * q) * PAGE
        for d, document in enumerate(documents)
        for q in range(4)
    ]
    return [*documents, *questions, [5] * 35 * PAGE, [6] * 18 * PAGE]


def machines() -> list[Machine]:
    asked = prompts()

    async def slow(request: Asked, line: Line) -> None:
        await asyncio.sleep(0.02)
        await line.answer(generated(request, cached=8))

    return [
        Busy(Role.PREFILL, slow, tuple(asked[::2]), fill=0.62),
        Busy(Role.PREFILL, slow, tuple(asked[1:9]), fill=0.31),
        Busy(Role.DECODE, slow, tuple(asked[4:]), fill=0.97),
        Busy(Role.BOTH, slow, (asked[0], asked[-1]), fill=0.08),
    ]


async def some_traffic(router: Router, count: int = 24, **more: Any) -> None:
    asked = prompts()
    for i in range(count):
        ids = asked[i % len(asked)] + [7000 + i] * (3 + 5 * (i % 4))
        assert (await router.post("/generate", {"input_ids": ids}, **more)).status == 200


async def ready(browser: Page, url: str) -> None:
    await browser.open(f"{url}/dashboard")
    await browser.until("document.querySelectorAll('#tree .run').length > 8")
    await browser.until("document.querySelectorAll('#requests tbody tr').length > 5")


@pytest.fixture(scope="module", autouse=True)
def browser_installed() -> str:
    return installed()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_shows_what_there_is(tmp_path: Path, scheme: str) -> None:
    async def scenario() -> None:
        async with (
            router_over(*machines(), policy="prefix") as router,
            page(tmp_path / "profile") as browser,
        ):
            await some_traffic(router)
            await browser.theme(scheme)
            await ready(browser, router.url)
            await browser.until("document.querySelectorAll('#members tbody tr').length === 4")
            members = await browser.value("document.querySelector('#members').innerText")
            for word in ("prefill", "decode", "both", "exact", "62 %", "97 %"):
                assert word in members, members
            await browser.until("document.querySelectorAll('#lanes .lane').length > 0")
            requests = await browser.value("document.querySelector('#requests').innerText")
            assert "200" in requests
            assert await browser.value("document.querySelectorAll('#tiles div').length") == 6
            # A click on a run says who holds it.
            await browser.value(
                "document.querySelector('#tree .run')"
                ".dispatchEvent(new MouseEvent('click', {bubbles: true}))"
            )
            detail = await browser.value("document.querySelector('#detail').innerText")
            for word in ("Held by", "Tokens", "Hits", "Bytes, a copy"):
                assert word in detail, detail
            picture = await browser.picture(tmp_path / f"dashboard-{scheme}.png")
            assert len(picture) > PICTURE_BYTES
            assert not browser.complaints, browser.complaints

    go(scenario())


def test_the_tree_is_walked_with_keys(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with router_over(*machines()) as router, page(tmp_path / "profile") as browser:
            await some_traffic(router, 6)
            await ready(browser, router.url)
            focused = "document.activeElement.getAttribute('aria-label')"
            await browser.value("document.querySelector('#tree .run[tabindex=\"0\"]').focus()")
            seen = {await browser.value(focused)}
            for key in ("ArrowDown", "ArrowRight", "ArrowLeft", "ArrowUp"):
                await browser.call("Input.dispatchKeyEvent", type="keyDown", key=key)
                seen.add(await browser.value(focused))
            assert len(seen) >= 3, seen
            assert None not in seen
            await browser.call("Input.dispatchKeyEvent", type="keyDown", key="Enter")
            await browser.until("!document.querySelector('#whole').hidden")
            await browser.call("Input.dispatchKeyEvent", type="keyDown", key="Escape")
            await browser.until("document.querySelector('#whole').hidden")
            assert not browser.complaints, browser.complaints

    go(scenario())


def test_the_page_asks_for_a_key_and_shows_prompts_to_the_admin_only(tmp_path: Path) -> None:
    async def scenario() -> None:
        settings: dict[str, Any] = {"api_key": "api", "admin_key": "admin"}
        async with (
            router_over(*machines(), **settings) as router,
            page(tmp_path / "profile") as browser,
        ):
            await some_traffic(router)
            await browser.open(f"{router.url}/dashboard")
            await browser.until("!document.querySelector('#ask').hidden")
            for key, shown in (("nope", False), ("api", False), ("admin", True)):
                await browser.value(
                    "sessionStorage.removeItem('memserve-key'),"
                    f"document.querySelector('#key').value = '{key}',"
                    "document.querySelector('#ask').requestSubmit()"
                )
                if key == "nope":
                    await browser.until("document.querySelector('#refused').innerText")
                    continue
                await browser.until("document.querySelectorAll('#requests tbody tr').length > 5")
                excerpts = await browser.value("document.querySelectorAll('.excerpt').length")
                assert bool(excerpts) is shown, key
                await browser.value("sessionStorage.clear(), location.reload()")
                await browser.until("!document.querySelector('#ask').hidden")

    go(scenario())
