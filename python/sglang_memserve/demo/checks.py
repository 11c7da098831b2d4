"""What must be true of what was seen. Pure; every check is counted, none is for show."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .observe import Observation

PROGRAM = "frontend program"
CHAT = "chat"
PROGRAM_AGAIN = "frontend program again"
CHAT_AGAIN = "chat again"


@dataclass(frozen=True, slots=True)
class Check:
    """``detail``: the numbers behind it, or what was wrong."""

    name: str
    passed: bool
    detail: str


def usable_tokens(prompt_tokens: int, page_size: int) -> int:
    """Tokens of a prompt that can come from whole pages: the last token is always computed."""
    return max(0, prompt_tokens - 1) // page_size * page_size


def same_outputs(name: str, ours: Mapping[str, str], stock: Mapping[str, str]) -> Check:
    differing = [key for key in stock if ours.get(key) != stock[key]]
    if not differing:
        return Check(name, True, f"{len(stock)} of {len(stock)} equal, greedy")
    first = differing[0]
    return Check(name, False, f"{first}: {ours.get(first)!r} is not {stock[first]!r}")


def every_request_served(observations: Sequence[Observation], expected: int) -> Check:
    name = "every request was answered"
    for o in observations:
        if o.status != 200:
            return Check(name, False, f"{o.label}: status {o.status}")
    count = f"{len(observations)} of {expected} requests"
    return Check(name, len(observations) == expected, count)


def kv_moved(observations: Sequence[Observation], decoders: Sequence[str]) -> Check:
    into_decode = sum(o.fetched_bytes.get(name, 0) for o in observations for name in decoders)
    total = sum(o.total_fetched_bytes for o in observations)
    return Check(
        "KV pages moved over NIXL",
        into_decode > 0,
        f"{into_decode / 1e6:.1f} MB to decode, {(total - into_decode) / 1e6:.1f} MB to prefill",
    )


def decode_had_every_page(observations: Sequence[Observation], page_size: int) -> Check:
    """Of prompts that another instance prefilled."""
    asked = [o for o in observations if o.completion_tokens > 0]
    moved = [o for o in asked if o.prefill not in (None, o.decode)]
    bad = [
        f"{o.label}: {o.cached_tokens} cached of {o.prompt_tokens}"
        for o in moved
        if o.cached_tokens != usable_tokens(o.prompt_tokens, page_size)
    ]
    if not moved:
        return Check("decode computed no full page of a prompt", False, "nothing was prefilled")
    tokens = sum(o.cached_tokens for o in moved)
    return Check(
        "decode computed no full page of a prompt",
        not bad,
        bad[0] if bad else f"{tokens} tokens in {len(moved)} prompts came as pages",
    )


def later_turns_reused_earlier_ones(chat: Sequence[Observation], page_size: int) -> Check:
    """Each turn's prompt and generated tokens, less the last one, which has no KV yet.

    But for one page: computing it takes about as long as fetching it, and the router may choose so.
    The demo's first answer fills two, so that pages that never come back are seen."""
    name = "later turns did not compute earlier ones again"
    for before, after in itertools.pairwise(chat):
        known = (*before.input_ids, *before.output_ids[:-1])
        if not before.input_ids or not after.input_ids:
            return Check(name, False, f"{after.label}: the engine told no token ids")
        shared = _common_prefix(known, after.input_ids)
        expected = min(
            shared // page_size * page_size, usable_tokens(after.prompt_tokens, page_size)
        )
        if after.reused_tokens is None or after.reused_tokens < expected - page_size:
            return Check(name, False, f"{after.label}: {after.reused_tokens} reused of {expected}")
        if shared < len(before.input_ids):
            return Check(name, False, f"{after.label}: does not go on from the turn before")
    if len(chat) < 2:
        return Check(name, False, f"only {len(chat)} turns were seen")
    reused = ", ".join(f"{o.reused_tokens} of {o.prompt_tokens}" for o in chat[1:])
    return Check(name, True, f"reused {reused} prompt tokens")


def repeats_moved_nothing(again: Sequence[Observation], page_size: int) -> Check:
    name = "the same prompts again moved and computed nothing"
    asked = [o for o in again if o.completion_tokens > 0]
    for o in asked:
        if o.cached_tokens != usable_tokens(o.prompt_tokens, page_size):
            return Check(name, False, f"{o.label}: {o.cached_tokens} cached of {o.prompt_tokens}")
        if o.total_fetched_bytes:
            return Check(name, False, f"{o.label}: {o.total_fetched_bytes} bytes moved")
    return Check(name, bool(asked), f"{len(asked)} prompts answered from decode's own pages")


def _common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    length = 0
    for a, b in zip(left, right, strict=False):
        if a != b:
            break
        length += 1
    return length


def run_checks(
    observations: Sequence[Observation],
    outputs: Mapping[str, Mapping[str, str]],
    stock: Mapping[str, Mapping[str, str]],
    decoders: Sequence[str],
    page_size: int,
    expected_requests: int,
) -> list[Check]:
    """``outputs`` by phase; ``stock``: the two first phases on an instance without MemServe."""

    def of(*phases: str) -> list[Observation]:
        return [o for o in observations if o.phase in phases]

    return [
        every_request_served(observations, expected_requests),
        same_outputs("program equals stock SGLang", outputs[PROGRAM], stock[PROGRAM]),
        same_outputs("chat equals stock SGLang", outputs[CHAT], stock[CHAT]),
        same_outputs("program again equals itself", outputs[PROGRAM_AGAIN], outputs[PROGRAM]),
        same_outputs("chat again equals itself", outputs[CHAT_AGAIN], outputs[CHAT]),
        kv_moved(observations, decoders),
        decode_had_every_page(of(PROGRAM, CHAT), page_size),
        later_turns_reused_earlier_ones(of(CHAT), page_size),
        repeats_moved_nothing(of(PROGRAM_AGAIN, CHAT_AGAIN), page_size),
    ]
