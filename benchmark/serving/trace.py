"""What was replayed, in the simulator's format (docs/simulator.md): when each request really went
out, how long it was, and which prompts begin alike, or as another one with its answer."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

from benchmark.workloads.request import Message

from .replay import Sample

BLOCK_TOKENS = 16


def name_of(run: Mapping[str, Any]) -> str:
    """The file of a replay, by its result."""
    return f"{run['setup']}-{run['workload']}-x{run['rate']:g}-{run['round']}.jsonl"


def block_ids(tokens: Sequence[int]) -> list[int]:
    """One number for each block: of all tokens up to its end."""
    ids, state = [], blake2b(digest_size=6)
    for start in range(0, len(tokens), BLOCK_TOKENS):
        state.update(json.dumps(tokens[start : start + BLOCK_TOKENS]).encode())
        ids.append(int.from_bytes(state.copy().digest(), "big"))
    return ids


def write(samples: Sequence[Sample], model: Path, file: Path) -> None:
    """``model``: folder of the tokenizer. Requests that failed are left out."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)

    def tokens(messages: Sequence[Message], answer: str = "") -> list[int]:
        said = [{"role": message.role, "content": message.content} for message in messages]
        text = tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
        encoded: list[int] = tokenizer.encode(str(text) + answer, add_special_tokens=False)
        return encoded

    lines = []
    for sample in sorted(samples, key=lambda sample: sample.sent_s):
        if sample.error:
            continue
        prompt = tokens(sample.prompt)
        whole = len(prompt) + sample.generated_tokens
        # As the next turn's prompt will have it: its text, which may be other tokens than were
        # generated, and so a few more or less.
        answered = tokens(sample.prompt, sample.answer)[:whole]
        answered += [-1] * (whole - len(answered))
        line = {
            "timestamp": round(1e3 * sample.sent_s),
            "input_length": len(prompt),
            "output_length": sample.generated_tokens,
            "hash_ids": block_ids(prompt),
            "answered_hash_ids": block_ids(answered),
            "session": sample.conversation,
        }
        lines.append(json.dumps(line))
    file.write_text("\n".join(lines) + "\n")
