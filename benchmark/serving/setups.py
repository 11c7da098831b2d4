"""What is compared, by name. Pure.

A set-up is a *fleet* (which instances, with which flags) and a *front* (what routes to them).
Set-ups with one fleet are measured on the same running instances, caches emptied in between.

Every instance gets one core and the same number of KV slots in its device pool ("HBM"), unless its
fleet says otherwise. MemServe's instances have DRAM pages on top, as on a machine with
accelerators, where stock SGLang leaves DRAM alone; ``stock-large`` gives stock instances the same
bytes altogether.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum

from sglang_memserve.errors import ConfigError
from sglang_memserve.types import Role


class Engine(Enum):
    """``STOCK``: SGLang on the project's CPU platform, same attention, no MemPool."""

    STOCK = "stock SGLang"
    MEMSERVE = "MemServe"
    VLLM = "vLLM"


class FrontKind(Enum):
    ROUTER = "MemServe's router"
    PEER_ROUTER = "sglang-router"
    PROXY = "a plain proxy"


class Salt(Enum):
    """``EACH_REQUEST``: a ``cache_salt`` of its own, so that no request finds what another left."""

    NONE = "none"
    EACH_REQUEST = "each request"


class DevicePool(Enum):
    """An engine's own KV pool. ``LARGE``: with the bytes of MemServe's DRAM as well."""

    COMMON = "common"
    LARGE = "large"


@dataclass(frozen=True, slots=True)
class Fleet:
    """``forgetful``: instances of these roles keep nothing of a request that has ended."""

    name: str
    engine: Engine
    roles: tuple[Role, ...]
    device_pool: DevicePool = DevicePool.COMMON
    forgetful: frozenset[Role] = frozenset()

    def with_forgetful(self, role: Role) -> Fleet:
        return replace(self, name=f"{self.name}-forgetful", forgetful=frozenset({role}))


@dataclass(frozen=True, slots=True)
class Front:
    """``arguments``: of the router's command line."""

    kind: FrontKind
    arguments: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Setup:
    name: str
    about: str
    fleet: Fleet
    front: Front
    salt: Salt = Salt.NONE


_TWO = (Role.BOTH, Role.BOTH)
_STOCK = Fleet("stock", Engine.STOCK, _TWO)
_LARGE = Fleet("stock-large", Engine.STOCK, _TWO, DevicePool.LARGE)
_POOL = Fleet("pool", Engine.MEMSERVE, _TWO)
_ONE_ONE = Fleet("1p1d", Engine.MEMSERVE, (Role.PREFILL, Role.DECODE))
_TWO_ONE = Fleet("2p1d", Engine.MEMSERVE, (Role.PREFILL, Role.PREFILL, Role.DECODE))
_VLLM = Fleet("vllm", Engine.VLLM, _TWO)
_VLLM_ONE_ONE = Fleet("vllm-1p1d", Engine.VLLM, (Role.PREFILL, Role.DECODE))


def _router(*arguments: str) -> Front:
    return Front(FrontKind.ROUTER, arguments)


def _peer(policy: str, *arguments: str) -> Front:
    return Front(FrontKind.PEER_ROUTER, ("--policy", policy, *arguments))


# By default a system prompt that is 30 % of a first message sends every conversation to one worker,
# and balancing begins with 64 requests more on one than on another: far more than fit here.
_TUNED: tuple[str, ...] = ("--cache-threshold", "0.5", "--balance-abs-threshold", "3")
_TUNED += ("--balance-rel-threshold", "1.5")


# Whatever has a whole page to compute goes over a prefill instance, as in the paper.
_SPLIT = ("--bypass-tokens", "0")


def _separate(fleet: Fleet) -> list[Setup]:
    name = fleet.name
    return [
        Setup(name, "separate roles as MemServe runs them: the cost policy decides who computes",
              fleet, _router()),
        Setup(f"{name}-basic", "PD-Basic: prefill computes, decode fetches, nothing is reused",
              fleet, _router(*_SPLIT), Salt.EACH_REQUEST),
        Setup(f"{name}-caching-1", "PD-Caching-1: prefill keeps what it has, decode nothing, so "
              "that prompts move whole", fleet.with_forgetful(Role.DECODE),
              _router(*_SPLIT, "--moves", "from-prefill")),
        Setup(f"{name}-caching-2", "PD-Caching-2: both sides keep what they have, the increment "
              "moves from prefill to decode", fleet, _router(*_SPLIT, "--moves", "from-prefill")),
        Setup(f"{name}-caching-3", "PD-Caching-3: generated pages go back to prefill as well",
              fleet, _router(*_SPLIT)),
    ]  # fmt: skip


def _all() -> list[Setup]:
    setups = [
        Setup("stock", "stock instances in turn, through MemServe's router (needs no peer)",
              _STOCK, _router("--policy", "round-robin")),
        Setup("stock-round-robin", "stock instances in turn, through sglang-router",
              _STOCK, _peer("round_robin")),
        Setup("stock-cache-aware", "stock instances through sglang-router's cache_aware",
              _STOCK, _peer("cache_aware")),
        Setup("stock-cache-aware-tuned", "the same, thresholds fitted to so small a load",
              _STOCK, _peer("cache_aware", *_TUNED)),
        Setup("stock-large-cache-aware-tuned", "the same, with the bytes of MemServe's DRAM as "
              "well", _LARGE, _peer("cache_aware", *_TUNED)),
        Setup("pool", "MemServe: two instances, one pool", _POOL, _router()),
        Setup("no-pool", "MemServe's instances and router, nothing moves between instances",
              _POOL, _router("--moves", "none")),
        Setup("no-pool-session", "the same, routed by client",
              _POOL, _router("--policy", "session", "--moves", "none")),
    ]  # fmt: skip
    setups += [
        Setup(f"pool-{policy}", f"MemServe with policy {policy}", _POOL,
              _router("--policy", policy))
        for policy in ("prefix", "session", "least-load", "round-robin")
    ]  # fmt: skip
    setups += [*_separate(_ONE_ONE), *_separate(_TWO_ONE)]
    setups += [
        Setup("vllm", "vLLM with prefix caching, clients kept on one instance", _VLLM,
              Front(FrontKind.PROXY)),
        Setup("vllm-1p1d", "vLLM over NixlConnector", _VLLM_ONE_ONE, Front(FrontKind.PROXY)),
    ]  # fmt: skip
    return setups


SETUPS = {setup.name: setup for setup in _all()}


@dataclass(frozen=True, slots=True)
class Chosen:
    """``workloads``: names of those it is measured with; none for all."""

    setup: Setup
    workloads: frozenset[str] = frozenset()

    def takes(self, workload: str) -> bool:
        return not self.workloads or workload in self.workloads


def choose(text: str) -> list[Chosen]:
    """Of names with commas between, each with a colon and the workloads it alone is measured with
    behind it (``pool:chat+react``); fleet by fleet. Raises ConfigError for an unknown name."""
    chosen = []
    for part in text.split(","):
        name, _, only = part.partition(":")
        if name not in SETUPS:
            raise ConfigError(f"no set-up {name!r}: choose of {', '.join(SETUPS)}")
        chosen.append(Chosen(SETUPS[name], frozenset(only.split("+")) if only else frozenset()))
    order = list(dict.fromkeys(one.setup.fleet.name for one in chosen))
    return sorted(chosen, key=lambda one: order.index(one.setup.fleet.name))
