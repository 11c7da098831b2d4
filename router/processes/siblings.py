"""What several router processes must have in common, though each request reaches only one of them.

Each process has its own tree, feeds and connections. In common they have who is a member and what
the operator said: a request that changes that (``is_shared``) is carried out by the process that
got it and by all the others, whom it reaches over Unix sockets; a question about the whole is put
to all and the answers merged (``merge``).

A process that cannot be reached is about to be started again. Then it asks another for its journal,
which is what was shared since the beginning, and does it too. An instance's heartbeat is answered
"unknown" as long as one process does not know it, so that it registers again with all.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import struct
from collections.abc import Callable, Mapping, Sequence

import msgspec
from sglang_memserve.errors import LimitExceeded, PeerError, PeerUnreachable

from ..http.in_process import Answer, Call, ask
from ..http.replies import App, Receive, Scope, Send
from ..request.client import ClientGone, read_body, refusal
from . import merge
from .place import Place

logger = logging.getLogger(__name__)

SIGN_S = 1.0
# Long enough for a process that is busy, short enough for an instance that waits for its answer.
BRIEF_S = 3.0
# A worker may be drained before it goes.
PATIENT_S = 120.0
MAX_FRAME_BYTES = 256 * 2**20
MAX_SHARED_BODY_BYTES = 64 * 2**10
MAX_JOURNAL = 1000
JOURNAL = Call("JOURNAL", "", b"", b"")
REGISTER = "/memserve/register"
HEARTBEAT = "/memserve/heartbeat"
WORKERS = "/workers"

_LENGTH = struct.Struct("<I")
_INSTANCES_WORDS = frozenset({REGISTER, HEARTBEAT, "/memserve/deregister"})
_OPERATORS_WORDS = frozenset({WORKERS, "/add_worker", "/remove_worker"})
_UNRECORDED = frozenset({HEARTBEAT, "/abort_request"})
_MERGED: Mapping[str, Callable[[bytes, Sequence[bytes]], bytes]] = {WORKERS: merge.workers}


def is_shared(method: str, path: str) -> bool:
    """Whether a request changes what all processes know."""
    if method not in ("POST", "PUT", "PATCH", "DELETE"):
        return False
    words = _INSTANCES_WORDS | _OPERATORS_WORDS | {"/abort_request"}
    return path in words or path.startswith(f"{WORKERS}/")


class Siblings:
    """The processes of one router, seen from one of them. Create it inside the event loop."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._app: App | None = None
        self._server: asyncio.Server | None = None
        self._journal: dict[Call, None] = {}
        self._calls: set[asyncio.Task[None]] = set()

    def around(self, app: App) -> App:
        """``app`` as clients get to see it: for all processes."""
        self._app = app
        return self._serve

    async def start(self) -> None:
        """Be there for the others, and learn from one of them what was shared before."""
        path = self._place.meeting_point(self._place.index)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        self._server = await asyncio.start_unix_server(self._answer, path)
        for index in self._place.others:
            try:
                answer = await self._call(index, JOURNAL, BRIEF_S)
                calls = msgspec.msgpack.decode(answer.body, type=list[Call])
            except PeerError:
                continue
            for call in calls:
                await self._carry_out(call)
            logger.info("learnt %d things from process %d", len(calls), index)
            return

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
        for task in list(self._calls):
            task.cancel()
        await asyncio.gather(*self._calls, return_exceptions=True)

    async def give_signs(self, end: Callable[[], None]) -> None:
        """Say that the event loop turns, for as long as the supervisor wants to hear it; then
        ``end``."""
        loop = asyncio.get_running_loop()
        reading = asyncio.Event()
        os.set_blocking(self._place.lifeline, False)
        loop.add_reader(self._place.lifeline, reading.set)
        try:
            while not reading.is_set():
                with contextlib.suppress(BlockingIOError):
                    os.write(self._place.lifeline, b".")
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(reading.wait(), SIGN_S)
        except BrokenPipeError:
            pass
        finally:
            loop.remove_reader(self._place.lifeline)
        end()

    # -- clients --

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        assert self._app is not None
        if scope["type"] == "http":
            method, path = scope["method"], scope["path"]
            if is_shared(method, path):
                return await self._share(scope, receive, send)
            if method == "GET" and (path in _MERGED or path == "/metrics"):
                return await self._put_together(scope, send)
        await self._app(scope, receive, send)

    async def _share(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            body = await read_body(receive, scope["headers"], MAX_SHARED_BODY_BYTES)
        except ClientGone:
            return
        except LimitExceeded as error:
            await refusal(error).send(send)
            return
        call = Call(scope["method"], scope["path"], scope.get("query_string", b""), body)
        limit_s = PATIENT_S if call.path.startswith(f"{WORKERS}/") else BRIEF_S
        own, others = await asyncio.gather(
            self._carry_out(call, scope), self._ask_all(call, limit_s)
        )
        for index, answer in others.items():
            if own.succeeded and not answer.succeeded:
                logger.warning(
                    "process %d: %s %s: %s", index, call.method, call.path, answer.status
                )
        if call.path == HEARTBEAT and own.succeeded:
            told = [answer.body for answer in others.values() if answer.succeeded]
            own = msgspec.structs.replace(own, body=merge.heartbeats(own.body, told))
        await own.send(send)

    async def _put_together(self, scope: Scope, send: Send) -> None:
        assert self._app is not None
        call = Call("GET", scope["path"], scope.get("query_string", b""), b"")
        own, others = await asyncio.gather(
            ask(self._app, call, scope), self._ask_all(call, BRIEF_S)
        )
        if own.succeeded:
            told = {index: one.body for index, one in others.items() if one.succeeded}
            if call.path == "/metrics":
                texts = {**told, self._place.index: own.body}
                body = merge.metrics(self._place.index, texts)
            else:
                body = _MERGED[call.path](own.body, list(told.values()))
            own = msgspec.structs.replace(own, body=body)
        await own.send(send)

    async def _carry_out(self, call: Call, scope: Scope | None = None) -> Answer:
        """Here; what went well is written down for those that come later."""
        assert self._app is not None
        answer = await ask(self._app, call, scope)
        if answer.succeeded and is_shared(call.method, call.path) and call.path not in _UNRECORDED:
            if call.path == REGISTER and call in self._journal:
                # Moved behind a drain it would undo that; one that is missed registers again.
                return answer
            # The last time counts: said before, it is not said twice.
            self._journal.pop(call, None)
            self._journal[call] = None
            if len(self._journal) > MAX_JOURNAL:
                del self._journal[next(iter(self._journal))]
        return answer

    # -- the other processes --

    async def _ask_all(self, call: Call, limit_s: float) -> dict[int, Answer]:
        """Those that answer, by index."""
        indices = self._place.others
        answers = await asyncio.gather(
            *(self._call(index, call, limit_s) for index in indices), return_exceptions=True
        )
        found: dict[int, Answer] = {}
        for index, answer in zip(indices, answers, strict=True):
            if isinstance(answer, PeerError):
                logger.info("process %d does not answer %s: %s", index, call.path, answer)
            elif isinstance(answer, BaseException):
                raise answer
            else:
                found[index] = answer
        return found

    async def _call(self, index: int, call: Call, limit_s: float) -> Answer:
        """Raises PeerUnreachable, PeerError."""
        try:
            async with asyncio.timeout(limit_s):
                reader, writer = await asyncio.open_unix_connection(
                    self._place.meeting_point(index)
                )
                try:
                    writer.write(_frame(call))
                    return msgspec.msgpack.decode(await _read_frame(reader), type=Answer)
                finally:
                    writer.close()
        except (TimeoutError, OSError, asyncio.IncompleteReadError) as error:
            raise PeerUnreachable(f"process {index}: {error or type(error).__name__}") from error
        except msgspec.MsgspecError as error:
            raise PeerError(f"process {index}: {error}") from error

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One call of another process."""
        task = asyncio.current_task()
        assert task is not None
        self._calls.add(task)
        try:
            async with asyncio.timeout(PATIENT_S):
                call = msgspec.msgpack.decode(await _read_frame(reader), type=Call)
                if call == JOURNAL:
                    known = msgspec.msgpack.encode(list(self._journal))
                    writer.write(_frame(Answer(200, [], known)))
                else:
                    writer.write(_frame(await self._carry_out(call)))
                await writer.drain()
        except (TimeoutError, OSError, asyncio.IncompleteReadError, msgspec.MsgspecError) as error:
            logger.info("a call of another process broke off: %s", error or type(error).__name__)
        finally:
            self._calls.discard(task)
            writer.close()


def _frame(message: Call | Answer) -> bytes:
    data = msgspec.msgpack.encode(message)
    return _LENGTH.pack(len(data)) + data


async def _read_frame(reader: asyncio.StreamReader) -> bytes:
    (size,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
    if size > MAX_FRAME_BYTES:
        raise msgspec.ValidationError(f"a frame of {size} bytes")
    return await reader.readexactly(size)
