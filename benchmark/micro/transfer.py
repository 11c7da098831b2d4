"""Fetching blocks through two RankAgents, against raw NIXL READs of the same bytes.

Two processes: a holder with a MemPool and an agent, and this one with another; a second holder
keeps checksums. All ways read the same bytes of a holder's arena into the same blocks; they take
turns, so that noise hits all of them. Either side's arena holds the most blocks asked for.

fetch      everything from the request to published pages: control messages, blocks, read, index
checked    the same from the holder with checksums, which are compared before pages are published
raw        one descriptor of all bytes, created, posted and awaited on agents of their own
blocks     one descriptor a block, not merged (aggregated blocks that lie apart)
by_layer   one descriptor for each block, layer, K and V: what the pages are without aggregation

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
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
from sglang_memserve.mempool import MemPool
from sglang_memserve.protocol.control import FetchRequest
from sglang_memserve.transfer.agent import RankAgent
from sglang_memserve.transfer.base import ReadState
from sglang_memserve.transfer.nixl import NixlTransport, RawNixl
from sglang_memserve.transfer.plan import Segments
from sglang_memserve.transfer.port import FetchSettings
from sglang_memserve.types import Checksums, Namespace, PageKey

# SmolLM2-135M in bf16: 368,640 bytes a page of 16 tokens.
NAMESPACE = Namespace("bench", "1", "bfloat16", 16, 30, 3, 64, 64, 0, 1)
DEADLINE_S = 60.0
# Above this neither the second holder nor the short descriptors are worth their memory.
MANY_BLOCKS = 1000


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
        store.commit(checksums=pool.compute_checksums([block for _, block in store.missing]))
    return pool.addresses(pool.match(keys))


def hold(pipe: Connection, keys: list[PageKey], folder: str, checksums: Checksums) -> None:
    name = f"holder-{checksums.value}"
    size = len(keys) * NAMESPACE.block_bytes
    pool = MemPool(
        NAMESPACE, arena_bytes=size, reserve_bytes=size, generation=name, checksums=checksums
    )
    addresses = fill(pool, keys)
    raw = RawNixl(f"raw-{name}")
    raw.register(pool.arena_base, pool.arena_bytes)
    with make_agent(pool, name, folder) as agent:
        pipe.send((agent.peer_address, raw.metadata(), addresses))
        while pipe.poll(600) and pipe.recv() == "cpu":
            pipe.send(time.process_time())
    raw.close()
    pool.close()


class Reader:
    def __init__(self, pipes: Sequence[Connection], keys: Sequence[PageKey], folder: str) -> None:
        self.keys = keys
        size = len(keys) * NAMESPACE.block_bytes
        self.pool = MemPool(NAMESPACE, arena_bytes=size, reserve_bytes=size, generation="reader")
        (self.peer, metadata, self.remote), (self.checked_peer, *_) = (p.recv() for p in pipes)
        self.raw = RawNixl("raw-reader")
        # Every page is touched before anything is timed.
        ctypes.memset(self.pool.arena_base, 0, self.pool.arena_bytes)
        self.raw.register(self.pool.arena_base, self.pool.arena_bytes)
        self.raw_peer = self.raw.add_peer(metadata)
        self.agent = make_agent(self.pool, "reader", folder)
        self.agent.start()

    def fetch(self, count: int, peer: str) -> float:
        request = FetchRequest.of("holder", peer, list(self.keys[:count]), 0.0, DEADLINE_S)
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

    def one_descriptor(self, count: int) -> Segments:
        length = count * self.pool.block_bytes
        assert self.remote[count - 1] - self.remote[0] == length - self.pool.block_bytes
        return np.array([(self.remote[0], self.pool.arena_base, length)], dtype=np.uint64)

    def descriptors(self, count: int, parts: int) -> Segments:
        """Each block in ``parts``, which lie apart: all first parts, then all second parts, ..."""
        part_bytes = self.pool.block_bytes // parts
        far, near = self.remote[0], self.pool.arena_base
        rows = [
            (far + offset, near + offset, part_bytes)
            for block in range(count)
            for part in range(parts)
            for offset in [(part * count + block) * part_bytes]
        ]
        return np.array(rows, dtype=np.uint64)

    def read(self, batch: Segments) -> float:
        start = time.perf_counter()
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
    one = reader.one_descriptor(count)
    ways: dict[str, Callable[[], float]] = {
        "fetch": lambda: reader.fetch(count, reader.peer),
        "raw": lambda: reader.read(one),
    }
    if count <= MANY_BLOCKS:
        each = reader.descriptors(count, 1)
        by_layer = reader.descriptors(count, 2 * NAMESPACE.num_layers)
        ways["checked"] = lambda: reader.fetch(count, reader.checked_peer)
        ways["blocks"] = lambda: reader.read(each)
        ways["by_layer"] = lambda: reader.read(by_layer)
    for way in ways.values():
        way()
    rounds = [{name: way() for name, way in ways.items()} for _ in range(repeat)]
    total = count * NAMESPACE.block_bytes
    result: dict[str, Any] = {"blocks": count, "bytes": total, "repeat": repeat}
    for name in ways:
        result[f"{name}_ms"] = round(1e3 * statistics.median(r[name] for r in rounds), 3)
        result[f"{name}_best_ms"] = round(1e3 * min(r[name] for r in rounds), 3)
    result["raw_bytes_per_s"] = round(1e3 * total / result["raw_ms"])
    result["fetch_over_raw"] = ratio(rounds, "raw", "fetch")
    if "checked" in ways:
        result["checked_over_fetch"] = ratio(rounds, "fetch", "checked")
        result["by_layer_slower_than_blocks"] = ratio(rounds, "by_layer", "blocks")
    return result


def ratio(rounds: Sequence[dict[str, float]], time_of: str, over: str) -> float:
    """Median over the rounds of one way's time divided by another's of the same round."""
    return round(statistics.median(r[time_of] / r[over] for r in rounds), 3)


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
    pipes: list[Connection] = []
    holders: list[BaseProcess] = []
    with tempfile.TemporaryDirectory() as folder:
        for checksums in (Checksums.OFF, Checksums.ON):
            ours, theirs = spawn.Pipe()
            kept = keys if checksums is Checksums.OFF else keys[:MANY_BLOCKS]
            arguments = (theirs, kept, folder, checksums)
            holders.append(spawn.Process(target=hold, args=arguments, daemon=True))
            holders[-1].start()
            pipes.append(ours)
        reader = Reader(pipes, keys, folder)
        try:
            results = [
                compare(reader, count, max(3, min(repeat, 20_000 // count))) for count in blocks
            ]
            idle = idle_cpu(pipes[0], 3.0)
        finally:
            for pipe, holder in zip(pipes, holders, strict=True):
                pipe.send("end")
                holder.join(30)
            reader.close()
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
