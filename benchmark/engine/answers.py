"""Greedy answers of one engine beside stock SGLang's, on a fixed set of prompts.

Rounding differs between two ways to compute attention, so where two tokens are as good as equal the
engines may choose differently, and go on differently from there. The first difference of every
answer is listed with how far apart stock's scores of the two tokens are. A difference that is not
such a tie fails the run. Each prompt is asked twice: what a hit answers must be what the engine
itself answered before, token for token.

    PYTHONPATH=. python -m benchmark.engine.answers [--cores 0,1] [--json FILE]
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests

from benchmark.engine.contenders import Running, memserve, running, stock
from benchmark.engine.contenders import parser as engine_parser
from benchmark.harness import report
from benchmark.workloads.registry import get

LIMIT_S = 180.0
WORKLOADS = ("chat", "control")
# Scores are logits in bf16, 8 bits each: one step is 0.125 from 16 on, and each of the two scores
# may be a step off in either engine.
TIE_NATS = 0.5
# Of stock's alternatives at every token; ours must be among them to be called a tie.
CONSIDERED = 5


@dataclass(frozen=True, slots=True)
class Answer:
    """``scores``: for each token, the log-probabilities of the best ``CONSIDERED`` by token."""

    tokens: tuple[int, ...]
    scores: tuple[dict[int, float], ...]


@dataclass(frozen=True, slots=True)
class Difference:
    """The first one. ``nats``: how much less likely stock finds our token than its own; None where
    it is not among those considered."""

    prompt: int
    place: int
    nats: float | None

    @property
    def is_tie(self) -> bool:
        return self.nats is not None and self.nats <= TIE_NATS


def prompts(model: Path, count: int, seed: int) -> list[list[int]]:
    """The first messages of conversations, as many of each of ``WORKLOADS``, as token ids."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    found: list[list[int]] = []
    for name in WORKLOADS:
        firsts = [turn for turn in get(name, seed, None).turns if turn.after is None]
        for turn in firsts[: -(-count // len(WORKLOADS))]:
            said = [{"role": one.role, "content": one.content} for one in turn.messages]
            text = tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
            found.append(tokenizer.encode(text, add_special_tokens=False))
    return found[:count]


def ask(server: Running, ids: Sequence[int], new_tokens: int) -> Answer:
    body = {
        "input_ids": list(ids),
        "sampling_params": {"temperature": 0, "max_new_tokens": new_tokens, "ignore_eos": True},
        "return_logprob": True,
        "top_logprobs_num": CONSIDERED,
    }
    response = requests.post(f"{server.url}/generate", json=body, timeout=LIMIT_S)
    if response.status_code != 200:
        raise SystemExit(f"{server.name}: {response.status_code} {response.text[:500]}")
    said = response.json()
    scores = tuple(
        {token: score for score, token, _ in best}
        for best in said["meta_info"]["output_top_logprobs"]
    )
    return Answer(tuple(said["output_ids"]), scores)


def first_difference(prompt: int, ours: Answer, theirs: Answer) -> Difference | None:
    for place, (a, b) in enumerate(zip(ours.tokens, theirs.tokens, strict=True)):
        if a != b:
            scores = theirs.scores[place]
            nats = round(scores[b] - scores[a], 4) if a in scores else None
            return Difference(prompt, place, nats)
    return None


def compared(
    servers: Sequence[Running], ids: Sequence[list[int]], new_tokens: int
) -> dict[str, Any]:
    computed = [[ask(server, one, new_tokens) for one in ids] for server in servers]
    again = [[ask(server, one, new_tokens) for one in ids] for server in servers]
    found = [
        first_difference(number, ours, theirs)
        for number, (ours, theirs) in enumerate(zip(*computed, strict=True))
    ]
    differences = [one for one in found if one is not None]
    return {
        "prompts": len(ids),
        "prompt_tokens": [len(one) for one in ids],
        "new_tokens": new_tokens,
        "equal": len(ids) - len(differences),
        "tie_nats": TIE_NATS,
        "differences": [
            {"prompt": one.prompt, "place": one.place, "nats": one.nats, "tie": one.is_tie}
            for one in differences
        ],
        "changed_by_a_hit": {
            server.name: sum(
                before.tokens != after.tokens for before, after in zip(first, second, strict=True)
            )
            for server, first, second in zip(servers, computed, again, strict=True)
        },
    }


def main() -> int:
    parser = engine_parser(__doc__, cores="0,1", new_tokens=48)
    parser.add_argument("--prompts", type=int, default=40)
    options = parser.parse_args()
    cores = options.cores
    started = time.monotonic()
    ids = prompts(options.model, options.prompts, options.seed)
    contenders = [memserve(options.model, len(cores)), stock(options.model, len(cores))]
    with tempfile.TemporaryDirectory() as folder, running(contenders, cores, Path(folder)) as up:
        result = compared(up, ids, options.new_tokens)
    report("engine/answers", result, started, options.json)
    ties = all(one["tie"] for one in result["differences"])
    return 0 if ties and not result["changed_by_a_hit"]["memserve"] else 1


if __name__ == "__main__":
    sys.exit(main())
