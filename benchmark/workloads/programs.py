"""The requests that SGLang frontend programs make: few-shot questions and trees of thought.

Few-shot: many questions behind one set of examples, all at once, as ``run_batch`` sends them. Tree
of thought: a problem, ``branches`` plans for it, ``branches`` next steps for each plan; a fork's
branches share all that came before, answers included, and are sent together.
"""

from __future__ import annotations

import random

from .request import Message, Turn, Workload
from .words import question, text


def make(
    seed: int,
    *,
    batches: int = 2,
    questions: int = 10,
    example_words: int = 400,
    trees: int = 4,
    branches: int = 2,
    problem_words: int = 250,
    answer_tokens: int = 24,
    within_s: float = 60.0,
) -> Workload:
    source = random.Random(f"programs {seed}")
    programs = batches + trees
    starts = [(index + source.random()) * within_s / programs for index in range(programs)]
    source.shuffle(starts)
    turns: list[Turn] = []
    for batch in range(batches):
        examples = "Answer as in these examples. " + text(source, example_words)
        for number in range(questions):
            turns.append(
                Turn(
                    conversation=f"few-shot-{batch}-{number}",
                    turn=0,
                    arrival_s=round(starts[batch], 3),
                    messages=(Message("system", examples), Message("user", question(source))),
                    max_tokens=answer_tokens,
                    after=None,
                    session=f"few-shot-{batch}",
                )
            )
    for tree in range(trees):
        problem = f"Problem {source.getrandbits(32):x}. {text(source, problem_words)}"
        turns += _tree(f"tree-{tree}", problem, starts[batches + tree], branches, answer_tokens)
    about = (
        f"{batches} few-shot batches of {questions} questions, {trees} trees of thought with "
        f"{branches} branches at two levels, {answer_tokens} tokens an answer; seed {seed}"
    )
    return Workload("programs", about, tuple(turns))


def _tree(name: str, problem: str, at_s: float, branches: int, answer_tokens: int) -> list[Turn]:
    said: list[tuple[str, int | None]] = [("Restate the problem.", None)]
    said += [(f"Propose plan {n + 1}, unlike all others.", 0) for n in range(branches)]
    said += [
        (f"Carry out this plan, variant {n + 1}.", plan + 1)
        for plan in range(branches)
        for n in range(branches)
    ]
    return [
        Turn(
            conversation=name,
            turn=number,
            arrival_s=round(at_s, 3),
            messages=(Message("user", f"{problem} {words}" if after is None else words),),
            max_tokens=answer_tokens,
            after=after,
            session=name,
        )
        for number, (words, after) in enumerate(said)
    ]
