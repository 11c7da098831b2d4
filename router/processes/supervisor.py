"""Several router processes behind one port: started, watched, started again, ended together.

Each process binds the port itself (``SO_REUSEPORT``) when it is ready and leaves it when it drains
or dies, so that the kernel hands connections to those only that serve. This one reads a
sign of life from every process once a second:

    starting --first sign--> serving --end--> waiting (backoff) --> starting
                               |
                               +-- silent for ``silent_s`` --> killed

A process that ends before any has ever served ends them all, with its status: the command line is
wrong, most likely. How processes keep what they know equal is in ``siblings``.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass

from ..config import RouterConfig
from ..http.listening import listen, shown
from .place import Place

logger = logging.getLogger(__name__)

READ_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Patience:
    """Seconds. ``stable_s``: who served that long is started again at once. ``close_s``: after the
    time a process has to drain."""

    start_s: float = 60.0
    silent_s: float = 15.0
    close_s: float = 15.0
    stable_s: float = 10.0
    least_backoff_s: float = 0.5
    most_backoff_s: float = 30.0

    def backoff_s(self, failures: int) -> float:
        """Before the next start, after ``failures`` short lives in a row."""
        if failures == 0:
            return 0.0
        return min(self.least_backoff_s * 2.0 ** min(failures - 1, 30), self.most_backoff_s)


def supervise(config: RouterConfig, argv: Sequence[str], patience: Patience | None = None) -> int:
    """Run ``config.processes`` routers of the command line ``argv`` until told to stop.

    The exit status. Raises ConfigError when the port cannot be had.
    """
    # Whoever listens there already, with or without SO_REUSEPORT, makes this fail.
    listen(config.host, config.port).close()
    folder = tempfile.mkdtemp(prefix="memserve-router-")
    try:
        supervisor = Supervisor(config, argv, folder, patience or Patience())
        status = asyncio.run(supervisor.run())
        logger.info("the router and its %d processes have ended", config.processes)
        return status
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class Supervisor:
    """``run`` once, in an event loop of its own."""

    def __init__(
        self, config: RouterConfig, argv: Sequence[str], folder: str, patience: Patience
    ) -> None:
        self._config = config
        self._argv = list(argv)
        self._folder = folder
        self._patience = patience
        self._stopping = asyncio.Event()
        self._status = 0
        self._serving: set[int] = set()
        self._processes: set[asyncio.subprocess.Process] = set()
        self._has_served = False
        self._announced = False

    async def run(self) -> int:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._told_to_stop)
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            loop.add_signal_handler(signal.SIGHUP, self._stopping.set)
        tasks = [
            asyncio.create_task(self._keep(index), name=f"process {index}")
            for index in range(self._config.processes)
        ]
        await asyncio.gather(*tasks)
        return self._status

    def _told_to_stop(self) -> None:
        if not self._stopping.is_set():
            self._stopping.set()
            return
        # For a process it is the second signal then, which ends its draining.
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()

    async def _keep(self, index: int) -> None:
        failures = 0
        while not self._stopping.is_set():
            began = time.monotonic()
            status = await self._live(index)
            if self._stopping.is_set():
                return
            if not self._has_served:
                self._status = status or 1
                self._stopping.set()
                return
            lasted_s = time.monotonic() - began
            failures = 0 if lasted_s >= self._patience.stable_s else failures + 1
            pause_s = self._patience.backoff_s(failures)
            logger.error(
                "process %d ended (status %d) after %.0f s; starts again in %.1f s",
                index,
                status,
                lasted_s,
                pause_s,
            )
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), pause_s)

    async def _live(self, index: int) -> int:
        """One life of a process; its exit status, negative for a signal."""
        ours, theirs = socket.socketpair()
        with ours:
            with theirs:
                place = Place(index, self._config.processes, self._folder, theirs.fileno())
                process = await asyncio.create_subprocess_exec(
                    sys.executable,
                    "-m",
                    "sglang_memserve.router",
                    *self._argv,
                    env={**os.environ, **place.as_variable()},
                    stdin=asyncio.subprocess.DEVNULL,
                    pass_fds=(theirs.fileno(),),
                )
            self._processes.add(process)
            ours.setblocking(False)
            signs = asyncio.create_task(self._read_signs(index, ours))
            stop = asyncio.create_task(self._stopping.wait())
            ended = asyncio.create_task(process.wait())
            try:
                await asyncio.wait((signs, stop, ended), return_when=asyncio.FIRST_COMPLETED)
                if not ended.done():
                    await self._end(index, process, ours, self._stopping.is_set())
                return await ended
            finally:
                self._serving.discard(index)
                self._processes.discard(process)
                for task in (signs, stop, ended):
                    task.cancel()
                if process.returncode is None:
                    process.kill()
                    await process.wait()

    async def _read_signs(self, index: int, ours: socket.socket) -> None:
        """Returns when the process has closed its end, or is silent for too long."""
        loop = asyncio.get_running_loop()
        limit_s = self._patience.start_s
        while True:
            try:
                signs = await asyncio.wait_for(loop.sock_recv(ours, READ_BYTES), limit_s)
            except TimeoutError:
                logger.error("process %d gave no sign of life for %.0f s", index, limit_s)
                return
            except OSError:
                return
            if not signs:
                return
            limit_s = self._patience.silent_s
            self._serves(index)

    def _serves(self, index: int) -> None:
        self._serving.add(index)
        self._has_served = True
        if len(self._serving) == self._config.processes and not self._announced:
            self._announced = True
            where = shown(self._config.tls.scheme, self._config.host, self._config.port)
            text = f"policy {self._config.policy}, {self._config.processes} processes"
            print(f"router listening on {where} ({text})", flush=True)

    async def _end(
        self, index: int, process: asyncio.subprocess.Process, ours: socket.socket, drain: bool
    ) -> None:
        """Ask it to drain; what is silent, or has not ended in time, is killed."""
        if drain:
            process.terminate()
            # A process that does not listen to signals yet sees this end of the line.
            with contextlib.suppress(OSError):
                ours.shutdown(socket.SHUT_WR)
        limit_s = self._config.drain_timeout_s + self._patience.close_s if drain else 1.0
        try:
            await asyncio.wait_for(process.wait(), limit_s)
        except TimeoutError:
            logger.error("process %d has not ended; killed", index)
            process.kill()
