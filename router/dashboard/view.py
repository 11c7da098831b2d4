"""What the dashboard and ``top`` show, as JSON values. Pure; text only where it is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import Enum

from prometheus_client import Counter
from sglang_memserve.types import InstanceId

from ..control.registration import SourceStates
from ..members.instances import Instances
from ..members.member import MemberStatus
from ..members.pools import PoolState
from ..metrics.registry import Metrics
from ..request.journal import Journal, Seen
from .survey import Survey

MOST_LIVING = 60
MOST_ENDED = 60
MOST_PAIRS = 128
MOST_ERROR = 300


class Text(Enum):
    """Whether the beginnings of prompts are shown: to who has the admin key."""

    SHOWN = "shown"
    HIDDEN = "hidden"


@dataclass(frozen=True, slots=True)
class Sources:
    """All that a view is made from."""

    instances: Instances
    journal: Journal
    metrics: Metrics
    pools: Mapping[InstanceId, PoolState]
    states: SourceStates
    policy: str
    version: str
    started_at: float


def state_view(sources: Sources, now: float, text: Text) -> dict[str, object]:
    """``now`` is wall clock."""
    states = sources.states()
    reference = sources.instances.reference()
    journal = sources.journal
    return {
        "at": round(now, 3),
        "router": {
            "version": sources.version,
            "policy": sources.policy,
            "uptime_s": round(now - sources.started_at, 1),
            "model": reference.served_model_name if reference is not None else "",
            "page_size": reference.page_size if reference is not None else 0,
            "page_bytes": (
                reference.namespace.block_bytes * len(reference.ranks)
                if reference is not None
                else 0
            ),
        },
        "totals": totals(sources.metrics, journal),
        "members": [_member(m, sources, states) for m in sources.instances.members()],
        "living": [_seen(one, text) for one in journal.living(MOST_LIVING)],
        "living_total": journal.living_count(),
        "ended": [_seen(one, text) for one in journal.ended(MOST_ENDED)],
        "pairs": [
            {
                "source": source,
                "target": target,
                "fetches": pair.fetches,
                "short": pair.short,
                "partial": pair.partial,
                "pages": pair.pages,
                "bytes": pair.bytes,
                "seconds": round(pair.seconds, 4),
                "idle_s": round(journal.now() - pair.last_at, 1),
            }
            for source, target, pair in journal.pairs(MOST_PAIRS)
        ],
        "text": text.value,
    }


def totals(metrics: Metrics, journal: Journal) -> dict[str, float]:
    """The funnel so far, over all labels. Rates are the reader's to make."""
    return {
        "requests": journal.finished,
        "prompt_tokens": _sum(metrics.prompt_tokens),
        "best_match_tokens": _sum(metrics.best_match_tokens),
        "selected_match_tokens": _sum(metrics.selected_match_tokens),
        "transferred_tokens": _sum(metrics.transferred_tokens),
        "cached_tokens": _sum(metrics.engine_cached_tokens),
        "recomputed_tokens": _sum(metrics.recomputed_tokens),
        "transfer_bytes": _sum(metrics.transfer_bytes),
        "transfer_failures": _sum(metrics.transfer_failures),
        "partial_transfers": _sum(metrics.partial_transfers),
        "fallbacks": _sum(metrics.fallbacks),
        "retries": _sum(metrics.retries),
        "aborts": _sum(metrics.aborts),
    }


def tree_view(survey: Survey) -> dict[str, object]:
    """Nodes as short rows: they make up most of what is sent."""
    return {
        "number": survey.number,
        "members": list(survey.members),
        "pages": survey.pages,
        "runs": survey.runs,
        "complete": survey.complete,
        "columns": list(_COLUMNS),
        "nodes": [
            [
                node.key,
                node.above,
                node.start,
                node.pages,
                node.weight,
                node.runs,
                node.hits,
                None if node.used_s is None else round(node.used_s, 1),
                None if node.known_s is None else round(node.known_s, 1),
                [[who, tiers] for who, tiers in node.holders.items()],
            ]
            for node in survey.drawn
        ],
    }


_COLUMNS = (
    "key",
    "above",
    "start",
    "pages",
    "weight",
    "runs",
    "hits",
    "used_s",
    "known_s",
    "holders",
)


def _member(member: MemberStatus, sources: Sources, states: Mapping[str, str]) -> dict[str, object]:
    pool = sources.pools.get(member.id)
    return {
        "url": member.id,
        "role": member.role.value,
        "state": member.state.value,
        "breaker": member.breaker.value,
        "source": states.get(member.id),
        "mempool": member.has_mempool,
        "running": member.load.running_requests,
        "waiting": member.load.waiting_requests,
        "in_flight": member.in_flight_requests,
        "prefill_tokens": member.in_flight_prefill_tokens,
        "hbm_used_tokens": member.load.used_tokens,
        "hbm_total_tokens": member.load.total_tokens,
        "dram_used_bytes": pool.used_bytes if pool is not None else None,
        "dram_total_bytes": pool.total_bytes if pool is not None else None,
        "dram_pinned_blocks": pool.pinned_blocks if pool is not None else None,
        "evicted": dict(pool.evicted) if pool is not None else {},
        "silent_s": round(member.silent_s, 1),
        "error": member.last_error[:MOST_ERROR] or None,
    }


def _seen(one: Seen, text: Text) -> dict[str, object]:
    shown = {k: round(v, 4) if isinstance(v, float) else v for k, v in asdict(one).items()}
    if text is Text.HIDDEN:
        shown["excerpt"] = None
    return shown


def _sum(counter: Counter) -> float:
    return sum(
        sample.value
        for family in counter.collect()
        for sample in family.samples
        if sample.name.endswith("_total")
    )
