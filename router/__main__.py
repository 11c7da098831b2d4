"""``python -m sglang_memserve.router``: start the router and serve until told to stop."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import os
import signal
import socket
import sys
from collections.abc import Sequence

import uvicorn
from sglang_memserve.errors import ConfigError, MemServeError

from .app import running
from .config import RouterConfig, parse_args
from .connection import BoundedProtocol

logger = logging.getLogger(__name__)

BACKLOG = 2048
# Clients that open a connection a minute keep it; the instances' side has its own figure.
KEEP_ALIVE_S = 75
DRAIN_S = 30


def main(argv: Sequence[str] | None = None) -> int:
    """The process's exit status: 0 after a SIGTERM or Ctrl-C, 2 for a bad command line."""
    try:
        config = parse_args(argv)
        listener = listen(config.host, config.port)
    except MemServeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    logging.basicConfig(
        level=config.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    if config.warning:
        logger.warning("%s", config.warning)
    # uvicorn raises the signals it caught once more when it has shut down; that is not a crash.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _ignore)
    with listener, asyncio.Runner(loop_factory=_loop_factory()) as runner:
        runner.run(serve(config, listener))
    return 0


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises ConfigError, one line, when that is impossible."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ConfigError(f"cannot listen on {host}: {error.strerror or error}") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
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


async def serve(config: RouterConfig, listener: socket.socket) -> None:
    """Until SIGTERM or SIGINT: then no new connection, and ``DRAIN_S`` for what is running."""
    async with running(config) as app:
        server = uvicorn.Server(
            uvicorn.Config(
                app,
                lifespan="off",
                access_log=False,
                log_config=None,
                log_level="warning",
                http=BoundedProtocol,
                ws="none",
                timeout_keep_alive=KEEP_ALIVE_S,
                timeout_graceful_shutdown=DRAIN_S,
                server_header=False,
                # Nobody here asks for the client's address.
                proxy_headers=False,
                **config.tls.uvicorn_options(),
            )
        )
        host, port = listener.getsockname()[:2]
        if not config.api_key and not ipaddress.ip_address(host).is_loopback:
            logger.warning("anybody who reaches %s may ask anything: no --api-key", host)
        shown = f"[{host}]" if ":" in host else host
        print(
            f"router listening on {config.tls.scheme}://{shown}:{port} (policy {config.policy})",
            flush=True,
        )
        await server.serve(sockets=[listener])


def _loop_factory() -> type[asyncio.AbstractEventLoop] | None:
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.Loop


def _ignore(number: int, frame: object) -> None:
    pass


if __name__ == "__main__":
    sys.exit(main())
