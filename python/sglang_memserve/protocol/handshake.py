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


def require_same_namespace(ours: Namespace, theirs: Namespace) -> None:
    """Raises NamespaceMismatch naming each differing field with both values."""
    differing = [
        f"{field.name}: ours {getattr(ours, field.name)!r}, theirs {getattr(theirs, field.name)!r}"
        for field in fields(Namespace)
        if getattr(ours, field.name) != getattr(theirs, field.name)
    ]
    if differing:
        raise NamespaceMismatch("pages are not interchangeable: " + "; ".join(differing))
