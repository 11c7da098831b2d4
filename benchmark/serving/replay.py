"""The client: sends a workload's requests and times the answers.

A request is sent when its time has come and the answer it comes after is there, whichever is later,
so a slow server gets the next turn later, as from a person. Times count from the sending. Answers
are streamed; the first token is the first piece with text in it.

Prompts carry the answers that this server gave, so what it generated can be reused. Answers have a
fixed number of tokens (``min_tokens`` forbids the end-of-text token); their words, and so the next
prompts, may differ between engines in the last bits of arithmetic, their lengths hardly.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from benchmark.workloads.request import Message, Turn, Workload

from .setups import Salt

REQUEST_LIMIT_S = 300.0


@dataclass(frozen=True, slots=True)
class Target:
    """Where to send to. ``salt``: see ``setups.Salt``."""

    url: str
    model: str
    salt: Salt = Salt.NONE


@dataclass(slots=True)
class Sample:
    """One request. Seconds from the start of the replay; ``first_s`` and ``done_s`` are 0 and
    ``error`` says why when no whole answer came."""

    conversation: str
    turn: int
    sent_s: float = 0.0
    first_s: float = 0.0
    done_s: float = 0.0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    error: str = ""
    prompt: list[Message] = field(default_factory=list)
    answer: str = ""

    @property
    def ttft_s(self) -> float:
        return self.first_s - self.sent_s

    @property
    def jct_s(self) -> float:
        return self.done_s - self.sent_s

    @property
    def tpot_s(self) -> float:
        return (self.done_s - self.first_s) / max(self.generated_tokens - 1, 1)


@dataclass(slots=True)
class _Told:
    """What has been said up to and with a turn's answer."""

    messages: list[Message] = field(default_factory=list)
    sample: Sample | None = None


async def replay(target: Target, workload: Workload, rate: float, limit_s: float) -> list[Sample]:
    """One sample a turn, in the workload's order. ``rate``: 2 sends twice as fast. After
    ``limit_s`` seconds whatever still runs is given up."""
    timeout = aiohttp.ClientTimeout(total=REQUEST_LIMIT_S)
    # No bound on connections: a request that waits here would not be seen to wait.
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
        client = _Client(session, target, rate)
        tasks: dict[tuple[str, int], asyncio.Task[_Told]] = {}
        for turn in workload.turns:
            before = None if turn.after is None else tasks[turn.conversation, turn.after]
            task = asyncio.create_task(client.take_turn(turn, before))
            tasks[turn.conversation, turn.turn] = task
        done, late = await asyncio.wait(tasks.values(), timeout=limit_s)
        for task in late:
            task.cancel()
        await asyncio.gather(*late, return_exceptions=True)
        samples = []
        for (conversation, number), task in tasks.items():
            sample = task.result().sample if task in done else None
            samples.append(sample or Sample(conversation, number, error="not answered in time"))
        return samples


class _Client:
    def __init__(self, session: aiohttp.ClientSession, target: Target, rate: float) -> None:
        self._session = session
        self._target = target
        self._rate = rate
        self._started_s = time.perf_counter()

    def _now_s(self) -> float:
        return time.perf_counter() - self._started_s

    async def take_turn(self, turn: Turn, before: asyncio.Task[_Told] | None) -> _Told:
        sample = Sample(turn.conversation, turn.turn)
        told = _Told(sample=sample)
        if before is not None:
            # Cancelling this turn must not cancel the one it waits for.
            earlier = await asyncio.shield(before)
            told.messages += earlier.messages
            if earlier.sample is not None and earlier.sample.error:
                sample.error = "the turn before failed"
                return told
        told.messages += turn.messages
        sample.prompt = list(told.messages)
        # More than once: uvloop's timers count whole milliseconds and may end one early.
        while (left_s := turn.arrival_s / self._rate - self._now_s()) > 0:  # noqa: ASYNC110
            await asyncio.sleep(left_s)
        try:
            answer = await self._ask(turn, told.messages, sample)
        except (TimeoutError, aiohttp.ClientError, _BadAnswer) as error:
            sample.error = f"{type(error).__name__}: {error}"[:200]
            return told
        sample.answer = answer
        told.messages.append(Message("assistant", answer))
        return told

    async def _ask(self, turn: Turn, messages: list[Message], sample: Sample) -> str:
        body = self._body(turn, messages)
        sample.sent_s = self._now_s()
        pieces: list[str] = []
        url = f"{self._target.url}/v1/chat/completions"
        async with self._session.post(url, json=body) as response:
            if response.status != 200:
                text = await response.text()
                raise _BadAnswer(f"{response.status}: {text[:120]}")
            async for frame in _frames(response):
                piece = _text(frame)
                if piece and not pieces:
                    sample.first_s = self._now_s()
                if piece:
                    pieces.append(piece)
                    sample.done_s = self._now_s()
                _count(frame, sample)
        if not pieces:
            raise _BadAnswer("an answer without text")
        return "".join(pieces)

    def _body(self, turn: Turn, messages: list[Message]) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self._target.model,
            "messages": [{"role": m.role, "content": m.content} for m in messages],
            "max_tokens": turn.max_tokens,
            "min_tokens": turn.max_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            "session_id": turn.session,
        }
        if self._target.salt is Salt.EACH_REQUEST:
            body["cache_salt"] = f"{turn.conversation}/{turn.turn}/{time.time_ns()}"
        return body


class _BadAnswer(Exception):
    """An answer that is no answer to a chat request."""


async def _frames(response: aiohttp.ClientResponse) -> AsyncIterator[dict[str, Any]]:
    async for line in response.content:
        if not line.startswith(b"data:"):
            continue
        data = line.removeprefix(b"data:").strip()
        if data == b"[DONE]":
            return
        try:
            frame = json.loads(data)
        except ValueError as error:
            raise _BadAnswer(f"a frame that is no JSON: {data[:60]!r}") from error
        if "error" in frame:
            raise _BadAnswer(str(frame["error"])[:120])
        yield frame
    raise _BadAnswer("the stream ended early")


def _text(frame: dict[str, Any]) -> str:
    choices = frame.get("choices") or [{}]
    return (choices[0].get("delta") or {}).get("content") or ""


def _count(frame: dict[str, Any], sample: Sample) -> None:
    usage = frame.get("usage")
    if not usage:
        return
    details = usage.get("prompt_tokens_details") or {}
    sample.prompt_tokens = usage.get("prompt_tokens", 0)
    sample.generated_tokens = usage.get("completion_tokens", 0)
    sample.cached_tokens = details.get("cached_tokens") or 0
