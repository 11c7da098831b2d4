"""Keys and what they open, TLS files, the bounds of a connection's head."""

from __future__ import annotations

import pytest
from sglang_memserve.errors import ConfigError
from sglang_memserve.router.config import RouterConfig, parse_args
from sglang_memserve.router.http.security import Access, Keys, Tls, access_of
from unit.certificates import Authority


@pytest.mark.parametrize(
    ("method", "path", "needed"),
    [
        ("GET", "/health", Access.OPEN),
        ("GET", "/health_generate", Access.OPEN),
        ("GET", "/readiness", Access.OPEN),
        ("GET", "/liveness", Access.OPEN),
        ("GET", "/metrics", Access.OPEN),
        ("GET", "/dashboard", Access.OPEN),
        ("GET", "/dashboard/", Access.OPEN),
        ("GET", "/dashboard/app.js", Access.OPEN),
        ("POST", "/health", Access.CLIENT),
        ("HEAD", "/health", Access.CLIENT),
        ("GET", "//health", Access.CLIENT),
        ("GET", "/metrics/", Access.CLIENT),
        ("GET", "/health\n", Access.CLIENT),
        ("GET", "/dashboard/app.js/", Access.CLIENT),
        ("GET", "/dashboard/app.js\n", Access.CLIENT),
        ("POST", "/dashboard/app.js", Access.CLIENT),
        ("GET", "/dashboard/a/b", Access.CLIENT),
        ("GET", "/dashboard/state\n", Access.CLIENT),
        ("GET", "/dashboard/events", Access.CLIENT),
        ("GET", "/dashboard/../workers", Access.CLIENT),
        ("GET", "/metricsx", Access.CLIENT),
        ("POST", "/generate", Access.CLIENT),
        ("GET", "/workers", Access.CLIENT),
        ("GET", "/memserve/tree", Access.CLIENT),
        ("POST", "/memserve/explain", Access.CLIENT),
        ("POST", "/workers", Access.ADMIN),
        ("DELETE", "/workers/http://a:1", Access.ADMIN),
        ("PATCH", "/workers/http%3A%2F%2Fa%3A1", Access.ADMIN),
        ("POST", "/add_worker", Access.ADMIN),
        ("GET", "/flush_cache", Access.ADMIN),
        ("POST", "//flush_cache/", Access.ADMIN),
        ("POST", "/flush_cache\n", Access.ADMIN),
        ("POST", "/workers\n", Access.ADMIN),
        ("POST", "/x/../flush_cache", Access.ADMIN),
        ("POST", "/abort_request", Access.ADMIN),
        ("POST", "/update_weights_from_disk", Access.ADMIN),
        ("POST", "/hicache/storage-backend/clear", Access.ADMIN),
        ("POST", "/memserve/register", Access.ADMIN),
        ("POST", "/memserve/role", Access.ADMIN),
        ("POST", "/memserve/anything", Access.ADMIN),
    ],
)
def test_what_a_path_needs(method: str, path: str, needed: Access) -> None:
    assert access_of(method, path) is needed


API, ADMIN, WRONG = b"Bearer api", b"Bearer admin", b"Bearer nope"


@pytest.mark.parametrize(
    ("api", "admin", "shown", "client", "operator"),
    [
        (None, None, None, True, True),
        ("api", None, None, False, False),
        ("api", None, API, True, True),
        ("api", None, b"bearer api", True, True),
        ("api", None, b"Basic api", False, False),
        ("api", None, b"Bearer \xff", False, False),
        ("api", None, b"Bearer", False, False),
        ("api", None, WRONG, False, False),
        ("api", "admin", API, True, False),
        ("api", "admin", ADMIN, True, True),
        ("api", "admin", WRONG, False, False),
        (None, "admin", None, True, False),
        (None, "admin", WRONG, True, False),
        (None, "admin", ADMIN, True, True),
    ],
)
def test_which_key_opens_what(
    api: str | None, admin: str | None, shown: bytes | None, client: bool, operator: bool
) -> None:
    keys = Keys(api, admin)
    raw = [] if shown is None else [(b"authorization", shown)]
    assert keys.allow(Access.CLIENT, raw) is client
    assert keys.allow(Access.ADMIN, raw) is operator
    assert keys.allow(Access.OPEN, raw)


def test_instances_are_shown_the_key_that_their_route_asks_for() -> None:
    keys = Keys("api", "admin")
    assert keys.towards("/generate") == "api"
    assert keys.towards("/abort_request") == "admin"
    assert keys.towards("/memserve/role") == "admin"
    assert keys.towards("/memserve/fetch") == keys.towards("/memserve/peers") == "api"
    assert Keys("api").towards("/abort_request") == "api"
    assert Keys().towards("/generate") is None


def test_keys_stay_out_of_what_is_printed() -> None:
    config = RouterConfig(api_key="hidden-1", admin_key="hidden-2", tls=Tls())
    assert "hidden" not in f"{config!r} {config.keys!r}"


def test_the_command_line(tmp_path_factory: pytest.TempPathFactory) -> None:
    own = Authority(tmp_path_factory.mktemp("ca")).issue("127.0.0.1")
    config = parse_args(
        f"--api-key a --admin-key b --ssl-certfile {own.certfile} --ssl-keyfile {own.keyfile} "
        f"--instance-ca-certs {own.ca_certs} --cors-origin http://a:1 https://b".split()
    )
    assert config.keys == Keys("a", "b")
    assert config.tls == Tls(own.certfile, own.keyfile, instance_ca_certs=own.ca_certs)
    assert config.tls.scheme == "https"
    assert config.cors_origins == ("http://a:1", "https://b")
    assert parse_args([]).host == "127.0.0.1"


def test_tls_files_are_looked_at_before_anything_starts(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("ca")
    authority = Authority(folder)
    own, other = authority.issue("127.0.0.1"), authority.issue("other")
    absent = str(folder / "absent.pem")
    for wrong in (
        f"--ssl-certfile {own.certfile} --ssl-keyfile {other.keyfile}",
        f"--ssl-certfile {absent} --ssl-keyfile {own.keyfile}",
        f"--ssl-keyfile {own.keyfile}",
        f"--ssl-certfile {own.certfile} --ssl-keyfile {own.keyfile} --ssl-ca-certs {absent}",
        f"--instance-ca-certs {absent}",
        f"--instance-ca-certs {own.keyfile}",
    ):
        with pytest.raises(ConfigError):
            parse_args(wrong.split())


@pytest.mark.parametrize("wrong", ["--api-key=", "--admin-key=\n", "--cors-origin=nonsense"])
def test_bad_keys_and_origins(wrong: str) -> None:
    with pytest.raises(ConfigError):
        parse_args([wrong])
