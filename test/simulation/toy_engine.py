"""A toy engine's answers in SGLang's own shapes: deterministic, so that any two of them agree.

One token a character. The next token is a function of all before it, as in greedy decoding; only
prompts with a "z" in them come to an end of their own.
``Toy.stream`` gives whole event streams of ``/generate``, completions and chats; what goes wrong
on the way is up to the caller.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import orjson

LETTERS = "abcdefghijklmnop <"
# Its bytes are three tokens: the text lags behind the ids, as in real engines.
WIDE = "\u4f60"
EOS = 2
_SPLIT = (1001, 1002, 1003)
_ids = itertools.count()


def encode(text: str) -> list[int]:
    ids: list[int] = []
    for character in text:
        ids += _SPLIT if character == WIDE else [ord(character)]
    return ids


def decode(ids: Sequence[int]) -> str:
    """What is complete of the text."""
    parts = []
    rest = list(ids)
    while rest:
        if rest[0] == _SPLIT[0]:
            if len(rest) < len(_SPLIT):
                break
            parts.append(WIDE)
            rest = rest[len(_SPLIT) :]
        else:
            parts.append(chr(rest.pop(0)))
    return "".join(parts)


def next_token(ids: Sequence[int]) -> int:
    if ids and ids[-1] in _SPLIT[:2]:
        return ids[-1] + 1
    digest = hashlib.sha256(repr(list(ids)).encode()).digest()
    if digest[0] < 12:
        return _SPLIT[0]
    if digest[0] > 252 and ord("z") in ids:
        return EOS
    return ord(LETTERS[digest[1] % len(LETTERS)])


def chat_prompt(messages: Sequence[Mapping[str, Any]]) -> list[int]:
    return encode("".join(f"[{m['role']}]{m['content']}" for m in messages) + "[assistant]")


def prompt_of(path: str, body: Mapping[str, Any]) -> list[int]:
    """The token ids of a request's prompt."""
    if path == "/v1/chat/completions" and body.get("input_ids") is None:
        return chat_prompt(body["messages"])
    given = body.get("prompt" if path == "/v1/completions" else "input_ids", body.get("text"))
    return encode(given) if isinstance(given, str) else list(given)


class Answer:
    """One request's generation: tokens, text, and why it ended."""

    def __init__(self, path: str, body: Mapping[str, Any]) -> None:
        params = body.get("sampling_params") or {} if path == "/generate" else body
        limit = params.get("max_new_tokens", params.get("max_completion_tokens"))
        self.limit = 128 if path == "/generate" else 16
        self.limit = params.get("max_tokens", self.limit) if limit is None else limit
        self.stop = params.get("stop")
        self.prompt = prompt_of(path, body)
        self.ids: list[int] = []
        self.finish: dict[str, Any] | None = None

    def steps(self) -> Iterator[str]:
        """The whole text after each token."""
        while self.finish is None and len(self.ids) < self.limit:
            token = next_token(self.prompt + self.ids)
            self.ids.append(token)
            text = decode(self.ids[:-1] if token == EOS else self.ids)
            if token == EOS:
                self.finish = {"type": "stop", "matched": EOS}
            elif self.stop and self.stop in text:
                self.finish = {"type": "stop", "matched": self.stop}
                text = text[: text.index(self.stop)]
            elif len(self.ids) >= self.limit:
                self.finish = {"type": "length", "length": self.limit}
            yield text


def parts(path: str, body: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """A batch of token ids as the requests it is made of."""
    ids = body.get("input_ids") if path == "/generate" else None
    if not ids or not isinstance(ids[0], list):
        return [body]
    return [{**body, "input_ids": one} for one in ids]


def whole(path: str, body: Mapping[str, Any]) -> Any:
    """The answer of a request that is not streamed."""
    several = parts(path, body)
    if path == "/generate" and several[0] is not body:
        return [whole(path, one) for one in several]
    answer = Answer(path, body)
    text = ["", *answer.steps()][-1]
    if path == "/generate":
        return _generate(answer, text, answer.finish or {"type": "length", "length": 0}, "0")
    reason = (answer.finish or {})["type"]
    said = {"message": {"role": "assistant", "content": text}}
    choice = {"index": 0, "finish_reason": reason, **(said if "chat" in path else {"text": text})}
    return {"id": "0", "choices": [choice], "usage": _usage(answer)}


def scores(body: Mapping[str, Any]) -> dict[str, Any]:
    """What ``/generate`` without new tokens says of its prompt's tokens."""
    ids = list(body["input_ids"])
    start = body["logprob_start_len"]
    given: list[list[Any]] = [[None, ids[start], None]]
    best: list[Any] = [None]
    for position in range(start + 1, len(ids)):
        top = next_token(ids[:position])
        given.append([-0.1 if top == ids[position] else -9.0, ids[position], None])
        best.append([[-0.1, top, None]])
    meta = {"input_token_logprobs": given, "input_top_logprobs": best, "cached_tokens": 0}
    meta |= {"finish_reason": {"type": "length", "length": 0}, "prompt_tokens": len(ids)}
    return {"text": "", "output_ids": [], "meta_info": meta}


def stream(path: str, body: Mapping[str, Any]) -> Iterator[bytes]:
    """The frames, ``[DONE]`` included."""
    name = f"toy-{next(_ids)}"
    answer = Answer(path, body)
    frames = {"/generate": _generate_frames, "/v1/completions": _completion_frames}
    for value in frames.get(path, _chat_frames)(answer, body, name):
        yield b"data: " + orjson.dumps(value) + b"\n\n"
    yield b"data: [DONE]\n\n"


def _generate(
    answer: Answer, text: str, finish: Mapping[str, Any] | None, name: str
) -> dict[str, Any]:
    meta = {
        "id": name,
        "finish_reason": finish,
        "prompt_tokens": len(answer.prompt),
        "completion_tokens": len(answer.ids),
        "cached_tokens": 0,
    }
    return {"text": text, "output_ids": list(answer.ids), "meta_info": meta}


def _generate_frames(
    answer: Answer, body: Mapping[str, Any], name: str
) -> Iterator[dict[str, Any]]:
    for text in answer.steps():
        yield _generate(answer, text, answer.finish, name)


def _usage(answer: Answer) -> dict[str, int]:
    prompt, new = len(answer.prompt), len(answer.ids)
    return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}


def _chunk(name: str, body: Mapping[str, Any], choices: list[Any]) -> dict[str, Any]:
    return {"id": name, "created": 7, "model": body.get("model"), "choices": choices}


def _last(answer: Answer, body: Mapping[str, Any], name: str) -> Iterator[dict[str, Any]]:
    if (body.get("stream_options") or {}).get("include_usage"):
        yield {**_chunk(name, body, []), "usage": _usage(answer)}


def _completion_frames(
    answer: Answer, body: Mapping[str, Any], name: str
) -> Iterator[dict[str, Any]]:
    sent = 0
    for text in answer.steps():
        reason = answer.finish["type"] if answer.finish else None
        choice = {"index": 0, "text": text[sent:], "logprobs": None, "finish_reason": reason}
        sent = len(text)
        yield _chunk(name, body, [choice])
    yield from _last(answer, body, name)


def _chat_frames(answer: Answer, body: Mapping[str, Any], name: str) -> Iterator[dict[str, Any]]:
    def said(delta: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
        return _chunk(name, body, [{"index": 0, "delta": delta, "finish_reason": reason}])

    sent = 0
    for text in answer.steps():
        if len(answer.ids) == 1:
            yield said({"role": "assistant", "content": ""})
        if len(text) > sent:
            yield said({"content": text[sent:]})
        sent = max(sent, len(text))
    yield said({}, answer.finish["type"] if answer.finish else "length")
    yield from _last(answer, body, name)
