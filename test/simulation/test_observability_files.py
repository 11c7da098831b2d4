"""Files for Grafana and Prometheus against what a router exports; ``top`` against a router."""

from __future__ import annotations

import asyncio
import json
import re
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from sglang_memserve import top
from sglang_memserve.errors import PeerError, PeerUnreachable
from sglang_memserve.types import Role
from simulation.router_machines import PAGE, WAIT_S, Machine, Router, router_over

FOLDER = Path(__file__).parents[2] / "docs" / "observability"
METRIC = re.compile(r"memserve_[a-z_]+")
PROMPT = list(range(1, 4 * PAGE + 2))


def go(scenario: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(scenario, 60))


def expressions() -> list[str]:
    board = json.loads((FOLDER / "grafana-dashboard.json").read_text())
    return [target["expr"] for panel in board["panels"] for target in panel["targets"]]


async def names(router: Router) -> set[str]:
    """Families a router exports, also those without a sample yet, and their samples' names."""
    text = await (await router.get("/metrics")).text()
    found: set[str] = set()
    for family in text_string_to_metric_families(text):
        found |= {family.name, f"{family.name}_total", *(s.name for s in family.samples)}
        if family.type == "histogram":
            found |= {f"{family.name}{end}" for end in ("_bucket", "_sum", "_count")}
    return found


def test_every_metric_in_the_files_is_exported() -> None:
    asked = {name for expression in expressions() for name in METRIC.findall(expression)}
    assert len(asked) > 20

    async def scenario() -> None:
        async with router_over(Machine(Role.BOTH, holds=(PROMPT,))) as router:
            assert (await router.post("/generate", {"input_ids": PROMPT})).status == 200
            assert not asked - await names(router)

    go(scenario())


def test_the_board_is_laid_out_without_overlaps() -> None:
    board = json.loads((FOLDER / "grafana-dashboard.json").read_text())
    taken: set[tuple[int, int]] = set()
    for panel in board["panels"]:
        at = panel["gridPos"]
        cells = {(at["x"] + dx, at["y"] + dy) for dx in range(at["w"]) for dy in range(at["h"])}
        assert not taken & cells, panel["title"]
        assert at["x"] + at["w"] <= 24
        taken |= cells
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])


def test_what_prometheus_scrapes_is_served() -> None:
    jobs = yaml.safe_load((FOLDER / "prometheus.yml").read_text())["scrape_configs"]

    async def scenario() -> None:
        async with router_over(Machine(Role.BOTH)) as router:
            for job in jobs:
                answer = await router.get(job.get("metrics_path", "/metrics"))
                assert answer.status == 200
                assert list(text_string_to_metric_families(await answer.text()))

    go(scenario())


# -- top --


async def run_top(*arguments: str) -> tuple[int, str, str]:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "sglang_memserve.top",
        *arguments,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={"PATH": "", "COLUMNS": "160"},
    )
    out, err = await asyncio.wait_for(process.communicate(), WAIT_S)
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


def test_top_prints_one_frame_for_scripts() -> None:
    async def scenario() -> None:
        p, d = Machine(Role.PREFILL, holds=(PROMPT,)), Machine(Role.DECODE)
        async with router_over(p, d, api_key="k") as router:
            await router.post("/generate", {"input_ids": PROMPT})
            status, out, err = await run_top("--once", "--url", router.url, "--key", "k")
            assert (status, err) == (0, "")
            for word in ("prefill", "decode", "ready", "exact", "2 members", "requests"):
                assert word in out, out
            status, out, err = await run_top("--once", "--url", router.url)
            assert (status, out) == (1, "")
            assert "answered 401" in err
        status, _, err = await run_top("--once", "--url", router.url)
        assert status == 1
        assert err.startswith("error: ")
        status, _, err = await run_top("--once", "--url", "nonsense")
        assert status == 2
        assert "malformed URL" in err

    go(scenario())


@pytest.mark.parametrize("answer", [b"[]", b"{}", b"no", b"\xff"])
def test_top_says_when_it_is_no_router(answer: bytes) -> None:
    async def scenario() -> None:
        async def other(asked: Any, line: Any) -> None:
            await line.answer(answer)

        machine = Machine(Role.BOTH, other)
        await machine.start()
        with pytest.raises(PeerError):
            await asyncio.to_thread(top.ask, machine.url, None)
        await machine.stop()
        with pytest.raises(PeerUnreachable):
            await asyncio.to_thread(top.ask, machine.url, None)

    go(scenario())


def test_top_makes_rates_of_two_states() -> None:
    def state(at: float, tokens: int) -> dict[str, Any]:
        router = {"model": "m", "policy": "cost", "uptime_s": 1, "version": "1"}
        rest: dict[str, Any] = {"members": [], "living": [], "ended": [], "living_total": 0}
        return {"at": at, "totals": dict.fromkeys(top.FUNNEL, tokens), "router": router, **rest}

    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    with console.file:
        console.print(top.frame([state(10.0, 100), state(14.0, 140)]))
        assert "per second, last 4 s" in console.export_text(clear=False)
        # A router that was started anew counts from nothing: no rates below zero.
        console.print(top.frame([state(10.0, 100), state(14.0, 40)]))
        assert "-15" not in console.export_text()


@pytest.mark.parametrize("width", [80, 100, 160])
def test_top_shows_role_state_and_port_of_everybody(width: int) -> None:
    def member(number: int, state: str, breaker: str, role: str) -> dict[str, Any]:
        return {
            **{
                "url": f"http://node-{number}.a-long-cluster-name.example.internal:{30000 + number}"
            },
            **{"role": role, "state": state, "breaker": breaker, "source": "exact"},
            **{"running": 120, "in_flight": 3, "waiting": 1024},
            **{"hbm_used_tokens": 10, "hbm_total_tokens": 10},
            **{"dram_used_bytes": 10, "dram_total_bytes": 10},
            "error": "connection broke in the middle of the answer " * 3
            if breaker == "open"
            else None,
        }

    members = [
        member(1, "ready", "closed", "prefill"),
        member(2, "unhealthy", "closed", "decode"),
        member(3, "ready", "open", "both"),
        member(4, "starting", "half_open", "both"),
    ]
    router = {"model": "m", "policy": "cost", "uptime_s": 1, "version": "1"}
    state = {
        **{"at": 1.0, "totals": dict.fromkeys(top.FUNNEL, 5), "router": router},
        **{"members": members, "living": [], "ended": [], "living_total": 0},
    }
    with open("/dev/null", "w") as nowhere:
        console = Console(width=width, record=True, file=nowhere)
        console.print(top.frame([state]))
    lines = console.export_text().splitlines()
    for one in members:
        port = one["url"].rpartition(":")[2]
        (line, *_) = [line for line in lines if f":{port}" in line]
        for word in (one["role"], one["state"], one["source"], "120", "1024"):
            assert word in line, line
    assert any("connection broke" in line for line in lines)
    assert all(len(line) <= width for line in lines)
