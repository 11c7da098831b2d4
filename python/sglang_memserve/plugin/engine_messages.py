"""What the HTTP process and the schedulers say to each other about the device tier.

These travel on SGLang's own channel from tokenizer manager to scheduler: it wakes a scheduler that
sleeps, and it hands every tensor parallel rank the same messages in the same round, so that all of
them change their trees alike.
"""

from __future__ import annotations

from enum import Enum

from sglang.srt.managers.io_struct import BaseReq, hook_custom_types


class Verb(Enum):
    MATCH = "match"
    SWAP_OUT = "swap_out"
    SWAP_IN = "swap_in"


class Outcome(Enum):
    """Why a verb did no more than it did. Documented in ``docs/mempool.md``."""

    COMPLETE = "complete"
    MISS = "miss"
    IN_USE = "in_use"
    SHARED = "shared"
    NO_BLOCKS = "no_blocks"
    NO_SLOTS = "no_slots"
    COPY_FAILED = "copy_failed"
    DEADLINE = "deadline"
    FLUSHED = "flushed"
    LIMIT_EXCEEDED = "limit_exceeded"
    UNSUPPORTED = "unsupported"
    INTERNAL_ERROR = "internal_error"


class PrefixVerbReqInput(BaseReq):
    """``keys``: of all full pages of ``tokens``. ``tokens`` is empty when only keys are known:
    enough for what DRAM holds, as SGLang's tree is searched by tokens."""

    call_id: int
    verb: str
    tokens: list[int]
    keys: list[bytes]
    extra_key: str | None
    cache_salt: str | None
    deadline_s: float


class PrefixVerbReqOutput(BaseReq):
    """Pages of the prefix asked for, over all ranks the least. ``hbm_pages`` and ``dram_pages``:
    the leading runs there are now; ``reusable_pages``: what a request would not compute: HBM and
    then DRAM. ``moved_pages``: left HBM or came into it; ``stored_pages``: written to DRAM for it;
    ``continued_pages``: pages beyond the prefix that left HBM with it."""

    call_id: int
    outcome: str
    hbm_pages: int = 0
    dram_pages: int = 0
    reusable_pages: int = 0
    moved_pages: int = 0
    stored_pages: int = 0
    continued_pages: int = 0


def register() -> None:
    """SGLang's message decoder of this process learns these types. Safe to call twice."""
    hook_custom_types(PrefixVerbReqInput, PrefixVerbReqOutput)
