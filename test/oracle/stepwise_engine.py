"""An instance's steps one by one: the slow engine that the simulator's is compared with.

No memory, no pages: prompts first, in chunks, first come first served; then every stream gets one
token a step. Nothing is summed up and nothing is cut short.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sglang_memserve.router.simulate.profile import Profile


@dataclass
class Stream:
    """``at_s``: when it comes. The rest is what happens to it."""

    at_s: float
    prompt_tokens: int
    output_tokens: int
    computed: int = 0
    generated: int = 0
    first_token_s: float = -1.0
    ended_s: float = -1.0


def serve(profile: Profile, streams: Sequence[Stream]) -> None:
    """Fills in when each got its first token and ended. ``streams`` in order of arrival."""
    now, prefill, decode = 0.0, profile.prefill, profile.decode
    while any(one.ended_s < 0 for one in streams):
        here = [one for one in streams if one.at_s <= now and one.ended_s < 0]
        if not here:
            now = min(one.at_s for one in streams if one.ended_s < 0)
            continue
        running = [one for one in here if one.generated]
        prompts = [one for one in here if not one.generated]
        begun = [one for one in prompts if one.computed]
        room = decode.max_streams - len(running) - len(begun)
        prompts = [*begun, *(one for one in prompts if not one.computed)][: len(begun) + room]
        budget, seconds, parts = prefill.chunk_tokens, prefill.fixed_s, []
        for one in prompts:
            tokens = min(budget, one.prompt_tokens - one.computed)
            if tokens:
                seconds += prefill.tokens_s(tokens, one.computed)
                budget -= tokens
                parts.append((one, tokens))
        if parts:
            now += seconds
            for one, tokens in parts:
                one.computed += tokens
                if one.computed == one.prompt_tokens:
                    one.generated, one.first_token_s = 1, now
        else:
            context = sum(one.prompt_tokens + one.generated - 1 for one in running)
            now += decode.fixed_s + len(running) * decode.stream_s
            now += context * decode.context_token_s
            for one in running:
                one.generated += 1
        for one in here:
            if one.generated == one.output_tokens:
                one.ended_s = now
