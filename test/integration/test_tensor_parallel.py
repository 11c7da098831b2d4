"""Instances of two ranks each: both prefill and decode with ``--tp 2``, real processes throughout.

What is compared with is stock SGLang, also with two ranks, since two ranks add in another order.
The ranks are driven apart on purpose, over the local sockets that the HTTP process uses: one rank
is told to fetch, the other is not.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import requests
import zmq
from integration.harness import (
    REQUEST_LIMIT_S,
    RunningCluster,
    Server,
    await_agreement,
    flush,
    generate,
    held_pages,
    launch_cluster,
    launch_server,
    wait_until,
)
from sglang_memserve.hashing import page_keys
from sglang_memserve.protocol import control
from sglang_memserve.types import Tier

pytestmark = pytest.mark.integration

PAGE = 16
NEW_TOKENS = 20
# Blocks of 6,144 bytes: 170 for each rank, about four prompts.
DRAM = "2MiB"
FILLERS = 16
LIMIT_S = 30.0


def tokens(seed: str, count: int = 600) -> list[int]:
    source = random.Random(seed)
    return [source.randrange(3, 250) for _ in range(count)]


MOVED, ONE_SIDED, LOST = tokens("moved"), tokens("one-sided"), tokens("lost")
PROMPTS = {"moved": MOVED, "one-sided": ONE_SIDED, "lost": LOST}


@pytest.fixture(scope="module")
def truth(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[int]]:
    """What stock SGLang with two ranks answers. It ends before the cluster starts."""
    folder = tmp_path_factory.mktemp("stock-tp2")
    with launch_server(tiny_model, folder, flags=["--no-mempool", "--tp", "2"]) as stock:
        return {
            name: generate(stock.url, prompt, NEW_TOKENS).output_ids
            for name, prompt in PROMPTS.items()
        }


@pytest.fixture(scope="module")
def pair(
    truth: dict[str, list[int]], tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningCluster]:
    flags = ["--tp", "2", "--mempool-dram", DRAM]
    flags += ["--policy", "prefix", "--router-arg=--bypass-tokens=0"]
    with launch_cluster(tiny_model, tmp_path_factory.mktemp("tp2"), flags=flags) as running:
        pids = [running.pid, *_family(running.pid)]
        yield running
    wait_until(lambda: not any(map(psutil.pid_exists, pids)), LIMIT_S, "all processes are gone")


def _family(pid: int) -> list[int]:
    return [child.pid for child in psutil.Process(pid).children(recursive=True)]


def info(server: Server) -> dict:
    response = requests.get(f"{server.url}/memserve/info", timeout=10)
    response.raise_for_status()
    value: dict = response.json()
    return value


def stats(server: Server) -> dict:
    response = requests.get(f"{server.url}/memserve/stats", timeout=10)
    response.raise_for_status()
    value: dict = response.json()
    return value


def shorts(prompt: list[int]) -> set[int]:
    return {int.from_bytes(key[:8], "big", signed=True) for key in page_keys(prompt, PAGE)}


def held(server: Server) -> set[int]:
    """Pages in DRAM that every rank of the server holds."""
    return held_pages(server.url)[Tier.DRAM]


def router_agrees(cluster: RunningCluster) -> None:
    await_agreement(cluster.url, [server.url for server in cluster.instances], LIMIT_S)


def rank_socket(server: Server, rank: int) -> str:
    """The path of a rank's local socket, as the processes of the server have it open."""
    for pid in [server.pid, *_family(server.pid)]:
        for connection in psutil.Process(pid).net_connections("unix"):
            if connection.laddr.endswith(f"rank{rank}.sock"):
                return str(connection.laddr)
    raise AssertionError(f"{server.name} has no socket of rank {rank}")


def fetch_on_one_rank(
    holder: Server, receiver: Server, rank: int, prompt: list[int]
) -> control.FetchReply:
    """What ``POST /memserve/fetch`` asks of every rank, asked of one."""
    address = info(holder)["ranks"][rank]["peer_address"]
    keys: list[bytes] = [*page_keys(prompt, PAGE)]
    request = control.FetchRequest.of(holder.url, address, keys, 1.0, 10.0)
    context = zmq.Context()
    try:
        socket = context.socket(zmq.DEALER)
        socket.rcvtimeo = int(LIMIT_S * 1000)
        socket.connect(f"ipc://{rank_socket(receiver, rank)}")
        socket.send_multipart([bytes(8), control.encode(request)])
        reply = control.decode(socket.recv_multipart()[1])
    finally:
        context.destroy(0)
    assert isinstance(reply, control.FetchReply), reply
    return reply


def test_stock_answers_differ(truth: dict[str, list[int]]) -> None:
    """Else comparing them would mean nothing. Before the cluster starts: each has a limit."""
    assert len({tuple(answer) for answer in truth.values()}) == len(PROMPTS)


def test_prefill_to_decode(pair: RunningCluster, truth: dict[str, list[int]]) -> None:
    decode = pair.one("decode")
    answer = generate(pair.url, MOVED, NEW_TOKENS)
    assert answer.output_ids == truth["moved"]
    assert answer.cached_tokens == len(MOVED) // PAGE * PAGE, "decode computed what prefill had"
    for rank in stats(decode)["ranks"]:
        assert rank["transfer_fetched_pages_total"] >= len(MOVED) // PAGE
    assert shorts(MOVED) <= held(decode)
    assert shorts(MOVED) <= held(pair.one("prefill"))
    router_agrees(pair)
    assert generate(pair.url, MOVED, NEW_TOKENS).output_ids == truth["moved"]


def test_what_one_rank_alone_has_is_not_there(
    pair: RunningCluster, truth: dict[str, list[int]]
) -> None:
    prefill, decode = pair.one("prefill"), pair.one("decode")
    generate(prefill.url, ONE_SIDED, 0)
    wait_until(lambda: shorts(ONE_SIDED) <= held(prefill), LIMIT_S, "prefill has stored it")
    reply = fetch_on_one_rank(prefill, decode, 0, ONE_SIDED)
    assert reply.outcome == "complete" and reply.fetched_pages == len(shorts(ONE_SIDED))

    partial = "residency_partial_pages"
    wait_until(
        lambda: stats(decode)["instance"][partial] >= len(shorts(ONE_SIDED)), LIMIT_S, partial
    )
    assert not shorts(ONE_SIDED) & held(decode)
    router_agrees(pair)
    answer = generate(decode.url, ONE_SIDED, NEW_TOKENS)
    assert answer.output_ids == truth["one-sided"]
    assert answer.cached_tokens == 0, "one rank had the pages, both must have them"
    # Computing it gave the other rank its shards.
    wait_until(lambda: shorts(ONE_SIDED) <= held(decode), LIMIT_S, "both ranks have stored it")
    router_agrees(pair)


def test_what_one_rank_has_lost_is_gone(pair: RunningCluster, truth: dict[str, list[int]]) -> None:
    """One rank evicts for pages that only it fetches; the other goes on holding the prompt."""
    prefill, decode = pair.one("prefill"), pair.one("decode")
    flush(decode.url)
    generate(prefill.url, LOST, 0)
    wait_until(lambda: shorts(LOST) <= held(prefill), LIMIT_S, "prefill has stored it")
    body = {"source": prefill.url, "keys": [key.hex() for key in page_keys(LOST, PAGE)]}
    fetched = requests.post(f"{decode.url}/memserve/fetch", json=body, timeout=REQUEST_LIMIT_S)
    assert fetched.json()["outcome"] == "complete", fetched.text
    wait_until(lambda: shorts(LOST) <= held(decode), LIMIT_S, "both ranks have it")
    for number in range(FILLERS):
        filler = tokens(f"filler {number}")
        generate(prefill.url, filler, 0)
        fetch_on_one_rank(prefill, decode, 1, filler)
        if evicted(decode)[1]:
            break
    assert evicted(decode) == [0, evicted(decode)[1]] != [0, 0]
    wait_until(lambda: not shorts(LOST) <= held(decode), LIMIT_S, "one rank has lost some of it")
    router_agrees(pair)
    here = held(decode)
    keys = [int.from_bytes(key[:8], "big", signed=True) for key in page_keys(LOST, PAGE)]
    leading = next(index for index, key in enumerate(keys) if key not in here)
    answer = generate(decode.url, LOST, NEW_TOKENS)
    assert answer.output_ids == truth["lost"]
    assert answer.cached_tokens == leading * PAGE
    router_agrees(pair)


def evicted(server: Server) -> list[float]:
    return [rank["evicted_pages_total"] for rank in stats(server)["ranks"]]


def test_shards_of_other_ranks_are_refused(pair: RunningCluster) -> None:
    """An instance with another number of ranks, and a rank with another shard."""
    prefill, decode = pair.one("prefill"), pair.one("decode")
    addresses = [rank["peer_address"] for rank in info(prefill)["ranks"]]
    keys = [key.hex() for key in page_keys(tokens("refused"), PAGE)]
    body = {"source": prefill.url, "keys": keys, "source_ranks": addresses[:1]}
    fewer = requests.post(f"{decode.url}/memserve/fetch", json=body, timeout=REQUEST_LIMIT_S)
    assert "has 1 ranks, this instance has 2" in fewer.text, fewer.text
    assert fewer.status_code == 400
    body["source_ranks"] = addresses[::-1]
    crossed = requests.post(f"{decode.url}/memserve/fetch", json=body, timeout=REQUEST_LIMIT_S)
    assert crossed.json()["outcome"] == "namespace_mismatch", crossed.text
    wrong = [f"tp_rank: {prefill.url} has {1 - rank}, {decode.url} has {rank}" for rank in (0, 1)]
    assert any(sentence in crossed.text for sentence in wrong), crossed.text
