"""A word every few seconds while a server starts, which takes a minute on a small machine."""

from __future__ import annotations

import sys
import threading
import time
from types import TracebackType
from typing import TextIO

EVERY_S = 5.0


class StartUp:
    """Writes ``[ 10.0 s] STAGE`` to ``out`` (stderr) until ``ready`` or the end of the block.

    A thread of its own does it: imports and engines do not come by here."""

    def __init__(self, stage: str, out: TextIO | None = None, every_s: float = EVERY_S) -> None:
        self._stage = stage
        self._out = out or sys.stderr
        self._every_s = every_s
        self._began_s = time.monotonic()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="memserve-start", daemon=True)

    def stage(self, text: str) -> None:
        """What it does from now on."""
        self._stage = text

    def ready(self) -> None:
        """Say so, and no more. Any thread; the first call counts."""
        if not self._ended.is_set():
            self._ended.set()
            self._say("ready")

    def __enter__(self) -> StartUp:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended.set()
        self._thread.join(1.0)

    def _run(self) -> None:
        while not self._ended.wait(self._every_s):
            self._say(self._stage)

    def _say(self, text: str) -> None:
        elapsed_s = time.monotonic() - self._began_s
        print(f"[{elapsed_s:5.1f} s] {text}", file=self._out, flush=True)
