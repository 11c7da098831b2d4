"""Answers of several router processes put together."""

from __future__ import annotations

import orjson
import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from sglang_memserve.errors import ConfigError
from sglang_memserve.router.config import RouterConfig
from sglang_memserve.router.processes import merge
from sglang_memserve.router.processes.supervisor import Patience


def exposed(count: float, only_here: str = "") -> bytes:
    registry = CollectorRegistry()
    requests = Counter("memserve_requests", "Answered", ["route"], registry=registry)
    requests.labels('/odd} "route" {').inc(count)
    seconds = Histogram("memserve_ttft_seconds", "First byte", buckets=(1.0,), registry=registry)
    seconds.observe(count)
    Gauge("memserve_requests_in_flight", "Now", registry=registry).set(count)
    Gauge("memserve_tree_nodes", "Nodes", registry=registry).set(count)
    Counter("sglang:prompt_tokens", "Of an engine", registry=registry).inc(count)
    if only_here:
        Counter(only_here, "Elsewhere not yet", registry=registry).inc(count)
    return generate_latest(registry)


def test_own_work_is_there_once_a_process_and_the_rest_once() -> None:
    text = merge.metrics(1, {0: exposed(3), 1: exposed(4, "memserve_late"), 2: exposed(5)})
    samples: dict[str, list[tuple[str | None, float]]] = {}
    for family in text_string_to_metric_families(text.decode()):
        for sample in family.samples:
            samples.setdefault(sample.name, []).append((sample.labels.get("process"), sample.value))
            if sample.name == "memserve_requests_total":
                assert sample.labels["route"] == '/odd} "route" {'
    assert samples["memserve_requests_total"] == [("0", 3), ("1", 4), ("2", 5)]
    assert samples["memserve_requests_in_flight"] == [("0", 3), ("1", 4), ("2", 5)]
    assert samples["memserve_ttft_seconds_sum"] == [("0", 3), ("1", 4), ("2", 5)]
    assert len(samples["memserve_ttft_seconds_bucket"]) == 6
    assert samples["memserve_tree_nodes"] == [(None, 4)]
    assert samples["sglang:prompt_tokens_total"] == [(None, 4)]
    assert samples["memserve_late_total"] == [("1", 4)]


def test_requests_in_flight_add_up_and_the_worst_source_counts() -> None:
    def said(**fields: object) -> bytes:
        return orjson.dumps({"workers": [{"url": "http://a", **fields}], "total": 1})

    own = said(in_flight_requests=1, in_flight_prefill_tokens=10, source="exact")
    others = [
        said(in_flight_requests=2, in_flight_prefill_tokens=20, source="degraded"),
        said(in_flight_requests=4, in_flight_prefill_tokens=0, source=None),
        orjson.dumps({"workers": [], "total": 0}),
    ]
    body = orjson.loads(merge.workers(own, others))
    assert body["processes"] == 4 and body["total"] == 1
    assert body["workers"] == [
        {
            "url": "http://a",
            "in_flight_requests": 7,
            "in_flight_prefill_tokens": 30,
            "source": "degraded",
        }
    ]


@pytest.mark.parametrize(("others", "known"), [([], True), ([True, True], True), ([False], False)])
def test_an_instance_is_known_when_all_know_it(others: list[bool], known: bool) -> None:
    told = [orjson.dumps({"known": one}) for one in others]
    assert orjson.loads(merge.heartbeats(b'{"known":true}', told)) == {"known": known}
    assert orjson.loads(merge.heartbeats(b'{"known":false}', told)) == {"known": False}


def test_the_pause_before_a_start_doubles_up_to_its_limit() -> None:
    patience = Patience(least_backoff_s=0.5, most_backoff_s=4.0)
    assert [patience.backoff_s(n) for n in range(6)] == [0.0, 0.5, 1.0, 2.0, 4.0, 4.0]
    assert patience.backoff_s(10**6) == 4.0


@pytest.mark.parametrize("count", [0, -1, 65])
def test_the_number_of_processes_is_bounded(count: int) -> None:
    with pytest.raises(ConfigError, match="--processes"):
        RouterConfig(processes=count)
