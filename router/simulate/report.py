"""What a run came to: latencies, throughput, where tokens came from, how busy everybody was."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from math import ceil

from ..values import Plan

MS = 1e3


@dataclass(slots=True)
class Served:
    """One request. Times in seconds of the run; None until then. Tokens of the prompt by where they
    came from, on the instance that computed it: HBM, DRAM, another instance's memory, nowhere.
    ``again_tokens``: computed on the decode instance though a prefill instance had computed them.
    ``refused``: it fits no instance."""

    arrived_s: float
    prompt_tokens: int
    output_tokens: int
    first_token_s: float | None = None
    ended_s: float | None = None
    hbm_tokens: int = 0
    dram_tokens: int = 0
    fetched_tokens: int = 0
    computed_tokens: int = 0
    again_tokens: int = 0
    handed_over: bool = False
    refused: bool = False
    plan: Plan | None = None

    @property
    def ttft_s(self) -> float:
        assert self.first_token_s is not None
        return self.first_token_s - self.arrived_s

    @property
    def jct_s(self) -> float:
        assert self.ended_s is not None
        return self.ended_s - self.arrived_s

    @property
    def tpot_s(self) -> float:
        """Seconds a token after the first one."""
        assert self.ended_s is not None and self.first_token_s is not None
        return (self.ended_s - self.first_token_s) / max(self.output_tokens - 1, 1)


@dataclass(frozen=True, slots=True)
class Spread:
    mean: float
    p50: float
    p90: float
    p99: float


@dataclass(frozen=True, slots=True)
class Work:
    """Of one instance. ``prefill`` and ``decode``: shares of the run that it spent so."""

    instance: str
    role: str
    prefill: float
    decode: float
    prefills: int
    decodes: int
    computed_tokens: int


@dataclass(frozen=True, slots=True)
class Report:
    """Milliseconds; ``tokens``: those of finished requests' prompts by where they came from.
    ``requests_per_s``: finished, from the first arrival to the last end."""

    policy: str
    shape: str
    rate: float
    requests: int
    finished: int
    unfinished: int
    refused: int
    seconds: float
    requests_per_s: float
    output_tokens_per_s: float
    ttft_ms: Spread
    tpot_ms: Spread
    jct_ms: Spread
    prompt_tokens: int
    tokens: dict[str, int]
    computed_again_tokens: int
    handed_over: int
    transfers: int
    moved_bytes: int
    instances: list[Work] = field(default_factory=list)

    def json(self) -> dict[str, object]:
        return asdict(self)

    @property
    def cached_share(self) -> float:
        return 1 - self.tokens["computed"] / max(self.prompt_tokens, 1)


def spread(values: Sequence[float]) -> Spread:
    """Nearest rank. Of nothing: zeros."""
    if not values:
        return Spread(0.0, 0.0, 0.0, 0.0)
    ranked = sorted(values)
    at = [ranked[max(ceil(share * len(ranked)) - 1, 0)] for share in (0.5, 0.9, 0.99)]
    return Spread(sum(ranked) / len(ranked), *at)


@dataclass(frozen=True, slots=True)
class Setting:
    """What was run."""

    policy: str
    shape: str
    rate: float


def report(
    setting: Setting,
    served: Sequence[Served],
    instances: Sequence[Work],
    *,
    transfers: int,
    moved_bytes: float,
) -> Report:
    done = [one for one in served if one.ended_s is not None]
    refused = sum(one.refused for one in served)
    begin = min((one.arrived_s for one in served), default=0.0)
    seconds = max((one.ended_s or 0.0 for one in done), default=begin) - begin
    tokens = {
        "hbm": sum(one.hbm_tokens for one in done),
        "dram": sum(one.dram_tokens for one in done),
        "fetched": sum(one.fetched_tokens for one in done),
        "computed": sum(one.computed_tokens for one in done),
    }
    return Report(
        setting.policy,
        setting.shape,
        setting.rate,
        requests=len(served),
        finished=len(done),
        unfinished=len(served) - len(done) - refused,
        refused=refused,
        seconds=seconds,
        requests_per_s=len(done) / seconds if seconds else 0.0,
        output_tokens_per_s=sum(one.output_tokens for one in done) / seconds if seconds else 0.0,
        ttft_ms=spread([MS * one.ttft_s for one in done]),
        tpot_ms=spread([MS * one.tpot_s for one in done if one.output_tokens > 1]),
        jct_ms=spread([MS * one.jct_s for one in done]),
        prompt_tokens=sum(one.prompt_tokens for one in done),
        tokens=tokens,
        computed_again_tokens=sum(one.again_tokens for one in done),
        handed_over=sum(one.handed_over for one in done),
        transfers=transfers,
        moved_bytes=round(moved_bytes),
        instances=list(instances),
    )


def text(one: Report) -> str:
    """A table for people."""
    lines = [
        f"{one.policy}, {one.shape}, {one.rate:g} x the trace's rate: {one.finished} of "
        f"{one.requests} requests in {one.seconds:.0f} s"
        f" ({one.unfinished} not finished, {one.refused} too long)",
        f"  {'ms':<8}{'mean':>10}{'P50':>10}{'P90':>10}{'P99':>10}",
    ]
    for name, spread in (("TTFT", one.ttft_ms), ("TPOT", one.tpot_ms), ("JCT", one.jct_ms)):
        cells = "".join(f"{v:>10.1f}" for v in (spread.mean, spread.p50, spread.p90, spread.p99))
        lines.append(f"  {name:<8}{cells}")
    whole = max(one.prompt_tokens, 1)
    shares = ", ".join(f"{name} {100 * n / whole:.1f} %" for name, n in one.tokens.items())
    if one.finished < one.requests:
        # The long ones, most often: what is left looks quicker than it is.
        lines.append(f"  these are of the {one.finished} requests that finished alone")
    lines += [
        f"  {one.requests_per_s:.2f} requests/s, {one.output_tokens_per_s:.0f} tokens/s generated",
        f"  prompt tokens: {shares}",
        f"  {one.transfers} transfers, {one.moved_bytes / 1e9:.1f} GB; "
        f"{one.handed_over} requests decoded elsewhere than computed",
        f"  {'instance':<12}{'role':<9}{'prefill':>8}{'decode':>8}{'prompts':>9}{'streams':>9}",
    ]
    for work in one.instances:
        name = work.instance.removeprefix("http://")
        lines.append(
            f"  {name:<12}{work.role:<9}{100 * work.prefill:>6.0f} %{100 * work.decode:>6.0f} %"
            f"{work.prefills:>9}{work.decodes:>9}"
        )
    return "\n".join(lines)


def comparison(reports: Sequence[Report]) -> str:
    """One line a run."""
    head = f"{'rate':>5} {'shape':<10}{'policy':<13}{'TTFT mean':>10}{'P50':>9}{'P99':>10}"
    head += f"{'TPOT mean':>10}{'P99':>9}{'JCT mean':>10}{'P99':>10}{'cached':>8}{'req/s':>7}"
    lines = [head]
    for one in sorted(reports, key=lambda one: (one.rate, one.shape, one.policy)):
        lines.append(
            f"{one.rate:>5g} {one.shape:<10}{one.policy:<13}"
            f"{one.ttft_ms.mean:>10.0f}{one.ttft_ms.p50:>9.0f}{one.ttft_ms.p99:>10.0f}"
            f"{one.tpot_ms.mean:>10.1f}{one.tpot_ms.p99:>9.1f}"
            f"{one.jct_ms.mean:>10.0f}{one.jct_ms.p99:>10.0f}"
            f"{100 * one.cached_share:>6.1f} %{one.requests_per_s:>7.2f}"
        )
    return "\n".join(lines)
