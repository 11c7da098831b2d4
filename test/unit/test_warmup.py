"""The warm-up against a server that asks for keys as SGLang does: its own middleware."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("sglang")

import uvicorn
from fastapi import FastAPI, Request
from sglang.srt.entrypoints import http_server
from sglang.srt.utils.auth import AuthLevel, add_api_key_middleware, auth_level
from sglang_memserve.plugin.warmup import Outcome, warm_up
from sglang_memserve.protocol.access import ENGINE_CONTROL, ENGINE_CONTROL_FOLDERS
from sglang_memserve.router.http.listening import listen


@contextmanager
def server(api: str | None, admin: str | None, asked: list[str]) -> Iterator[str]:
    app = FastAPI()

    @app.get("/model_info")
    async def model_info() -> dict[str, Any]:
        asked.append("/model_info")
        return {"is_generation": True}

    @app.post("/generate")
    async def generate(request: Request) -> dict[str, Any]:
        asked.append("/generate")
        return {"tokens": len((await request.json())["input_ids"])}

    @app.post("/flush_cache")
    @auth_level(AuthLevel.ADMIN_OPTIONAL)  # type: ignore[untyped-decorator]
    async def flush_cache() -> None:
        asked.append("/flush_cache")

    if api or admin:
        add_api_key_middleware(app, api_key=api, admin_api_key=admin)
    sock = listen("127.0.0.1", 0)
    serving = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off"))
    thread = threading.Thread(target=serving.run, args=([sock],))
    thread.start()
    try:
        yield f"http://127.0.0.1:{sock.getsockname()[1]}"
    finally:
        serving.should_exit = True
        thread.join(20)
        sock.close()


def arguments(url: str, api: str | None, admin: str | None) -> Any:
    return SimpleNamespace(
        url=lambda: url, api_key=api, admin_api_key=admin, ssl_ca_certs=None, ssl_certfile=None
    )


@pytest.mark.parametrize("api", [None, "api"])
@pytest.mark.parametrize("admin", [None, "admin"])
def test_every_route_is_shown_the_key_it_asks_for(api: str | None, admin: str | None) -> None:
    asked: list[str] = []
    with server(api, admin, asked) as url:
        assert warm_up(arguments(url, api, admin)) is Outcome.DONE
    assert asked == ["/model_info", "/generate", "/generate", "/generate", "/flush_cache"]


# SGLang's own way to answer 401.
@pytest.mark.filterwarnings("ignore:ORJSONResponse is deprecated")
def test_a_server_that_does_not_let_us_in_is_not_waited_for(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_waiting(_: float) -> None:
        raise AssertionError("it waits")

    asked: list[str] = []
    with server("other", None, asked) as url:
        monkeypatch.setattr(time, "sleep", no_waiting)
        assert warm_up(arguments(url, "api", None)) is Outcome.FAILED
        monkeypatch.undo()
    assert not asked
    assert "/model_info answers 401 to this server's own --api-key" in caplog.text


def test_the_table_is_what_sglang_says_of_its_routes() -> None:
    control = {
        route.path
        for route in http_server.app.router.routes
        if getattr(getattr(route, "endpoint", None), "_auth_level", None)
        is AuthLevel.ADMIN_OPTIONAL
    }
    whole = {path for path in control if not path.startswith(ENGINE_CONTROL_FOLDERS)}
    assert whole <= ENGINE_CONTROL
    # Some are there only with other settings of the server.
    assert len(whole) > 20
