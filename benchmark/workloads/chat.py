"""Conversations of several turns behind one system prompt.

Each begins with a pasted text and a question; later turns are short. Starts are spread evenly with
jitter, turns follow after a pause to read and think. A real service's turns are longer by about
ten; the model and the machine here are smaller by more.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from .request import Message, Turn, Workload
from .words import question, text


@dataclass(frozen=True, slots=True)
class Shape:
    conversations: int = 24
    turns: int = 5
    system_words: int = 120
    first_words: int = 260
    later_words: tuple[int, int] = (20, 90)
    answer_tokens: tuple[int, int] = (24, 48)
    starts_within_s: float = 60.0
    pause_s: tuple[float, float] = (8.0, 16.0)


def make(seed: int, shape: Shape | None = None) -> Workload:
    shape = Shape() if shape is None else shape
    source = random.Random(f"chat {seed}")
    system = "You are a helpful assistant. House rules: " + text(source, shape.system_words)
    turns = []
    for index in range(shape.conversations):
        at_s = (index + source.random()) * shape.starts_within_s / shape.conversations
        for number in range(shape.turns):
            said = question(source)
            words = shape.first_words if number == 0 else source.randint(*shape.later_words)
            said = f"{text(source, words)} {said}"
            messages = [Message("user", said)]
            if number == 0:
                messages.insert(0, Message("system", system))
            turns.append(
                Turn(
                    conversation=f"chat-{index}",
                    turn=number,
                    arrival_s=round(at_s, 3),
                    messages=tuple(messages),
                    max_tokens=source.randint(*shape.answer_tokens),
                    after=number - 1 if number else None,
                    session=f"chat-{index}",
                )
            )
            at_s += source.uniform(*shape.pause_s)
    about = (
        f"{shape.conversations} generated conversations of {shape.turns} turns, one system prompt; "
        f"a first message of about {shape.first_words} words, later ones of "
        f"{shape.later_words[0]} to {shape.later_words[1]}; {shape.answer_tokens[0]} to "
        f"{shape.answer_tokens[1]} tokens an answer; seed {seed}"
    )
    return Workload("chat", about, tuple(turns))
