"""Which ports instances are given before they listen."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from sglang_memserve.cluster.machine import free_ports, server_ports
from sglang_memserve.errors import ConfigError

HOSTS = ("127.0.0.1", "127.0.0.1", "0.0.0.0", "0.0.0.0")
Held = tuple[range, list[socket.socket]]


@pytest.fixture
def held() -> Iterator[Held]:
    """Four neighbouring ports that are all listened on, the last two on every address."""
    for _ in range(50):
        (first,) = free_ports(1, taken=set())
        with ExitStack() as stack:
            listeners = []
            try:
                for port, host in enumerate(
                    ("127.0.0.1", "127.0.0.1", "0.0.0.0", "0.0.0.0"), first
                ):
                    listeners.append(stack.enter_context(socket.create_server((host, port))))
            except OSError:
                continue  # somebody has one of them
            yield range(first, first + 4), listeners
            return
    raise AssertionError("no four neighbouring ports")


def test_free_ports_are_distinct_and_can_be_listened_on() -> None:
    ports = free_ports(20, taken={30000})
    assert len(set(ports)) == 20 and 30000 not in ports
    with ExitStack() as stack:
        for port in ports:
            stack.enter_context(socket.create_server(("127.0.0.1", port)))
            assert port not in free_ports(5, taken=set())


def test_no_outgoing_connection_is_given_one_of_them() -> None:
    ports = free_ports(20, taken=set())
    assert set(ports) <= set(server_ports())
    with socket.create_server(("127.0.0.1", 0)) as listener:
        outgoing = listener.getsockname()[1]  # from where connections get theirs, too
    # Where connections get nearly all ports, there is nothing to choose from.
    assert outgoing not in server_ports() or server_ports() == range(10_000, 65_536)


@pytest.mark.parametrize(
    ("setting", "ports"),
    [
        ("32768\t60999\n", range(10_000, 32_768)),
        ("20000 65535", range(10_000, 20_000)),
        ("10500 50000", range(50_001, 65_536)),
        ("1024 65535", range(10_000, 65_536)),
        ("10999 65000", range(10_000, 65_536)),
        ("", range(10_000, 32_768)),
        ("many few", range(10_000, 32_768)),
        (None, range(10_000, 32_768)),
    ],
)
def test_ports_for_servers(tmp_path: Path, setting: str | None, ports: range) -> None:
    path = tmp_path / "ip_local_port_range"
    if setting is not None:
        path.write_text(setting)
    assert server_ports(path) == ports


def test_searches_begin_at_different_ports() -> None:
    found = [free_ports(1, taken=set())[0] for _ in range(100)]
    assert len(set(found)) > 50


def test_what_is_listened_on_is_not_given(held: Held) -> None:
    ports, listeners = held
    for index, port in enumerate(ports):
        listeners[index].close()
        for _ in range(20):  # wherever the search begins
            assert free_ports(1, taken=set(), among=ports) == [port]
        with pytest.raises(ConfigError, match="1 free ports are needed"):
            free_ports(1, taken={port}, among=ports)
        listeners[index] = socket.create_server(("127.0.0.1", port))
    for listener in listeners:
        listener.close()


def test_a_range_of_which_all_is_taken(held: Held) -> None:
    ports, _ = held
    with pytest.raises(ConfigError, match=rf"has 0 of the 4 from {ports.start} on"):
        free_ports(2, taken=set(), among=ports)
    with pytest.raises(ConfigError, match="has 0 of the 0"):
        free_ports(1, taken=set(), among=range(0))
    assert free_ports(0, taken=set(), among=ports) == []
