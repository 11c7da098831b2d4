"""ReAct-like agents: all begin with one long preamble, then thought and action (generated) and
observation (given) take turns.

The preamble and the questions are those of the ReAct repository when their files are given; else
generated ones of the same size.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

from sglang_memserve.errors import ConfigError

from .request import Message, Turn, Workload
from .words import question, text

PROMPTS = "react_prompts_naive.json"
QUESTIONS = "hotpot_dev_v1_simplified.json"
_PREAMBLE = "webthink_simple6"
_PREAMBLE_CHARACTERS = 5000


def make(
    seed: int,
    data: Path | None,
    *,
    agents: int = 32,
    steps: int = 5,
    observation_words: tuple[int, int] = (50, 130),
    answer_tokens: tuple[int, int] = (20, 36),
    within_s: float = 60.0,
    pause_s: tuple[float, float] = (2.0, 6.0),
) -> Workload:
    """``pause_s``: what the tool takes. Raises ConfigError when ``data`` lacks the files."""
    source = random.Random(f"react {seed}")
    preamble, questions, origin = _texts(source, data, agents)
    system = (
        "Solve a question answering task with interleaving Thought, Action, Observation steps."
        f"\n{preamble[:_PREAMBLE_CHARACTERS]}"
    )
    turns = []
    for index in range(agents):
        at_s = (index + source.random()) * within_s / agents
        for number in range(steps):
            if number:
                said = f"Observation {number}: {text(source, source.randint(*observation_words))}"
                messages: tuple[Message, ...] = (Message("user", said),)
            else:
                messages = (
                    Message("system", system),
                    Message("user", f"Question: {questions[index]}"),
                )
            turns.append(
                Turn(
                    conversation=f"react-{index}",
                    turn=number,
                    arrival_s=round(at_s, 3),
                    messages=messages,
                    max_tokens=source.randint(*answer_tokens),
                    after=number - 1 if number else None,
                    session=f"react-{index}",
                )
            )
            at_s += source.uniform(*pause_s)
    about = (
        f"{agents} agents of {steps} steps behind one preamble of at most "
        f"{_PREAMBLE_CHARACTERS} characters ({origin}), {answer_tokens[0]} to {answer_tokens[1]} "
        f"tokens a step; seed {seed}"
    )
    return Workload("react", about, tuple(turns))


def _texts(source: random.Random, data: Path | None, agents: int) -> tuple[str, list[str], str]:
    if data is None:
        return text(source, 700), [question(source) for _ in range(agents)], "generated"
    try:
        preamble = json.loads((data / PROMPTS).read_text())[_PREAMBLE]
        rows = json.loads((data / QUESTIONS).read_text())
        questions = [str(row["question"]) for row in source.sample(rows, agents)]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{data} must hold {PROMPTS} and {QUESTIONS}: {error}") from error
    return str(preamble), questions, f"{_PREAMBLE} of ReAct, questions of HotpotQA"
