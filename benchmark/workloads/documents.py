"""LooGLE-like: questions about long documents, several clients for each document.

A client asks few questions and goes; so routing by client computes a document on every instance
where one of its clients lands, and routing by prefix once. Documents are cut to a length that the
machine reads in seconds; of a longer one each part is a document of its own.
"""

from __future__ import annotations

import ast
import json
import random
from pathlib import Path

from sglang_memserve.errors import ConfigError

from .request import Message, Turn, Workload
from .words import question, text

FILE = "loogle_shortdep_qa.jsonl"
_CHARACTERS = 8000


def make(
    seed: int,
    data: Path | None,
    *,
    documents: int = 8,
    clients: int = 4,
    questions: int = 2,
    answer_tokens: tuple[int, int] = (12, 24),
    within_s: float = 70.0,
    pause_s: tuple[float, float] = (6.0, 12.0),
) -> Workload:
    """``clients`` of each document, ``questions`` of each client. Raises ConfigError when ``data``
    lacks the file."""
    source = random.Random(f"documents {seed}")
    texts, origin = _texts(source, data, documents)
    # Clients of one document come one after the other, mixed with those of the others.
    order = [(client, document) for client in range(clients) for document in range(documents)]
    turns = []
    for place, (client, document) in enumerate(order):
        at_s = (place + source.random()) * within_s / len(order)
        body, asked = texts[document]
        name = f"document-{document}-{client}"
        for number in range(questions):
            said = asked[(client * questions + number) % len(asked)]
            said = f"{body}\n\nQuestion: {said}" if number == 0 else f"Question: {said}"
            turns.append(
                Turn(
                    conversation=name,
                    turn=number,
                    arrival_s=round(at_s, 3),
                    messages=(Message("user", said),),
                    max_tokens=source.randint(*answer_tokens),
                    after=number - 1 if number else None,
                    session=name,
                )
            )
            at_s += source.uniform(*pause_s)
    about = (
        f"{documents} documents of {_CHARACTERS} characters ({origin}), {clients} clients each "
        f"with {questions} questions, {answer_tokens[0]} to {answer_tokens[1]} tokens an answer; "
        f"seed {seed}"
    )
    return Workload("documents", about, tuple(turns))


def _texts(
    source: random.Random, data: Path | None, documents: int
) -> tuple[list[tuple[str, list[str]]], str]:
    if data is None:
        bodies = [text(source, _CHARACTERS // 6)[:_CHARACTERS] for _ in range(documents)]
        return [(body, [question(source) for _ in range(8)]) for body in bodies], "generated"
    try:
        rows = [json.loads(line) for line in (data / FILE).read_text().splitlines() if line]
        parts = []
        for row in rows:
            # A list of dictionaries in Python's spelling, as the data set has it.
            asked = [str(pair["Q"]) for pair in ast.literal_eval(row["qa_pairs"])]
            body = str(row["input"])
            starts = range(0, len(body) - _CHARACTERS, _CHARACTERS)
            parts.append([(body[at : at + _CHARACTERS], asked) for at in starts])
    except (OSError, ValueError, SyntaxError, KeyError, TypeError) as error:
        raise ConfigError(f"{data} must hold {FILE}: {error}") from error
    # A part of each document in turn, so that few documents come from one text.
    mixed = [part for group in zip(*parts, strict=False) for part in group]
    if len(mixed) < documents:
        raise ConfigError(f"{data / FILE} has only {len(mixed)} parts of {_CHARACTERS} characters")
    return mixed[:documents], "LooGLE"
