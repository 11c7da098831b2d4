"""How long a killed router takes to know everything again. Writes one JSON object.

    python benchmark/router/restart.py [--instances 64] [--pages 1000000] [--rounds 5] [--json FILE]

One process answers as all the instances, whose pages are chains of ``PROMPT_PAGES``. The router is
killed and started again in each round; seconds are counted from its start:

- ``answers``: to the first answer of ``/liveness``
- ``serves``: until a request would be served (``/readiness`` is 200)
- ``exact``: until every instance's pages are in its tree
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import psutil
from aiohttp import web
from sglang_memserve.protocol.events import BlockStored, Snapshot, encode_snapshot
from sglang_memserve.types import Tier

from benchmark.harness import report, spread
from benchmark.micro.router_overhead import free_port
from benchmark.router.described import PAGE, instance_info

PROMPT_PAGES = 500
LIMIT_S = 120.0
POLL_S = 0.02


class Fleet:
    """Instances that say what they hold and nothing else, in a thread of this process."""

    def __init__(self, instances: int, pages: int) -> None:
        source = random.Random(1)
        self._snapshots: dict[int, bytes] = {}
        self._sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(instances)]
        self.ports = [one.getsockname()[1] for one in self._sockets]
        for port in self.ports:
            events = []
            for _ in range(max(pages // instances // PROMPT_PAGES, 1)):
                keys = [source.getrandbits(63) for _ in range(PROMPT_PAGES)]
                events.append(BlockStored(keys, None, [], PAGE, medium=Tier.DRAM.value))
            self._snapshots[port] = encode_snapshot(Snapshot(f"boot {port}", -1, list(events)))
        self.pages = instances * max(pages // instances // PROMPT_PAGES, 1) * PROMPT_PAGES
        self.snapshot_bytes = sum(map(len, self._snapshots.values()))
        self._loop = asyncio.new_event_loop()
        self._up = threading.Event()
        threading.Thread(target=self._run, daemon=True).start()
        if not self._up.wait(LIMIT_S):
            raise SystemExit("the fleet did not start")

    @property
    def urls(self) -> list[str]:
        return [f"http://127.0.0.1:{port}" for port in self.ports]

    def _run(self) -> None:
        self._loop.run_until_complete(self._open())
        self._up.set()
        self._loop.run_forever()

    async def _open(self) -> None:
        app = web.Application()
        app.router.add_get("/memserve/info", self._info)
        app.router.add_get("/memserve/snapshot", self._snapshot)
        app.router.add_get("/memserve/stats", self._stats)
        app.router.add_get("/v1/loads", self._loads)
        app.router.add_post("/memserve/peers", self._peers)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        for one in self._sockets:
            await web.SockSite(runner, one).start()

    async def _info(self, request: web.Request) -> web.Response:
        port = request.url.port
        role = "decode" if self.ports.index(port or 0) % 2 else "prefill"
        info = instance_info(f"http://127.0.0.1:{port}", f"boot {port}", role)
        return web.Response(body=msgspec.json.encode(info), content_type="application/json")

    async def _snapshot(self, request: web.Request) -> web.Response:
        return web.Response(body=self._snapshots[request.url.port or 0])

    async def _stats(self, _: web.Request) -> web.Response:
        return web.json_response({"event_seq": -1, "instance": {}, "ranks": [{}]})

    async def _loads(self, _: web.Request) -> web.Response:
        return web.json_response({"loads": []})

    async def _peers(self, _: web.Request) -> web.Response:
        return web.json_response({"members": 0, "connected": 0})


def get(port: int, path: str) -> tuple[int, Any]:
    """Status and JSON, 0 where nobody answers."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        data = answer.read()
        return answer.status, json.loads(data) if data else None
    except OSError:
        return 0, None
    finally:
        connection.close()


def held(port: int) -> int:
    """Pages in the router's tree."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=LIMIT_S) as answer:
        text = answer.read().decode()
    found = re.findall(r"^memserve_tree_blocks\{.*\} (\S+)$", text, re.MULTILINE)
    return int(sum(map(float, found)))


def one_round(urls: Sequence[str], pages: int) -> dict[str, float]:
    port = free_port()
    argv = [sys.executable, "-m", "sglang_memserve.router", "--port", str(port), "--policy", "cost"]
    for url in urls:
        argv += ["--instance", url]
    started = time.monotonic()
    process = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:

        def when(true: Callable[[], bool]) -> float:
            while not true():
                if time.monotonic() - started > LIMIT_S or process.poll() is not None:
                    raise SystemExit("the router did not get there")
                time.sleep(POLL_S)
            return round(time.monotonic() - started, 2)

        def exact() -> bool:
            _, body = get(port, "/readiness")
            states = [one["source"] for one in body["members"]]
            return states.count("exact") == len(urls)

        answers = when(lambda: get(port, "/liveness")[0] == 200)
        serves = when(lambda: get(port, "/readiness")[0] == 200)
        known = when(exact)
        if held(port) != pages:
            raise SystemExit(f"{held(port)} pages are in the tree, {pages} are held")
        memory = psutil.Process(process.pid).memory_info().rss / 2**20
        return {"answers_s": answers, "serves_s": serves, "exact_s": known, "mib": round(memory)}
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait(LIMIT_S)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--instances", type=int, default=64)
    parser.add_argument("--pages", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    began = time.monotonic()
    fleet = Fleet(options.instances, options.pages)
    rounds = [one_round(fleet.urls, fleet.pages) for _ in range(options.rounds)]
    results: dict[str, Any] = {
        "instances": options.instances,
        "pages": fleet.pages,
        "snapshot_bytes": fleet.snapshot_bytes,
        **{name: spread([one[name] for one in rounds]) for name in rounds[0]},
    }
    report("router_restart", results, began, options.json)


if __name__ == "__main__":
    main()
