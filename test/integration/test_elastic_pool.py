"""The DRAM pools of a live cluster grow and shrink while it answers."""

from __future__ import annotations

import random
import threading
from functools import partial
from typing import Any

import pytest
import requests
from integration.harness import (
    REQUEST_LIMIT_S,
    RunningCluster,
    Server,
    generate,
    stats,
    wait_until,
)

pytestmark = pytest.mark.integration

PAGE = 16
START = "256MiB"  # of the shared cluster


def tokens(seed: str, count: int) -> list[int]:
    source = random.Random(seed)
    return [source.randrange(3, 250) for _ in range(count)]


def resize(server: Server, dram: str) -> dict[str, Any]:
    body = {"dram": dram, "wait_s": 30.0}
    response = requests.post(f"{server.url}/memserve/pool", json=body, timeout=REQUEST_LIMIT_S)
    assert response.status_code == 200, response.text
    result: dict[str, Any] = response.json()
    return result


def test_answers_stay_right_while_every_pool_changes_size(
    cluster: RunningCluster, stock: Server
) -> None:
    prompts = [tokens(f"elastic {index}", 300) for index in range(4)]
    expected = [generate(stock.url, prompt, 12).output_ids for prompt in prompts]
    stop = threading.Event()
    wrong: list[object] = []
    answered = 0

    def traffic() -> None:
        nonlocal answered
        # One request at a time: a batch may round otherwise.
        while not stop.is_set():
            for prompt, right in zip(prompts, expected, strict=True):
                try:
                    answer = generate(cluster.url, prompt, 12)
                except (AssertionError, requests.RequestException) as error:
                    wrong.append(error)
                    return
                if answer.output_ids != right:
                    wrong.append(answer)
                answered += 1

    def answered_or_wrong(count: int) -> bool:
        return bool(wrong) or answered >= count

    client = threading.Thread(target=traffic)
    client.start()
    try:
        for dram in ("512MiB", "64MiB", "384MiB", START):
            for server in cluster.instances:
                result = resize(server, dram)
                assert result["outcome"] == "resized", result
                shown = requests.get(f"{server.url}/memserve/pool", timeout=10).json()
                info = requests.get(f"{server.url}/memserve/info", timeout=10).json()
                blocks = [rank["total_blocks"] for rank in shown["ranks"]]
                assert blocks == [rank["total_blocks"] for rank in info["ranks"]]
                assert blocks == [rank["total_blocks"] for rank in result["ranks"]]
            wait_until(partial(answered_or_wrong, answered + 2), REQUEST_LIMIT_S, "two answers")
    finally:
        stop.set()
        client.join(REQUEST_LIMIT_S)
    assert not wrong, wrong[:2]
    assert answered > 8

    fresh = tokens("elastic, afterwards", 300)
    answer = generate(cluster.url, fresh, 12)
    assert answer.output_ids == generate(stock.url, fresh, 12).output_ids
    assert answer.cached_tokens == (300 - 1) // PAGE * PAGE, "decode fetched nothing"
    parts = ("free", "withdrawn", "filling", "ready", "orphan")
    for server in cluster.instances:
        values = stats(server)
        assert values["resizes_total"] >= 4
        assert values["total_blocks"] == sum(values[f"{part}_blocks"] for part in parts)


def test_a_size_that_cannot_be_is_refused_with_the_reason(cluster: RunningCluster) -> None:
    server = cluster.one("decode")
    for body, text in (
        ({"dram": "900TiB"}, "more than this machine's memory"),
        ({"dram": "much"}, "malformed size"),
    ):
        response = requests.post(f"{server.url}/memserve/pool", json=body, timeout=10)
        assert response.status_code == 400
        assert text in response.json()["error"]["message"]
