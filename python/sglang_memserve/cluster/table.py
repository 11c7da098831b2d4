"""Progress for a person, on standard error: a live table on a terminal, lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from .probe import Stage

_STYLE = {Stage.READY: "green", Stage.DEAD: "bold red", Stage.UP: "cyan"}
_DETAIL_CHARS = 70
# Where there is no live table: who is awaited is said again when nothing has changed for so long.
_SILENCE_S = 15.0


@dataclass(frozen=True, slots=True)
class Row:
    """``detail``: what the process said last."""

    name: str
    role: str
    url: str
    stage: Stage
    detail: str = ""


class Progress:
    """Show rows as they change. A context manager: the table stays on screen when it ends."""

    def __init__(
        self, console: Console | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._console = console or Console(stderr=True)
        self._clock = clock
        self._began = self._spoke = clock()
        self._stages: dict[str, Stage] = {}
        self._live = (
            Live(console=self._console, refresh_per_second=4) if self._console.is_terminal else None
        )

    def say(self, text: str) -> None:
        self._console.print(escape(text), highlight=False, soft_wrap=True)

    def show(self, rows: Sequence[Row]) -> None:
        if self._live is not None:
            self._live.update(self._table(rows), refresh=True)
            return
        for row in rows:
            if self._stages.get(row.name) is not row.stage:
                self._stages[row.name] = row.stage
                self._line(row, row.url)
        if self._clock() - self._spoke >= _SILENCE_S:
            for row in rows:
                if row.stage is not Stage.READY:
                    self._line(row, row.detail[:_DETAIL_CHARS])

    def _line(self, row: Row, more: str) -> None:
        self._spoke = self._clock()
        self.say(f"[{self._elapsed():5.1f} s] {row.name}: {row.stage.value}, {more}")

    def _elapsed(self) -> float:
        return self._clock() - self._began

    def _table(self, rows: Sequence[Row]) -> Table:
        table = Table(title=f"MemServe cluster, {self._elapsed():.0f} s", title_justify="left")
        for column in ("process", "role", "URL", "state", "last word"):
            table.add_column(column, no_wrap=column != "last word")
        for row in rows:
            style = _STYLE.get(row.stage, "yellow")
            state = f"[{style}]{row.stage.value}[/]"
            detail = "" if row.stage is Stage.READY else escape(row.detail[:_DETAIL_CHARS])
            table.add_row(row.name, row.role, row.url, state, f"[dim]{detail}[/]")
        return table

    def __enter__(self) -> Progress:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live is not None:
            self._live.stop()
