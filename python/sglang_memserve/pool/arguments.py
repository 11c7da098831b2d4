"""What a caller of the pool may ask for. Looked at before anything changes, so a mistake is refused
whole: ConfigError for what can never be right, LimitExceeded beyond a bound."""

from __future__ import annotations

from collections.abc import Sequence
from operator import index

from ..errors import ConfigError, LimitExceeded
from ..types import Namespace, PageKey

MAX_RESIZE_WAIT_S = 600.0
KEY_BYTES = 32

_KEY_TYPES = {bytes}
_KEY_SIZES = {KEY_BYTES}


def require_namespace(namespace: Namespace) -> Namespace:
    if not isinstance(namespace, Namespace):
        raise ConfigError(
            f"a pool's first argument is a sglang_memserve.types.Namespace, not {namespace!r}"
        )
    return namespace


def require_keys(keys: Sequence[PageKey], parent: PageKey | None) -> None:
    """Keys that pages are stored under; some 10 microseconds for 256."""
    if set(map(type, keys)) <= _KEY_TYPES and set(map(len, keys)) <= _KEY_SIZES:
        if parent is None or (type(parent) is bytes and len(parent) == KEY_BYTES):
            return
        wrong: object = parent
    else:
        wrong = next(key for key in keys if type(key) is not bytes or len(key) != KEY_BYTES)
    raise ConfigError(f"a page's key is {KEY_BYTES} bytes (hashing.page_keys), not {wrong!r:.100}")


def require_size(nbytes: int) -> int:
    """A whole number of bytes, or of whatever is counted."""
    try:
        return index(nbytes)
    except TypeError:
        raise ConfigError(f"a size is a whole number, not {nbytes!r}") from None


def require_wait(wait_s: float) -> float:
    """Written so that NaN is refused too."""
    if not 0 <= wait_s <= MAX_RESIZE_WAIT_S:
        raise LimitExceeded(f"wait of {wait_s} s, allowed are 0 to {MAX_RESIZE_WAIT_S:g} s")
    return wait_s
