"""Which pages may be exchanged with whom."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, fields

import msgspec

from ..errors import NamespaceMismatch, VersionMismatch
from ..types import Namespace
from . import PROTOCOL_VERSION


def layout_hash(namespace: Namespace) -> str:
    """16 hex digits that two ranks share exactly when their pages are interchangeable."""
    encoded = msgspec.json.encode(asdict(namespace), order="sorted")
    return hashlib.sha256(encoded).hexdigest()[:16]


def require_same_version(theirs: int) -> None:
    if theirs != PROTOCOL_VERSION:
        raise VersionMismatch(
            f"peer speaks MemServe protocol {theirs}, we speak {PROTOCOL_VERSION}"
        )


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
