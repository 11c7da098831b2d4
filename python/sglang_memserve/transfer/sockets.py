"""The ZMQ sockets of a rank, as bytes in and out. All belong to the agent's thread."""

from __future__ import annotations

import ipaddress
import os
import re
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

import zmq

from ..errors import ConfigError, ProtocolError
from ..protocol.control import Message, decode, encode

MAX_MESSAGE_BYTES = 16 << 20
_QUEUE_MESSAGES = 1000
_REQUEST_ID_BYTES = 8
_RECONNECT_MS = 5_000
_PROBE_S = 1.0
_PORTS = 65_536
_TCP = re.compile(r"tcp://(?:\[(?P<v6>[^\s/\]]+)\]|(?P<v4>[^\s/:]+)):(?P<port>[0-9]{1,5})")
# sockaddr_un holds 108 bytes, the last of which is NUL.
_MAX_IPC_PATH_BYTES = 107


class MalformedFrames(ProtocolError):
    """Frames that are no request; ``route`` is where an error can be sent (maybe nowhere)."""

    def __init__(self, text: str, route: Route | None) -> None:
        super().__init__(text)
        self.route = route


class Route:
    """Who asked, and the request id to answer under."""

    __slots__ = ("asker", "request_id")

    def __init__(self, asker: bytes, request_id: bytes) -> None:
        self.asker = asker
        self.request_id = request_id


class Server:
    """A ROUTER socket. Answers to askers that are gone, or that do not read, are dropped."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]]) -> None:
        self.socket = context.socket(zmq.ROUTER)
        _bound(self.socket)

    def bind_tcp(self, host: str, advertise: str | None, port: int = 0) -> str:
        """``port`` 0: any that is free. Returns the address that others connect to."""
        bound = _bind(self.socket, host, port)
        return f"tcp://{_in_url(numeric(advertise or host))}:{bound}"

    def bind_ipc(self, path: Path) -> None:
        """Only this user may connect. Raises ConfigError when something else lies at ``path``."""
        if len(os.fsencode(path)) > _MAX_IPC_PATH_BYTES:
            raise ConfigError(f"socket path longer than {_MAX_IPC_PATH_BYTES} bytes: {path}")
        _require_free(path)
        before = os.umask(0o177)
        try:
            self.socket.bind(f"ipc://{path}")
        except zmq.ZMQError as error:
            raise ConfigError(f"cannot bind {path}: {error}") from error
        finally:
            os.umask(before)
        path.chmod(0o600)

    def receive(self, limit: int) -> Iterator[tuple[Route, Message] | MalformedFrames]:
        for frames in _waiting(self.socket, limit):
            if len(frames) != 3 or len(frames[1]) != _REQUEST_ID_BYTES:
                route = Route(frames[0], bytes(_REQUEST_ID_BYTES))
                yield MalformedFrames(f"request of {len(frames) - 1} frames, expected 2", route)
                continue
            route = Route(frames[0], frames[1])
            try:
                yield route, decode(frames[2])
            except ProtocolError as error:
                yield MalformedFrames(str(error), route)

    def send(self, route: Route, message: Message) -> None:
        _send(self.socket, [route.asker, route.request_id, encode(message)])

    def close(self) -> None:
        self.socket.close(0)


class Dialer:
    """A DEALER socket to one peer; ``peers.Link``. Only to a numeric address: ZMQ looks names up in
    the one thread that moves all messages, for as long as the name server is silent."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], address: str) -> None:
        version = _ip_version(address)
        self.socket = context.socket(zmq.DEALER)
        _bound(self.socket)
        self.socket.setsockopt(zmq.IPV6, int(version == 6))
        self.dropped = 0
        # A peer that is gone is called ever more rarely until it is forgotten.
        self.socket.reconnect_ivl_max = _RECONNECT_MS
        try:
            self.socket.connect(address)
        except zmq.ZMQError as error:
            self.socket.close(0)
            raise ProtocolError(f"peer address {address!r}: {error}") from error

    def send(self, request_id: int, message: Message) -> None:
        frames = [request_id.to_bytes(_REQUEST_ID_BYTES, "big"), encode(message)]
        self.dropped += not _send(self.socket, frames)

    def receive(self, limit: int) -> Iterator[tuple[int, Message] | MalformedFrames]:
        for frames in _waiting(self.socket, limit):
            if len(frames) != 2 or len(frames[0]) != _REQUEST_ID_BYTES:
                yield MalformedFrames(f"answer of {len(frames)} frames, expected 2", None)
                continue
            try:
                yield int.from_bytes(frames[0], "big"), decode(frames[1])
            except ProtocolError as error:
                yield MalformedFrames(str(error), None)

    def close(self) -> None:
        self.socket.close(0)


class Publisher:
    """A PUB socket: a subscriber that does not keep up loses batches and sees the hole."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], host: str) -> None:
        self.socket = context.socket(zmq.PUB)
        _bound(self.socket)
        self._port = _bind(self.socket, host, 0)

    def address(self, host: str) -> str:
        return f"tcp://{_in_url(numeric(host))}:{self._port}"

    def send(self, frames: list[bytes]) -> None:
        _send(self.socket, frames)

    def close(self) -> None:
        self.socket.close(0)


class Wake:
    """Lets other threads end the agent's poll. ``set`` never waits and may be called any time."""

    def __init__(self) -> None:
        self._near, self._far = socket.socketpair()
        self._near.setblocking(False)
        self._far.setblocking(False)

    def fileno(self) -> int:
        return self._near.fileno()

    def set(self) -> None:
        try:
            self._far.send(b"\0")
        except (BlockingIOError, OSError):
            # Full: a wake-up is pending anyway. Closed: nobody is left to wake.
            return

    def clear(self) -> None:
        try:
            while len(self._near.recv(4096)) == 4096:
                pass
        except BlockingIOError:
            return

    def close(self) -> None:
        self._near.close()
        self._far.close()


def _bound(sock: zmq.Socket[bytes]) -> None:
    sock.linger = 0
    sock.sndhwm = _QUEUE_MESSAGES
    sock.rcvhwm = _QUEUE_MESSAGES
    sock.maxmsgsize = MAX_MESSAGE_BYTES


def _bind(sock: zmq.Socket[bytes], host: str, port: int) -> int:
    try:
        # ZMQ binds addresses and interface names, not host names.
        interface = f"tcp://{_in_url(numeric(host))}"
        sock.setsockopt(zmq.IPV6, int("[" in interface))
        if not port:
            return sock.bind_to_random_port(interface)
        sock.bind(f"{interface}:{port}")
        return port
    except (OSError, zmq.ZMQError) as error:
        place = f"port {port} of {host!r}" if port else repr(host)
        raise ConfigError(f"cannot listen on {place}: {error}") from error


def numeric(host: str) -> str:
    """The address of ``host``. Raises ConfigError."""
    try:
        return str(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0])
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"no address is known for host {host!r}: {error}") from error


def _ip_version(address: str) -> int:
    """4 or 6. Raises ProtocolError for what is not tcp://ADDRESS:PORT with a numeric address."""
    found = _TCP.fullmatch(address)
    text = f"peer address {address!r} is not tcp://ADDRESS:PORT with a numeric address"
    if found is None or not 0 < int(found["port"]) < _PORTS:
        raise ProtocolError(text)
    try:
        return ipaddress.ip_address(found["v4"] or found["v6"]).version
    except ValueError as error:
        raise ProtocolError(text) from error


def _require_free(path: Path) -> None:
    """ZMQ takes away whatever lies where it binds. The folder is made, those above it are not."""
    try:
        path.parent.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"there is no folder for the local socket {path}: {error}") from error
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise ConfigError(f"{path} is there and no socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(_PROBE_S)
        try:
            probe.connect(os.fspath(path))
        except (ConnectionRefusedError, FileNotFoundError):
            return  # of a process that is gone
        except OSError as error:
            raise ConfigError(f"{path} is somebody's socket: {error}") from error
    raise ConfigError(f"another process listens on {path}")


def _in_url(host: str) -> str:
    try:
        return f"[{host}]" if ipaddress.ip_address(host).version == 6 else host
    except ValueError:
        return host


def _waiting(sock: zmq.Socket[bytes], limit: int) -> Iterator[list[bytes]]:
    """Messages that have arrived, ``limit`` at most."""
    for _ in range(limit):
        try:
            yield sock.recv_multipart(zmq.NOBLOCK)
        except zmq.Again:
            return


def _send(sock: zmq.Socket[bytes], frames: list[bytes]) -> bool:
    try:
        sock.send_multipart(frames, zmq.NOBLOCK)
    except zmq.Again:
        return False
    return True
