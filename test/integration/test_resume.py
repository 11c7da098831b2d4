"""A real instance is killed in mid-stream: the client's stream is the one it would have been."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests
from integration.harness import generate, launch_cluster

pytestmark = pytest.mark.integration

FLAGS = ["--mempool-dram", "64MiB", "--policy", "round-robin"]


def kill_tree(pid: int) -> None:
    server = psutil.Process(pid)
    for process in [*server.children(recursive=True), server]:
        os.kill(process.pid, signal.SIGKILL)


def test_a_stream_whose_instance_is_killed_goes_on(
    tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("resume")
    ids = [3 + (7 * i) % 240 for i in range(300)]
    with launch_cluster(tiny_model, folder, prefill=0, decode=0, both=2, flags=FLAGS) as cluster:
        expected = generate(cluster.url, ids, 400)
        body = {
            "input_ids": ids,
            "stream": True,
            "sampling_params": {"temperature": 0, "max_new_tokens": 400, "ignore_eos": True},
        }
        frames: list[Any] = []
        with requests.post(
            f"{cluster.url}/generate", json=body, stream=True, timeout=120
        ) as response:
            victim = response.headers["x-memserve-decode"]
            for line in response.iter_lines():
                if not line:
                    continue
                frames.append(line.removeprefix(b"data: "))
                if len(frames) == 40:
                    kill_tree(next(s.pid for s in cluster.instances if s.url == victim))
        assert frames.pop() == b"[DONE]"
        values = [json.loads(frame) for frame in frames]
        assert "error" not in values[-1], values[-1]
        assert values[-1]["output_ids"] == expected.output_ids
        assert values[-1]["text"] == expected.text
        meta = values[-1]["meta_info"]
        assert (meta["prompt_tokens"], meta["completion_tokens"]) == (300, 400)
        assert len({value["meta_info"]["id"] for value in values}) == 1
        metrics = requests.get(f"{cluster.url}/metrics", timeout=10).text
        assert 'memserve_resumes_total{outcome="resumed"} 1.0' in metrics
