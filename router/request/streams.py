"""Client-visible event streams that can outlive the instance which began them. Pure.

The client sees one stream: the first instance's id, all token counts whole, cumulative text and
ids as if nothing had happened. Only whole frames are passed on.

    instance 1   t1 t2 t3 t4 t5 <breaks>
    instance 2                 prompt + t1 .. t5 -> t6 t7 ..     chat, completions
    instance 2         prompt + t1 .. t3 -> t4 t5 t6 t7 ..       /generate: t4 t5 are compared

``/generate`` sends ids and text of all tokens in each frame. Text may lag behind (a character of
several tokens), so the new instance starts at a token where the text had just grown, and must first
repeat what the client has. The OpenAI routes send new text alone; ``resume`` finds its tokens, or
has everything generated anew, and what the client has is left out of that.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import orjson
from sglang_memserve.errors import PeerError

from ..prompt.bodies import Request, Route
from .frames import Cumulative, Diverged, Said, count_in, cumulative, is_role_only, load, said_in
from .resumable import OnlyAnew, Unresumable, sampling, stop_strings

GAP = b"\n\n"
CRLF_GAP = b"\r\n\r\n"
DONE = b"data: [DONE]"
LAST = DONE + GAP
TAIL_BYTES = len(DONE + CRLF_GAP)
MAX_FRAME_BYTES = 16 * 2**20
_TEXT = b'data: {"text":"'
_IDS = b'","output_ids":['


@dataclass(frozen=True, slots=True)
class Continuation:
    """``ids``: tokens after the prompt from where it goes on, None where ``text`` has to be turned
    into them first."""

    text: str
    ids: tuple[int, ...] | None


class Stream(Protocol):
    """One client's event stream, over as many instances as it takes."""

    done: bool
    """The client has been sent ``[DONE]``."""

    tail: bytes
    """The last bytes sent, where they may be less than a frame."""

    @property
    def finished(self) -> bool:
        """All but ``[DONE]`` was sent."""

    def feed(self, chunk: bytes) -> bytes:
        """Bytes from the instance to whole frames for the client. Raises Diverged."""

    def at_end(self) -> bytes:
        """The instance ended its answer: what is left for the client. Raises PeerError where it
        should not have ended."""

    def so_far(self) -> Continuation:
        """Where it may go on. Raises OnlyAnew, Unresumable."""

    def conclude(self, prompt_tokens: int, tokens: int) -> bytes:
        """What says that the text so far was all, ``tokens`` being as many as were asked for."""

    def go_on(self, ids: Sequence[int]) -> None:
        """From now on ``feed`` gets what follows the prompt and ``ids``. Without ids it gets
        everything anew, and what the client has is compared and left out."""


def make_stream(request: Request) -> Stream:
    """For a request without any ``why_not``."""
    stops = stop_strings(sampling(request))
    if request.route is Route.GENERATE:
        return GenerateStream(stops)
    options = request.body.get("stream_options")
    usage = isinstance(options, dict) and bool(options.get("include_usage"))
    return OpenAIStream(stops, wants_usage=usage)


class _Framed(ABC):
    """Whole frames out of bytes. A stream that is not as expected is passed on as it comes."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._rest = b""
        self.tail = b""
        self._odd = ""
        self._joining = False
        self.done = False

    def feed(self, chunk: bytes) -> bytes:
        data = self._rest + chunk if self._rest else chunk
        if self._odd and not self._joining:
            self._rest = b""
            return self._pass_on(data)
        end = data.rfind(GAP) + len(GAP)
        if CRLF_GAP in data or (end < len(GAP) and len(data) > MAX_FRAME_BYTES):
            self._rest = b""
            return self._unexpected(data)
        if end < len(GAP):
            self._rest = data
            return b""
        self._rest = data[end:]
        whole = data[:end]
        frames = whole.split(GAP)[:-1]
        if self._joining:
            return b"".join(map(self._join, frames))
        for frame in frames:
            self._note(frame)
        return whole

    def at_end(self) -> bytes:
        if self._joining and not self.done:
            raise PeerError("the continuation ended early")
        if not self.done:
            raise PeerError("the stream ended early")
        rest, self._rest = self._rest, b""
        return b"" if self._joining else rest

    def _unexpected(self, data: bytes) -> bytes:
        if self._joining:
            raise Diverged("sent no frames that can be read")
        self._odd = "its frames cannot be read"
        return self._pass_on(data)

    def _pass_on(self, data: bytes) -> bytes:
        self.tail = (self.tail + data[-TAIL_BYTES:])[-TAIL_BYTES:]
        self.done = self.tail.rstrip().endswith(DONE)
        return data

    def _note(self, frame: bytes) -> None:
        """The client gets ``frame``."""
        if frame == DONE:
            self.done = True
        else:
            self._observe(frame)

    def _join(self, frame: bytes) -> bytes:
        """What the client gets for a frame of the continuation."""
        if frame == DONE:
            self._require_end()
            self.done = True
            return LAST
        joined = self._joined(load(frame))
        if not joined:
            return b""
        data = b"data: " + orjson.dumps(joined)
        self._note(data)
        return data + GAP

    def _start_joining(self) -> None:
        self._joining = True
        self._rest = b""

    def _require_no_half_stop(self, text: str) -> None:
        """The next instance looks for stop strings in its own text only."""
        for stop in self._stops:
            if any(text.endswith(stop[:length]) for length in range(1, len(stop) + 1)):
                raise OnlyAnew("it broke off in what may be a stop string")

    def _may_stop(self, text: str) -> bool:
        """Whether a stop string begins with ``text``."""
        return any(stop.startswith(text) for stop in self._stops)

    @abstractmethod
    def _observe(self, frame: bytes) -> None: ...

    @abstractmethod
    def _joined(self, value: dict[str, Any]) -> dict[str, Any] | None:
        """The client's frame, None while there is nothing new in it. Raises Diverged."""

    @abstractmethod
    def _require_end(self) -> None:
        """Raises Diverged where a continuation must not end yet."""


@dataclass(frozen=True, slots=True)
class _Seam:
    """What the client had ``seen`` of a ``/generate`` stream when it went on after ``base``."""

    base_ids: list[int]
    base_text: str
    seen: Cumulative


class GenerateStream(_Framed):
    """Cumulative frames: the last one says all. Parsed when needed only."""

    def __init__(self, stops: Sequence[str] = ()) -> None:
        super().__init__(stops)
        self._last = b""
        # (tokens, where the text ends in the frame) of the last two frames whose text had grown.
        self._growth: list[tuple[int, int]] = []
        # Where a text that has not grown ends; None before a frame that may not have.
        self._floor: int | None = len(_TEXT)
        self._seam: _Seam | None = None
        self._caught_up = True

    @property
    def finished(self) -> bool:
        return not self._odd and self._read_last().meta.get("finish_reason") is not None

    def _observe(self, frame: bytes) -> None:
        end = frame.find(_IDS)
        if not frame.startswith(_TEXT) or end < 0:
            self._odd = "a frame without text and output_ids"
            return
        start = end + len(_IDS)
        close = frame.find(b"]", start)
        tokens = frame.count(b",", start, close) + 1 if close > start else 0
        if self._floor is None:
            self._floor = end
        elif end > (self._growth[-1][1] if self._growth else self._floor):
            self._growth = [*self._growth[-1:], (tokens, end)]
        self._last = frame

    def _read_last(self) -> Cumulative:
        if not self._last:
            return Cumulative("", [], {})
        return cumulative(load(self._last))

    def so_far(self) -> Continuation:
        if self._odd:
            raise Unresumable(self._odd)
        last = self._read_last()
        if len(last.ids) < last.meta.get("completion_tokens", 0):
            raise Unresumable("its frames hold the new tokens only")
        self._require_no_half_stop(last.text)
        if len(self._growth) < 2:
            return Continuation("", ())
        tokens, end = self._growth[0]
        try:
            text = orjson.loads(b'"' + self._last[len(_TEXT) : end] + b'"')
        except orjson.JSONDecodeError as error:
            raise Unresumable("its text is not cumulative") from error
        return Continuation(text, tuple(last.ids[:tokens]))

    def conclude(self, prompt_tokens: int, tokens: int) -> bytes:
        raise Unresumable("its last frame says how it ended")

    def go_on(self, ids: Sequence[int]) -> None:
        text = self.so_far().text if ids else ""
        self._seam = _Seam(list(ids), text, self._read_last())
        self._caught_up = False
        self._start_joining()

    def _require_end(self) -> None:
        self._require(self._caught_up, "it ended before where the first one was")

    def _joined(self, value: dict[str, Any]) -> dict[str, Any] | None:
        assert self._seam is not None
        seam = self._seam
        new = cumulative(value)
        ids, text, seen = seam.base_ids + new.ids, seam.base_text + new.text, seam.seen
        shared = min(len(ids), len(seen.ids))
        prompt = new.meta.get("prompt_tokens", 0) - len(seam.base_ids)
        self._require(prompt == seen.meta.get("prompt_tokens", prompt), "another prompt")
        self._require(ids[:shared] == seen.ids[:shared], "other tokens")
        finished = new.meta.get("finish_reason") is not None
        # The engine takes back what it has shown of a stop string.
        cut = finished and seen.text.startswith(text) and self._may_stop(seen.text[len(text) :])
        if len(ids) < len(seen.ids) or (len(text) < len(seen.text) and not cut):
            self._require(not finished, "it ended before where the first one was")
            self._require(seen.text.startswith(text), "other text")
            return None
        self._require(cut or text.startswith(seen.text), "other text")
        meta = dict(new.meta)
        meta["completion_tokens"] = new.meta.get("completion_tokens", 0) + len(seam.base_ids)
        for name in ("id", "prompt_tokens", "cached_tokens", "cached_tokens_details"):
            if name in seen.meta:
                meta[name] = seen.meta[name]
        reason = meta.get("finish_reason")
        if isinstance(reason, dict) and type(reason.get("length")) is int:
            meta["finish_reason"] = {**reason, "length": reason["length"] + len(seam.base_ids)}
        if not self._caught_up:
            # From here on the places of growth are those in our own frames. Whether the text grew
            # just with this one is not known.
            self._caught_up = True
            self._growth, self._floor = [], None
        return {**value, "text": text, "output_ids": ids, "meta_info": meta}

    @staticmethod
    def _require(holds: bool, what: str) -> None:
        if not holds:
            raise Diverged(f"does not continue as it began: {what}")


class OpenAIStream(_Framed):
    """Frames of new text, of completions or a chat."""

    def __init__(self, stops: Sequence[str] = (), *, wants_usage: bool = False) -> None:
        super().__init__(stops)
        self._wants_usage = wants_usage
        self._parts: list[str] = []
        self._first: dict[str, Any] = {}
        # The last frame with text in it.
        self._like: dict[str, Any] = {}
        self._ended = False
        self._usage_seen = False
        self._skipped_tokens = 0
        # Text of a continuation that the client has already.
        self._repeated = ""

    @property
    def finished(self) -> bool:
        return not self._odd and self._ended and (self._usage_seen or not self._wants_usage)

    def _observe(self, frame: bytes) -> None:
        try:
            value = load(frame)
        except Diverged as error:
            self._odd = str(error)
            return
        said = said_in(value)
        if said is None:
            self._odd = "a frame without choices"
            return
        self._first = self._first or {k: value[k] for k in ("id", "created") if k in value}
        self._usage_seen = self._usage_seen or (not said and "usage" in value)
        if len(said) > 1:
            self._odd = "it holds more than one text"
        for one in said:
            if one.index or one.fields.get("tool_calls") or one.fields.get("reasoning_content"):
                self._odd = "it holds more than one text"
            self._parts.append(one.text)
            self._like = value
            self._ended = self._ended or one.finished

    def so_far(self) -> Continuation:
        if self._odd:
            raise Unresumable(self._odd)
        if self._ended:
            raise Unresumable("it had come to its end but for the usage")
        text = "".join(self._parts)
        self._parts = [text]
        self._require_no_half_stop(text)
        return Continuation(text, None if text else ())

    def conclude(self, prompt_tokens: int, tokens: int) -> bytes:
        (choice,) = self._like["choices"]
        nothing: dict[str, Any] = {"delta": {}} if "delta" in choice else {"text": ""}
        last = {**choice, **nothing, "finish_reason": "length"}
        frames: list[dict[str, Any]] = [{**self._like, "choices": [last]}]
        if self._wants_usage:
            usage = {"prompt_tokens": prompt_tokens, "completion_tokens": tokens}
            usage["total_tokens"] = prompt_tokens + tokens
            frames.append({**self._like, "choices": [], "usage": usage})
        return b"".join(b"data: " + orjson.dumps(frame) + GAP for frame in frames)

    def go_on(self, ids: Sequence[int]) -> None:
        self._skipped_tokens = len(ids)
        self._repeated = "" if ids else "".join(self._parts)
        self._start_joining()

    def _require_end(self) -> None:
        if not self._ended:
            raise Diverged("ended without a reason")

    def _joined(self, value: dict[str, Any]) -> dict[str, Any] | None:
        said = said_in(value)
        if said is None or len(said) > 1:
            raise Diverged(f"refused to continue: {str(value)[:200]}")
        if self._first and said and is_role_only(said[0]):
            return None
        has_had = self._repeated or self._ended
        if has_had and said and not self._leave_out(said[0]):
            return None
        usage = value.get("usage")
        if isinstance(usage, dict):
            count_in(usage, self._skipped_tokens)
        return {**value, **self._first}

    def _leave_out(self, said: Said) -> bool:
        """Take out of a frame what the client has; whether something is left. Raises Diverged."""
        known = min(len(said.text), len(self._repeated))
        if said.text[:known] != self._repeated[:known]:
            raise Diverged("does not continue as it began: other text")
        self._repeated = self._repeated[known:]
        if said.finished and self._repeated and not self._may_stop(self._repeated):
            raise Diverged("does not continue as it began: it ended before where the first one was")
        rest = said.fields[said.name] = said.text[known:]
        return not self._ended and (bool(rest) or said.finished)
