"""What a person reads while a cluster starts, where there is no terminal."""

from __future__ import annotations

import io

from rich.console import Console
from sglang_memserve.cluster.probe import Stage
from sglang_memserve.cluster.table import Progress, Row


def test_changes_are_said_at_once_and_who_is_awaited_now_and_then() -> None:
    output, now = io.StringIO(), [100.0]
    progress = Progress(Console(file=output, width=200), clock=lambda: now[0])

    def at(seconds: float, stage: Stage, word: str) -> list[str]:
        now[0] = 100.0 + seconds
        output.truncate(0)
        output.seek(0)
        router = Row("router", "router", "http://r", Stage.READY, "listening")
        progress.show([router, Row("prefill-0", "prefill", "http://p", stage, word)])
        return output.getvalue().splitlines()

    starting = Stage.STARTING
    assert at(0, starting, "a") == [
        "[  0.0 s] router: ready, http://r",
        f"[  0.0 s] prefill-0: {starting.value}, http://p",
    ]
    assert at(14, starting, "b") == []
    assert at(16, starting, "importing") == [f"[ 16.0 s] prefill-0: {starting.value}, importing"]
    assert at(20, starting, "c") == []
    assert at(25, Stage.UP, "d") == ["[ 25.0 s] prefill-0: up, registering, http://p"]
    assert at(39, Stage.UP, "e") == []
    assert at(41, Stage.READY, "f") == ["[ 41.0 s] prefill-0: ready, http://p"]
    assert at(90, Stage.READY, "g") == []
