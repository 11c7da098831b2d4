"""Request and response headers between client, router and instances. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum

from .ids import new_id

RawHeaders = Sequence[tuple[bytes, bytes]]
"""ASGI's form: lower-case names, undecoded values."""

HOP_BY_HOP = frozenset(
    {
        b"connection",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
    }
)
# Set anew for each hop by whoever sends the message.
_OURS = frozenset({b"host", b"content-length", b"expect", b"x-request-id"})
# What an instance says about itself as a server, or about a request id that we echo ourselves.
_NOT_PASSED_BACK = frozenset({b"date", b"server", b"x-request-id"})

# Of answers that have no body whatever they announce.
BODILESS = frozenset({204, 304})

MAX_REQUEST_ID_BYTES = 200
# RFC 9110's "token", and what a field value may not contain.
_NOT_IN_NAMES = re.compile(rb"[^!#$%&'*+.^_`|~0-9A-Za-z-]|^$")
_NOT_IN_VALUES = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")


def get(headers: RawHeaders, name: bytes) -> bytes | None:
    for key, value in headers:
        if key == name:
            return value
    return None


def request_id(headers: RawHeaders) -> str:
    """The client's own ``x-request-id`` if it is a sane one, else a new one."""
    given = get(headers, b"x-request-id")
    if given and len(given) <= MAX_REQUEST_ID_BYTES and given.isascii():
        text = given.decode("ascii").strip()
        if text and text.isprintable():
            return text
    return new_id()


def to_instance(headers: RawHeaders, id: str, api_key: str | None) -> list[tuple[str, str]]:
    """The client's headers as an instance gets them.

    With ``api_key`` the client's own authorization, checked already, is replaced by it.
    """
    dropped = HOP_BY_HOP | _OURS | _named_by_connection(headers)
    if api_key is not None:
        dropped |= {b"authorization"}
    passed = [(_text(name), _text(value)) for name, value in headers if name not in dropped]
    if api_key is not None:
        passed.append(("authorization", f"Bearer {api_key}"))
    passed.append(("x-request-id", id))
    return passed


def as_json(headers: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Of a body that was read as JSON, whatever its sender called it: curl says ``form`` unless it
    is told otherwise, and SGLang takes a body for JSON only when it is called so."""
    if any(name == "content-type" and is_json(value) for name, value in headers):
        return headers
    kept = [(name, value) for name, value in headers if name != "content-type"]
    return [*kept, ("content-type", "application/json")]


def is_encoded(headers: RawHeaders) -> bool:
    """Whether a body is compressed, say: nothing of ours can be put behind parts of it."""
    codings = [value for name, value in headers if name.lower() == b"content-encoding"]
    return any(one.strip().lower() not in (b"", b"identity") for one in codings)


def is_json(content_type: str) -> bool:
    kind = content_type.split(";")[0].strip().lower()
    return kind == "application/json" or kind.endswith("+json")


def unfit(status: int, headers: RawHeaders) -> str:
    """Why an instance's answer cannot be passed on as HTTP; empty if it can."""
    if not 200 <= status <= 599:
        return f"answered with status {status}"
    for name, value in headers:
        if _NOT_IN_NAMES.search(name) or _NOT_IN_VALUES.search(value):
            return f"answered with a malformed header {name[:40]!r}"
    return ""


class Length(Enum):
    """Of an answer's body. ANNOUNCED: it has the content-length that the instance announced, if
    any. OURS: what is sent may be more or less than that."""

    ANNOUNCED = "announced"
    OURS = "ours"


def to_client(
    headers: RawHeaders, extra: Iterable[tuple[bytes, bytes]], length: Length = Length.ANNOUNCED
) -> list[tuple[bytes, bytes]]:
    """An instance's response headers as the client gets them, ours added."""
    dropped = HOP_BY_HOP | _NOT_PASSED_BACK | _named_by_connection(headers)
    if length is Length.OURS:
        dropped |= {b"content-length"}
    passed = [(name.lower(), value) for name, value in headers if name.lower() not in dropped]
    return [*passed, *extra]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the router did with a request, for its response headers."""

    request_id: str
    prefill: str | None = None
    decode: str | None = None
    cached_tokens: int | None = None
    reason: str = ""

    def headers(self) -> list[tuple[bytes, bytes]]:
        pairs = [(b"x-request-id", self.request_id)]
        if self.decode is not None:
            pairs.append((b"x-memserve-decode", self.decode))
        if self.prefill is not None:
            pairs.append((b"x-memserve-prefill", self.prefill))
        if self.cached_tokens is not None:
            pairs.append((b"x-memserve-cached-tokens", str(self.cached_tokens)))
        if self.reason:
            pairs.append((b"x-memserve-reason", self.reason))
        return [(name, _header_value(value)) for name, value in pairs]


def _named_by_connection(headers: RawHeaders) -> frozenset[bytes]:
    """Headers that ``Connection`` declares to be for this hop only."""
    value = get(headers, b"connection")
    if value is None:
        return frozenset()
    return frozenset(name.strip().lower() for name in value.split(b","))


def _header_value(text: str) -> bytes:
    # A reason may quote anything; a header may not contain line ends.
    return " ".join(text.split()).encode("ascii", "replace")


def _text(raw: bytes) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return raw.decode("latin-1")
