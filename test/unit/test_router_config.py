"""The router's command line."""

from __future__ import annotations

from pathlib import Path

import pytest
from sglang_memserve.errors import ConfigError
from sglang_memserve.router.__main__ import main
from sglang_memserve.router.config import RouterConfig, StaticInstance, _parser, parse_args
from sglang_memserve.router.values import Moves
from sglang_memserve.types import InstanceId, Role


def test_defaults() -> None:
    assert parse_args([]) == RouterConfig()


def test_instances_in_every_spelling() -> None:
    argv = (
        "--instance http://a:1/ --worker-urls http://b:1 http://b:2 --prefill http://p:1 9000 "
        "--prefill http://p:2 none --prefill http://p:3 --decode http://d:1"
    )
    assert parse_args(argv.split()).instances == (
        StaticInstance(InstanceId("http://a:1")),
        StaticInstance(InstanceId("http://b:1")),
        StaticInstance(InstanceId("http://b:2")),
        StaticInstance(InstanceId("http://p:1"), Role.PREFILL),
        StaticInstance(InstanceId("http://p:2"), Role.PREFILL),
        StaticInstance(InstanceId("http://p:3"), Role.PREFILL),
        StaticInstance(InstanceId("http://d:1"), Role.DECODE),
    )


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("round_robin", "round-robin"),
        ("cache_aware", "cost"),
        ("power_of_two", "least-load"),
        ("random", "round-robin"),
        ("session", "session"),
    ],
)
def test_policy_spellings(given: str, meant: str) -> None:
    assert parse_args(["--policy", given]).policy == meant


def test_everything_else() -> None:
    argv = (
        "--host 0.0.0.0 --port 8000 --bypass-tokens 0 --moves none --model-path m --api-key k "
        "--heartbeat-s 1 "
        "--expire-s 4 --request-timeout-s 9 --fetch-timeout-s 3 --max-body-bytes 1MiB "
        "--log-level DEBUG"
    )
    assert parse_args(argv.split()) == RouterConfig(
        host="0.0.0.0",
        port=8000,
        bypass_tokens=0,
        moves=Moves.NONE,
        model_path="m",
        api_key="k",
        heartbeat_s=1.0,
        expire_s=4.0,
        request_timeout_s=9.0,
        fetch_timeout_s=3.0,
        max_body_bytes=2**20,
        log_level="debug",
    )


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--port 0", "--port must be in 1..65535, got 0"),
        ("--port x", "invalid int value: 'x'"),
        ("--policy best", "unknown policy 'best': choose one of cost, prefix"),
        ("--bypass-tokens -1", "must not be negative"),
        ("--moves some", "choose one of all, from-prefill, none"),
        ("--heartbeat-s 0", "--heartbeat-s must be positive"),
        ("--request-timeout-s inf", "--request-timeout-s must be positive and finite"),
        ("--fetch-timeout-s nan", "--fetch-timeout-s must be positive and finite"),
        ("--expire-s 1", "must be longer than --heartbeat-s"),
        ("--max-body-bytes none", "malformed size"),
        ("--log-level loud", "unknown log level 'loud'"),
        ("--instance localhost:1", "malformed URL"),
        ("--prefill http://a:1 http://b:1", "takes one URL"),
        ("--instance http://a:1 --decode http://a:1", "listed more than once"),
        ("--polcy cost", "unrecognized arguments"),
        ("--policy manual", "use session"),
    ],
)
def test_mistakes_are_one_line(argv: str, message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        parse_args(argv.split())
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_help_gives_every_flag_a_meaning_and_a_default(capsys: pytest.CaptureFixture[str]) -> None:
    for action in _parser()._actions:
        flag = action.option_strings[-1]
        assert action.help, flag
        assert "default" in action.help or flag in ("--help", "--config"), flag
        assert not flag.endswith("-s") or "seconds" in action.help, flag
    with pytest.raises(SystemExit):
        parse_args(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "a whole request, in seconds (default: 600)" in shown


def test_an_unknown_flag_points_to_help() -> None:
    with pytest.raises(
        ConfigError, match=r"unrecognized arguments: --prot.*--help lists the flags"
    ):
        parse_args(["--prot", "1"])


def test_a_model_folder_that_is_none_is_refused_at_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--model-path", "/nosuch"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: --model-path /nosuch: no tokenizer.json there")
    (tmp_path / "tokenizer.json").write_text("{}")
    RouterConfig(model_path=str(tmp_path)).require_tokenizer()
    RouterConfig().require_tokenizer()


@pytest.mark.parametrize("policy", ["manual", "bucket"])
def test_a_policy_without_a_counterpart_says_where_the_session_goes(policy: str) -> None:
    with pytest.raises(ConfigError, match=r"session_id.*field of the body"):
        parse_args(["--policy", policy])
