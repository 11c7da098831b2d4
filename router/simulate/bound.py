"""The least that any fleet, policy and cache can come to with a trace and a profile.

Every request alone on an idle instance whose HBM holds all that came before: pages of every
earlier prompt and, where the trace says them, of every earlier answer. What is left is computing
the rest of the prompt and one stream's steps. A goal below that is out of reach of any cache. (Of
the share that is cached it is the most but for a request that waits and is overtaken: it may find
what a later one brought.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import ceil

from sglang_memserve.types import PageKey

from . import trace
from .profile import Profile
from .report import MS, Spread, spread


@dataclass(frozen=True, slots=True)
class Bound:
    """``cached_share``: of the prompts' tokens, what some earlier request left."""

    ttft_ms: Spread
    jct_ms: Spread
    cached_share: float

    def json(self) -> dict[str, object]:
        return asdict(self)


def bound(
    arrivals: Sequence[trace.Arrival], profile: Profile, page_tokens: int, block_tokens: int
) -> Bound:
    """Of those ``arrivals`` that fit, in their order; the rate plays no part."""
    left_behind: set[PageKey] = set()
    room = profile.hbm_tokens // page_tokens
    ttft_ms, jct_ms, cached_tokens, prompt_tokens = [], [], 0, 0
    for one in arrivals:
        if ceil((one.prompt_tokens + one.output_tokens) / page_tokens) > room:
            # Refused by every instance.
            continue
        keys = trace.keyed(one, page_tokens, block_tokens).chains[0].keys
        held = next((at for at, key in enumerate(keys) if key not in left_behind), len(keys))
        ttft_s = prefill_s(profile, one.prompt_tokens, held * page_tokens)
        ttft_ms.append(MS * ttft_s)
        jct_ms.append(MS * (ttft_s + _decode_s(profile, one.prompt_tokens, one.output_tokens)))
        cached_tokens += held * page_tokens
        prompt_tokens += one.prompt_tokens
        left_behind.update(keys)
        left_behind.update(trace.answered_keys(one, page_tokens, block_tokens))
    return Bound(spread(ttft_ms), spread(jct_ms), cached_tokens / max(prompt_tokens, 1))


def prefill_s(profile: Profile, prompt_tokens: int, cached_tokens: int) -> float:
    """Until the first token, on an idle instance, with what the way there and back takes."""
    times = profile.prefill
    new = prompt_tokens - cached_tokens
    steps = ceil(new / times.chunk_tokens)
    return profile.hop_s + steps * times.fixed_s + times.tokens_s(new, cached_tokens)


def _decode_s(profile: Profile, prompt_tokens: int, output_tokens: int) -> float:
    """The steps after the first token, of the only stream."""
    times, steps = profile.decode, output_tokens - 1
    context = steps * prompt_tokens + steps * (steps - 1) / 2
    return steps * (times.fixed_s + times.stream_s) + context * times.context_token_s


def text(one: Bound) -> str:
    return (
        f"at best, each request alone and all that came before in HBM: "
        f"TTFT mean {one.ttft_ms.mean:.1f}, P99 {one.ttft_ms.p99:.1f} ms; "
        f"JCT mean {one.jct_ms.mean:.1f}, P99 {one.jct_ms.p99:.1f} ms; "
        f"{100 * one.cached_share:.1f} % of the prompts' tokens cached"
    )
