"""KV computed anywhere is used everywhere: on real clusters, in every direction, for every tenant.

What is compared with is one stock SGLang instance (``stock``) with the same model and flags.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import requests
from integration.harness import (
    REQUEST_LIMIT_S,
    Answer,
    RunningCluster,
    Server,
    await_agreement,
    generate,
    held_pages,
    stats,
    wait_until,
)
from sglang_memserve.hashing import namespace_seed, page_keys
from sglang_memserve.types import Tier

pytestmark = pytest.mark.integration

PAGE = 16


@pytest.fixture
def prompt(request: pytest.FixtureRequest) -> Iterator[list[int]]:
    """600 token ids that no other test uses; the seed is the test's name."""
    yield tokens(request.node.nodeid, 600)


def tokens(seed: str, count: int) -> list[int]:
    source = random.Random(seed)
    return [source.randrange(3, 250) for _ in range(count)]


def full_pages(count: int) -> int:
    """Tokens in full pages that an engine can take from a cache: it always computes the last."""
    return (count - 1) // PAGE * PAGE


def fetched_bytes(server: Server) -> float:
    return stats(server)["transfer_fetched_bytes_total"]


def served(answer: Answer, header: str) -> str:
    return answer.headers[f"x-memserve-{header}"]


def fetch(holder: Server, receiver: Server, ids: list[int], seed: bytes | None = None) -> dict:
    body = {
        "source": holder.url,
        "keys": [key.hex() for key in page_keys(ids, PAGE, seed)],
        "wait_s": 0.5,
        "deadline_s": 10.0,
    }
    response = requests.post(f"{receiver.url}/memserve/fetch", json=body, timeout=REQUEST_LIMIT_S)
    assert response.status_code == 200, response.text
    result: dict = response.json()
    return result


def short_keys(ids: list[int], seed: bytes | None = None) -> list[int]:
    return [int.from_bytes(key[:8], "big", signed=True) for key in page_keys(ids, PAGE, seed)]


def readable(server: Server, ids: list[int], seed: bytes | None = None) -> int:
    """Leading pages of ``ids`` in the server's MemPool."""
    held = held_pages(server.url)[Tier.DRAM]
    keys = short_keys(ids, seed)
    return next((index for index, key in enumerate(keys) if key not in held), len(keys))


def test_prefill_to_decode(cluster: RunningCluster, stock: Server, prompt: list[int]) -> None:
    decode = cluster.one("decode")
    before = fetched_bytes(decode)
    answer = generate(cluster.url, prompt, 24)

    assert answer.output_ids == generate(stock.url, prompt, 24).output_ids
    assert served(answer, "prefill") in [server.url for server in cluster.all("prefill")]
    assert served(answer, "decode") == decode.url
    assert answer.cached_tokens == full_pages(len(prompt)), "decode computed what prefill had done"
    assert int(served(answer, "cached-tokens")) == 0, "the prompt was new: somebody computed it"
    block_bytes = stats(decode)["block_bytes"]
    assert fetched_bytes(decode) - before >= full_pages(len(prompt)) / PAGE * block_bytes


def test_second_time_nobody_computes(
    cluster: RunningCluster, stock: Server, prompt: list[int]
) -> None:
    first = generate(cluster.url, prompt, 8)
    again = generate(cluster.url, prompt, 8)
    assert again.output_ids == first.output_ids
    assert int(served(again, "cached-tokens")) == full_pages(len(prompt))


def test_next_turn_takes_generated_pages_back(
    cluster: RunningCluster, stock: Server, prompt: list[int]
) -> None:
    """Decode -> prefill: the answer's own pages are not computed again by the prefill instance."""
    decode = cluster.one("decode")
    first = generate(cluster.url, prompt, 80)
    by_url = {server.url: server for server in cluster.instances}
    prefill = by_url[served(first, "prefill")]
    # The very last token of an answer is sampled but never run through the model.
    history = prompt + first.output_ids
    known = full_pages(len(history))
    wait_until(lambda: readable(decode, history) * PAGE >= known, 10, "generated pages in MemPool")
    before = fetched_bytes(prefill)

    follow_up = history + tokens("follow-up", 200)
    second = generate(cluster.url, follow_up, 24)

    assert second.output_ids == generate(stock.url, follow_up, 24).output_ids
    assert served(second, "prefill") == prefill.url
    assert int(served(second, "cached-tokens")) == known, "a page of the first turn was recomputed"
    moved = (known - len(prompt) // PAGE * PAGE) / PAGE * stats(prefill)["block_bytes"]
    assert fetched_bytes(prefill) - before >= moved
    assert second.cached_tokens == full_pages(len(follow_up))


def test_prefill_to_prefill(cluster: RunningCluster, stock: Server, prompt: list[int]) -> None:
    """The other prefill instance fetches instead of computing."""
    first, second = cluster.all("prefill")
    expected = generate(first.url, prompt, 16).output_ids
    wait_until(lambda: readable(first, prompt) == len(prompt) // PAGE, 10, "pages in MemPool")
    result = fetch(first, second, prompt)
    assert result["outcome"] == "complete"
    assert result["fetched_pages"] == len(prompt) // PAGE
    answer = generate(second.url, prompt, 16)
    assert answer.cached_tokens == full_pages(len(prompt))
    assert answer.output_ids == expected == generate(stock.url, prompt, 16).output_ids


@pytest.mark.parametrize("length", [1, 15, 16, 17, 33, 511, 512, 513, 1500])
def test_greedy_outputs_equal_stock(cluster: RunningCluster, stock: Server, length: int) -> None:
    """Around page and chunk borders; the second time from the cache."""
    ids = tokens(f"greedy {length}", length)
    expected = generate(stock.url, ids, 20).output_ids
    assert generate(cluster.url, ids, 20).output_ids == expected
    assert generate(cluster.url, ids, 20).output_ids == expected


def test_batch_shares_pages(cluster: RunningCluster, stock: Server) -> None:
    """Several prompts in one request, with a shared prefix of several pages.

    Batching changes the order of bf16 sums, so only first tokens are compared with stock SGLang.
    """
    shared = tokens("batch", 100)
    batch = [shared + tokens(f"batch {index}", 50 + index) for index in range(3)]

    def ask(url: str) -> tuple[list[int], list[int], requests.Response]:
        body = {
            "input_ids": batch,
            "sampling_params": {"temperature": 0, "max_new_tokens": 8, "ignore_eos": True},
        }
        response = requests.post(f"{url}/generate", json=body, timeout=REQUEST_LIMIT_S)
        assert response.status_code == 200, response.text
        items = response.json()
        cached = [item["meta_info"]["cached_tokens"] for item in items]
        return [item["output_ids"][0] for item in items], cached, response

    expected, _, _ = ask(stock.url)
    whole = [full_pages(len(ids)) for ids in batch]
    first, cached, _ = ask(cluster.url)
    assert first == expected
    assert cached == whole, "decode computed pages of a batch"
    again, cached, response = ask(cluster.url)
    assert again == expected
    assert cached == whole
    assert int(response.headers["x-memserve-cached-tokens"]) > 0


def test_salt_separates_tenants(cluster: RunningCluster, prompt: list[int]) -> None:
    """Equal prompts of two tenants share nothing: not by routing, fetching, loading or in HBM."""
    prefill, decode = cluster.all("prefill")[0], cluster.one("decode")
    for fields in ({"cache_salt": "tenant-a"}, {"extra_key": "tenant-a"}, {}):
        first = generate(cluster.url, prompt, 8, **fields)
        assert int(served(first, "cached-tokens")) == 0, f"{fields} saw another tenant's pages"
        assert first.cached_tokens == full_pages(len(prompt)), "its own pages moved"
        again = generate(cluster.url, prompt, 8, **fields)
        assert int(served(again, "cached-tokens")) == full_pages(len(prompt)), fields
    stranger = generate(cluster.url, prompt, 8, cache_salt="tenant-b")
    assert int(served(stranger, "cached-tokens")) == 0
    # Straight at the instances, past the router.
    for server in (prefill, decode):
        direct = generate(server.url, prompt, 8, cache_salt="tenant-c")
        assert direct.cached_tokens == 0
    other = namespace_seed(None, "tenant-d")
    assert fetch(prefill, decode, prompt, other)["readable_pages"] == 0


def test_salt_separates_chats(cluster: RunningCluster) -> None:
    body = {
        "model": "default",
        "messages": [{"role": "user", "content": "Tell me of pages and prefixes. " * 20}],
        "temperature": 0,
        "max_tokens": 8,
    }

    def cached(salt: str) -> int:
        response = requests.post(
            f"{cluster.url}/v1/chat/completions",
            json={**body, "cache_salt": salt},
            timeout=REQUEST_LIMIT_S,
        )
        assert response.status_code == 200, response.text
        return int(response.headers["x-memserve-cached-tokens"])

    assert cached("chat-a") == 0
    assert cached("chat-b") == 0
    assert cached("chat-a") > 0


def test_tree_equals_what_instances_hold(cluster: RunningCluster, prompt: list[int]) -> None:
    """After quiet the global tree is the union of the instances' snapshots, tier by tier, whatever
    came before: requests of several tenants at once, pages that left HBM alone."""
    prompts = [prompt[:200] + tokens(f"load {number}", 150 + 30 * number) for number in range(8)]
    salts: list[dict[str, str]] = [{}, {"cache_salt": "tree"}]
    with ThreadPoolExecutor(6) as pool:
        answers = [
            pool.submit(generate, cluster.url, ids, 12, **salts[number % 2])
            for number, ids in enumerate(prompts)
        ]
        for answer in answers:
            answer.result(REQUEST_LIMIT_S)
    decode = cluster.one("decode")
    body = {"input_ids": prompts[0], "deadline_s": 10.0}
    moved = requests.post(f"{decode.url}/memserve/swap_out", json=body, timeout=REQUEST_LIMIT_S)
    assert moved.status_code == 200 and moved.json()["moved_pages"] > 0, moved.text

    await_agreement(cluster.url, [server.url for server in cluster.instances], 15)
    for server in cluster.instances:
        assert all(held_pages(server.url).values()), f"{server.name} holds nothing in some tier"
        assert stats(server)["device_watch_lost_total"] == 0
    # The pages that other prompts share stay.
    gone = set(short_keys(prompts[0])[moved.json()["hbm_pages"] :])
    assert not gone & held_pages(decode.url)[Tier.HBM], "what left HBM is told of"
    assert gone <= held_pages(decode.url)[Tier.DRAM]
    tenant = namespace_seed(None, "tree")
    in_hbm = set().union(*(held_pages(server.url)[Tier.HBM] for server in cluster.instances))
    assert set(short_keys(prompts[1], tenant)) <= in_hbm, "a tenant's keys are page keys"
