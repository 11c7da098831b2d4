"""Sees what each request did: a pass-through server between the clients and the router.

Clients stay what they are (the frontend language, the ``openai`` SDK); the recorder forwards their
requests byte for byte, and keeps response headers, the engine's own report (``meta_info`` or
``usage``), times, and how many bytes each instance fetched meanwhile. Requests pass one at a time,
so that what moved can be told apart; times start when a request is passed on.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import aiohttp
from aiohttp import web

from ..errors import MemServeError

_START_LIMIT_S = 20.0
_REQUEST_LIMIT_S = 300.0
_STATS_LIMIT_S = 10.0
# What NIXL has read for a rank: ``docs/mempool.md``.
_FETCHED = "transfer_fetched_bytes_total"
_SHOWN = ("/generate", "/v1/chat/completions", "/v1/completions")
_LABEL_CHARS = 34


@dataclass(frozen=True, slots=True)
class Observation:
    """One request. Tokens of the prompt: ``device_tokens`` and ``host_tokens`` came from HBM and
    DRAM of the instance that answered, ``reused_tokens`` no instance computed for this request
    (None: not said). ``fetched_bytes``: read over NIXL meanwhile, by instance name."""

    phase: str
    label: str
    status: int
    prefill: str | None
    decode: str | None
    reason: str
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    device_tokens: int
    host_tokens: int
    reused_tokens: int | None
    fetched_bytes: Mapping[str, int]
    ttft_s: float
    seconds: float
    input_ids: tuple[int, ...] = field(default=(), repr=False)
    output_ids: tuple[int, ...] = field(default=(), repr=False)

    @property
    def total_fetched_bytes(self) -> int:
        return sum(self.fetched_bytes.values())


@dataclass(frozen=True, slots=True)
class Report:
    """What the engine that answered says of itself."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    device_tokens: int = 0
    host_tokens: int = 0
    input_ids: tuple[int, ...] = ()
    output_ids: tuple[int, ...] = ()


def engine_report(body: bytes) -> Report:
    """From a whole answer or a whole stream of ``/generate`` or of the OpenAI routes."""
    merged: dict[str, Any] = {}
    for frame in _frames(body):
        for part in (frame.get("meta_info"), frame.get("usage"), frame.get("sglext")):
            if isinstance(part, dict):
                merged.update({key: value for key, value in part.items() if value is not None})
    in_prompt = merged.get("prompt_tokens_details") or {}
    tiers = merged.get("cached_tokens_details") or {}
    cached = int(merged.get("cached_tokens", in_prompt.get("cached_tokens", 0)))
    return Report(
        prompt_tokens=int(merged.get("prompt_tokens", 0)),
        completion_tokens=int(merged.get("completion_tokens", 0)),
        cached_tokens=cached,
        device_tokens=int(tiers.get("device") or 0),
        host_tokens=int(tiers.get("host") or 0) + int(tiers.get("storage") or 0),
        input_ids=_flat_ids(merged.get("input_ids")),
        output_ids=_flat_ids(merged.get("output_ids")),
    )


def _flat_ids(value: object) -> tuple[int, ...]:
    if not isinstance(value, list):
        return ()
    if value and isinstance(value[0], list):
        value = value[0]
    return tuple(int(token) for token in value)


def _frames(body: bytes) -> list[dict[str, Any]]:
    if body.lstrip().startswith(b"{"):
        return [json.loads(body)]
    frames = []
    for line in body.splitlines():
        if line.startswith(b"data: {"):
            frames.append(json.loads(line[len(b"data: ") :]))
    return frames


def label_of(path: str, body: Mapping[str, Any]) -> str:
    """A few words that tell a person which request this is."""
    if path == "/generate":
        params = body.get("sampling_params") or {}
        if params.get("max_new_tokens") == 0:
            return "announce the shared prefix"
        lines = [line for line in str(body.get("text", "")).splitlines() if "Question:" in line]
        text = lines[-1].replace("Question: ", "fork: ") if lines else "generate"
    else:
        asked = [message for message in body.get("messages", []) if message["role"] == "user"]
        text = f"turn {len(asked)}: {asked[-1]['content']}" if asked else path
    return text if len(text) <= _LABEL_CHARS else text[: _LABEL_CHARS - 3] + "..."


class Recorder:
    """Serves on ``url`` until it is released. ``names`` maps instance URLs to names; the instances
    in it are asked for their fetched bytes."""

    def __init__(
        self,
        target: str,
        names: Mapping[str, str],
        on_observation: Callable[[Observation], None] = lambda observation: None,
    ) -> None:
        self._target = target
        self._names = names
        self._on_observation = on_observation
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="recorder", daemon=True)
        self.observations: list[Observation] = []
        self.phase = ""
        self.url = ""

    def __enter__(self) -> Recorder:
        self._thread.start()
        self.url = self._call(self._start())
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._call(self._stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_START_LIMIT_S)
        self._loop.close()

    def _call(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(_START_LIMIT_S)

    async def _start(self) -> str:
        self._one_at_a_time = asyncio.Lock()
        self._session = aiohttp.ClientSession(
            timeout=aiohttp.ClientTimeout(total=_REQUEST_LIMIT_S), auto_decompress=False
        )
        app = web.Application(client_max_size=64 * 2**20)
        app.router.add_route("*", "/{path:.*}", self._handle)
        self._runner = web.AppRunner(app)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        host, port = self._runner.addresses[0][:2]
        return f"http://{host}:{port}"

    async def _stop(self) -> None:
        await self._runner.cleanup()
        await self._session.close()

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        if request.path not in _SHOWN:
            return await self._forward(request, body)
        async with self._one_at_a_time:
            before = await self._fetched()
            seen = _Seen()
            response = await self._forward(request, body, seen)
            after = await self._fetched()
        moved = {name: after[name] - before.get(name, 0) for name in after}
        self._keep(request.path, json.loads(body), seen, moved)
        return response

    async def _forward(
        self, request: web.Request, body: bytes, seen: _Seen | None = None
    ) -> web.StreamResponse:
        seen = seen or _Seen()
        seen.began = time.monotonic()
        skipped = ("host", "content-length", "connection", "accept-encoding")
        headers = {k: v for k, v in request.headers.items() if k.lower() not in skipped}
        async with self._session.request(
            request.method, self._target + request.path_qs, data=body or None, headers=headers
        ) as answer:
            kept = {
                k: v
                for k, v in answer.headers.items()
                if k.lower() not in ("transfer-encoding", "connection", "content-length")
            }
            response = web.StreamResponse(status=answer.status, headers=kept)
            await response.prepare(request)
            async for chunk in answer.content.iter_any():
                seen.first = seen.first or time.monotonic()
                seen.body += chunk
                await _write(response, chunk)
            seen.status = answer.status
            seen.headers = {name.lower(): value for name, value in answer.headers.items()}
        seen.ended = time.monotonic()
        return response

    async def _fetched(self) -> dict[str, int]:
        """Bytes read over NIXL so far, by instance."""
        total: dict[str, int] = {}
        limit = aiohttp.ClientTimeout(total=_STATS_LIMIT_S)
        for url, name in self._names.items():
            async with self._session.get(f"{url}/memserve/stats", timeout=limit) as answer:
                if answer.status != 200:
                    raise MemServeError(f"{url}/memserve/stats answers {answer.status}")
                ranks = (await answer.json())["ranks"]
            total[name] = int(sum(rank[_FETCHED] for rank in ranks))
        return total

    def _keep(self, path: str, asked: Any, seen: _Seen, moved: Mapping[str, int]) -> None:
        said = engine_report(bytes(seen.body))
        reused = seen.headers.get("x-memserve-cached-tokens")
        observation = Observation(
            phase=self.phase,
            label=label_of(path, asked),
            status=seen.status,
            prefill=self._name(seen.headers.get("x-memserve-prefill")),
            decode=self._name(seen.headers.get("x-memserve-decode")),
            reason=seen.headers.get("x-memserve-reason", ""),
            prompt_tokens=said.prompt_tokens,
            completion_tokens=said.completion_tokens,
            cached_tokens=said.cached_tokens,
            device_tokens=said.device_tokens,
            host_tokens=said.host_tokens,
            reused_tokens=int(reused) if reused is not None else None,
            fetched_bytes=dict(moved),
            ttft_s=(seen.first or seen.ended) - seen.began,
            seconds=seen.ended - seen.began,
            input_ids=said.input_ids,
            output_ids=said.output_ids,
        )
        self.observations.append(observation)
        self._on_observation(observation)

    def _name(self, url: str | None) -> str | None:
        return None if url is None else self._names.get(url, url)


async def _write(response: web.StreamResponse, chunk: bytes) -> None:
    try:
        await response.write(chunk)
    except ConnectionResetError:
        # Clients hang up at ``[DONE]``; the rest of the answer is still read, for the record.
        return


class _Seen:
    """What is known of a request while it passes."""

    def __init__(self) -> None:
        self.began = 0.0
        self.first = 0.0
        self.ended = 0.0
        self.status = 0
        self.body = bytearray()
        self.headers: dict[str, str] = {}
