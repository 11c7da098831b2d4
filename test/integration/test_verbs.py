"""The device verbs on live servers: what they move, what requests then report, what they refuse."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import requests
from integration.harness import RunningCluster, Server, flush, generate, stats, wait_until
from sglang_memserve.hashing import page_keys

PAGE = 16
LIMIT_S = 60.0


@pytest.fixture(scope="module")
def server(cluster: RunningCluster) -> Server:
    return cluster.one("decode")


def ask(server: Server, verb: str, status: int = 200, **body: Any) -> dict[str, Any]:
    response = requests.post(f"{server.url}/memserve/{verb}", json=body, timeout=LIMIT_S)
    assert response.status_code == status, response.text
    value: dict[str, Any] = response.json()
    return value


def prompt(name: str, tokens: int = 10 * PAGE + 5) -> str:
    """The tiny model has a token a byte."""
    return (f"{name}: " + "what leaves the device tier comes back when asked for. " * 99)[:tokens]


def details(answer: Any) -> tuple[int, int]:
    """Prompt tokens found in HBM and in DRAM."""
    found = answer.meta["cached_tokens_details"]
    return found["device"], found["host"]


def test_out_match_and_in(server: Server) -> None:
    text = prompt("out and in")
    first = generate(server.url, text, 8)
    there = ask(server, "match", text=text)
    assert (there["page_size"], there["pages"]) == (PAGE, 10)
    assert there["hbm_pages"] == there["both_pages"] == there["reusable_pages"] == 10
    out = ask(server, "swap_out", text=text)
    assert (out["outcome"], out["moved_pages"], out["hbm_pages"]) == ("complete", 10, 0), out
    there = ask(server, "match", text=text)
    assert (there["hbm_pages"], there["dram_pages"], there["reusable_pages"]) == (0, 10, 10)
    from_dram = generate(server.url, text, 8)
    assert details(from_dram) == (0, 160)
    assert from_dram.output_ids == first.output_ids
    ask(server, "swap_out", text=text)
    back = ask(server, "swap_in", text=text)
    assert (back["outcome"], back["moved_pages"], back["hbm_pages"]) == ("complete", 10, 10), back
    from_hbm = generate(server.url, text, 8)
    assert details(from_hbm) == (160, 0)
    assert from_hbm.output_ids == first.output_ids


def test_tokens_and_keys_name_the_same_pages(server: Server) -> None:
    ids = [1 + i % 200 for i in range(5 * PAGE)]
    generate(server.url, ids, 1)
    assert ask(server, "match", input_ids=ids)["hbm_pages"] == 5
    wait_until(
        lambda: ask(server, "match", input_ids=ids)["dram_pages"] == 5, LIMIT_S, "written through"
    )
    keys = [key.hex() for key in page_keys(ids, PAGE)]
    by_keys = ask(server, "match", keys=keys)
    assert (by_keys["dram_pages"], by_keys["hbm_pages"]) == (5, None)


def test_namespaces_as_in_requests(server: Server) -> None:
    text = prompt("salted")
    namespaces: tuple[dict[str, Any], ...] = ({"cache_salt": "tenant"}, {"extra_key": "lane"})
    for fields in namespaces:
        generate(server.url, text, 1, **fields)
        assert ask(server, "match", text=text, **fields)["hbm_pages"] == 10
        assert ask(server, "swap_out", text=text, **fields)["moved_pages"] == 10
        assert ask(server, "swap_in", text=text, **fields)["moved_pages"] == 10
    assert ask(server, "match", text=text)["hbm_pages"] == 0


def test_prefix_of_a_running_request_stays(server: Server) -> None:
    text = prompt("busy")
    alone = generate(server.url, text, 200)
    answers: list[Any] = []
    thread = threading.Thread(target=lambda: answers.append(generate(server.url, text, 200)))
    thread.start()

    def running() -> bool:
        loads = requests.get(f"{server.url}/v1/loads", timeout=LIMIT_S).json()
        return any(rank["num_running_reqs"] for rank in loads["loads"])

    wait_until(running, LIMIT_S, "the request runs", poll_s=0.01)
    out = ask(server, "swap_out", text=text, deadline_s=2)
    thread.join(LIMIT_S)
    assert out["outcome"] == "in_use" and out["hbm_pages"] == 10, out
    assert answers[0].output_ids == alone.output_ids
    assert ask(server, "swap_out", text=text)["hbm_pages"] == 0


def test_bad_bodies_are_refused(server: Server) -> None:
    for body, word in (
        ({}, "exactly one"),
        ({"text": "a", "input_ids": [1]}, "exactly one"),
        ({"text": ""}, "characters"),
        ({"input_ids": []}, "no tokens"),
        ({"input_ids": [-1]}, "token ids"),
        ({"input_ids": [10**9]}, "token ids"),
        ({"input_ids": "abc"}, "input_ids"),
        ({"input_ids": [1] * 100_000}, "context"),
        ({"text": "a", "deadline_s": 0}, "deadline_s"),
        ({"text": "a", "deadline_s": 1e9}, "deadline_s"),
        ({"keys": ["00"]}, "bytes"),
        ({"keys": ["zz"]}, "hex"),
        ({"keys": [], "cache_salt": "x"}, "namespace"),
    ):
        assert word in ask(server, "match", status=400, **body)["error"]["message"], body
    for verb in ("swap_in", "swap_out"):
        error = ask(server, verb, status=400, keys=["00" * 32])["error"]
        assert error["type"] == "ConfigError" and "searched by tokens" in error["message"]


def test_swaps_leave_the_server_sound(server: Server) -> None:
    """Many at once, against each other and against requests; then everything can be flushed."""
    texts = [prompt(f"soak {i % 4}", 6 * PAGE + 3) for i in range(16)]
    expected = {text: generate(server.url, text, 4).output_ids for text in set(texts)}
    wrong: list[str] = []

    def work(index: int) -> None:
        text = texts[index]
        for _ in range(3):
            ask(server, "swap_out" if index % 2 else "swap_in", text=text)
            if generate(server.url, text, 4).output_ids != expected[text]:
                wrong.append(text)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT_S)
    assert not wrong
    flush(server.url)
    assert ask(server, "match", text=texts[0])["reusable_pages"] == 0
    after = stats(server)
    assert after["ready_blocks"] == after["filling_blocks"] == after["leases"] == 0
    assert 0 < after["scheduler_seconds_total"] < after["uptime_seconds"]
