"""Which key opens which of an instance's own routes: SGLang's middleware over our routes."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest

pytest.importorskip("sglang")

import aiohttp
import httpx
from aiohttp import web
from aiohttp.test_utils import TestServer
from fastapi import FastAPI
from sglang.srt.utils.auth import add_api_key_middleware
from sglang_memserve.config import InstanceConfig
from sglang_memserve.errors import PeerError, PeerUnreachable
from sglang_memserve.plugin import routes
from sglang_memserve.plugin.agent import InstanceAgent
from sglang_memserve.plugin.answers import open_routes
from sglang_memserve.plugin.pool_size import pool_routes
from sglang_memserve.plugin.verb_routes import verb_routes
from sglang_memserve.protocol.access import MEMSERVE_CONTROL, key_for
from sglang_memserve.types import Generation, InstanceId, Role

# SGLang's own way to answer 401.
pytestmark = pytest.mark.filterwarnings("ignore:ORJSONResponse is deprecated")

SHOWN = (
    ("GET", "/memserve/info"),
    ("GET", "/memserve/snapshot"),
    ("GET", "/memserve/stats"),
    ("POST", "/memserve/fetch"),
    ("POST", "/memserve/peers"),
)
CONTROL = (
    ("POST", "/memserve/match"),
    ("GET", "/memserve/pool"),
    ("POST", "/memserve/pool"),
    ("POST", "/memserve/role"),
    ("POST", "/memserve/swap_in"),
    ("POST", "/memserve/swap_out"),
)


class Silent:
    """An agent whose ranks do not answer."""

    def __getattr__(self, name: str) -> Any:
        def silent(*_: object) -> NoReturn:
            raise PeerUnreachable(name)

        return silent


def statuses(keys: tuple[str | None, str | None], shown: str | None) -> dict[str, int]:
    app = FastAPI()
    silent: Any = Silent()
    open_routes(app, routes._routes(silent), pool_routes(silent), verb_routes(silent.manager, 16))
    add_api_key_middleware(app, api_key=keys[0], admin_api_key=keys[1])

    async def ask() -> Iterator[tuple[str, int]]:
        headers = {"Authorization": f"Bearer {shown}"} if shown else {}
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://i") as client:
            answers = [
                (path, (await client.request(method, path, headers=headers)).status_code)
                for method, path in (*SHOWN, *CONTROL)
            ]
        return iter(answers)

    return dict(asyncio.run(ask()))


@pytest.mark.parametrize(
    ("keys", "shown", "opens", "controls"),
    [
        ((None, None), None, True, True),
        (("api", None), None, False, False),
        (("api", None), "api", True, True),
        (("api", "admin"), "api", True, False),
        (("api", "admin"), "admin", False, True),
        ((None, "admin"), None, True, False),
        ((None, "admin"), "admin", True, True),
    ],
)
def test_what_changes_an_instance_takes_its_admin_key(
    keys: tuple[str | None, str | None], shown: str | None, opens: bool, controls: bool
) -> None:
    got = statuses(keys, shown)
    assert {path: got[path] != 401 for _, path in SHOWN} == {path: opens for _, path in SHOWN}
    assert {path: got[path] != 401 for _, path in CONTROL} == {
        path: controls for _, path in CONTROL
    }


@pytest.mark.parametrize("keys", [(None, None), ("api", None), ("api", "admin"), (None, "admin")])
def test_what_the_router_shows_is_let_in(keys: tuple[str | None, str | None]) -> None:
    for _, path in (*SHOWN, *CONTROL):
        assert statuses(keys, key_for(path, *keys))[path] != 401
    assert {path for _, path in CONTROL} == MEMSERVE_CONTROL


@pytest.mark.parametrize(("admin", "flag"), [(None, "--api-key"), ("admin", "--admin-api-key")])
def test_a_router_that_takes_another_key_is_named_with_the_flag(
    admin: str | None, flag: str, tmp_path: Path
) -> None:
    async def refuse(_: web.Request) -> web.Response:
        return web.json_response({"error": "Unauthorized"}, status=401)

    async def scenario() -> None:
        config = InstanceConfig(
            role=Role.BOTH,
            url=InstanceId("http://127.0.0.1:1"),
            generation=Generation("g"),
            peer_host="127.0.0.1",
            runtime_dir=str(tmp_path),
            mempool_dram_bytes=2**20,
        )
        silent: Any = Silent()
        agent = InstanceAgent(config, silent, print, api_key="api", admin_key=admin)
        app = web.Application()
        app.router.add_post("/memserve/register", refuse)
        async with TestServer(app) as router, aiohttp.ClientSession() as session:
            agent._session = session
            with pytest.raises(PeerError, match=f"does not take this instance's {flag} "):
                await agent._post(str(router.make_url("/memserve/register")), b"{}")

    asyncio.run(asyncio.wait_for(scenario(), 30))
