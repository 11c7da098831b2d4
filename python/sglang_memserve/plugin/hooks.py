"""The functions of SGLang that are wrapped, each through SGLang's own hook registry.

``in_worker`` runs in scheduler processes on our CPU platform, ``page_hash`` in scheduler processes
that have a MemPool. A process without either keeps every function of SGLang as it is.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Sequence
from hashlib import sha256
from typing import Any, Protocol

import torch
from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from ..hashing import page_keys

NATIVE_HASH = "sglang.srt.mem_cache.cpp_utils.native_hash.get_native_hash"
LAST_LOCATION = "sglang.srt.mem_cache.allocation.get_last_loc"

_MAX_NARROW = 2**32 - 1
# SGLang marks a page that has an id beyond 32 bits by this byte before its 64-bit words.
_WIDE_TAG = b"\xff"


class TokenKey(Protocol):
    """What we use of SGLang's ``RadixKey``."""

    is_bigram: bool

    def raw_token_ids(self) -> Sequence[int]: ...

    def __len__(self) -> int: ...


def register() -> None:
    """Called in every process of SGLang. Only makes our backend a legal ``--attention-backend``."""
    from sglang.srt.server_args import ATTENTION_BACKEND_CHOICES, add_attention_backend_choices

    from . import ATTENTION_BACKEND, PLATFORM_NAME, activate_platform

    if os.environ.get("SGLANG_PLATFORM", "") not in ("", PLATFORM_NAME):
        return
    if ATTENTION_BACKEND not in ATTENTION_BACKEND_CHOICES and activate_platform() is not None:
        add_attention_backend_choices([ATTENTION_BACKEND])


def in_worker() -> None:
    """Hooks that SGLang's schedulers need on the CPU platform."""
    HookRegistry.register(LAST_LOCATION, last_location, HookType.REPLACE)
    page_hash()


def page_hash() -> None:
    """Page keys without SGLang's C++ extension.

    SGLang compiles that extension at first use: it needs a compiler and OpenSSL's headers, takes
    half a minute, and is built by all ranks at once. Safe to call twice.
    """
    if not any(hook is native_hash for _, hook, _ in HookRegistry._hooks.get(NATIVE_HASH, [])):
        HookRegistry.register(NATIVE_HASH, native_hash, HookType.REPLACE)
    HookRegistry.apply_hooks()


def last_location(
    req_to_token: torch.Tensor, req_pool_indices: torch.Tensor, prefix_lens: torch.Tensor
) -> torch.Tensor:
    """Slot of the last prefix token of each request, -1 without a prefix. ``[requests]``.

    SGLang uses a Triton kernel here for every backend but its own ``torch_native``.
    """
    last = req_to_token[req_pool_indices, (prefix_lens - 1).clamp_min(0)].to(prefix_lens.dtype)
    return torch.where(prefix_lens > 0, last, torch.full_like(prefix_lens, -1))


def native_hash(
    token_ids: TokenKey | Sequence[int] | Sequence[tuple[int, ...]],
    prior_digest: bytes | None,
    page_size: int | None = None,
) -> str | list[str]:
    """As SGLang's ``get_native_hash``: hex keys of all pages, the incomplete last one included, or
    with ``page_size`` None one key of everything.

    Raises ValueError for a token id that is negative or beyond 63 bits.
    """
    if page_size is not None and page_size <= 0:
        raise ValueError(f"page size must be positive, got {page_size}")
    if prior_digest is not None and len(prior_digest) != 32:
        raise ValueError(f"a parent digest has 32 bytes, not {len(prior_digest)}")
    words, words_per_unit = _flatten(token_ids)
    if page_size is None:
        return _digest(words, prior_digest).hex()
    step = page_size * words_per_unit
    full = len(words) // step * step
    try:
        keys: list[bytes] = list(page_keys(words[:full], step, prior_digest))
    except ValueError:  # an id beyond 32 bits, which page keys do not know
        keys, full = [], 0
    for start in range(full, len(words), step):
        parent = keys[-1] if keys else prior_digest
        keys.append(_digest(words[start : start + step], parent))
    return [key.hex() for key in keys]


def _flatten(
    token_ids: TokenKey | Sequence[int] | Sequence[tuple[int, ...]],
) -> tuple[Sequence[int], int]:
    """The integers that are hashed, and how many of them stand for one unit of the key."""
    length = len(token_ids)
    raw_ids = getattr(token_ids, "raw_token_ids", None)
    raw: Any = raw_ids() if raw_ids is not None else getattr(token_ids, "token_ids", token_ids)
    if getattr(token_ids, "is_bigram", False):
        if length and len(raw) < length + 1:
            raise ValueError("bigram key with fewer tokens than its length needs")
        return [raw[index] for start in range(length) for index in (start, start + 1)], 2
    if length and isinstance(raw[0], tuple):
        return [word for unit in raw[:length] for word in unit], len(raw[0])
    words: Sequence[int] = raw if len(raw) == length else raw[:length]
    return words, 1


def _digest(words: Sequence[int], parent: bytes | None) -> bytes:
    wide = any(word > _MAX_NARROW for word in words)
    try:
        packed = array("q" if wide else "I", words).tobytes()
    except (OverflowError, TypeError) as error:
        raise ValueError(f"token ids must be integers in 0..2**63 - 1: {error}") from error
    if wide and any(word < 0 for word in words):
        raise ValueError("token ids must not be negative")
    return sha256((parent or b"") + (_WIDE_TAG if wide else b"") + packed).digest()
