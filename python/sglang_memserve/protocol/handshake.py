"""Which pages may be exchanged with whom."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, fields

import msgspec

from ..errors import NamespaceMismatch, ProtocolError, VersionMismatch
from ..types import DTYPE_BYTES, Namespace
from . import PROTOCOL_VERSION

MOST_OF_A_PAGE = 2**31 - 1


def layout_hash(namespace: Namespace) -> str:
    """16 hex digits that two ranks share exactly when their pages are interchangeable."""
    encoded = msgspec.json.encode(asdict(namespace), order="sorted")
    return hashlib.sha256(encoded).hexdigest()[:16]


def require_same_version(theirs: int) -> None:
    if theirs != PROTOCOL_VERSION:
        raise VersionMismatch(
            f"peer speaks MemServe protocol {theirs}, we speak {PROTOCOL_VERSION}"
        )


def require_possible(namespace: Namespace) -> None:
    """Raises ProtocolError, which names the field, for pages that no engine has."""
    if namespace.kv_dtype not in DTYPE_BYTES:
        raise ProtocolError(f"namespace.kv_dtype: unknown {namespace.kv_dtype[:40]!r}")
    least = {"v_head_dim": 0, "tp_rank": 0}
    for field in fields(Namespace):
        value = getattr(namespace, field.name)
        if isinstance(value, int) and not least.get(field.name, 1) <= value <= MOST_OF_A_PAGE:
            raise ProtocolError(f"namespace.{field.name} is out of bounds")


def require_same_namespace(one: Namespace, other: Namespace, one_id: str, other_id: str) -> None:
    """Raises NamespaceMismatch naming each differing field with both values, and whose each is:
    the text is read on both sides."""
    differing = [
        f"{field.name}: {one_id} has {getattr(one, field.name)!r}, "
        f"{other_id} has {getattr(other, field.name)!r}"
        for field in fields(Namespace)
        if getattr(one, field.name) != getattr(other, field.name)
    ]
    if differing:
        raise NamespaceMismatch("pages are not interchangeable: " + "; ".join(differing))
