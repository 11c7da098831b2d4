"""One router process: a listening socket, an event loop, uvicorn, the application."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import signal
import socket
from contextlib import AsyncExitStack

import uvicorn

from ..app import running
from ..config import RouterConfig
from ..http.connection import BoundedProtocol
from ..http.listening import listen, shown
from ..http.replies import App
from ..request.admission import Admission
from .draining import DrainingServer, Obeyed, is_hangup_heard
from .place import Place
from .siblings import Siblings

logger = logging.getLogger(__name__)

# Clients that open a connection a minute keep it; the instances' side has its own figure.
KEEP_ALIVE_S = 75
# For what is left of answers when everything else has ended.
CLOSE_S = 3


def run(config: RouterConfig, place: Place | None) -> None:
    """Until SIGTERM, SIGINT or SIGHUP. ``place``: if this is one of several processes.

    Raises ConfigError when the port cannot be had.
    """
    # uvicorn raises the signals it caught once more when it has shut down; that is not a crash.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _ignore)
    if is_hangup_heard():
        signal.signal(signal.SIGHUP, _ignore)
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        if place is None:
            with listen(config.host, config.port) as listener:
                runner.run(serve(config, listener))
            logger.info("the router has ended")
        else:
            runner.run(_serve_with_others(config, place))
    # Python takes handlers back while it ends, and a signal then would look like a crash.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


async def serve(config: RouterConfig, listener: socket.socket) -> None:
    """Until SIGTERM, SIGINT or SIGHUP: see ``drain``."""
    admission = Admission(config.limits)
    async with running(config, admission=admission) as app:
        host, port = listener.getsockname()[:2]
        _warn_of_strangers(config, host)
        where = shown(config.tls.scheme, host, port)
        print(f"router listening on {where} (policy {config.policy})", flush=True)
        await _server(app, config, admission, Obeyed.ALL).serve(sockets=[listener])


async def _serve_with_others(config: RouterConfig, place: Place) -> None:
    """As ``serve``, but listen only when the others' knowledge is here."""
    siblings = Siblings(place)
    admission = Admission(config.limits)
    async with AsyncExitStack() as stack:
        router = running(config, admission=admission, around=siblings.around)
        app = await stack.enter_async_context(router)
        stack.push_async_callback(siblings.close)
        await siblings.start()
        if place.index == 0:
            _warn_of_strangers(config, config.host)
        listener = stack.enter_context(listen(config.host, config.port, socket.SO_REUSEPORT))
        server = _server(app, config, admission, Obeyed.TERM)
        signs = asyncio.create_task(siblings.give_signs(server.drain), name="signs of life")
        try:
            await server.serve(sockets=[listener])
        finally:
            signs.cancel()
            await asyncio.gather(signs, return_exceptions=True)


def _server(app: App, config: RouterConfig, admission: Admission, obeyed: Obeyed) -> DrainingServer:
    settings = uvicorn.Config(
        app,
        lifespan="off",
        access_log=False,
        log_config=None,
        log_level="warning",
        http=BoundedProtocol,
        ws="none",
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=CLOSE_S,
        server_header=False,
        # Nobody here asks for the client's address.
        proxy_headers=False,
        **config.tls.uvicorn_options(),
    )
    return DrainingServer(settings, admission, config.drain_timeout_s, obeyed)


def _warn_of_strangers(config: RouterConfig, host: str) -> None:
    if not config.api_key and not _is_loopback(host):
        logger.warning("anybody who reaches %s may ask anything: no --api-key", host)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _loop_factory() -> type[asyncio.AbstractEventLoop] | None:
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.Loop


def _ignore(number: int, frame: object) -> None:
    pass
