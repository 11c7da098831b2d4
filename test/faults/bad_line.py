"""A line between a reader and a holder's control socket that loses, repeats and delays messages."""

from __future__ import annotations

import random
import threading
from dataclasses import dataclass
from types import TracebackType

import zmq


@dataclass(frozen=True, slots=True)
class Line:
    """Probabilities, each of one message in either direction."""

    lose: float = 0.0
    repeat: float = 0.0


class BadLine:
    """Readers connect to ``address`` instead of the holder's. Draws from ``seed``."""

    def __init__(self, holder: str, line: Line, seed: int) -> None:
        self._line = line
        self._random = random.Random(seed)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._front = self._context.socket(zmq.ROUTER)
        port = self._front.bind_to_random_port("tcp://127.0.0.1")
        self.address = f"tcp://127.0.0.1:{port}"
        self._back = self._context.socket(zmq.DEALER)
        self._back.connect(holder)
        self.lost = 0
        self.repeated = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._front, zmq.POLLIN)
        poller.register(self._back, zmq.POLLIN)
        askers: dict[bytes, bytes] = {}
        while not self._stop.is_set():
            ready = dict(poller.poll(20))
            if self._front in ready:
                asker, request_id, message = self._front.recv_multipart()
                askers[request_id] = asker
                self._pass_on(self._back, [request_id, message])
            if self._back in ready:
                request_id, message = self._back.recv_multipart()
                self._pass_on(self._front, [askers[request_id], request_id, message])

    def _pass_on(self, to: zmq.Socket[bytes], frames: list[bytes]) -> None:
        if self._random.random() < self._line.lose:
            self.lost += 1
            return
        to.send_multipart(frames)
        if self._random.random() < self._line.repeat:
            self.repeated += 1
            to.send_multipart(frames)

    def close(self) -> None:
        self._stop.set()
        self._thread.join(10)
        assert not self._thread.is_alive()
        self._context.destroy(0)

    def __enter__(self) -> BadLine:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
