"""Texts to token ids piece by piece, remembering pieces: the next turn of a conversation is mostly
the last one, and encoding is most of what routing a long prompt takes.

A text may be cut where encoding its parts alone gives the same ids. For the byte-level BPE of
today's models that is before a single space between two ASCII letters, since their patterns begin a
word with the space before it and end it at the next. ``why_not`` tells from ``tokenizer.json``
whether a tokenizer is of that kind. Cuts depend on what is before them alone, so equal prefixes
have equal pieces:

    "... the quick brown| fox jumps over| the lazy dog ..."     ``PIECE_CHARACTERS`` apart at least
"""

from __future__ import annotations

import re
import threading
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import msgspec

PIECE_CHARACTERS = 512
MAX_PIECE_CHARACTERS = 8 * PIECE_CHARACTERS
SEARCHED_CHARACTERS = 16 * PIECE_CHARACTERS
REMEMBERED_CHARACTERS = 8 * 2**20

_CUT = re.compile(r"(?<=[A-Za-z]) (?=[A-Za-z])")

EncodeMany = Callable[[list[str]], Sequence[Sequence[int]]]
"""Ids of each text, as if it stood alone, without special tokens."""


class Pieces:
    """Any thread may call. Memory: one to four bytes for each of ``capacity`` characters, four for
    each of their tokens, and some 300 a piece."""

    def __init__(self, encode: EncodeMany, *, capacity: int = REMEMBERED_CHARACTERS) -> None:
        self._encode = encode
        self._capacity = capacity
        self._known: OrderedDict[str, array[int]] = OrderedDict()
        self._characters = 0
        self._lock = threading.Lock()

    def encode(self, text: str) -> list[int]:
        """The ids of ``text``, without special tokens."""
        pieces = list(cut(text))
        found = self._recall(pieces)
        missing = [piece for piece, ids in zip(pieces, found, strict=True) if ids is None]
        new = iter(self._encode(missing) if missing else ())
        result: list[int] = []
        for piece, known in zip(pieces, found, strict=True):
            if known is None:
                ids = next(new)
                self._remember(piece, ids)
                result += ids
            else:
                result += known
        return result

    def missing_characters(self, text: str) -> int:
        """Of how many characters ``encode`` would have to find the ids."""
        pieces = list(cut(text))
        found = self._recall(pieces)
        return sum(len(p) for p, ids in zip(pieces, found, strict=True) if ids is None)

    def _recall(self, pieces: Sequence[str]) -> list[array[int] | None]:
        found: list[array[int] | None] = []
        with self._lock:
            for piece in pieces:
                ids = self._known.get(piece)
                if ids is not None:
                    self._known.move_to_end(piece)
                found.append(ids)
        return found

    def _remember(self, piece: str, ids: Sequence[int]) -> None:
        # The last piece of a prompt is seldom seen again, but it is small; a huge one is not.
        if len(piece) > min(MAX_PIECE_CHARACTERS, self._capacity):
            return
        with self._lock:
            if piece in self._known:
                return
            self._known[piece] = array("I", ids)
            self._characters += len(piece)
            while self._characters > self._capacity:
                dropped, _ = self._known.popitem(last=False)
                self._characters -= len(dropped)

    def check(self) -> None:
        assert self._characters == sum(map(len, self._known)), self._characters
        assert self._characters <= self._capacity, (self._characters, self._capacity)


def cut(text: str) -> Iterator[str]:
    """``text`` in pieces of ``PIECE_CHARACTERS``, and what it is to the next place to cut."""
    at, look = 0, PIECE_CHARACTERS
    while look < len(text):
        # A search keeps the interpreter's lock: it must not go through megabytes of no words.
        place = _CUT.search(text, look, look + SEARCHED_CHARACTERS)
        if place is None:
            look += SEARCHED_CHARACTERS
        else:
            yield text[at : place.start()]
            at = place.start()
            look = at + PIECE_CHARACTERS
    yield text[at:]


class _Model(msgspec.Struct, frozen=True):
    type: str = ""
    dropout: float | None = None


class _Anatomy(msgspec.Struct, frozen=True):
    """What decides, of a file that is vocabulary for the most part."""

    model: _Model
    normalizer: dict[str, Any] | None = None
    pre_tokenizer: dict[str, Any] | None = None
    added_tokens: list[dict[str, Any]] = []


def why_not(tokenizer_json: bytes) -> str:
    """Why texts of the tokenizer in this ``tokenizer.json`` may not be cut; empty if they may."""
    try:
        tokenizer = msgspec.json.decode(tokenizer_json, type=_Anatomy)
    except msgspec.MsgspecError as error:
        return f"not understood: {error}"
    if tokenizer.model.type != "BPE" or tokenizer.model.dropout:
        return f"model {tokenizer.model.type}"
    normalizer = tokenizer.normalizer
    if normalizer is not None and normalizer.get("type") != "NFC":
        return f"normalizer {normalizer.get('type')}"
    if not _splits_words(tokenizer.pre_tokenizer or {}):
        return "pre-tokenizer"
    for token in tokenizer.added_tokens:
        content = str(token.get("content", ""))
        if _CUT.search(content) or content[:1] == " " or content[-1:] == " ":
            return f"added token {content!r}"
        if (token.get("lstrip") and _is_letter(content[:1])) or (
            token.get("rstrip") and _is_letter(content[-1:])
        ):
            return f"added token {content!r} takes spaces"
    return ""


def _splits_words(pre_tokenizer: Mapping[str, Any]) -> bool:
    """GPT-2's own pattern, or one of a model's own before bytes are made letters."""
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    kinds = [step.get("type") for step in steps]
    if "ByteLevel" not in kinds or not set(kinds) <= {"ByteLevel", "Split", "Digits"}:
        return False
    by_pattern = [step for step in steps if step.get("type") == "Split"]
    if any(_ends_with_spaces(step) for step in by_pattern):
        return False
    return bool(by_pattern) or any(
        step.get("type") == "ByteLevel" and step.get("use_regex", True) for step in steps
    )


def _ends_with_spaces(split: Mapping[str, Any]) -> bool:
    """Whether it is none of the known patterns, which begin a word with what stands before it."""
    pattern = (split.get("pattern") or {}).get("Regex", "")
    isolated = split.get("behavior") == "Isolated" and not split.get("invert")
    return not (isolated and r"\p{L}" in pattern and r"\s+(?!\S)" in pattern)


def _is_letter(character: str) -> bool:
    return character.isascii() and character.isalpha()
