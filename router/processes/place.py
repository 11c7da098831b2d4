"""What one of several router processes is told by the one that started it."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
from sglang_memserve.errors import ConfigError

VARIABLE = "MEMSERVE_ROUTER_PROCESS"


class Place(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``index`` of ``count`` processes. ``lifeline``: a file descriptor, written to as a sign of
    life, at whose end the process has to end. ``folder``: where the processes meet."""

    index: int
    count: int
    folder: str
    lifeline: int

    def meeting_point(self, index: int) -> str:
        """The Unix socket of a process."""
        return str(Path(self.folder) / f"{index}.sock")

    @property
    def others(self) -> list[int]:
        return [index for index in range(self.count) if index != self.index]

    def as_variable(self) -> dict[str, str]:
        return {VARIABLE: msgspec.json.encode(self).decode()}


def read_place() -> Place | None:
    """None for a router that is alone. Raises ConfigError for a malformed variable."""
    text = os.environ.get(VARIABLE)
    if text is None:
        return None
    try:
        place = msgspec.json.decode(text, type=Place)
    except msgspec.MsgspecError as error:
        raise ConfigError(f"{VARIABLE}: {error}") from error
    if not 0 <= place.index < place.count or place.lifeline < 0:
        raise ConfigError(f"{VARIABLE}: no process {place.index} of {place.count}")
    return place
