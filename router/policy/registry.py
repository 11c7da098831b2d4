"""Policies by the name they have on the command line."""

from __future__ import annotations

from collections.abc import Callable

from sglang_memserve.errors import ConfigError

from ..cost.learned import CostModel
from .base import Policy, Rotation
from .cost import MOST_WAIT_S, Cost
from .least_load import LeastLoad
from .prefix import Prefix
from .round_robin import RoundRobin
from .session import Session

POLICIES: dict[str, Callable[[Rotation, int | None, CostModel, float], Policy]] = {
    "cost": Cost,
    "prefix": lambda rotation, bypass_tokens, *_: Prefix(rotation, bypass_tokens),
    "session": lambda rotation, bypass_tokens, *_: Session(rotation, bypass_tokens),
    "least-load": lambda rotation, bypass_tokens, *_: LeastLoad(rotation, bypass_tokens),
    "round-robin": lambda rotation, bypass_tokens, *_: RoundRobin(rotation, bypass_tokens),
}


def make_policy(
    name: str,
    rotation: Rotation,
    costs: CostModel,
    bypass_tokens: int | None = None,
    most_wait_s: float = MOST_WAIT_S,
) -> Policy:
    """Raises ConfigError for an unknown name.

    ``bypass_tokens``: an uncached rest of at most this many tokens is computed by the decode
    instance itself; 0 sends every full uncached page through a prefill instance; None lets the
    policy decide. ``costs`` and ``most_wait_s``, how long a fetch can wait for pages that are still
    being computed, are for ``cost`` alone.
    """
    make = POLICIES.get(name)
    if make is None:
        raise ConfigError(f"unknown policy {name!r}: choose one of {', '.join(POLICIES)}")
    return make(rotation, bypass_tokens, costs, most_wait_s)
