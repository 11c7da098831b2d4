"""Asking an instance to fetch pages from another: pages that exist, and pages being computed."""

from __future__ import annotations

import time

import msgspec
from sglang_memserve.errors import ProtocolError
from sglang_memserve.protocol.http import FetchBody, FetchResult
from sglang_memserve.types import InstanceId

from ..http.limits import StepDeadlines
from ..http.proxy import Upstream
from ..members.instances import Instances
from .placement import Keyed


class Fetches:
    """Both verbs raise PeerError and ProtocolError."""

    def __init__(self, upstream: Upstream, instances: Instances, deadlines: StepDeadlines) -> None:
        self._upstream = upstream
        self._instances = instances
        self._deadlines = deadlines

    async def once(
        self,
        source: InstanceId,
        target: InstanceId,
        keyed: Keyed,
        chain: int,
        wait_s: float,
        deadline_s: float,
        pages: int | None = None,
        skip: int = 0,
    ) -> FetchResult:
        """One prompt's pages from ``source`` to ``target``, the first ``pages`` of them but for the
        first ``skip``, which ``target`` has. The answer counts those too. They are held there until
        the request takes them."""
        info = self._instances.info(source)
        body = FetchBody(
            source=source,
            keys=[key.hex() for key in keyed.chains[chain].keys[skip:pages]],
            wait_s=wait_s,
            deadline_s=deadline_s,
            source_ranks=[rank.peer_address for rank in info.ranks] if info else None,
            hold_s=self._deadlines.hold_s,
        )
        # A moment more than the instance itself allows: its answer says how far it got.
        answer = await self._upstream.call(
            "POST",
            f"{target}/memserve/fetch",
            msgspec.json.encode(body),
            deadline_s=deadline_s + 1.0,
        )
        try:
            result = msgspec.convert(answer, FetchResult)
        except msgspec.ValidationError as error:
            raise ProtocolError(f"{target}/memserve/fetch: {error}") from error
        return msgspec.structs.replace(
            result,
            requested_pages=result.requested_pages + skip,
            present_pages=result.present_pages + skip,
            readable_pages=result.readable_pages + skip,
        )

    async def as_computed(
        self,
        source: InstanceId,
        target: InstanceId,
        keyed: Keyed,
        chain: int,
        wait_s: float,
        skip: int = 0,
    ) -> FetchResult:
        """Pages that ``source`` computes within ``wait_s``, in as many fetches as that takes."""
        deadlines = self._deadlines
        grace_s = min(deadlines.grace_s, 0.5 * deadlines.most_fetch_s)
        until = time.monotonic() + wait_s
        total: FetchResult | None = None
        while True:
            started = time.monotonic()
            left_s = max(0.0, until - started)
            once_s = min(left_s, deadlines.most_fetch_s - grace_s)
            limit_s = once_s + grace_s
            part = await self.once(source, target, keyed, chain, once_s, limit_s, skip=skip)
            total = part if total is None else _joined(total, part)
            cut_short = once_s < left_s and time.monotonic() - started >= once_s
            if not (cut_short and part.outcome in ("miss", "deadline")):
                return total


def _joined(one: FetchResult, two: FetchResult) -> FetchResult:
    """Two fetches of the same pages, one after the other."""
    return msgspec.structs.replace(
        two,
        present_pages=one.present_pages,
        fetched_pages=one.fetched_pages + two.fetched_pages,
        fetched_bytes=one.fetched_bytes + two.fetched_bytes,
        seconds=one.seconds + two.seconds,
    )
