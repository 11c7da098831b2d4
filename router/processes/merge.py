"""What one of several router processes says, put together with what the others say. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import orjson

# How bad a process takes the state of an instance's event stream to be.
_SOURCE_ORDER = ("exact", "syncing", "degraded", "stale")
_COUNTED_KINDS = frozenset({"counter", "histogram", "summary"})
_OWN_GAUGES = frozenset({"memserve_requests_in_flight"})
# Instances' own counters: every process shows the same.
_TOLD = frozenset({"memserve_evicted_blocks_total"})
_OWN = "memserve_"


def heartbeats(own: bytes, others: Sequence[bytes]) -> bytes:
    """``HeartbeatReply``: an instance that one of us does not know has to register with all."""
    reply = orjson.loads(own)
    reply["known"] = all(orjson.loads(one).get("known") for one in (own, *others))
    return orjson.dumps(reply)


def workers(own: bytes, others: Sequence[bytes]) -> bytes:
    """``GET /workers``: requests in flight are added up; of a source the worst word counts."""
    body: dict[str, Any] = orjson.loads(own)
    theirs = [_by_url(orjson.loads(one)) for one in others]
    for worker in body["workers"]:
        same = [found[worker["url"]] for found in theirs if worker["url"] in found]
        for name in ("in_flight_requests", "in_flight_prefill_tokens"):
            if name in worker:
                worker[name] += sum(one.get(name, 0) for one in same)
        if "source" in worker:
            states = [worker["source"], *(one.get("source") for one in same)]
            worker["source"] = max(states, key=_badness)
    body["processes"] = 1 + len(others)
    return orjson.dumps(body)


def metrics(own: int, texts: Mapping[int, bytes]) -> bytes:
    """The Prometheus text of all processes, by index; ``own`` is that of the one asked.

    What a process counts of its own work is there once a process, with a label ``process``: sums
    would fall when a process starts again, which Prometheus takes for a reset of the whole. What
    describes instances is the same everywhere, so ours stands for all.
    """
    families = {index: dict(_families(text.decode())) for index, text in texts.items()}
    lines: list[str] = []
    named = dict.fromkeys(name for index in sorted(families) for name in families[index])
    for name in named:
        holders = [index for index in sorted(families) if name in families[index]]
        first = families[own].get(name) or families[holders[0]][name]
        if not _is_own_work(name, first):
            lines += families[own].get(name, [])
            continue
        lines += [line for line in first if line.startswith("#")]
        for index in holders:
            samples = (line for line in families[index][name] if not line.startswith("#"))
            lines += [_labelled(line, index) for line in samples]
    return ("\n".join(lines) + "\n").encode()


def _by_url(body: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {worker["url"]: worker for worker in body.get("workers", ())}


def _badness(state: str | None) -> int:
    return _SOURCE_ORDER.index(state) if state in _SOURCE_ORDER else -1


def _families(text: str) -> Iterator[tuple[str, list[str]]]:
    """Name and lines of each, comments first, as ``prometheus_client`` writes them."""
    name, lines = "", list[str]()
    for line in text.splitlines():
        if line.startswith("# HELP "):
            if lines:
                yield name, lines
            name, lines = line.split(" ", 3)[2], []
        if line:
            lines.append(line)
    if lines:
        yield name, lines


def _is_own_work(name: str, lines: Sequence[str]) -> bool:
    if not name.startswith(_OWN) or name in _TOLD:
        return False
    kind = next((line.split(" ")[3] for line in lines if line.startswith("# TYPE ")), "")
    return kind in _COUNTED_KINDS or name in _OWN_GAUGES or name.endswith("_created")


def _labelled(sample: str, process: int) -> str:
    label = f'process="{process}"'
    # A label's value may contain any character, a metric's name neither brace nor space.
    at = min((found for found in (sample.find("{"), sample.find(" ")) if found >= 0), default=0)
    if sample[at] == "{":
        return f"{sample[: at + 1]}{label},{sample[at + 1 :]}"
    return f"{sample[:at]}{{{label}}}{sample[at:]}"
