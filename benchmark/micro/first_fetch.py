"""The first fetch from a peer: met at that moment, or a member that was connected before.

Two processes: a holder, and a reader that is started anew for every sample, so that each sample is
a first meeting. Both kinds take turns. ``met``: nothing was done before the fetch. ``member``: the
reader was told of the holder and waited until it was connected. ``again``: the second fetch of the
same process, which is what a first fetch can be at best.

    python benchmark/micro/first_fetch.py [--blocks 94] [--repeat 10] [--json FILE]
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from sglang_memserve.mempool import MemPool
from sglang_memserve.protocol.control import FetchRequest, PeerEntry, PeersReply, PeersRequest
from sglang_memserve.transfer.agent import RankAgent
from sglang_memserve.transfer.client import LocalClient
from sglang_memserve.transfer.nixl import NixlTransport
from sglang_memserve.transfer.port import FetchSettings
from sglang_memserve.types import Namespace, PageKey

from benchmark.harness import report, spread

# SmolLM2-135M in bf16: 368,640 bytes a page of 16 tokens.
NAMESPACE = Namespace("bench", "1", "bfloat16", 16, 30, 3, 64, 64, 0, 1)
DEADLINE_S = 60.0
WAYS = {"same machine": {"UCX_TLS": "all"}, "tcp": {"UCX_TLS": "tcp", "UCX_NET_DEVICES": "lo"}}


class Meeting(Enum):
    MET = "met"
    MEMBER = "member"


def keys_of(blocks: int) -> list[PageKey]:
    return [PageKey(index.to_bytes(32, "big")) for index in range(blocks)]


def make_agent(pool: MemPool, name: str, folder: str) -> RankAgent:
    return RankAgent(
        pool,
        NixlTransport(name),
        namespace=NAMESPACE,
        instance_id=f"http://{name}",
        generation=name,
        rank=0,
        host="127.0.0.1",
        local_path=Path(folder) / f"{name}.sock",
        settings=FetchSettings(grace_s=0.001),
    )


def hold(pipe: Connection, blocks: int, folder: str, name: str, way: dict[str, str]) -> None:
    os.environ.update(way)
    pool = MemPool(NAMESPACE, arena_bytes=blocks * NAMESPACE.block_bytes, generation=name)
    with pool.prepare_store(keys_of(blocks)) as store:
        for _, block in store.missing:
            ctypes.memset(pool.address(block), 1, pool.block_bytes)
        store.commit()
    with make_agent(pool, name, folder) as agent:
        pipe.send(agent.peer_address)
        pipe.poll(600)
    pool.close()


def meet(
    pipe: Connection,
    blocks: int,
    folder: str,
    names: tuple[str, str],
    address: str,
    meeting: Meeting,
    way: dict[str, str],
) -> None:
    """One sample, in a process of its own: (connecting, first fetch, second fetch), seconds."""
    os.environ.update(way)
    name, holder = names
    pool = MemPool(NAMESPACE, arena_bytes=blocks * NAMESPACE.block_bytes, generation=name)
    ctypes.memset(pool.arena_base, 0, pool.arena_bytes)
    with make_agent(pool, name, folder) as agent:
        connect_s = 0.0
        if meeting is Meeting.MEMBER:
            start = time.perf_counter()
            asyncio.run(be_connected(Path(folder) / f"{name}.sock", holder, address))
            connect_s = time.perf_counter() - start
        first_s = fetch(agent, pool, address, blocks)
        pool.clear()
        while pool.stats()["free_blocks"] < pool.total_blocks:
            time.sleep(0.01)
        pipe.send((connect_s, first_s, fetch(agent, pool, address, blocks)))
    pool.close()


async def be_connected(path: Path, holder: str, address: str) -> None:
    client = LocalClient(path)
    members = PeersRequest([PeerEntry(f"http://{holder}", holder, address)], 60.0)
    async with asyncio.timeout(DEADLINE_S):
        while (await client.call(members, DEADLINE_S)) != PeersReply(1, 1):  # noqa: ASYNC110 - asked
            await asyncio.sleep(0.002)
    client.close()


def fetch(agent: RankAgent, pool: MemPool, address: str, blocks: int) -> float:
    request = FetchRequest.of("holder", address, list(keys_of(blocks)), 0.0, DEADLINE_S)
    start = time.perf_counter()
    reply = agent.fetch(request).result(DEADLINE_S)
    seconds = time.perf_counter() - start
    assert reply.outcome == "complete" and reply.fetched_pages == blocks, reply
    return seconds


@contextmanager
def process(target: Any, *args: Any) -> Iterator[Connection]:
    """A spawned process with a pipe, ended when the block is left."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    child = context.Process(target=target, args=(theirs, *args))
    child.start()
    theirs.close()
    try:
        yield ours
    finally:
        ours.close()
        child.join(30)
        if child.is_alive():
            child.kill()
            child.join(10)


def measure(way: dict[str, str], blocks: int, repeat: int, folder: str) -> dict[str, Any]:
    samples: dict[Meeting, list[tuple[float, float, float]]] = {kind: [] for kind in Meeting}
    token = os.urandom(4).hex()
    holder = f"holder-{token}"
    with process(hold, blocks, folder, holder, way) as holding:
        assert holding.poll(DEADLINE_S), "the holder did not start"
        address = holding.recv()
        for index in range(2 * repeat):
            kind = list(Meeting)[index % 2]
            names = (f"reader-{token}-{index}", holder)
            with process(meet, blocks, folder, names, address, kind, way) as reading:
                assert reading.poll(DEADLINE_S), "the reader did not answer"
                samples[kind].append(reading.recv())
    return summary(samples)


def summary(samples: dict[Meeting, list[tuple[float, float, float]]]) -> dict[str, Any]:
    met, member = samples[Meeting.MET], samples[Meeting.MEMBER]
    again = [sample[2] for sample in met + member]
    extra = {
        "met": statistics.median(s[1] - s[2] for s in met),
        "member": statistics.median(s[1] - s[2] for s in member),
    }
    return {
        "first_fetch_met_ms": _ms(sample[1] for sample in met),
        "first_fetch_member_ms": _ms(sample[1] for sample in member),
        "fetch_again_ms": _ms(again),
        "connecting_in_the_background_ms": _ms(sample[0] for sample in member),
        "extra_of_the_first_fetch_ms": {k: round(1e3 * v, 2) for k, v in extra.items()},
        "member_over_met": round(
            statistics.median(s[1] for s in member) / statistics.median(s[1] for s in met), 3
        ),
    }


def _ms(seconds: Any) -> dict[str, float]:
    values: Sequence[float] = [1e3 * value for value in seconds]
    return spread(values, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=94)
    parser.add_argument("--repeat", type=int, default=10)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="ms-") as folder:
        results = {
            name: measure(way, options.blocks, options.repeat, folder) for name, way in WAYS.items()
        }
    sizes = {"blocks": options.blocks, "block_bytes": NAMESPACE.block_bytes}
    report("first fetch from a peer", sizes | results, started, options.json)


if __name__ == "__main__":
    main()
