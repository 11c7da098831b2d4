"""Servers that many tests share: started when the first test asks, ended with the run.

``tiny_model``, ``demo_model``  model folders, made once and kept under ``.cache``
``cluster``                     2 prefill, 1 decode and a router, on the tiny model
``stock``                       one SGLang instance without MemServe, on the same model

A test that kills or floods something starts its own with ``harness.launch_cluster``.
"""

from __future__ import annotations

import gc
import hashlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from integration.harness import RunningCluster, Server, launch_cluster, launch_server

ROOT = Path(__file__).resolve().parents[2]
MODELS = ROOT / ".cache" / "models"
_MAKE_LIMIT_S = 240.0


def _make(module: str, folder: Path) -> Path:
    command = [sys.executable, "-m", f"sglang_memserve.{module}", str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=_MAKE_LIMIT_S)
    assert result.returncode == 0, result.stderr
    return folder


@pytest.fixture(scope="module", autouse=True)
def _nothing_left_open() -> Iterator[None]:
    """A connection that a test forgot is told of at the end of its file, not of the whole run."""
    yield
    gc.collect()


@pytest.fixture(scope="session")
def tiny_model() -> Path:
    """A tiny random llama, one token a byte; changes with the code that makes it."""
    source = ROOT / "python" / "sglang_memserve" / "tiny_model.py"
    version = hashlib.sha256(source.read_bytes()).hexdigest()[:8]
    return _make("tiny_model", MODELS / f"tiny-{version}")


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """SmolLM2-135M-Instruct."""
    return _make("demo_model", MODELS / "SmolLM2-135M-Instruct")


@pytest.fixture(scope="session")
def cluster(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningCluster]:
    """Two prefill instances, so that prefill to prefill can be tried. A policy that predicts
    nothing, so that what moves depends on no timing: a tiny model computes faster than anything
    can be moved, and tests want to see it move."""
    flags = ["--mempool-dram", "256MiB", "--policy", "prefix", "--router-arg=--bypass-tokens=0"]
    folder = tmp_path_factory.mktemp("cluster")
    with launch_cluster(tiny_model, folder, prefill=2, flags=flags) as running:
        yield running


@pytest.fixture(scope="session")
def stock(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("stock")
    with launch_server(tiny_model, folder, name="stock", flags=["--no-mempool"]) as server:
        yield server
