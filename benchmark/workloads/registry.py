"""Workloads by name, or from a file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from sglang_memserve.errors import ConfigError

from . import chat, control, documents, programs, react, sharegpt
from .request import Message, Turn, Workload, read

WORKLOADS: dict[str, Callable[[int, Path | None], Workload]] = {
    "chat": lambda seed, _: chat.make(seed),
    "sharegpt": sharegpt.make,
    "react": lambda seed, data: react.make(seed, data),
    "documents": lambda seed, data: documents.make(seed, data),
    "programs": lambda seed, _: programs.make(seed),
    "control": lambda seed, _: control.make(seed),
}


def get(name: str, seed: int, data: Path | None = None) -> Workload:
    """``name``: one of the above, or a JSONL file. ``data``: folder of the files that ``react`` and
    ``documents`` read. Raises ConfigError."""
    make = WORKLOADS.get(name)
    if make is not None:
        return make(seed, data)
    if not Path(name).is_file():
        raise ConfigError(f"no workload and no file {name!r}: choose of {', '.join(WORKLOADS)}")
    return read(Path(name))


def warm_up(requests: int = 8) -> Workload:
    """Requests that every set-up answers before it is measured: connections, kernels of common
    shapes, and what a router learns of its instances' speed."""
    turns = []
    made = control.make(99, requests=requests, within_s=requests * 0.7)
    for turn in made.turns:
        # Two turns, so that hits and moved pages have been met too.
        turns.append(turn)
        more = Message("user", "Say it again, in other words.")
        turns.append(
            Turn(
                conversation=turn.conversation,
                turn=1,
                arrival_s=turn.arrival_s,
                messages=(more,),
                max_tokens=8,
                after=0,
                session=turn.session,
            )
        )
    return Workload("warm-up", "unmeasured", tuple(turns))
