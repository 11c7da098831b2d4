"""What is read when somebody asks for ``/metrics``: members, their pools. Nothing is kept here, so
an instance that left is gone from it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from sglang_memserve.types import InstanceId

from ..members.breaker import BreakerState
from ..members.instances import Instances
from ..members.pools import PoolState


class MemberCollector(Collector):
    def __init__(
        self, instances: Instances, pools: Callable[[], Mapping[InstanceId, PoolState]]
    ) -> None:
        self._instances = instances
        self._pools = pools

    def collect(self) -> Iterable[Metric]:
        yield from self._members()
        yield from self._pool_families()

    def _members(self) -> Iterable[Metric]:
        members = self._instances.members()
        here = GaugeMetricFamily(
            "memserve_members", "Instances by role and state", labels=["role", "state"]
        )
        counted = Counter((m.role.value, m.state.value) for m in members)
        for labels, count in sorted(counted.items()):
            here.add_metric(list(labels), count)
        yield here
        breaker = GaugeMetricFamily(
            "memserve_breaker_state",
            "1 for the state an instance's breaker is in",
            labels=["instance", "state"],
        )
        requests = GaugeMetricFamily(
            "memserve_instance_requests",
            "Requests by the instance's own count, and by the router's",
            labels=["instance", "kind"],
        )
        tokens = GaugeMetricFamily(
            "memserve_instance_tokens", "Slots of the device pool", labels=["instance", "kind"]
        )
        for m in members:
            for state in BreakerState:
                breaker.add_metric([m.id, state.value], float(m.breaker is state))
            for kind, value in (
                ("running", m.load.running_requests),
                ("waiting", m.load.waiting_requests),
                ("in_flight", m.in_flight_requests),
            ):
                requests.add_metric([m.id, kind], value)
            tokens.add_metric([m.id, "used"], m.load.used_tokens)
            tokens.add_metric([m.id, "total"], m.load.total_tokens)
        yield from (breaker, requests, tokens)

    def _pool_families(self) -> Iterable[Metric]:
        blocks = GaugeMetricFamily(
            "memserve_pool_blocks",
            "Pages of an instance's pools, over all ranks",
            labels=["instance", "tier", "state"],
        )
        pinned = GaugeMetricFamily(
            "memserve_pool_pinned_blocks", "DRAM blocks that may not go now", labels=["instance"]
        )
        size = GaugeMetricFamily(
            "memserve_pool_bytes", "Size of an instance's DRAM pool", labels=["instance"]
        )
        evicted = CounterMetricFamily(
            "memserve_evicted_blocks",
            "Pages that left a pool: to make room, by name, by a flush",
            labels=["instance", "tier", "reason"],
        )
        pools = self._pools()
        for instance, pool in pools.items():
            for state, count in pool.blocks.items():
                blocks.add_metric([instance, "dram", state], count)
            pinned.add_metric([instance], pool.pinned_blocks)
            size.add_metric([instance], pool.total_bytes)
            for reason, count in pool.evicted.items():
                evicted.add_metric([instance, "dram", reason], count)
        for m in self._instances.members():
            info = self._instances.info(m.id)
            if info is not None and m.load.total_tokens:
                used, total = m.load.used_tokens, m.load.total_tokens
                pages = used // info.page_size, max(total - used, 0) // info.page_size
                blocks.add_metric([m.id, "hbm", "used"], pages[0])
                blocks.add_metric([m.id, "hbm", "free"], pages[1])
        yield from (blocks, pinned, size, evicted)
