"""What one frame of an engine's event stream says, whatever it may hold. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import orjson
from sglang_memserve.errors import PeerError


class Diverged(PeerError):
    """The other instance does not repeat what the client has already."""


@dataclass(frozen=True, slots=True)
class Cumulative:
    """What one frame of ``/generate`` says."""

    text: str
    ids: list[int]
    meta: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Said:
    """One choice of an OpenAI frame. ``fields``: where its text is, under ``name``."""

    fields: dict[str, Any]
    name: str
    text: str
    index: int
    finished: bool


def said_in(value: Mapping[str, Any]) -> list[Said] | None:
    """What the choices of a frame say; None for a frame of another kind, an error say."""
    choices = value.get("choices")
    if not isinstance(choices, list):
        return None
    said = []
    for choice in choices:
        if not isinstance(choice, dict):
            return None
        fields, name = (choice["delta"], "content") if "delta" in choice else (choice, "text")
        if not isinstance(fields, dict):
            return None
        text, index = fields.get(name) or "", choice.get("index") or 0
        if not (isinstance(text, str) and isinstance(index, int)):
            return None
        said.append(Said(fields, name, text, index, choice.get("finish_reason") is not None))
    return said


def is_role_only(said: Said) -> bool:
    """The first frame of a chat: the client has had one."""
    return (
        said.name == "content"
        and bool(said.fields.get("role"))
        and not (said.text or said.finished)
    )


def count_in(usage: dict[str, Any], tokens: int) -> None:
    """``tokens`` were generated, though the continuation took them for a part of its prompt."""
    for name, change in (("prompt_tokens", -tokens), ("completion_tokens", tokens)):
        if type(usage.get(name)) is int:
            usage[name] += change
    details = usage.get("prompt_tokens_details")
    if not isinstance(details, dict):
        return
    cached, prompt = details.get("cached_tokens"), usage.get("prompt_tokens")
    if type(cached) is int and type(prompt) is int:
        details["cached_tokens"] = min(cached, prompt)


def load(frame: bytes) -> dict[str, Any]:
    """A frame, ``data:`` and all. Raises Diverged for one that is no JSON object."""
    try:
        value = orjson.loads(frame.removeprefix(b"data:"))
    except orjson.JSONDecodeError as error:
        raise Diverged(f"sent a frame that is no JSON: {error}") from error
    if not isinstance(value, dict):
        raise Diverged("sent a frame that is no JSON object")
    return value


def cumulative(value: Mapping[str, Any]) -> Cumulative:
    """Raises Diverged for a frame of another kind, an error say."""
    text, ids, meta = (value.get(name) for name in ("text", "output_ids", "meta_info"))
    if not (
        isinstance(text, str)
        and isinstance(ids, list)
        and all(type(one) is int for one in ids)
        and isinstance(meta, dict)
        and all(type(meta.get(name, 0)) is int for name in ("prompt_tokens", "completion_tokens"))
    ):
        raise Diverged(f"sent something else than tokens: {str(value.get('error'))[:200]}")
    return Cumulative(text, ids, meta)
