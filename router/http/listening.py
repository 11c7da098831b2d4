"""Listening sockets."""

from __future__ import annotations

import os
import socket

from sglang_memserve.errors import ConfigError

BACKLOG = 2048


def listen(host: str, port: int, *options: int) -> socket.socket:
    """A listening socket; ``options``: more ``SO_*`` to switch on, ``SO_REUSEPORT`` say.

    Raises ConfigError, one line, when that is impossible.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ConfigError(f"cannot listen on {host}: {error.strerror or error}") from error
    try:
        for option in (socket.SO_REUSEADDR, *options):
            listener.setsockopt(socket.SOL_SOCKET, option, 1)
        # Accepted connections inherit it. asyncio sets it on them only if the listener was made
        # with an explicit protocol; without it a first streamed byte comes 40 ms late.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise ConfigError(f"cannot listen on {host}:{port}: {os.strerror(error.errno or 0)}") from (
            error
        )
    listener.setblocking(False)
    return listener


def shown(scheme: str, host: str, port: int) -> str:
    """As a URL."""
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"
