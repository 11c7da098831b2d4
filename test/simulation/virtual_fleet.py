"""A fleet in virtual time for tests of decisions: the product's simulator, small and plain.

Instances have room for everything, compute at a true cost that the router does not know and has to
learn, and share links of one speed. Time passes from event to event.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from sglang_memserve.router.cost.learned import CostModel
from sglang_memserve.router.request.placement import key_prompts
from sglang_memserve.router.simulate.fleet import Fleet as Simulated
from sglang_memserve.router.simulate.fleet import Terms
from sglang_memserve.router.simulate.instance import Instance
from sglang_memserve.router.simulate.profile import Decode, Link, Prefill, Profile
from sglang_memserve.router.simulate.report import Served
from sglang_memserve.router.values import Plan
from sglang_memserve.types import Role

PAGE = 16
ROOM_TOKENS = 320_000
STEPS = 100


class Fleet:
    """``truth``: what a prefill takes; ``output_s``: how long a stream lasts alone."""

    def __init__(
        self,
        roles: Sequence[str],
        truth: Prefill,
        *,
        policy: str = "cost",
        bytes_per_s: float = 2e9,
        page_bytes: int = 368_640,
        output_s: float = 0.0,
    ) -> None:
        self._output_tokens = STEPS + 1 if output_s else 1
        profile = Profile(
            name="test",
            model="m",
            source="invented",
            estimates=[],
            kv_bytes_per_token=page_bytes // PAGE,
            hbm_tokens=ROOM_TOKENS,
            dram_bytes=ROOM_TOKENS // PAGE * page_bytes,
            load_bytes_per_s=1e12,
            hop_s=0.0,
            prefill=truth,
            decode=Decode(output_s / STEPS, 0.0, 0.0, 10_000),
            link=Link(0.001, bytes_per_s),
        )
        terms = Terms(policy=policy, page_tokens=PAGE)
        self._fleet = Simulated(profile, [Role(role) for role in roles], terms)
        self.sites = self._fleet.sites

    def site(self, number: int) -> Instance:
        return list(self.sites.values())[number]

    @property
    def costs(self) -> CostModel:
        return self._fleet.costs

    @property
    def transfers(self) -> int:
        return self._fleet.network.transfers

    @property
    def served(self) -> list[Served]:
        """In the order in which they were asked for."""
        return self._fleet.served

    def at(self, when: float, do: Callable[[], None]) -> None:
        self._fleet.agenda.at(when, do)

    def ask(self, when: float, ids: Sequence[int]) -> None:
        keyed = key_prompts([ids], [(None, None)], PAGE)
        self._fleet.submit(when, keyed, self._output_tokens)

    def run(self) -> list[Served]:
        """Until nothing is left to happen."""
        served = self._fleet.run()
        self._fleet.check()
        return served


def plan_of(one: Served) -> Plan:
    assert one.plan is not None
    return one.plan
