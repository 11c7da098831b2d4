"""What the launcher refuses and adds, without starting an engine."""

from __future__ import annotations

import argparse
import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from sglang_memserve import launch_server
from sglang_memserve.config import InstanceConfig
from sglang_memserve.errors import ConfigError
from sglang_memserve.plugin import flags
from sglang_memserve.types import Eviction, Role

MODEL = ["--model-path", "org/name"]


def test_own_flags_are_taken_and_the_rest_stays_in_order() -> None:
    line = "--tp 2 --role decode --page-size=32 --router-url http://a:1 --new-flag x"
    line += " --router-url http://b:2 http://c:3"
    own, rest = launch_server.parse([*line.split(), *MODEL])
    assert rest == ["--tp", "2", "--page-size=32", "--new-flag", "x", *MODEL]
    assert own.role == "decode"
    assert own.router_url == ["http://a:1", "http://b:2", "http://c:3"]


def test_a_prefix_of_our_flag_is_not_ours() -> None:
    _, rest = launch_server.parse(["--rol", "x", "--mempool", "y"])
    assert rest == ["--rol", "x", "--mempool", "y"]


@pytest.mark.parametrize(
    ("argv", "reason"),
    [
        (["--enable-hierarchical-cache"], "only one of them"),
        (["--disaggregation-mode", "prefill"], "--role prefill"),
        (["--disaggregation-mode=decode"], "--role"),
        (["--radix-cache-backend", "x"], "own radix cache"),
        (["--disable-radix-cache"], "cannot work without it"),
        (["--unified-cache-external-linker-config={}"], "MemPool is the external linker"),
        (["--dp", "2"], "one instance for each replica"),
        (["--tokenizer-worker-num", "2"], "single HTTP process"),
        (["--nnodes", "two"], "nnodes"),
    ],
)
def test_refused(argv: list[str], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        flags.refuse_incompatible(MODEL + argv)


def test_not_refused() -> None:
    flags.refuse_incompatible([*MODEL, "--disaggregation-mode", "null", "--dp", "1", "--unknown"])


def test_engine_flags() -> None:
    read = flags.read_engine_flags([*MODEL, "--port=99", "--tp", "2", "--other", "--host", "::"])
    assert (read.model_path, read.port, read.tp_size, read.url_host) == ("org/name", 99, 2, "::1")
    for argv in ([], [*MODEL, "--port", "0"], [*MODEL, "--port", "x"]):
        with pytest.raises(ConfigError):
            flags.read_engine_flags(argv)


def test_the_linker_gets_the_settings() -> None:
    own, rest = launch_server.parse(
        [*MODEL, "--mempool-dram", "1MiB", "--role", "prefill", "--mempool-eviction", "lru"]
    )
    config = launch_server.build_config(own, flags.read_engine_flags(rest), "/tmp/memserve-x")
    words = flags.linker_flags(config)
    linker = json.loads(words[words.index("--unified-cache-external-linker-config") + 1])
    assert InstanceConfig.from_json(linker["linker_extra_config"]) == config
    assert config.url == "http://127.0.0.1:30000"
    assert (config.role, config.mempool_dram_bytes) == (Role.PREFILL, 1 << 20)
    assert config.mempool_eviction is Eviction.LRU


def test_dram_is_the_instances_and_divided_among_its_ranks(tmp_path: Path) -> None:
    """One page of this model: 4 layers x K and V x 8 heads x 64 x 2 B x 16 tokens = 128 KiB."""
    model = {"num_attention_heads": 8, "hidden_size": 512, "num_hidden_layers": 4}
    (tmp_path / "config.json").write_text(json.dumps(model))
    argv = ["--model-path", str(tmp_path), "--tp", "2", "--mempool-dram"]
    own, rest = launch_server.parse([*argv, "256KiB"])
    config = launch_server.build_config(own, flags.read_engine_flags(rest), "/tmp/memserve-x")
    assert [config.rank_dram_bytes(ranks) for ranks in (1, 2, 3)] == [262144, 131072, 87381]
    launch_server.build_config(*_parsed([*argv, "128KiB"]))
    with pytest.raises(ConfigError, match=r"each of 2 ranks gets 65535 bytes.* 65536 bytes"):
        launch_server.build_config(*_parsed([*argv, "131071"]))


def _parsed(argv: list[str]) -> tuple[argparse.Namespace, flags.EngineFlags, str]:
    own, rest = launch_server.parse(argv)
    return own, flags.read_engine_flags(rest), "/tmp/memserve-x"


def test_model_folders(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no config\.json"):
        launch_server.require_model(str(tmp_path))
    for wrong in (str(tmp_path / "nope"), "./nope", "nope", "a/b/c"):
        with pytest.raises(ConfigError, match="does not exist"):
            launch_server.require_model(wrong)
    (tmp_path / "config.json").write_text("{}")
    launch_server.require_model(str(tmp_path))


def test_pool_tokens(tmp_path: Path) -> None:
    assert flags.suitable_pool_tokens(str(tmp_path)) == 16384
    for content in ("[]", "{", '{"num_attention_heads": 0, "hidden_size": 1}'):
        (tmp_path / "config.json").write_text(content)
        with_default = flags.suitable_pool_tokens(str(tmp_path))
        assert with_default == 16384
    model = {"num_attention_heads": 8, "hidden_size": 512, "num_hidden_layers": 4}
    (tmp_path / "config.json").write_text(json.dumps(model))
    assert flags.suitable_pool_tokens(str(tmp_path)) % 16 == 0


def test_a_port_in_use() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1:{port}"):
            launch_server.require_free_port("127.0.0.1", port)
    launch_server.require_free_port("127.0.0.1", port)


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["--role", "router", *MODEL], "error: unknown role 'router'"),
        (["--model-path", "/nope"], "error: model folder /nope does not exist"),
        ([], "error: --model-path is required"),
        ([*MODEL, "--disable-radix-cache"], "error: --disable-radix-cache cannot be used"),
    ],
)
def test_one_line_and_a_status(argv: list[str], line: str) -> None:
    pytest.importorskip("sglang")
    done = subprocess.run(
        [sys.executable, "-m", "sglang_memserve.launch_server", *argv],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == launch_server.EXIT_BAD_INPUT
    assert done.stderr.startswith(line)
    assert done.stderr.count("\n") == 1
