"""Fetching blocks through two RankAgents, against one raw NIXL READ of the same bytes.

Two processes: a holder with a MemPool and an agent, and this one with another. Both ways read the
same blocks of the holder's arena; they take turns, so that noise hits both. A fetch is everything
from the request to published pages: control messages, blocks, read, release, index. Raw is one
descriptor list of whole blocks on an agent of its own, created, posted and awaited.

    python benchmark/micro/transfer.py [--blocks 100 1000] [--repeat 15] [--json FILE]
"""

from __future__ import annotations

import argparse
import ctypes
import json
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from sglang_memserve.mempool import MemPool
from sglang_memserve.protocol.control import FetchRequest
from sglang_memserve.transfer.agent import RankAgent
from sglang_memserve.transfer.base import ReadState
from sglang_memserve.transfer.nixl import NixlTransport, RawNixl
from sglang_memserve.transfer.plan import Segment
from sglang_memserve.transfer.port import FetchSettings
from sglang_memserve.types import Namespace, PageKey

# SmolLM2-135M in bf16: 368,640 bytes a page of 16 tokens.
NAMESPACE = Namespace("bench", "1", "bfloat16", 16, 30, 3, 64, 64, 0, 1)
DEADLINE_S = 60.0


def make_agent(pool: MemPool, name: str, folder: str) -> RankAgent:
    # Pages are dropped between repetitions: pins that outlive a fetch would keep their blocks.
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


def fill(pool: MemPool, keys: Sequence[PageKey]) -> list[int]:
    with pool.prepare_store(keys) as store:
        for index, block in store.missing:
            ctypes.memset(pool.address(block), index % 251 + 1, pool.block_bytes)
        store.commit()
    return [pool.address(block) for block in pool.match(keys)]


def hold(pipe: Connection, keys: list[PageKey], folder: str) -> None:
    pool = MemPool(NAMESPACE, arena_bytes=len(keys) * NAMESPACE.block_bytes, generation="holder")
    addresses = fill(pool, keys)
    raw = RawNixl("raw-holder")
    raw.register(pool.arena_base, pool.arena_bytes)
    with make_agent(pool, "holder", folder) as agent:
        pipe.send((agent.peer_address, raw.metadata(), addresses))
        while pipe.poll(600) and pipe.recv() == "cpu":
            pipe.send(time.process_time())
    raw.close()
    pool.close()


class Reader:
    def __init__(self, pipe: Connection, keys: Sequence[PageKey], folder: str) -> None:
        self.keys = keys
        self.pool = MemPool(
            NAMESPACE, arena_bytes=2 * len(keys) * NAMESPACE.block_bytes, generation="reader"
        )
        self.peer, metadata, self.remote = pipe.recv()
        self.raw = RawNixl("raw-reader")
        # The upper half of the arena is never allocated while the lower half is free; every page
        # of it is touched before anything is timed.
        ctypes.memset(self.pool.arena_base, 0, self.pool.arena_bytes)
        self.raw.register(self.pool.arena_base, self.pool.arena_bytes)
        self.raw_peer = self.raw.add_peer(metadata)
        self.agent = make_agent(self.pool, "reader", folder)
        self.agent.start()

    def fetch(self, count: int) -> float:
        request = FetchRequest.of("holder", self.peer, list(self.keys[:count]), 0.0, DEADLINE_S)
        start = time.perf_counter()
        reply = self.agent.fetch(request).result(DEADLINE_S)
        seconds = time.perf_counter() - start
        assert reply.outcome == "complete" and reply.fetched_pages == count, reply
        self.empty()
        return seconds

    def empty(self) -> None:
        self.pool.clear()
        until = time.monotonic() + 10
        while self.pool.stats()["free_blocks"] < self.pool.total_blocks:
            assert time.monotonic() < until, self.pool.stats()
            time.sleep(0.01)

    def read(self, count: int) -> float:
        with self.pool.prepare_store(self.keys[:count]) as store:
            local = [self.pool.address(block) for _, block in store.missing]
            size = self.pool.block_bytes
            start = time.perf_counter()
            batch = [
                Segment(far, near, size) for far, near in zip(self.remote, local, strict=False)
            ]
            request = self.raw.submit(self.raw_peer, batch)
            while request is not None:
                state = self.raw.state(request)
                if state is ReadState.DONE:
                    break
                assert state is ReadState.RUNNING, state
                time.sleep(0.0001)
            return time.perf_counter() - start

    def close(self) -> None:
        self.agent.close()
        self.raw.close()
        self.pool.close()


def compare(reader: Reader, count: int, repeat: int) -> dict[str, Any]:
    for _ in range(2):
        reader.fetch(count)
        reader.read(count)
    pairs = [(reader.fetch(count), reader.read(count)) for _ in range(repeat)]
    total = count * NAMESPACE.block_bytes
    fetch_s = statistics.median(pair[0] for pair in pairs)
    read_s = statistics.median(pair[1] for pair in pairs)
    return {
        "blocks": count,
        "bytes": total,
        "fetch_ms": round(fetch_s * 1e3, 3),
        "raw_ms": round(read_s * 1e3, 3),
        "fetch_bytes_per_s": round(total / fetch_s),
        "raw_bytes_per_s": round(total / read_s),
        "fetch_over_raw": round(statistics.median(raw / fetch for fetch, raw in pairs), 3),
    }


def idle_cpu(pipe: Connection, seconds: float) -> dict[str, float]:
    """Percent of a core that a process with an idle agent (and an idle raw agent) takes."""
    pipe.send("cpu")
    theirs, ours = pipe.recv(), time.process_time()
    time.sleep(seconds)
    pipe.send("cpu")
    theirs, ours = pipe.recv() - theirs, time.process_time() - ours
    return {
        "holder_percent": round(100 * theirs / seconds, 2),
        "reader_percent": round(100 * ours / seconds, 2),
    }


def measure(blocks: list[int], repeat: int) -> dict[str, Any]:
    load_before = round(os.getloadavg()[0], 2)
    keys = [PageKey(index.to_bytes(32, "big")) for index in range(max(blocks))]
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    with tempfile.TemporaryDirectory() as folder:
        holder = spawn.Process(target=hold, args=(theirs, keys, folder), daemon=True)
        holder.start()
        reader = Reader(ours, keys, folder)
        try:
            results = [compare(reader, count, repeat) for count in blocks]
            idle = idle_cpu(ours, 3.0)
        finally:
            ours.send("end")
            reader.close()
            holder.join(30)
    return {
        "benchmark": "micro/transfer",
        "command": "python " + " ".join(sys.argv),
        "machine": {
            "cpu": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "python": platform.python_version(),
            "load_before": load_before,
            "ucx_tls": os.environ.get("UCX_TLS", "default"),
        },
        "idle": idle,
        "results": results,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--blocks", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--repeat", type=int, default=15)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    text = json.dumps(measure(arguments.blocks, arguments.repeat), indent=2)
    print(text)
    if arguments.json is not None:
        arguments.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
