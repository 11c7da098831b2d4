"""``python -m sglang_memserve.top --url ROUTER``: the router's dashboard in a terminal.

Reads ``/dashboard/state``, which the page reads too. ``--once`` prints one frame and exits: with
status 1, and the reason, when there is none.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from .config import parse_url
from .errors import ConfigError, MemServeError, PeerError, PeerUnreachable

ASK_S = 5.0
MAX_BYTES = 16 * 2**20
WINDOW = 10
SHOWN_REQUESTS = 12
# Below that many columns the bars go, and errors have lines of their own.
NARROW = 120
LEAST_URL = 15
GAP = 2
# What stands beside a URL where there is room, thirty of it for an error.
WIDE_BESIDE = 120
FUNNEL = (
    "requests",
    "prompt_tokens",
    "best_match_tokens",
    "selected_match_tokens",
    "transferred_tokens",
    "cached_tokens",
    "recomputed_tokens",
    "transfer_bytes",
)
GOOD = {"ready", "exact", "closed"}
BAD = {"unhealthy", "left", "open"}

State = Mapping[str, Any]
"""What ``/dashboard/state`` answers, decoded."""


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status: 0, or 1 when the router did not answer, or 2 for a bad command line."""
    args = _parser().parse_args(argv)
    try:
        url = parse_url(args.url)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    key = args.key or os.environ.get("MEMSERVE_KEY")
    console = Console()
    if args.once:
        try:
            console.print(frame([ask(url, key)]))
        except MemServeError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        return 0
    return _follow(console, url, key, args.interval)


def ask(url: str, key: str | None) -> State:
    """The router's state. Raises PeerUnreachable, PeerError."""
    where = f"{url}/dashboard/state"
    request = urllib.request.Request(where)
    if key:
        request.add_header("Authorization", f"Bearer {key}")
    try:
        with urllib.request.urlopen(request, timeout=ASK_S) as response:
            data = response.read(MAX_BYTES + 1)
    except urllib.error.HTTPError as error:
        why = " (--key, or MEMSERVE_KEY)" if error.code == 401 else ""
        raise PeerError(f"{where} answered {error.code}{why}") from error
    except OSError as error:
        raise PeerUnreachable(f"{where}: {getattr(error, 'reason', error)}") from error
    if len(data) > MAX_BYTES:
        raise PeerError(f"{where} answered more than {MAX_BYTES} bytes")
    try:
        state = json.loads(data)
    except ValueError as error:
        raise PeerError(f"{where} answered no JSON: {error}") from error
    if not isinstance(state, dict) or "members" not in state:
        raise PeerError(f"{where} is not a MemServe router's state")
    return state


def frame(past: Sequence[State]) -> RenderableType:
    """One screen. ``past``: states, oldest first; rates are made between first and last."""
    state = past[-1]
    return Group(_head(state), _rates(past), _members(state), _requests(state))


def _follow(console: Console, url: str, key: str | None, interval_s: float) -> int:
    past: deque[State] = deque(maxlen=WINDOW + 1)
    shown: RenderableType = Text(f"asking {url}")
    with Live(shown, console=console, screen=console.is_terminal, auto_refresh=False) as live:
        try:
            while True:
                try:
                    past.append(ask(url, key))
                    shown = frame(past)
                except MemServeError as error:
                    shown = Panel(Text(str(error), style="bold red"), title="no answer")
                live.update(shown, refresh=True)
                time.sleep(interval_s)
        except KeyboardInterrupt:
            return 0


def _head(state: State) -> RenderableType:
    router = state["router"]
    return Text.assemble(
        ("MemServe ", "bold"),
        (f"{router['model'] or 'no model yet'}", "cyan"),
        f"  policy {router['policy']}  up {router['uptime_s']:.0f} s",
        f"  version {router['version']}  ",
        (f"{state['living_total']} in flight", "yellow"),
    )


def _rates(past: Sequence[State]) -> RenderableType:
    """The funnel: of the prompt's tokens, how many were not computed, and why."""
    first, last = past[0]["totals"], past[-1]["totals"]
    seconds = past[-1]["at"] - past[0]["at"]
    again = any(last[name] < first[name] for name in last)
    table = Table(box=None, pad_edge=False, expand=True)
    table.add_column("")
    for name in FUNNEL:
        table.add_column(name.replace("_", " "), justify="right")
    if seconds > 0 and not again:
        per_s = [_count((last[name] - first[name]) / seconds) for name in FUNNEL]
        table.add_row(f"per second, last {seconds:.0f} s", *per_s)
    table.add_row("since start", *(_count(last[name]) for name in FUNNEL))
    prompt = last["prompt_tokens"] or 1
    shares = [f"{100 * last[name] / prompt:.0f} %" for name in FUNNEL[2:7]]
    table.add_row("of the prompts", "", "", *shares, "", style="dim")
    return Panel(table, title="tokens", title_align="left")


class _Members:
    """As much of every member as there are columns: which, what for and how it is, always."""

    def __init__(self, members: Sequence[Mapping[str, Any]]) -> None:
        self._members = members

    def __rich_console__(self, _: Console, options: ConsoleOptions) -> RenderResult:
        narrow = options.max_width < NARROW
        table = Table(expand=not narrow, box=None, pad_edge=False)
        for title in ("instance", "role", "state", "events"):
            table.add_column(title, no_wrap=True)
        for title in ("run", "wait"):
            table.add_column(title, justify="right", no_wrap=True)
        for title in ("HBM", "DRAM"):
            table.add_column(title, no_wrap=True, justify="right")
            if not narrow:
                table.add_column("", no_wrap=True)
        if not narrow:
            table.add_column("last error", no_wrap=True, overflow="ellipsis", ratio=1)
        rows = [self._row(one, narrow) for one in self._members]
        room = max(options.max_width - self._beside(rows, narrow), LEAST_URL)
        for one, row in zip(self._members, rows, strict=True):
            table.add_row(_ending(one["url"], room), *row)
        yield table
        if narrow:
            for one in self._members:
                if one["error"]:
                    said = f"{_ending(one['url'], LEAST_URL)}: {one['error']}"
                    yield Text(said, style="red", overflow="ellipsis", no_wrap=True)

    def _row(self, one: Mapping[str, Any], narrow: bool) -> list[RenderableType]:
        state = one["state"] if one["breaker"] == "closed" else f"{one['state']}/{one['breaker']}"
        hbm = _bar(one["hbm_used_tokens"], one["hbm_total_tokens"])
        dram = _bar(one["dram_used_bytes"], one["dram_total_bytes"])
        row: list[RenderableType] = [
            one["role"],
            _toned(state, one["state"] if one["breaker"] == "closed" else one["breaker"]),
            _toned(one["source"] or "-", one["source"] or ""),
            str(max(one["running"], one["in_flight"])),
            str(one["waiting"]),
        ]
        if narrow:
            return [*row, hbm[1] or "-", dram[1] or "-"]
        return [*row, *hbm, *dram, Text(one["error"] or "", style="red")]

    def _beside(self, rows: Sequence[Sequence[RenderableType]], narrow: bool) -> int:
        """Columns that the others need, with the gaps between."""
        if not narrow:
            return WIDE_BESIDE
        titles = ("role", "state", "events", "run", "wait", "HBM", "DRAM")
        return sum(
            GAP + max(len(title), *(len(str(row[at])) for row in rows), 0)
            for at, title in enumerate(titles)
        )


def _members(state: State) -> RenderableType:
    members = state["members"]
    return Panel(_Members(members), title=f"{len(members)} members", title_align="left")


def _ending(url: str, room: int) -> Text:
    """The end tells instances apart: host and port."""
    short = url.removeprefix("http://")
    return Text(short if len(short) <= room else "…" + short[1 - room :])


def _requests(state: State) -> RenderableType:
    table = Table(expand=True, box=None, pad_edge=False)
    for title in ("request", "phase"):
        table.add_column(title, no_wrap=True)
    for title in ("prompt", "cached", "TTFT", "total"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("why", no_wrap=True, overflow="ellipsis", ratio=1)
    for one in [*state["living"], *state["ended"]][:SHOWN_REQUESTS]:
        done = one["phase"] == "done"
        good = 200 <= one["status"] < 300
        word = str(one["status"]) if done else one["phase"]
        table.add_row(
            Text(one["id"][:10]),
            Text(word, style=("green" if good else "red") if done else "yellow"),
            _count(one["prompt_tokens"]),
            "-" if one["cached_tokens"] is None else _count(one["cached_tokens"]),
            _seconds(one["ttft_s"]),
            _seconds(one["total_s"] if done else one["age_s"]),
            Text(one["reason"]),
        )
    return Panel(table, title="requests", title_align="left")


def _bar(used: float | None, total: float | None) -> tuple[RenderableType, str]:
    if not total or used is None:
        return Text("-", style="dim"), ""
    share = min(used / total, 1.0)
    style = "yellow" if share > 0.95 else "blue"
    return ProgressBar(100, 100 * share, width=12, complete_style=style), f"{100 * share:.0f} %"


def _toned(text: str, state: str) -> Text:
    style = "green" if state in GOOD else "red" if state in BAD else "yellow"
    return Text(text, style=style)


def _count(value: float) -> str:
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            scale = 1e3 if letter == "k" else size
            return f"{value / scale:.3g}{letter}"
    return f"{value:.1f}" if value % 1 and abs(value) < 10 else f"{value:.0f}"


def _seconds(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{1e3 * value:.0f} ms" if value < 1 else f"{value:.1f} s"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m sglang_memserve.top", description="A router's dashboard in a terminal."
    )
    parser.add_argument("--url", default="http://127.0.0.1:30000", help="default: %(default)s")
    parser.add_argument("--key", help="API key (default: MEMSERVE_KEY from the environment)")
    parser.add_argument("--interval", type=_interval, default=1.0, metavar="S")
    parser.add_argument("--once", action="store_true", help="print one frame and exit")
    return parser


def _interval(text: str) -> float:
    value = float(text)
    if not 0.1 <= value <= 3600:
        raise argparse.ArgumentTypeError("from 0.1 to 3600 seconds")
    return value


if __name__ == "__main__":
    sys.exit(main())
