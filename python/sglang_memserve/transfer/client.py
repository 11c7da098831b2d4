"""The HTTP process's end of a rank's local socket."""

from __future__ import annotations

import asyncio
import itertools
import math
from pathlib import Path

import zmq
import zmq.asyncio

from .. import errors
from ..errors import LimitExceeded, MemServeError, PeerUnreachable, ProtocolError
from ..protocol.control import ErrorReply, Message, decode, encode
from .sockets import MAX_MESSAGE_BYTES

_MAX_CALLS = 1024
_QUEUE_MESSAGES = 1000


class LocalClient:
    """Any number of concurrent calls from one event loop. Connects when first used, and again by
    itself when the rank returns."""

    def __init__(self, path: Path | str) -> None:
        self._path = path
        self._context: zmq.asyncio.Context | None = None
        self._socket: zmq.asyncio.Socket | None = None
        self._receiver: asyncio.Task[None] | None = None
        self._calls: dict[bytes, asyncio.Future[Message]] = {}
        self._ids = itertools.count(1)
        self.malformed = 0

    async def call(self, message: Message, timeout_s: float) -> Message:
        """The rank's answer.

        Raises the class of ``errors`` that an ErrorReply names, PeerUnreachable when no answer
        came within ``timeout_s`` seconds, LimitExceeded with too many calls under way.
        """
        if not 0 < timeout_s < math.inf:
            raise ProtocolError(f"timeout of {timeout_s} s")
        if len(self._calls) >= _MAX_CALLS:
            raise LimitExceeded(f"{len(self._calls)} calls to {self._path} are under way")
        socket = self._connected()
        request_id = next(self._ids).to_bytes(8, "big")
        answer: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        self._calls[request_id] = answer
        try:
            async with asyncio.timeout(timeout_s):
                await socket.send_multipart([request_id, encode(message)])
                reply = await answer
        except TimeoutError as error:
            text = f"no answer from rank socket {self._path} in {timeout_s:g} s"
            raise PeerUnreachable(text) from error
        finally:
            del self._calls[request_id]
        if isinstance(reply, ErrorReply):
            raise error_of(reply)
        return reply

    def close(self) -> None:
        """Calls under way fail with PeerUnreachable. Idempotent."""
        for answer in self._calls.values():
            if not answer.done():
                answer.set_exception(PeerUnreachable("the client was closed"))
        if self._receiver is not None:
            self._receiver.cancel()
            self._receiver = None
        if self._socket is not None:
            self._socket.close(0)
            self._socket = None
        if self._context is not None:
            self._context.destroy(0)
            self._context = None

    def _connected(self) -> zmq.asyncio.Socket:
        if self._socket is None:
            self._context = zmq.asyncio.Context()
            self._socket = self._context.socket(zmq.DEALER)
            self._socket.linger = 0
            self._socket.sndhwm = _QUEUE_MESSAGES
            # A snapshot of a large pool is longer than any request.
            self._socket.maxmsgsize = 16 * MAX_MESSAGE_BYTES
            self._socket.connect(f"ipc://{self._path}")
            self._receiver = asyncio.create_task(self._receive(self._socket))
        return self._socket

    async def _receive(self, socket: zmq.asyncio.Socket) -> None:
        while True:
            frames = await socket.recv_multipart()
            answer = self._calls.get(frames[0])
            if len(frames) != 2 or answer is None or answer.done():
                # An answer that comes after its time-out has nobody to go to.
                self.malformed += len(frames) != 2
                continue
            try:
                answer.set_result(decode(frames[1]))
            except ProtocolError as error:
                self.malformed += 1
                answer.set_exception(error)


_KINDS: dict[str, type[MemServeError]] = {
    kind.__name__: kind
    for kind in (
        errors.ConfigError,
        errors.ProtocolError,
        errors.VersionMismatch,
        errors.NamespaceMismatch,
        errors.OutOfBlocks,
        errors.PeerError,
        errors.PeerUnreachable,
        errors.LeaseInvalid,
        errors.TransferFailed,
        errors.LimitExceeded,
    )
}


def error_of(reply: ErrorReply) -> MemServeError:
    """The exception that an ErrorReply names; an unknown name gives a plain MemServeError."""
    kind = _KINDS.get(reply.kind)
    return MemServeError(f"{reply.kind}: {reply.message}") if kind is None else kind(reply.message)
