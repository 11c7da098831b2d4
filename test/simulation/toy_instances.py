"""Instances over the toy engine that really listen: they register, publish what they hold, and can
be killed, frozen and started again."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import msgspec
from sglang_memserve.cluster.machine import free_ports
from sglang_memserve.hashing import namespace_seed, page_keys, short_key
from sglang_memserve.protocol.events import BlockStored, Snapshot
from sglang_memserve.protocol.http import (
    Heartbeat,
    HeartbeatReply,
    InstanceInfo,
    Load,
    Registration,
)
from sglang_memserve.types import Role
from simulation import toy_engine as toy
from simulation.router_machines import PAGE, Asked, Line, Machine

HEARTBEAT_S = 0.1
MAX_PROMPTS = 200
GENERATING = ("/generate", "/v1/completions", "/v1/chat/completions")


@dataclass
class ToyInstance(Machine):
    """``step_s``: seconds a token. ``dies_after``: frames of a stream after which the connection
    is cut, once for each number. ``lies``: it computes other tokens than the others do.
    ``wont_tokenize``: so many times."""

    role: Role = Role.BOTH
    step_s: float = 0.0
    dies_after: list[int] = field(default_factory=list)
    stalls_after: list[int] = field(default_factory=list)
    lies: bool = False
    wont_tokenize: int = 0
    boot: int = 0
    deterministic: bool = False
    _thawed: asyncio.Event = field(default_factory=asyncio.Event)
    _held: list[list[int]] = field(default_factory=list)
    _seq: int = -1
    _beats: list[asyncio.Task[None]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.inference = self._infer
        self._thawed.set()

    # -- living and dying --

    async def start(self) -> None:
        # It comes back at its port, which no connection may have taken meanwhile.
        port = int(self.url.rsplit(":", 1)[1]) if self.url else free_ports(1, taken=set())[0]
        self.boot += 1
        self._held, self._seq = [], -1
        self._thawed.set()
        await self.listen(port)

    async def kill(self) -> None:
        """All connections are reset, nothing answers, nothing is said."""
        await self._silence()
        self._thawed.set()
        await self.stop()

    def freeze(self) -> None:
        """As SIGSTOP: connections stay and nothing moves."""
        self._thawed.clear()

    def thaw(self) -> None:
        self._thawed.set()

    @property
    def frozen(self) -> bool:
        return not self._thawed.is_set()

    def register_with(self, *routers: str) -> None:
        self._beats = [asyncio.create_task(self._keep_registered(router)) for router in routers]

    async def _silence(self) -> None:
        for task in self._beats:
            task.cancel()
        ended = await asyncio.gather(*self._beats, return_exceptions=True)
        self._beats = []
        for error in ended:
            # Heartbeats end when they are cancelled, and never by themselves.
            if not isinstance(error, asyncio.CancelledError):
                raise AssertionError(f"{self.url} ceased to register") from error

    async def _keep_registered(self, router: str) -> None:
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=2)) as http:
            while True:
                await self._thawed.wait()
                with contextlib.suppress(aiohttp.ClientError, TimeoutError):
                    await self._say(http, router)
                await asyncio.sleep(HEARTBEAT_S)

    async def _say(self, http: aiohttp.ClientSession, router: str) -> None:
        info = self.info()
        load = Load(len(self._lines), 0, 0, 100_000)
        beat = Heartbeat(self.url, info.generation, info.role, load, self._seq)
        async with http.post(
            f"{router}/memserve/heartbeat", data=msgspec.json.encode(beat)
        ) as answer:
            known = (
                answer.status == 200
                and msgspec.json.decode(await answer.read(), type=HeartbeatReply).known
            )
        if not known:
            data = msgspec.json.encode(Registration(info))
            async with http.post(f"{router}/memserve/register", data=data) as answer:
                await answer.read()

    # -- what it is and holds --

    def info(self) -> InstanceInfo:
        return msgspec.structs.replace(super().info(), generation=f"{self.url}#{self.boot}")

    def stats(self) -> object:
        return {"event_seq": self._seq, "instance": {}, "ranks": [{}]}

    def held_keys(self) -> set[int]:
        """Short keys of all pages it holds."""
        held: set[int] = set()
        for ids in self._held:
            held.update(short_key(key) for key in page_keys(ids, PAGE, namespace_seed(None, None)))
        return held

    def _snapshot(self) -> Snapshot:
        events = []
        for ids in self._held:
            keys = [short_key(key) for key in page_keys(ids, PAGE, namespace_seed(None, None))]
            events.append(BlockStored(list(keys), None, [], PAGE, medium="CPU_PINNED"))
        return Snapshot(self.info().generation, self._seq, list(events))

    def hold(self, ids: list[int]) -> None:
        if len(ids) < PAGE:
            return
        self._held.append(ids[: len(ids) // PAGE * PAGE])
        del self._held[:-MAX_PROMPTS]
        self._seq += 1

    # -- answering --

    async def _route(self, asked: Asked, line: Line) -> None:
        await self._thawed.wait()
        path = asked.path.split("?")[0]
        if path == "/tokenize" and self.wont_tokenize:
            self.wont_tokenize -= 1
            line.cut()
        elif path == "/tokenize":
            await line.answer({"tokens": self._tokenize(asked.json)})
        elif path == "/server_info":
            await line.answer({"enable_deterministic_inference": self.deterministic})
        else:
            await super()._route(asked, line)

    def _tokenize(self, body: dict[str, Any]) -> list[int]:
        if "messages" in body:
            return toy.chat_prompt(body["messages"])
        return toy.encode(body["prompt"])

    async def _infer(self, asked: Asked, line: Line) -> None:
        path, body = asked.path, asked.json
        if path not in GENERATING:
            await line.answer({})
        elif body.get("return_logprob"):
            await line.answer(toy.scores(body))
        elif body.get("stream"):
            await self._stream(path, body, line)
        else:
            await self._whole(path, body, line)

    async def _whole(self, path: str, body: dict[str, Any], line: Line) -> None:
        answer = toy.whole(path, body)
        for part in toy.parts(path, body):
            tokens = toy.whole(path, part).get("output_ids", [])
            await self._compute(len(tokens))
            self.hold(toy.prompt_of(path, part) + tokens)
        await line.answer(answer)

    async def _compute(self, tokens: int) -> None:
        if self.step_s:
            await asyncio.sleep(self.step_s * tokens)
        await self._thawed.wait()

    async def _stream(self, path: str, body: dict[str, Any], line: Line) -> None:
        dies = self.dies_after.pop(0) if self.dies_after else -1
        stalls = self.stalls_after.pop(0) if self.stalls_after else -1
        await line.start_stream()
        for count, frame in enumerate(self._frames(path, body)):
            if count == dies:
                # What was sent must arrive before the reset, or the test knows nothing.
                await asyncio.sleep(0.05)
                line.cut()
                return
            if count == stalls:
                await line.until_closed()
                return
            await self._compute(1)
            await line.chunk(frame)
        await line.end_stream()
        self.hold(toy.prompt_of(path, body))

    def _frames(self, path: str, body: dict[str, Any]) -> Iterator[bytes]:
        if self.lies:
            name = "prompt" if path == "/v1/completions" else "input_ids"
            body = {**body, name: [*toy.prompt_of(path, body), ord("z")]}
        return toy.stream(path, body)
