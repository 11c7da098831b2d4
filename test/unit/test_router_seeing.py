"""What is shown of a router: bounded labels, merged engine metrics, pools, the journal."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter
from prometheus_client.parser import text_string_to_metric_families
from sglang_memserve.protocol.http import InstanceStats
from sglang_memserve.router.members.pools import pool_state
from sglang_memserve.router.metrics import engine
from sglang_memserve.router.metrics.engine import merged
from sglang_memserve.router.metrics.labels import OTHER, Bounded, Departed
from sglang_memserve.router.prompt.bodies import Chat, Opaque, Texts, TokenIds
from sglang_memserve.router.request.journal import EXCERPT_CHARACTERS, excerpt
from sglang_memserve.types import InstanceId

A, B, C = InstanceId("http://a:1"), InstanceId("http://b:1"), InstanceId("http://c:1")

ENGINE = """# HELP sglang:ttft Time to first token
# TYPE sglang:ttft histogram
sglang:ttft_bucket{le="0.1",model="m"} 3.0
sglang:ttft_bucket{le="+Inf",model="m"} 4.0
sglang:ttft_sum{model="m"} 0.5
sglang:ttft_count{model="m"} 4.0
# HELP sglang:running Running
# TYPE sglang:running gauge
sglang:running 2
"""


def test_engine_metrics_are_one_valid_page() -> None:
    page = merged({A: ENGINE, B: ENGINE, C: None})
    families = {family.name: family for family in text_string_to_metric_families(page)}
    running = families["sglang:running"].samples
    assert [(s.labels["instance"], s.value) for s in running] == [(A, 2), (B, 2)]
    assert families["sglang:ttft"].type == "histogram"
    assert len(families["sglang:ttft"].samples) == 8
    up = {s.labels["instance"]: s.value for s in families["memserve_engine_up"].samples}
    assert up == {A: 1, B: 1, C: 0}
    # Each family's samples stand together: Prometheus refuses a page where they do not.
    ttft = [i for i, line in enumerate(page.splitlines()) if line.startswith("sglang:ttft")]
    assert ttft == list(range(ttft[0], ttft[0] + 8))
    assert page.count("# TYPE sglang:running") == 1


def test_what_is_no_sample_is_left_out() -> None:
    text = 'x{instance="theirs",a="b"} 1 123\n<html>\ny nonsense\nz{} 4\n{} 5\nw{a="} x"} 6\n'
    page = merged({InstanceId('http://"\\:1'): text})
    families = {family.name: family for family in text_string_to_metric_families(page)}
    assert families["x"].samples[0].labels == {
        "instance": 'http://"\\:1',
        "exported_instance": "theirs",
        "a": "b",
    }
    assert set(families) == {"memserve_engine_up", "x", "z", "w"}


def test_one_instance_cannot_fill_the_page() -> None:
    text = "".join(f"m{i} 1\n" for i in range(engine.MAX_SAMPLES + 50))
    page = merged({A: text})
    assert page.count("\nm") == engine.MAX_SAMPLES + 1  # and memserve_engine_up


def test_a_label_takes_so_many_values_and_no_more() -> None:
    reasons = Bounded(2)
    assert [reasons(word) for word in "abca"] == ["a", "b", OTHER, "a"]


def test_labels_of_who_left_go_after_a_while() -> None:
    registry = CollectorRegistry()
    counter = Counter("moved", "-", ("src", "dst"), registry=registry)
    departed = Departed((counter,), remember_s=10)
    for pair in ((A, B), (B, C), (C, A)):
        counter.labels(*pair).inc()
        departed.used(pair)

    def pairs() -> set[str]:
        samples = [s for family in counter.collect() for s in family.samples]
        return {s.labels["src"] + s.labels["dst"] for s in samples}

    departed.left(A, 0.0)
    departed.left(B, 0.0)
    departed.returned(B)
    departed.sweep(9.0)
    assert pairs() == {A + B, B + C, C + A}
    departed.sweep(10.0)
    assert pairs() == {B + C}
    departed.sweep(11.0)
    counter.labels(A, B).inc()
    departed.used((A, B))
    departed.sweep(100.0)
    assert pairs() == {B + C, A + B}


def test_a_pool_of_several_ranks() -> None:
    rank = {"total_blocks": 10.0, "free_blocks": 4.0, "ready_blocks": 6.0, "block_bytes": 100.0}
    rank["evicted_pages_total"] = 3.0
    pool = pool_state(InstanceStats(0, {}, [rank, rank]))
    assert (pool.total_blocks, pool.total_bytes, pool.used_bytes) == (20, 2000, 1200)
    assert pool.blocks == {"free": 8, "filling": 0, "ready": 12, "orphan": 0, "withdrawn": 0}
    assert pool.evicted == {"room": 6, "named": 0, "cleared": 0}
    assert pool_state(InstanceStats(0, {}, [{}])).total_bytes == 0


def test_beginnings_of_prompts() -> None:
    assert excerpt(Texts(("x" * 1000,))) == "x" * EXCERPT_CHARACTERS
    assert excerpt(TokenIds(([1, 2, 3],))) == "[1, 2, 3]"
    assert excerpt(Chat({"messages": [{"content": "no"}, {"content": "hi"}]})) == "hi"
    assert excerpt(Chat({"messages": [{"content": [{"text": "t"}]}], "cache_salt": "s"})) is None
    assert excerpt(Chat({})) is None
    assert excerpt(Opaque("image")) is None
