"""Tables for a person and JSON for a script."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from .checks import Check
from .observe import Observation


def _size(bytes_: int) -> str:
    return f"{bytes_ / 1e6:.2f} MB" if bytes_ else "-"


def _row(o: Observation) -> tuple[str, ...]:
    moved = "\n".join(
        f"{_size(count)} to {name}" for name, count in o.fetched_bytes.items() if count
    )
    return (
        escape(o.label),
        o.prefill or "-",
        o.decode or "-",
        str(o.prompt_tokens),
        f"{o.device_tokens} / {o.host_tokens}",
        "?" if o.reused_tokens is None else str(o.reused_tokens),
        moved or "-",
        f"{o.ttft_s * 1000:.0f} ms",
    )


class PhaseTable:
    """One phase's requests, a row as each ends. A context manager."""

    def __init__(self, console: Console, title: str) -> None:
        self._console = console
        self._live = Live(console=console, refresh_per_second=4, vertical_overflow="visible")
        self._table = Table(title=title, title_justify="left", title_style="bold")
        for column in ("request", "prefilled by", "decoded by"):
            self._table.add_column(column)
        for column in ("prompt", "cached HBM / DRAM", "reused", "moved over NIXL", "TTFT"):
            self._table.add_column(column, justify="right")

    def add(self, observation: Observation) -> None:
        self._table.add_row(*_row(observation))
        self._live.update(self._table, refresh=True)

    def __enter__(self) -> PhaseTable:
        self._live.start()
        self._live.update(self._table)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._live.stop()
        if not self._console.is_terminal:
            self._console.print()


def show_checks(console: Console, checks: Sequence[Check]) -> None:
    table = Table(title="Checks", title_justify="left", title_style="bold", show_header=False)
    for check in checks:
        mark = "[green]passed[/]" if check.passed else "[bold red]FAILED[/]"
        table.add_row(mark, escape(check.name), escape(check.detail))
    console.print(table)


def as_json(
    observations: Sequence[Observation],
    checks: Sequence[Check],
    outputs: Mapping[str, Mapping[str, str]],
    facts: Mapping[str, object],
) -> dict[str, object]:
    return {
        **facts,
        "passed": all(check.passed for check in checks),
        "checks": [asdict(check) for check in checks],
        "outputs": {phase: dict(texts) for phase, texts in outputs.items()},
        "requests": [asdict(observation) for observation in observations],
    }
