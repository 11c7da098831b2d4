"""Samples to figures, and what the router counted meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import requests
from prometheus_client.parser import text_string_to_metric_families

from .replay import Sample

_TIMEOUT_S = 10.0
# Of ``docs/router.md``; labels but for the tier are summed over.
_COUNTED = {
    "memserve_prompt_tokens_total": "prompt_tokens",
    "memserve_fleet_best_match_tokens_total": "best_in_fleet_tokens",
    "memserve_selected_match_tokens_total": "selected_tokens",
    "memserve_transferred_tokens_total": "transferred_tokens",
    "memserve_engine_cached_tokens_total": "cached_tokens",
    "memserve_recomputed_tokens_total": "computed_tokens",
    "memserve_kv_transfer_bytes_total": "moved_bytes",
    "memserve_kv_transfer_seconds_count": "transfers",
    "memserve_kv_transfer_failures_total": "failed_transfers",
    "memserve_kv_transfer_partial_total": "partial_transfers",
    "memserve_fallbacks_total": "fallbacks",
    "memserve_retries_total": "retries",
}


def router_counters(url: str) -> dict[str, float]:
    """The router's totals since it began; nothing from a server that is not MemServe's router."""
    response = requests.get(f"{url}/metrics", timeout=_TIMEOUT_S)
    if response.status_code != 200:
        return {}
    totals: dict[str, float] = {}
    for family in text_string_to_metric_families(response.text):
        for sample in family.samples:
            name = _COUNTED.get(sample.name)
            if name is None:
                continue
            tier = sample.labels.get("tier")
            key = f"{name}_{tier}" if tier else name
            totals[key] = totals.get(key, 0.0) + sample.value
    return totals


def difference(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, int]:
    return {name: int(value - before.get(name, 0.0)) for name, value in after.items()}


def quantile(ordered: Sequence[float], share: float) -> float:
    """Linear between the two nearest of ``ordered``, which is not empty."""
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def spread_ms(samples: Sequence[Sample], seconds: Callable[[Sample], float]) -> dict[str, float]:
    ordered = sorted(1e3 * seconds(sample) for sample in samples)
    figures = {
        "mean": sum(ordered) / len(ordered),
        "p50": quantile(ordered, 0.5),
        "p90": quantile(ordered, 0.9),
        "p99": quantile(ordered, 0.99),
    }
    return {name: round(value, 1) for name, value in figures.items()}


def summarize(samples: Sequence[Sample]) -> dict[str, Any]:
    """Latencies in ms, of whole answers. ``cached_tokens`` is what the servers said in their
    answers; ``samples`` keeps TTFT and JCT of each in ms, for distributions."""
    good = [sample for sample in samples if not sample.error]
    errors = [sample.error for sample in samples if sample.error]
    result: dict[str, Any] = {"requests": len(samples), "failed": len(errors)}
    if errors:
        result["first_errors"] = sorted(set(errors))[:3]
    if not good:
        return result
    seconds = max(s.done_s for s in good) - min(s.sent_s for s in good)
    prompt, cached = sum(s.prompt_tokens for s in good), sum(s.cached_tokens for s in good)
    generated = sum(s.generated_tokens for s in good)
    result |= {
        "seconds": round(seconds, 1),
        "ttft_ms": spread_ms(good, lambda s: s.ttft_s),
        "tpot_ms": spread_ms(good, lambda s: s.tpot_s),
        "jct_ms": spread_ms(good, lambda s: s.jct_s),
        "requests_per_s": round(len(good) / seconds, 3),
        "generated_tokens_per_s": round(generated / seconds, 2),
        "prompt_tokens": prompt,
        "cached_tokens": cached,
        "cached_share": round(cached / prompt, 4) if prompt else 0.0,
        "generated_tokens": generated,
        "samples": {
            "ttft_ms": [round(1e3 * s.ttft_s) for s in good],
            "jct_ms": [round(1e3 * s.jct_s) for s in good],
        },
    }
    return result
