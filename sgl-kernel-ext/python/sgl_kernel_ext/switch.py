"""Whether native ops run: ``MEMSERVE_NATIVE=0``, read on import, turns all of them off."""

from __future__ import annotations

import os

SWITCH = "MEMSERVE_NATIVE"


def _why_not_native() -> str | None:
    if os.environ.get(SWITCH, "1") == "0":
        return f"{SWITCH}=0"
    try:
        from . import _native  # noqa: F401
    except ImportError as error:
        return f"they are not built here ({error})"
    return None


WHY_NOT_NATIVE = _why_not_native()
"""None where native ops run."""

NATIVE = WHY_NOT_NATIVE is None
