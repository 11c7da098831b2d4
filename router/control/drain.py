"""An instance that is to leave: nothing new, what it has is seen to its end, then it is removed."""

from __future__ import annotations

import asyncio

from sglang_memserve.types import Generation, InstanceId

from ..members.instances import Instances
from ..members.member import State

POLL_S = 0.1


class Leaving:
    """Instances that get nothing new and are removed when what they have is done."""

    def __init__(self, instances: Instances) -> None:
        self._instances = instances
        self._tasks: dict[InstanceId, asyncio.Task[None]] = {}

    def begin(self, instance: InstanceId, limit_s: float) -> None:
        """Again with another limit is fine. Raises ConfigError for an unknown instance."""
        generation = self._instances.drain(instance)
        if (before := self._tasks.pop(instance, None)) is not None:
            before.cancel()
        if not self._works(instance, generation):
            self._instances.dismiss(instance, generation)
            return
        task = asyncio.create_task(
            self._see_off(instance, generation, limit_s), name=f"draining {instance}"
        )
        self._tasks[instance] = task

    def _works(self, instance: InstanceId, generation: Generation) -> bool:
        """Whether this boot is still being drained and has something to do."""
        return any(
            member.id == instance
            and member.generation == generation
            and member.state is State.DRAINING
            and member.in_flight_requests > 0
            for member in self._instances.members()
        )

    async def _see_off(self, instance: InstanceId, generation: Generation, limit_s: float) -> None:
        until = asyncio.get_running_loop().time() + limit_s
        while asyncio.get_running_loop().time() < until:
            if not self._works(instance, generation):
                break
            await asyncio.sleep(POLL_S)
        self._instances.dismiss(instance, generation)
        if self._tasks.get(instance) is asyncio.current_task():
            del self._tasks[instance]

    async def close(self) -> None:
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
