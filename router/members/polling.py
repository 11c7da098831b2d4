"""Asks listed URLs what they are and how busy they are: the shell around ``Instances``' statics.

An instance that registers itself needs none of this. A listed URL is asked until it answers, then
at the heartbeat's pace: ``/memserve/info`` (role, generation), ``/v1/loads``, and
``/memserve/stats`` (the last event's number). A server without ``/memserve`` is SGLang without
MemServe.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from typing import Any, TypeVar

import aiohttp
from sglang_memserve.errors import MemServeError, PeerError, PeerUnreachable, ProtocolError
from sglang_memserve.protocol.http import Heartbeat, InstanceInfo, InstanceStats, Load, decode
from sglang_memserve.types import InstanceId

from ..http.faults import plainly
from .instances import Instances

logger = logging.getLogger(__name__)

_T = TypeVar("_T")

ASK_S = 5.0
MAX_ANSWER_BYTES = 4 * 2**20


class Poller:
    """Runs until cancelled; follows additions to and removals from the list by itself."""

    def __init__(
        self,
        instances: Instances,
        session: aiohttp.ClientSession,
        *,
        interval_s: float,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self._instances = instances
        self._session = session
        self._interval_s = interval_s
        self._headers = dict(headers or {})

    async def run(self) -> None:
        """Look for silent members about once a second, and ask every listed URL every
        ``interval_s``: one that hangs does not hold up the others."""
        asking: dict[InstanceId, asyncio.Task[None]] = {}
        try:
            while True:
                for listed in self._instances.statics():
                    if listed not in asking:
                        asking[listed] = asyncio.create_task(self.ask(listed), name=f"ask {listed}")
                await asyncio.sleep(min(self._interval_s, 1.0))
                self._instances.expire()
                for listed in [listed for listed, task in asking.items() if task.done()]:
                    self._ended(listed, asking.pop(listed))
        finally:
            for task in asking.values():
                task.cancel()
            await asyncio.gather(*asking.values(), return_exceptions=True)

    def _ended(self, listed: InstanceId, task: asyncio.Task[None]) -> None:
        """A mistake of ours about one URL must not leave the others unasked."""
        if (error := task.exception()) is not None:
            logger.error("%s failed", task.get_name(), exc_info=error)
            self._instances.unreachable(listed, f"{type(error).__name__}: {error}")

    async def ask(self, listed: InstanceId) -> None:
        """One round for one URL; what goes wrong becomes the member's last error."""
        try:
            status, body = await self._get(f"{listed}/memserve/info")
            if status == 404:
                await self._ask_plain(listed)
            elif status != 200:
                raise PeerError(f"{listed}/memserve/info answered {status}")
            else:
                await self._ask_ours(listed, decode(body, InstanceInfo, "info"))
        except MemServeError as error:
            self._instances.unreachable(listed, str(error))

    async def _ask_ours(self, listed: InstanceId, info: InstanceInfo) -> None:
        self._instances.answered(listed, info)
        load = await self._load(listed)
        status, body = await self._get(f"{listed}/memserve/stats")
        event_seq = decode(body, InstanceStats, "stats").event_seq if status == 200 else -1
        self._instances.heartbeat(
            Heartbeat(listed, info.generation, info.role, load, event_seq=event_seq)
        )

    async def _ask_plain(self, listed: InstanceId) -> None:
        status, body = await self._get(f"{listed}/get_model_info")
        if status != 200:
            raise PeerError(f"{listed}/get_model_info answered {status}")
        fields = decode(body, dict[str, Any], "model info")
        model = fields.get("served_model_name") or fields.get("model_path") or ""
        self._instances.answered_plain(listed, str(model), await self._load(listed))

    async def _load(self, listed: InstanceId) -> Load:
        """Sums over data-parallel ranks; nothing where the route is missing (old servers)."""
        status, body = await self._get(f"{listed}/v1/loads?include=core")
        loads = decode(body, dict[str, Any], "loads").get("loads", []) if status == 200 else []
        names = ("num_running_reqs", "num_waiting_reqs", "num_used_tokens", "max_total_num_tokens")
        try:
            sums = [sum(int(load.get(name, 0)) for load in loads) for name in names]
        except (AttributeError, TypeError, ValueError, OverflowError) as error:
            raise ProtocolError(f"{listed}/v1/loads: {error}") from error
        return Load.counted(*sums)

    async def _get(self, url: str) -> tuple[int, bytes]:
        timeout = aiohttp.ClientTimeout(total=ASK_S)
        try:
            async with self._session.get(
                url, headers=self._headers, timeout=timeout, allow_redirects=False
            ) as response:
                return response.status, await _bounded(response)
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            # ValueError: its URL cannot be parsed, or its host not looked up.
            raise PeerUnreachable(f"{url}: {plainly(error)}") from error


async def _bounded(response: aiohttp.ClientResponse) -> bytes:
    """The whole answer. Raises ProtocolError beyond ``MAX_ANSWER_BYTES``."""
    body = bytearray()
    async for part in response.content.iter_any():
        body += part
        if len(body) > MAX_ANSWER_BYTES:
            raise ProtocolError(f"{response.url} answered more than {MAX_ANSWER_BYTES} bytes")
    return bytes(body)
