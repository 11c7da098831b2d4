"""sglang-router's command lines and files of settings, as this router understands them."""

from __future__ import annotations

from pathlib import Path

import pytest
from sglang_memserve.errors import ConfigError
from sglang_memserve.router import flags
from sglang_memserve.router.config import RouterConfig, StaticInstance, parse_args
from sglang_memserve.types import InstanceId, Role


def test_a_pd_line_of_sglang_router_works_as_it_is() -> None:
    argv = (
        "--pd-disaggregation --prefill http://p:1 9000 --prefill http://p:2 none "
        "--decode http://d:1 --decode http://d:2 --policy cache_aware --prefill-policy cache_aware "
        "--decode-policy=power_of_two --host 0.0.0.0 --port 8000 --request-timeout-secs 1800 "
        "--max-payload-size 1048576 --log-level warn --worker-startup-timeout-secs 600 "
        "--prometheus-duration-buckets 0.1 0.5 1 --cache-threshold=0.5 --dp-aware "
        "--backend sglang --api-key k --tokenizer-path m"
    )
    config = parse_args(argv.split())
    assert config == RouterConfig(
        host="0.0.0.0",
        port=8000,
        instances=(
            StaticInstance(InstanceId("http://p:1"), Role.PREFILL),
            StaticInstance(InstanceId("http://p:2"), Role.PREFILL),
            StaticInstance(InstanceId("http://d:1"), Role.DECODE),
            StaticInstance(InstanceId("http://d:2"), Role.DECODE),
        ),
        model_path="m",
        api_key="k",
        request_timeout_s=1800.0,
        max_body_bytes=2**20,
        log_level="warning",
        warning=config.warning,
    )
    idle = "pd-disaggregation prefill-policy decode-policy worker-startup-timeout-secs "
    idle += "prometheus-duration-buckets cache-threshold dp-aware"
    for flag in idle.split():
        assert config.warning.count(f"--{flag} (") == 1
    assert "\n" not in config.warning


def test_spellings_are_translated_wherever_their_value_stands() -> None:
    argv = ["--tls-cert-path", "c", "--tls-key-path=k", "--cors-allowed-origins", "http://a", "b"]
    assert flags.translate(argv).argv == [
        *("--ssl-certfile", "c", "--ssl-keyfile=k"),
        *("--cors-origin", "http://a", "b"),
    ]


def test_a_bounded_queue_by_the_other_names() -> None:
    argv = ["--queue-size", "7", "--queue-timeout-secs", "5", "--shutdown-grace-period-secs", "9"]
    config = parse_args([*argv, "--max-concurrent-requests", "12"])
    assert (config.queue_size, config.queue_timeout_s, config.drain_timeout_s) == (7, 5.0, 9.0)
    assert (config.max_concurrent_requests, config.warning) == (12, "")
    for unlimited in (["--max-concurrent-requests", "-1"], ["--max-concurrent-requests=-1"]):
        config = parse_args([*unlimited, "--port", "9"])
        assert config.max_concurrent_requests == RouterConfig().max_concurrent_requests
        assert config.port == 9
        assert "--max-concurrent-requests -1 (" in config.warning


def test_nothing_is_warned_of_in_lines_of_our_own() -> None:
    assert parse_args(["--instance", "http://a:1", "--policy", "cost"]).warning == ""


@pytest.mark.parametrize("flag", flags.REFUSED)
def test_what_cannot_be_left_out_is_refused_in_a_sentence(flag: str) -> None:
    for argv in ([flag, "x"], [f"{flag}=x"], ["--port", "1", flag]):
        with pytest.raises(ConfigError, match=f"{flag}: .+"):
            parse_args(argv)


def test_flags_of_three_kinds_are_told_apart() -> None:
    kinds = (flags.SPELLINGS, flags.WITHOUT_EFFECT, flags.REFUSED)
    every = [flag for kind in kinds for flag in kind]
    assert len(every) == len(set(every))
    assert all(flag.startswith("--") and flag == flag.lower() for flag in every)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--backend openai", "SGLang servers"),
        ("--backend", "SGLang servers"),
        ("--policy bucket", "use cost"),
        ("--config", "--config ."),
        ("--config /no/such/file", "No such file"),
        ("--config a --config b", "more than once"),
    ],
)
def test_mistakes(argv: str, message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        parse_args(argv.split())
    assert message in str(raised.value)


FILE = """
# a comment
port: 8000
policy: cache_aware
prefill:
  - http://p:1
  - [http://p:2, 9000]
decode: [http://d:1]
worker_urls: []
pd-disaggregation: true
dp_aware: false
bypass_tokens: 0
api_key:
"""


def test_a_file_and_the_command_line_together(tmp_path: Path) -> None:
    path = tmp_path / "router.yaml"
    path.write_text(FILE)
    config = parse_args(["--port", "9000", f"--config={path}", "--decode", "http://d:2"])
    assert config == RouterConfig(
        port=9000,
        bypass_tokens=0,
        instances=(
            StaticInstance(InstanceId("http://p:1"), Role.PREFILL),
            StaticInstance(InstanceId("http://p:2"), Role.PREFILL),
            StaticInstance(InstanceId("http://d:1"), Role.DECODE),
            StaticInstance(InstanceId("http://d:2"), Role.DECODE),
        ),
        warning=config.warning,
    )
    assert "--pd-disaggregation" in config.warning and "--dp-aware" not in config.warning


def test_an_empty_file_says_nothing(tmp_path: Path) -> None:
    path = tmp_path / "empty.yaml"
    path.write_text("")
    assert parse_args(["--config", str(path)]) == RouterConfig()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n- b", "must be a mapping"),
        ("just words", "must be a mapping"),
        ("{", "no YAML"),
        ("a: !!python/object/apply:os.system ['true']", "no YAML"),
        ("\x00", "no YAML"),
        ("7: x", "7 is no setting"),
        ("config: other.yaml", "'config' is no setting"),
        ("port: {a: 1}", "port has a value"),
        ("decode: http://a:1\ndecode: http://b:1", "decode named twice"),
        ("prefill: [[[x]]]", "prefill has a value"),
        ("prefill: [true]", "prefill has a value"),
        ("polcy: cost", "unrecognized arguments"),
        ("when: 2026-01-01", "when has a value"),
        ("service-discovery: true", "register themselves"),
        ("[" * 100_000, "no YAML"),
        ("x: " + "y" * 2**20, "larger than"),
    ],
)
def test_files_that_are_wrong(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as raised:
        parse_args(["--config", str(path)])
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ConfigError, match="no YAML"):
        parse_args(["--config", str(path)])
