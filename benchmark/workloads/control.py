"""Prompts that share nothing: what a cache can only cost."""

from __future__ import annotations

import random

from .request import Message, Turn, Workload
from .words import question, text


def make(
    seed: int,
    *,
    requests: int = 60,
    words: tuple[int, int] = (120, 420),
    answer_tokens: tuple[int, int] = (16, 40),
    within_s: float = 60.0,
) -> Workload:
    source = random.Random(f"control {seed}")
    turns = []
    for index in range(requests):
        # The first words differ already, so that not even one page is shared but the template's.
        said = f"Case {source.getrandbits(64):x}. {text(source, source.randint(*words))}"
        turns.append(
            Turn(
                conversation=f"control-{index}",
                turn=0,
                arrival_s=round((index + source.random()) * within_s / requests, 3),
                messages=(Message("user", f"{said} {question(source)}"),),
                max_tokens=source.randint(*answer_tokens),
                after=None,
                session=f"control-{index}",
            )
        )
    about = (
        f"{requests} generated prompts of {words[0]} to {words[1]} words that share nothing, "
        f"{answer_tokens[0]} to {answer_tokens[1]} tokens an answer; seed {seed}"
    )
    return Workload("control", about, tuple(turns))
