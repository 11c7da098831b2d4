"""What breaks, for real, and what the client sees of it: its full answer.

One cluster, from ready to killed: the tests that break it are the last ones, in this order.
"""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import requests
from integration.harness import (
    Answer,
    RunningCluster,
    Server,
    generate,
    launch_cluster,
    stats,
    wait_until,
)

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def fragile(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningCluster]:
    """A cluster of its own, which the last tests of this file end bit by bit."""
    flags = ["--mempool-dram", "16MiB", "--policy", "prefix", "--router-arg=--bypass-tokens=0"]
    with launch_cluster(tiny_model, tmp_path_factory.mktemp("fragile"), flags=flags) as running:
        yield running


def tokens(seed: str, count: int) -> list[int]:
    source = random.Random(seed)
    return [source.randrange(3, 250) for _ in range(count)]


def running_requests(server: Server) -> int:
    loads = requests.get(f"{server.url}/v1/loads", timeout=10).json()["loads"]
    return sum(load["num_running_reqs"] + load["num_waiting_reqs"] for load in loads)


def gone(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def signal_tree(pid: int, number: signal.Signals) -> None:
    """To a server and all its processes, schedulers first."""
    server = psutil.Process(pid)
    for process in [*server.children(recursive=True), server]:
        os.kill(process.pid, number)


def test_ready_means_served(fragile: RunningCluster) -> None:
    assert generate(fragile.url, "ready means served " * 8, 4).meta["completion_tokens"] == 4


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
def test_client_that_leaves_is_aborted(fragile: RunningCluster, stream: bool) -> None:
    decode = fragile.one("decode")
    body = {
        "input_ids": tokens(f"leaves {stream}", 200),
        "stream": stream,
        "sampling_params": {"max_new_tokens": 3500, "ignore_eos": True},
    }

    running = threading.Event()

    def leave() -> None:
        """A stream is left in its middle; a whole answer by losing patience."""
        try:
            with requests.post(
                f"{fragile.url}/generate", json=body, stream=True, timeout=(5, 60 if stream else 3)
            ) as response:
                pieces = response.iter_content(1)  # held: dropping it would hang up
                next(pieces)
                running.wait(30)
        except requests.Timeout:
            assert not stream

    client = threading.Thread(target=leave)
    client.start()
    wait_until(lambda: running_requests(decode) > 0, 30, "the request runs", poll_s=0.02)
    running.set()
    client.join(60)
    wait_until(lambda: running_requests(decode) == 0, 10, "the request is aborted on decode")
    assert running_requests(fragile.one("prefill")) == 0


def test_pool_serves_when_full(fragile: RunningCluster) -> None:
    """More pages than the pools hold: old ones go, answers stay right, blocks are conserved."""
    ids = tokens("full", 400)
    expected = generate(fragile.url, ids, 8).output_ids
    pages = int(stats(fragile.one("decode"))["total_blocks"])
    for index in range(pages * 16 // 3500 + 1):
        generate(fragile.url, tokens(f"fill {index}", 3500), 1)
    assert stats(fragile.one("decode"))["evicted_pages_total"] > 0
    assert generate(fragile.url, ids, 8).output_ids == expected
    for server in fragile.instances:
        values = stats(server)
        parts = ("free_blocks", "filling_blocks", "ready_blocks", "orphan_blocks")
        assert sum(values[part] for part in parts) == values["total_blocks"]


def test_flush_empties_every_pool(fragile: RunningCluster) -> None:
    generate(fragile.url, tokens("flush", 300), 1)
    wait_until(
        lambda: all(stats(s)["ready_blocks"] > 0 for s in fragile.instances), 10, "pages in pools"
    )
    assert requests.post(f"{fragile.url}/flush_cache", timeout=30).status_code == 200
    assert all(stats(server)["ready_blocks"] == 0 for server in fragile.instances)


def test_fetch_from_nobody_ends_by_its_deadline(fragile: RunningCluster) -> None:
    body = {
        "source": "http://127.0.0.1:9",
        "source_ranks": ["tcp://127.0.0.1:9"],
        "keys": ["00" * 32],
        "deadline_s": 1.0,
    }
    started = time.monotonic()
    answer = requests.post(f"{fragile.one('decode').url}/memserve/fetch", json=body, timeout=20)
    assert answer.status_code == 200 and answer.json()["outcome"] != "complete"
    assert time.monotonic() - started < 10


@pytest.mark.parametrize(
    ("body", "word"),
    [
        (b"{", "truncated"),
        (b'{"source": "http://127.0.0.1:9", "keys": ["zz"]}', "hex"),
        (b'{"source": "http://127.0.0.1:9", "keys": ["00"], "source_ranks": ["x"]}', "32 bytes"),
    ],
    ids=["truncated", "not hex", "short key"],
)
def test_malformed_fetch_is_refused(fragile: RunningCluster, body: bytes, word: str) -> None:
    answer = requests.post(f"{fragile.one('decode').url}/memserve/fetch", data=body, timeout=20)
    assert answer.status_code == 400
    assert word in answer.json()["error"]["message"]


def test_prefill_killed_in_mid_request(fragile: RunningCluster) -> None:
    """It is stopped first, so that the request surely waits for it, then killed."""
    prefill, decode = fragile.one("prefill"), fragile.one("decode")
    ids = tokens("killed", 1000)
    answers: list[Answer] = []
    signal_tree(prefill.pid, signal.SIGSTOP)
    try:
        client = threading.Thread(target=lambda: answers.append(generate(fragile.url, ids, 16)))
        client.start()
        time.sleep(1.5)
        assert client.is_alive(), "the request did not wait for the prefill instance"
    finally:
        signal_tree(prefill.pid, signal.SIGKILL)
    client.join(60)
    assert answers, "no answer within a minute of the prefill instance's death"
    (answer,) = answers
    assert answer.headers["x-memserve-decode"] == decode.url
    assert len(answer.output_ids) == 16
    report = fragile.router.log.parent / "cluster.log"
    wait_until(lambda: "prefill-0 died (signal 9)" in report.read_text(), 20, "the report")
    # The cluster goes on without it, at once, with the same tokens.
    started = time.monotonic()
    assert generate(fragile.url, ids, 16).output_ids == answer.output_ids
    assert generate(fragile.url, tokens("after", 300), 4).output_ids
    assert time.monotonic() - started < 30
    requests.post(f"{decode.url}/flush_cache", timeout=30).raise_for_status()
    assert generate(decode.url, ids, 16).output_ids == answer.output_ids


def test_nothing_survives_a_launcher_that_is_killed(fragile: RunningCluster) -> None:
    everything = {one.pid for one in psutil.Process(fragile.pid).children(recursive=True)}
    decode = psutil.Process(fragile.one("decode").pid)
    schedulers = {one.pid for one in decode.children(recursive=True)}
    assert schedulers and {fragile.router.pid, decode.pid, *schedulers} < everything
    os.kill(fragile.pid, signal.SIGKILL)
    wait_until(lambda: all(map(gone, everything)), 30, "all processes are gone")
