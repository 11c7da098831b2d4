"""Settings: sizes, URLs, roles, and the way to the scheduler processes and back."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
from sglang_memserve import config as settings
from sglang_memserve.config import InstanceConfig, Limits
from sglang_memserve.errors import ConfigError
from sglang_memserve.types import Eviction, Generation, InstanceId, Role


def example() -> InstanceConfig:
    return InstanceConfig(
        role=Role.PREFILL,
        url=InstanceId("http://127.0.0.1:1234"),
        generation=Generation("00ff"),
        peer_host="127.0.0.1",
        runtime_dir="/tmp/memserve-x",
        mempool_dram_bytes=1 << 20,
        mempool_eviction=Eviction.LRU,
        router_urls=("http://127.0.0.1:1", "http://127.0.0.1:2"),
        limits=Limits(max_leases=7),
    )


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("2GiB", 2 << 30),
        ("512MiB", 512 << 20),
        ("512 mib", 512 << 20),
        ("1.5KiB", 1536),
        ("1gb", 10**9),
        ("123", 123),
        ("7B", 7),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert settings.parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "GiB", "-1GiB", "2 G i B", "2XiB", "1e9", "0", "0.1B", "٣GiB"]
)
def test_malformed_sizes(text: str) -> None:
    with pytest.raises(ConfigError, match="size"):
        settings.parse_size(text)


def test_dram_must_fit_the_machine() -> None:
    assert settings.parse_dram("1GiB", machine_bytes=1 << 30) == 1 << 30
    with pytest.raises(ConfigError, match=r"more than this machine's memory \(1\.0 GiB\)"):
        settings.parse_dram("2GiB", machine_bytes=1 << 30)
    with pytest.raises(ConfigError, match="memory"):
        settings.parse_dram("4096TiB")


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("http://host:80", "http://host:80"),
        ("https://host/", "https://host"),
        ("http://[::1]:3000", "http://[::1]:3000"),
        ("http://10.0.0.1:80", "http://10.0.0.1:80"),
        ("http://engine_1.kv-pool.:80", "http://engine_1.kv-pool.:80"),
        ("http://xn--bcher-kva.example", "http://xn--bcher-kva.example"),
        (f"http://{'a' * 63}.example", f"http://{'a' * 63}.example"),
    ],
)
def test_urls(text: str, url: str) -> None:
    assert settings.parse_url(text) == url


@pytest.mark.parametrize(
    "text",
    [
        "",
        "host:80",
        "ftp://host",
        "http://",
        "http://h:0",
        "http://h:99999",
        "http://h:x",
        "http://h/path",
        "http://h?q=1",
        "http://u@h",
        "http://[::1",
        "http://[::g]:1",
        "http://a..b:80",
        "http://.:1",
        f"http://{'a' * 64}.example",
        f"http://{'a.' * 128}",
        "http://b\u00fccher.example",
        "http://a,b",
        "http://a\\b:1",
        "http://a b:1",
        "http://a%00b:1",
        "http://*:1",
    ],
)
def test_malformed_urls(text: str) -> None:
    with pytest.raises(ConfigError, match="malformed URL"):
        settings.parse_url(text)


def test_roles() -> None:
    assert [settings.parse_role(role.value) for role in Role] == list(Role)
    with pytest.raises(ConfigError, match="unknown role 'router': choose one of prefill, decode"):
        settings.parse_role("router")


def test_eviction_policies() -> None:
    assert [settings.parse_eviction(eviction.value) for eviction in Eviction] == list(Eviction)
    with pytest.raises(ConfigError, match="unknown eviction policy 'fifo': choose one of lru, 2q"):
        settings.parse_eviction("fifo")


def test_settings_cross_as_json() -> None:
    text = json.dumps(example().to_json())
    assert InstanceConfig.from_json(json.loads(text)) == example()


@pytest.mark.parametrize("damage", [None, [], "x", 3, {}])
def test_no_settings(damage: object) -> None:
    with pytest.raises(ConfigError):
        InstanceConfig.from_json(damage)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("role", "router"),
        ("url", ""),
        ("mempool_dram_bytes", 0),
        ("mempool_dram_bytes", "2GiB"),
        ("mempool_dram_bytes", True),
        ("mempool_eviction", "random"),
        ("router_urls", "http://h"),
        ("limits", None),
        ("limits", {}),
        ("limits", {"max_leases": 3}),
        ("surprise", 1),
    ],
)
def test_malformed_settings(name: str, value: object) -> None:
    with pytest.raises(ConfigError):
        InstanceConfig.from_json({**example().to_json(), name: value})


@pytest.mark.parametrize("name", sorted(field.name for field in dataclasses.fields(InstanceConfig)))
def test_missing_settings(name: str) -> None:
    encoded = example().to_json()
    del encoded[name]
    with pytest.raises(ConfigError, match=name):
        InstanceConfig.from_json(encoded)


@pytest.mark.parametrize("value", [0, -1, math.inf, math.nan])
def test_limits_are_finite(value: float) -> None:
    with pytest.raises(ConfigError, match="lease_ttl_s"):
        Limits(lease_ttl_s=value)


def test_generations_differ() -> None:
    assert len({settings.new_generation() for _ in range(100)}) == 100
