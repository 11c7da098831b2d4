"""The nouns every other module shares."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import NewType

PageKey = NewType("PageKey", bytes)
"""32-byte chained SHA-256 of a prefix that ends at a page boundary (SGLang's own page hash)."""

ShortKey = NewType("ShortKey", int)
"""First 64 bits of a PageKey as a signed integer: what SGLang's KV events carry.

Enough to route by, never enough to hand out bytes by."""

BlockId = NewType("BlockId", int)
"""Index of a block in one rank's arena."""

InstanceId = NewType("InstanceId", str)
"""Base URL of an instance, without a trailing slash."""

Generation = NewType("Generation", str)
"""Random id of one boot of an instance: an address may return, a generation never does."""


class Role(Enum):
    """What the router may use an instance for. A label, not an engine mode."""

    PREFILL = "prefill"
    DECODE = "decode"
    BOTH = "both"

    @property
    def can_prefill(self) -> bool:
        return self is not Role.DECODE

    @property
    def can_decode(self) -> bool:
        return self is not Role.PREFILL


class Eviction(Enum):
    """Which page goes when a MemPool needs room; ``index.eviction`` says how."""

    LRU = "lru"
    TWO_QUEUE = "2q"


class Tier(Enum):
    """Where a page lies. Values are SGLang's ``StorageMedium`` names."""

    HBM = "GPU"
    DRAM = "CPU_PINNED"


class Prefault(Enum):
    """When the system hands over a pool's memory, zeroed: in the background from the start, or each
    page when it is first touched, by whoever touches it."""

    BACKGROUND = "background"
    NONE = "none"


class Checksums(Enum):
    """Whether an instance computes a checksum of each block it fills."""

    ON = "on"
    OFF = "off"


@dataclass(frozen=True, slots=True)
class Namespace:
    """What must be equal for pages of two ranks to be interchangeable.

    ``layout_hash`` (see ``protocol.handshake``) names it on the wire; the fields stay readable so
    that a mismatch can be explained.
    """

    model: str
    weight_version: str
    kv_dtype: str
    page_size: int
    num_layers: int
    num_kv_heads: int
    head_dim: int
    v_head_dim: int
    tp_rank: int
    tp_size: int

    @property
    def block_bytes(self) -> int:
        """Bytes of one page over all layers, K and V."""
        per_token = (
            self.num_kv_heads * (self.head_dim + self.v_head_dim) * DTYPE_BYTES[self.kv_dtype]
        )
        return self.num_layers * self.page_size * per_token


DTYPE_BYTES = {
    "bfloat16": 2,
    "float16": 2,
    "float32": 4,
    "float8_e4m3fn": 1,
    "float8_e4m3fnuz": 1,
    "float8_e5m2": 1,
    "float8_e5m2fnuz": 1,
}


Region = tuple[int, int]
"""A range of memory: virtual address and length in bytes."""


class Progress(Enum):
    """How far something is that is done piece by piece. BLOCKED: others have to end first."""

    DONE = "done"
    WORKING = "working"
    BLOCKED = "blocked"


class HoldOutcome(Enum):
    """What came of holding pages for a request. REFUSED: too much is held already. NEEDLESS: none
    of them is readable, or the request was there before."""

    HELD = "held"
    REFUSED = "refused"
    NEEDLESS = "needless"


class ResizeOutcome(Enum):
    """``REFUSED``: the pool is as large as before."""

    RESIZED = "resized"
    UNCHANGED = "unchanged"
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class ResizeResult:
    """``total_blocks`` and ``total_bytes``: the pool's size now. ``reason``: of a refusal."""

    outcome: ResizeOutcome
    total_blocks: int
    total_bytes: int
    moved_pages: int
    evicted_pages: int
    reason: str = ""
