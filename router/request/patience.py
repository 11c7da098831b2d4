"""How long a request that met failing instances goes on looking for another one."""

from __future__ import annotations

import asyncio

from .turn import Turn

# About what an instance's successor, or its next heartbeat, may need to be there.
PAUSES_S = (0.0, 0.1, 0.2, 0.4, 0.8)


class Patience:
    """When nobody is left to try, those that failed are tried again, a few times: a connection that
    broke says little about an instance. A request that no instance failed is not made to wait."""

    def __init__(self) -> None:
        self._pauses_s = iter(PAUSES_S)

    async def again(self, turn: Turn) -> bool:
        """Whether to try once more; waits before it says so."""
        pause_s = next(self._pauses_s, None)
        if pause_s is None or not turn.failed or turn.live.aborted:
            return False
        await asyncio.sleep(pause_s)
        turn.failed.clear()
        return True
