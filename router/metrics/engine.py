"""``/engine_metrics``: every instance's own ``/metrics`` as one page, each sample with its
``instance``. Nobody waits for an instance longer than ``ASK_S``; askers at the same time share one
round; what one instance may say is bounded.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterable, Mapping

from sglang_memserve.errors import PeerError
from sglang_memserve.types import InstanceId
from starlette.requests import Request
from starlette.responses import Response

from ..http.proxy import Upstream
from ..members.instances import Instances
from ..members.member import State
from .registry import CONTENT_TYPE

ASK_S = 3.0
MAX_BYTES = 4 * 2**20
MAX_SAMPLES = 20_000
AT_ONCE = 16

_SAMPLE = re.compile(r"([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{(.*)\})?[ \t]+(\S+)(?:[ \t]+(-?\d+))?\s*")
_COMMENT = re.compile(r"# (HELP|TYPE) ([a-zA-Z_:][a-zA-Z0-9_:]*)(?: (.*))?")
_OWN_LABEL = re.compile(r"(^|,)instance=")
_SUFFIXES = ("_bucket", "_sum", "_count", "_total", "_created", "_info")


def merged(texts: Mapping[InstanceId, str | None]) -> str:
    """One exposition of many. A sample's own ``instance`` becomes ``exported_instance``; lines
    that are no samples are left out. None: that instance did not answer."""
    comments: dict[str, dict[str, str]] = {}
    samples: dict[str, list[str]] = {}
    up = ["# HELP memserve_engine_up 1 where an instance's metrics are in this answer"]
    up.append("# TYPE memserve_engine_up gauge")
    for instance, text in texts.items():
        label = f'instance="{_escaped(instance)}"'
        up.append(f"memserve_engine_up{{{label}}} {int(text is not None)}")
        for family, line in _lines(text or "", label, comments):
            samples.setdefault(family, []).append(line)
    for family, lines in samples.items():
        up += [f"# {kind} {family} {text}" for kind, text in comments.get(family, {}).items()]
        up += lines
    return "\n".join([*up, ""])


def _lines(text: str, label: str, comments: dict[str, dict[str, str]]) -> Iterable[tuple[str, str]]:
    count = 0
    for line in text.splitlines():
        if comment := _COMMENT.fullmatch(line):
            kind, family, words = comment.groups()
            comments.setdefault(family, {}).setdefault(kind, words or "")
            continue
        sample = _SAMPLE.fullmatch(line)
        if sample is None or not _is_number(sample[3]):
            continue
        count += 1
        if count > MAX_SAMPLES:
            return
        name, labels, value, stamp = sample.groups()
        labels = _OWN_LABEL.sub(r"\1exported_instance=", labels or "").strip(", ")
        joined = f"{label},{labels}" if labels else label
        yield (
            _family(name, comments),
            f"{name}{{{joined}}} {value}{f' {stamp}' if stamp else ''}",
        )


def _family(name: str, comments: Mapping[str, object]) -> str:
    """The family a sample belongs to: a page must keep each together."""
    if name in comments:
        return name
    for suffix in _SUFFIXES:
        if name.endswith(suffix) and name.removesuffix(suffix) in comments:
            return name.removesuffix(suffix)
    return name


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


class EngineMetrics:
    """The handler; ``app`` gives it its path."""

    def __init__(self, instances: Instances, upstream: Upstream) -> None:
        self._instances = instances
        self._upstream = upstream
        self._round: asyncio.Task[str] | None = None

    async def handle(self, _: Request) -> Response:
        if self._round is None or self._round.done():
            self._round = asyncio.create_task(self._ask_all(), name="engine metrics")
        text = await asyncio.shield(self._round)
        return Response(text, media_type=CONTENT_TYPE.decode())

    async def close(self) -> None:
        if self._round is not None:
            self._round.cancel()
            await asyncio.gather(self._round, return_exceptions=True)

    async def _ask_all(self) -> str:
        slots = asyncio.Semaphore(AT_ONCE)
        urls = [m.id for m in self._instances.members() if m.state is not State.STARTING]

        async def ask(url: InstanceId) -> str | None:
            async with slots:
                return await self._ask(url)

        return merged(dict(zip(urls, await asyncio.gather(*map(ask, urls)), strict=True)))

    async def _ask(self, url: InstanceId) -> str | None:
        try:
            async with self._upstream.exchange(
                "GET", f"{url}/metrics", deadline_s=ASK_S
            ) as response:
                data = bytearray()
                async for part in response.content.iter_any():
                    data += part
                    if len(data) > MAX_BYTES:
                        return None
                return data.decode("utf-8", "replace") if response.status == 200 else None
        except PeerError:
            return None
