"""All that looks on while requests are served: pools, gauges, journal, dashboard."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from sglang_memserve import __version__
from sglang_memserve.protocol.http import InstanceInfo
from sglang_memserve.types import Generation, InstanceId

from .config import RouterConfig
from .control.registration import SourceStates
from .dashboard.routes import Dashboard
from .dashboard.survey import Surveyor
from .dashboard.view import Sources
from .http.proxy import Upstream
from .members.instances import Instances
from .members.pools import Pools
from .metrics.engine import EngineMetrics
from .metrics.gauges import MemberCollector
from .metrics.registry import Metrics
from .request.journal import Excerpts, Journal
from .tree.merged import MergedTree

Path = tuple[str, Any, list[str]]
"""A path, its handler, its methods."""


class Watching:
    """A ``Listener`` of ``Instances`` too. ``open`` once those exist; ``close`` at the end."""

    def __init__(self, config: RouterConfig, upstream: Upstream, metrics: Metrics) -> None:
        kept = Excerpts.KEPT if config.admin_key is not None else Excerpts.NONE
        self.journal = Journal(time.monotonic, time.time, kept)
        self._config = config
        self._upstream = upstream
        self._metrics = metrics
        self._pools = Pools(upstream)
        self._surveyor: Surveyor | None = None
        self._engines: EngineMetrics | None = None

    def open(self, instances: Instances, tree: MergedTree, states: SourceStates) -> Sequence[Path]:
        """The paths it serves."""
        self._metrics.registry.register(MemberCollector(instances, self._pools.latest))
        self._surveyor = Surveyor(tree, self.journal)
        self._engines = EngineMetrics(instances, self._upstream)
        sources = Sources(
            instances=instances,
            journal=self.journal,
            metrics=self._metrics,
            pools=self._pools.latest(),
            states=states,
            policy=self._config.policy,
            version=__version__,
            started_at=time.time(),
        )
        dashboard = Dashboard(sources, self._surveyor)
        get = ["GET"]
        return (
            ("/engine_metrics", self._engines.handle, get),
            ("/dashboard", dashboard.page, get),
            ("/dashboard/", dashboard.page, get),
            ("/dashboard/state", dashboard.state, get),
            ("/dashboard/tree", dashboard.tree, get),
            ("/dashboard/events", dashboard.events, get),
            ("/dashboard/{name}", dashboard.page, get),
        )

    def joined(self, info: InstanceInfo) -> None:
        self._pools.joined(info)
        self._metrics.returned(info.url)

    def left(self, instance: InstanceId) -> None:
        self._pools.left(instance)
        self.journal.forget(instance)
        self._metrics.left(instance, time.monotonic())

    def beat(self, instance: InstanceId, generation: Generation, event_seq: int) -> None:
        pass

    async def close(self) -> None:
        await self._pools.close()
        if self._surveyor is not None:
            await self._surveyor.close()
        if self._engines is not None:
            await self._engines.close()
