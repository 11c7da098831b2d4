"""Simulated replays beside measured ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from sglang_memserve.errors import ConfigError

from benchmark.serving.trace import BLOCK_TOKENS, block_ids, name_of
from benchmark.serving.validate import choose, compared, line, simulated

SPREAD = {"mean": 100.0, "p50": 100.0, "p90": 100.0, "p99": 100.0}


def run_of(setup: str, **changed: Any) -> dict[str, Any]:
    told: dict[str, Any] = {"setup": setup, "workload": "chat", "rate": 2.0, "round": 0}
    told |= {"hbm_tokens": 4096, "dram_mib": 64, "requests": 2, "cached_share": 0.5}
    return told | {name: dict(SPREAD) for name in ("ttft_ms", "tpot_ms", "jct_ms")} | changed


def record(folder: Path, run: dict[str, Any]) -> None:
    """A prompt of 64 tokens, 16 generated, and later a prompt that begins with both."""
    tokens = list(range(112))
    lines = []
    for at_ms, prompt, output in ((0, 64, 17), (60_000, 96, 2)):
        whole = block_ids(tokens[: prompt + output])
        ids = block_ids(tokens[:prompt])
        told = {"timestamp": at_ms, "input_length": prompt, "output_length": output}
        lines.append(json.dumps(told | {"hash_ids": ids, "answered_hash_ids": whole}))
    (folder / name_of(run)).write_text("\n".join(lines))


@pytest.mark.parametrize(("setup", "dram_mib"), [("pool", 64), ("stock", 0)])
def test_a_recorded_replay_is_simulated(tmp_path: Path, setup: str, dram_mib: int) -> None:
    run = run_of(setup, dram_mib=dram_mib)
    record(tmp_path, run)
    found = compared(run, *simulated(run, tmp_path, "cpu-smollm2-135m"))
    ratios, told = found["simulated_over_measured"], found["simulated"]
    assert ratios["ttft_mean_ms"] == pytest.approx(told["ttft_mean_ms"] / 100.0, abs=1e-3)
    # In turn nothing is found, as the two go to different instances; ``cost`` finds prompt and
    # answer, 5 pages of 80 tokens.
    cached = 5 * BLOCK_TOKENS / (64 + 96) if setup == "pool" else 0.0
    assert told["cached_share"] == pytest.approx(cached)
    assert found["setup"] in line(found)
    assert found["bound"]["cached_share"] == pytest.approx(0.5)
    assert found["bound"]["ttft_mean_ms"] <= told["ttft_mean_ms"]


def test_a_file_of_many_set_ups_is_compared_as_far_as_it_can_be(
    capsys: pytest.CaptureFixture[str],
) -> None:
    runs = [run_of("stock-round-robin"), run_of("pool"), run_of("stock-round-robin")]
    assert choose(runs) == runs[1:2]
    assert capsys.readouterr().err.count("left out: stock-round-robin") == 1
    with pytest.raises(ConfigError, match="nothing to compare: stock-round-robin"):
        choose(runs[:1])


def test_what_the_simulator_does_not_do_is_not_compared(tmp_path: Path) -> None:
    for setup, says in (
        ("stock-round-robin", "not behind MemServe's router"),
        ("1p1d-basic", "or salted"),
        ("no-pool", "knows no --moves"),
        ("attached", "not behind"),
        ("pool", "No such file"),
    ):
        with pytest.raises(ConfigError, match=says):
            simulated(run_of(setup), tmp_path, "cpu-smollm2-135m")
