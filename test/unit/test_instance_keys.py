"""Which key opens which of an instance's own routes: SGLang's middleware over our routes."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any, NoReturn

import pytest

pytest.importorskip("sglang")

import httpx
from fastapi import FastAPI
from sglang.srt.utils.auth import add_api_key_middleware
from sglang_memserve.errors import PeerUnreachable
from sglang_memserve.plugin import routes
from sglang_memserve.plugin.answers import open_routes
from sglang_memserve.plugin.pool_size import pool_routes
from sglang_memserve.plugin.verb_routes import verb_routes
from sglang_memserve.protocol.access import MEMSERVE_CONTROL, key_for

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
