"""Page keys, byte for byte those of SGLang's storage tier.

A key is ``SHA-256(parent digest || token ids as little-endian uint32)`` over one page; the first
page's parent is the digest of the request's namespace, or nothing. Source: SGLang 0.5.23,
``sglang.srt.mem_cache.utils.get_storage_hash_str`` and ``storage_namespace_seed``; the contract
test compares with both.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from functools import lru_cache
from hashlib import sha256
from struct import Struct
from typing import cast

from .kernels import native
from .types import PageKey, ShortKey

_NAMESPACE_TAG = b"sglang-cache-namespace-v1"
_MAX_TOKEN_ID = 2**32 - 1


def namespace_seed(extra_key: str | None, cache_salt: str | None) -> bytes | None:
    """Digest that starts the chain of a request with an ``extra_key`` or a ``cache_salt``."""
    if extra_key is None and cache_salt is None:
        return None
    digest = sha256(_NAMESPACE_TAG)
    for part in (extra_key, cache_salt):
        if part is None:
            digest.update(b"\x00")
            continue
        encoded = part.encode()
        # Length first, so that ("a", "bc") and ("ab", "c") differ.
        digest.update(b"\x01" + len(encoded).to_bytes(8, "little") + encoded)
    return digest.digest()


def page_keys(tokens: Sequence[int], page_size: int, seed: bytes | None = None) -> list[PageKey]:
    """Keys of all full pages of ``tokens``; the incomplete last page has none.

    ``seed`` is the digest the chain goes on from: a namespace seed or the key of the page before.
    Raises ValueError for a token id outside 0 .. 2**32 - 1, or a seed that is not 32 bytes.
    """
    ops = native()
    if ops is None:
        return portable_page_keys(tokens, page_size, seed)
    return cast(list[PageKey], ops.page_keys(tokens, page_size, seed or b""))


def portable_page_keys(
    tokens: Sequence[int], page_size: int, seed: bytes | None = None
) -> list[PageKey]:
    """As ``page_keys``, without native code."""
    if page_size <= 0:
        raise ValueError(f"page size must be positive, got {page_size}")
    parent = seed or b""
    if len(parent) not in (0, 32):
        raise ValueError(f"a parent digest has 32 bytes, not {len(parent)}")
    try:
        packed = array("I", tokens).tobytes()
    except (OverflowError, TypeError) as error:
        raise ValueError(f"token ids must be integers in 0..{_MAX_TOKEN_ID}: {error}") from error
    step = 4 * page_size
    keys: list[PageKey] = []
    for start in range(0, len(packed) // step * step, step):
        parent = sha256(parent + packed[start : start + step]).digest()
        keys.append(PageKey(parent))
    return keys


def short_keys(keys: Sequence[PageKey]) -> list[ShortKey]:
    """``short_key`` of each, several times faster for many."""
    return cast(list[ShortKey], list(_heads(len(keys)).unpack(b"".join(keys))))


@lru_cache(maxsize=1024)
def _heads(count: int) -> Struct:
    return Struct(">" + "q24x" * count)


def short_key(key: PageKey) -> ShortKey:
    """The signed 64-bit form SGLang publishes (``hash_str_to_int64``)."""
    return ShortKey(int.from_bytes(key[:8], "big", signed=True))
