"""Keys, TLS and origins on a real socket; what must not be said anywhere."""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from sglang_memserve.router.config import RouterConfig, StaticInstance
from sglang_memserve.router.dashboard.routes import pages
from sglang_memserve.router.http.listening import listen
from sglang_memserve.router.http.security import Tls
from sglang_memserve.router.processes.serving import serve
from sglang_memserve.types import InstanceId, Role
from simulation.router_machines import PAGE, WAIT_S, Machine, router_over
from unit.certificates import Authority, Identity
from yarl import URL

PROMPT = list(range(1, 4 * PAGE + 2))


def go(scenario: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(scenario, 60))


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def test_the_admin_key_opens_what_the_api_key_does_not() -> None:
    async def scenario() -> None:
        both = Machine(Role.BOTH)
        async with router_over(both, api_key="api", admin_key="admin") as router:
            for path in ("/flush_cache", "/abort_request", "/workers", "/memserve/register"):
                refused = await router.post(path, {"abort_all": True, "url": "http://evil:1"})
                assert refused.status == 401, path
                assert (await refused.json()) == {"error": "Unauthorized"}
            gone = await router.http.delete(f"{router.url}/workers/x", headers=bearer("api"))
            assert gone.status == 401
            assert not both.to("/flush_cache")
            flushed = await router.post("/flush_cache", {}, headers=bearer("admin"))
            assert flushed.status == 200
            # Each route of an instance gets the key that SGLang asks for there.
            [asked] = both.to("/flush_cache")
            assert asked.headers["authorization"] == "Bearer admin"
            done = await router.post("/generate", {"input_ids": PROMPT}, headers=bearer("admin"))
            assert done.status == 200
            assert both.to("/generate")[0].headers["authorization"] == "Bearer api"
            passed = await router.post("/start_profile", {}, headers=bearer("admin"))
            assert passed.status == 200
            assert both.to("/start_profile")[0].headers["authorization"] == "Bearer admin"

    go(scenario())


OPEN = (
    *("/health", "/health_generate", "/ready", "/readiness", "/liveness", "/metrics"),
    *("/dashboard", "/dashboard/", *(f"/dashboard/{name}" for name in pages())),
)
CLOSED = (
    *(f"{method} {path}" for path in OPEN for method in ("POST", "PUT", "DELETE", "HEAD")),
    *(f"GET {path}{more}" for path in OPEN for more in ("/", "/a", "%0A", ";a")),
    *(f"GET {folder}{path}" for path in OPEN for folder in ("/", "/.", "/a/..")),
    *(
        "GET /dashboard/a/b",
        "POST /dashboard/x",
        "POST /dashboard/state",
        "GET /dashboard/state%0A",
    ),
    *("POST /dashboard/..;/generate", "GET /metrics/..;/generate", "GET /dashboard//a//generate"),
    *("GET /dashboard/a/..%2f..%2fgenerate", "GET /dashboard/%252e%252e/server_info"),
)


async def keyless(url: str, line: str) -> int:
    """The status of a request without a key, its path sent as it is written."""
    port = int(url.rpartition(":")[2])
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"{line} HTTP/1.1\r\nHost: r\r\nConnection: close\r\n\r\n".encode())
    status = int((await asyncio.wait_for(reader.readline(), WAIT_S)).split()[1])
    writer.close()
    await writer.wait_closed()
    return status


def test_without_a_key_only_what_the_router_answers_itself_is_open() -> None:
    async def scenario() -> None:
        both = Machine(Role.BOTH)
        async with router_over(both, api_key="api", admin_key="admin") as router:
            for path in OPEN:
                assert await keyless(router.url, f"GET {path}") == 200, path
            open_too = {f"GET {path}" for path in OPEN}
            for line in CLOSED:
                if line not in open_too:
                    assert await keyless(router.url, line) == 401, line
        own = {"/memserve/info", "/memserve/stats", "/memserve/snapshot", "/memserve/peers"}
        asked = {one.path.split("?")[0] for one in both.asked}
        assert asked <= own | {"/v1/loads", "/health_generate"}

    go(scenario())


def test_no_spelling_of_an_operators_path_is_a_clients() -> None:
    async def scenario() -> None:
        both = Machine(Role.BOTH)
        async with router_over(both, api_key="api", admin_key="admin") as router:
            for path in (
                "/flush_cache",
                "/workers",
                "/abort_request",
                "/add_worker?url=http://a:1",
            ):
                where, _, query = path.partition("?")
                for end in ("%0A", "/", "/.", "%2F"):
                    url = URL(f"{router.url}{where}{end}?{query}", encoded=True)
                    async with router.http.post(url, json={"url": "http://a:1"}) as refused:
                        assert refused.status == 401, url
            assert [
                worker["url"] for worker in (await (await router.get("/workers")).json())["workers"]
            ] == [both.url]

    go(scenario())


def test_an_admin_key_does_not_reach_instances_that_do_not_ask_for_it() -> None:
    async def scenario() -> None:
        both = Machine(Role.BOTH)
        async with router_over(both, admin_key="admin") as router:
            done = await router.post("/generate", {"input_ids": PROMPT}, headers=bearer("admin"))
            assert done.status == 200
            await router.post("/generate", {"input_ids": PROMPT}, headers=bearer("their own"))
            first, second = both.to("/generate")
            assert "authorization" not in first.headers
            assert second.headers["authorization"] == "Bearer their own"

    go(scenario())


def test_scripts_of_other_origins() -> None:
    async def scenario() -> None:
        asking = {"Origin": "https://app", "Access-Control-Request-Method": "POST"}
        async with router_over(Machine(Role.BOTH), api_key="k") as router:
            answer = await router.http.options(f"{router.url}/generate", headers=asking)
            assert "access-control-allow-origin" not in answer.headers
        async with router_over(
            Machine(Role.BOTH), api_key="k", cors_origins=("https://app",)
        ) as router:
            bare = aiohttp.ClientSession()
            async with bare:
                answer = await bare.options(f"{router.url}/generate", headers=asking)
                assert answer.status == 200
                assert answer.headers["access-control-allow-origin"] == "https://app"
                other = {**asking, "Origin": "https://evil"}
                answer = await bare.options(f"{router.url}/generate", headers=other)
                assert answer.status == 400
                assert "access-control-allow-origin" not in answer.headers
            done = await router.post(
                "/generate", {"input_ids": PROMPT}, headers={"Origin": "https://app"}
            )
            assert done.headers["access-control-allow-origin"] == "https://app"
            assert "x-memserve-decode" in done.headers["access-control-expose-headers"]

    go(scenario())


def test_a_cache_salt_is_said_nowhere(caplog: pytest.LogCaptureFixture) -> None:
    """Whatever happens to the request: served, refused by us, by an instance, or by nobody."""
    salt, token = "tenant-secret-salt", 987_654

    async def scenario() -> None:
        p, d = Machine(Role.PREFILL), Machine(Role.DECODE)
        said: list[str] = []
        async with router_over(p, d, policy="cost") as router:
            for more in (
                {},
                {"cache_salt": [salt]},
                {"rid": 5},
                {"cache_salt": {"a": salt}},
                {"input_ids": [[token] * 20, [token] * 30]},
                {"input_ids": "nonsense"},
            ):
                body = {"input_ids": [token] * 20, "cache_salt": salt, "extra_key": salt, **more}
                for path in ("/generate", "/memserve/explain"):
                    answer = await router.post(path, body)
                    said += [str(answer.headers), await answer.text()]
            for path in ("/metrics", "/workers", "/server_info", "/memserve/tree"):
                said.append(await (await router.get(path)).text())
            for path in ("/dashboard/state", "/dashboard/tree"):
                said.append(await (await router.get(path)).text())
            await d.stop()
            await p.stop()
            answer = await router.post("/generate", {"input_ids": PROMPT, "cache_salt": salt})
            said += [str(answer.headers), await answer.text()]
        spoken = "\n".join([*said, caplog.text])
        assert "/generate" in caplog.text
        assert salt not in spoken
        assert str(token) not in spoken

    caplog.set_level(logging.DEBUG, logger="sglang_memserve")
    go(scenario())


# -- the real server: TLS --


@asynccontextmanager
async def served(config: RouterConfig) -> AsyncIterator[int]:
    """``__main__.serve`` on a port of 127.0.0.1."""
    listener = listen("127.0.0.1", 0)
    task = asyncio.create_task(serve(config, listener))
    try:
        yield listener.getsockname()[1]
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        listener.close()


@pytest.fixture(scope="module")
def identities(tmp_path_factory: pytest.TempPathFactory) -> tuple[Identity, Identity]:
    authority = Authority(tmp_path_factory.mktemp("authority"))
    return authority.issue("127.0.0.1"), authority.issue("client")


def test_tls_on_both_sides(identities: tuple[Identity, Identity], tmp_path: Path) -> None:
    own, client = identities

    async def scenario() -> None:
        machine = Machine(Role.BOTH)
        await machine.start()
        # The instance behind TLS is a router itself: what it is matters little here.
        plain = RouterConfig(
            instances=(StaticInstance(InstanceId(machine.url)),),
            tls=Tls(own.certfile, own.keyfile, ca_certs=own.ca_certs),
        )
        trusted = ssl.create_default_context(cafile=own.ca_certs)
        known = ssl.create_default_context(cafile=own.ca_certs)
        known.load_cert_chain(client.certfile, client.keyfile)
        async with served(plain) as port, aiohttp.ClientSession() as http:
            url = f"https://127.0.0.1:{port}/liveness"
            assert (await http.get(url, ssl=known)).status == 200
            with pytest.raises(aiohttp.ClientError):
                await http.get(url, ssl=trusted)  # no certificate of its own
            with pytest.raises(aiohttp.ClientError):
                await http.get(url)  # knows no authority
        await machine.stop()

    go(scenario())


def test_an_instance_behind_tls(identities: tuple[Identity, Identity]) -> None:
    own, _ = identities

    async def scenario() -> None:
        inner = RouterConfig(tls=Tls(own.certfile, own.keyfile))
        async with served(inner) as port:
            listed = (StaticInstance(InstanceId(f"https://127.0.0.1:{port}")),)
            for tls, said in ((Tls(), "certificate"), (Tls(instance_ca_certs=own.ca_certs), "503")):
                async with router_over(extra=listed, tls=tls) as router:
                    await _says(router.http, f"{router.url}/workers", said)

    go(scenario())


async def _says(http: aiohttp.ClientSession, url: str, text: str) -> None:
    """Until the last error of the only worker contains ``text``."""
    async with asyncio.timeout(WAIT_S):
        while True:
            [worker] = (await (await http.get(url)).json())["workers"]
            if text in (worker["last_error"] or ""):
                return
            await asyncio.sleep(0.02)
