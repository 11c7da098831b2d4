"""Recorded traffic: one JSON object a line, Mooncake's format and two fields more.

    {"timestamp": 3000, "input_length": 6758, "output_length": 500, "hash_ids": [0, 1, 2], ...}

``timestamp``      milliseconds, any origin; lines may come in any order
``input_length``   tokens of the prompt
``output_length``  tokens that are generated
``hash_ids``       one integer for each block of the prompt (512 tokens, the last one may be short):
                   equal lists at the beginning of two prompts mean an equal prefix
``session``        optional: the client's affinity key, a string
``answered_hash_ids``  optional: the same of the prompt and its answer together, so that what was
                   generated is found by the prompts that go on from it; heeded where a page is as
                   long as a block

Source of the format and of the block size: Mooncake's published traces (FAST '25). Other fields are
ignored.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
from sglang_memserve.errors import ConfigError
from sglang_memserve.hashing import page_keys, short_keys
from sglang_memserve.types import PageKey

from ..request.placement import Chain, Keyed

BLOCK_TOKENS = 512
MOST_TOKENS = 2**24
MOST_LINE_BYTES = 2**24


class _Line(msgspec.Struct, frozen=True):
    timestamp: float
    input_length: int
    output_length: int
    hash_ids: list[int]
    session: str | None = None
    answered_hash_ids: list[int] | None = None


@dataclass(frozen=True, slots=True)
class Arrival:
    """``blocks``: one number a block, equal for equal prefixes. ``answered``: those of prompt and
    answer; empty where nobody says."""

    at_s: float
    prompt_tokens: int
    output_tokens: int
    blocks: tuple[int, ...]
    session: str | None = None
    answered: tuple[int, ...] = ()


def read(file: Path, block_tokens: int = BLOCK_TOKENS) -> list[Arrival]:
    """All requests of a trace, the first at 0 seconds. Raises ConfigError that names the line."""
    try:
        with file.open("rb") as lines:
            arrivals = list(_parse(lines, block_tokens, str(file)))
    except OSError as error:
        raise ConfigError(f"trace {file}: {error.strerror}") from error
    if not arrivals:
        raise ConfigError(f"trace {file}: no request in it")
    arrivals.sort(key=lambda arrival: arrival.at_s)
    begin = arrivals[0].at_s
    return [replace(arrival, at_s=arrival.at_s - begin) for arrival in arrivals]


def _parse(lines: Iterable[bytes], block_tokens: int, name: str) -> Iterator[Arrival]:
    # Ids are of any size; what a key is made of has 32 bits.
    dense: dict[int, int] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if len(line) > MOST_LINE_BYTES:
            raise ConfigError(f"trace {name}, line {number}: longer than {MOST_LINE_BYTES} bytes")
        try:
            one = msgspec.json.decode(line, type=_Line)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"trace {name}, line {number}: {error}") from error
        if wrong := _wrong(one, block_tokens):
            raise ConfigError(f"trace {name}, line {number}: {wrong}")
        blocks, answered = (
            tuple(dense.setdefault(block, len(dense)) for block in ids)
            for ids in (one.hash_ids, one.answered_hash_ids or ())
        )
        yield Arrival(
            one.timestamp / 1e3,
            one.input_length,
            one.output_length,
            blocks,
            one.session,
            answered,
        )


def _wrong(one: _Line, block_tokens: int) -> str:
    for name, value in (("input_length", one.input_length), ("output_length", one.output_length)):
        if not 1 <= value <= MOST_TOKENS:
            return f"{name} is {value}, not 1 to {MOST_TOKENS}"
    whole = one.input_length + one.output_length
    for name, ids, tokens in (
        ("hash_ids", one.hash_ids, one.input_length),
        ("answered_hash_ids", one.answered_hash_ids, whole),
    ):
        blocks = -(-tokens // block_tokens)
        if ids is not None and len(ids) != blocks:
            return (
                f"{len(ids)} {name} for {tokens} tokens in blocks of {block_tokens}: "
                f"there must be {blocks}"
            )
    full = one.input_length // block_tokens
    if one.answered_hash_ids is not None and one.answered_hash_ids[:full] != one.hash_ids[:full]:
        return f"answered_hash_ids must begin with the {full} hash_ids of the prompt's full blocks"
    return ""


def spread(arrivals: Iterable[Arrival], seconds: float, seed: int) -> list[Arrival]:
    """Each up to ``seconds`` later, at random: a trace whose clock is coarse has them in bursts."""
    source = random.Random(seed)
    later = [replace(one, at_s=one.at_s + source.uniform(0.0, seconds)) for one in arrivals]
    return sorted(later, key=lambda arrival: arrival.at_s)


def at_rate(arrivals: Iterable[Arrival], rate: float) -> list[Arrival]:
    """``rate`` times as many requests a second."""
    return [replace(one, at_s=one.at_s / rate) for one in arrivals]


def keyed(arrival: Arrival, page_tokens: int, block_tokens: int = BLOCK_TOKENS) -> Keyed:
    """The prompt's pages under the router's own kind of keys: the chain of hashes of its blocks.

    ``page_tokens`` divides ``block_tokens``. The router's keys are hashes over token ids; here the
    numbers of the blocks, and of the pages in a block, stand for these.
    """
    count = max(arrival.prompt_tokens - 1, 0) // page_tokens
    each = block_tokens // page_tokens
    pages = [block * each + page for block in arrival.blocks for page in range(each)]
    keys = page_keys(pages[:count], 1)
    return Keyed((Chain((), keys, short_keys(keys)),), page_tokens, arrival.prompt_tokens, count)


def answered_keys(
    arrival: Arrival, page_tokens: int, block_tokens: int = BLOCK_TOKENS
) -> Sequence[PageKey]:
    """Of the pages that prompt and answer fill, the last token aside, which is never computed.

    None where pages are shorter than blocks: the prompt's last block, not full then, has another
    number than the one that the answer fills, and its pages would be two where they are one.
    """
    if page_tokens != block_tokens:
        return ()
    count = (arrival.prompt_tokens + arrival.output_tokens - 1) // page_tokens
    return page_keys(arrival.answered[:count], 1)
