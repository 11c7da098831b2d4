"""One request of a workload, and the file that holds many.

JSON Lines; one turn a line, these fields:

    conversation  text, groups turns
    turn          integer, unique in its conversation
    arrival_s     not sent before, seconds from the start
    messages      what is new: a list of {"role": ..., "content": ...}
    max_tokens    generated, exactly: the end-of-text token does not end an answer
    after         the turn whose answer must have come before; null for none. Default: the turn of
                  the same conversation in the line before, if any
    session       affinity key of the client; default: the conversation

The prompt of a turn is the messages and answers of all turns it comes after, then its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
from sglang_memserve.errors import ConfigError

_MAX_FILE_BYTES = 2**30


class Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    role: str
    content: str


class Turn(msgspec.Struct, frozen=True, kw_only=True):
    """``after`` is None for a turn that waits for nobody."""

    conversation: str
    turn: int
    arrival_s: float
    messages: tuple[Message, ...]
    max_tokens: int
    after: int | None
    session: str


class _Line(msgspec.Struct, forbid_unknown_fields=True):
    conversation: str
    turn: int
    arrival_s: float
    messages: tuple[Message, ...]
    max_tokens: int
    after: int | msgspec.UnsetType | None = msgspec.UNSET
    session: str | msgspec.UnsetType = msgspec.UNSET


@dataclass(frozen=True, slots=True)
class Workload:
    """``about``: what it is and how it was scaled, for reports. Raises ConfigError when turns do
    not fit together."""

    name: str
    about: str
    turns: tuple[Turn, ...]

    def __post_init__(self) -> None:
        if not self.turns:
            raise ConfigError(f"workload {self.name} is empty")
        seen: set[tuple[str, int]] = set()
        for turn in self.turns:
            where = f"workload {self.name}: {turn.conversation}, turn {turn.turn}"
            key = (turn.conversation, turn.turn)
            if key in seen:
                raise ConfigError(f"{where} is there twice")
            if turn.after is not None and (turn.conversation, turn.after) not in seen:
                raise ConfigError(f"{where} comes after turn {turn.after}, which is not before it")
            if turn.max_tokens < 1 or not turn.messages or not 0 <= turn.arrival_s < 1e9:
                raise ConfigError(f"{where}: needs messages, max_tokens and a time from 0 on")
            seen.add(key)

    @property
    def span_s(self) -> float:
        return max(turn.arrival_s for turn in self.turns)


def chain(turns: Sequence[Turn], last: Turn) -> list[Turn]:
    """``last`` and all it comes after, first to last."""
    by_key = {(turn.conversation, turn.turn): turn for turn in turns}
    path = [last]
    while path[-1].after is not None:
        path.append(by_key[last.conversation, path[-1].after])
    return path[::-1]


def first(workload: Workload, count: int) -> Workload:
    """The conversations of the first ``count`` turns to arrive, cut there."""
    kept = sorted(workload.turns, key=lambda turn: turn.arrival_s)[:count]
    keys = {(turn.conversation, turn.turn) for turn in kept}
    turns = tuple(t for t in workload.turns if (t.conversation, t.turn) in keys)
    return Workload(workload.name, f"{workload.about}; the first {count} requests", turns)


def write(workload: Workload, file: Path) -> None:
    file.write_bytes(b"\n".join(msgspec.json.encode(turn) for turn in workload.turns) + b"\n")


def read(file: Path) -> Workload:
    """Raises ConfigError with the number of the line that is not as it should be."""
    try:
        if file.stat().st_size > _MAX_FILE_BYTES:
            raise ConfigError(f"{file}: larger than {_MAX_FILE_BYTES} bytes")
        data = file.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {file}: {error.strerror or error}") from error
    return Workload(file.stem, f"file {file.name}", tuple(_turns(data.splitlines(), file)))


def _turns(lines: Iterable[bytes], file: Path) -> Iterable[Turn]:
    decoder = msgspec.json.Decoder(_Line)
    latest: dict[str, int] = {}
    for number, text in enumerate(lines, 1):
        if not text.strip():
            continue
        try:
            line = decoder.decode(text)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{file}, line {number}: {error}") from error
        before = latest.get(line.conversation)
        latest[line.conversation] = line.turn
        yield Turn(
            conversation=line.conversation,
            turn=line.turn,
            arrival_s=line.arrival_s,
            messages=line.messages,
            max_tokens=line.max_tokens,
            after=before if isinstance(line.after, msgspec.UnsetType) else line.after,
            session=line.conversation
            if isinstance(line.session, msgspec.UnsetType)
            else line.session,
        )
