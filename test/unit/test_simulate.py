"""The simulator: traces and profiles as they are read, and the command."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from sglang_memserve.errors import ConfigError
from sglang_memserve.router.simulate import trace
from sglang_memserve.router.simulate.command import main, parse_args, parse_shape
from sglang_memserve.router.simulate.fleet import NAMES
from sglang_memserve.router.simulate.profile import load, shipped
from sglang_memserve.router.simulate.report import spread
from sglang_memserve.router.simulate.trace import Arrival
from unit.plain_instance import PLAIN


def line(**changed: object) -> str:
    told = {"timestamp": 0, "input_length": 600, "output_length": 5, "hash_ids": [1, 2]}
    return json.dumps(told | changed)


def trace_file(folder: Path, *lines: str) -> Path:
    file = folder / "trace.jsonl"
    file.write_text("\n".join(lines) + "\n")
    return file


# -- traces --


def test_a_trace_begins_at_its_first_request_whatever_the_order(tmp_path: Path) -> None:
    file = trace_file(tmp_path, line(timestamp=9000), "", line(timestamp=7000, session="s"))
    first, second = trace.read(file)
    assert (first.at_s, first.session) == (0.0, "s")
    assert (second.at_s, second.prompt_tokens, second.output_tokens) == (2.0, 600, 5)


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ("{", "line 2: Input data was truncated"),
        ("[]", "line 2: Expected `object`"),
        (line(input_length="600"), "line 2: Expected `int`, got `str` - at `$.input_length`"),
        (line(input_length=0), "line 2: input_length is 0"),
        (line(output_length=0), "line 2: output_length is 0"),
        (line(hash_ids=[1]), "line 2: 1 hash_ids for 600 tokens in blocks of 512"),
        (
            line(answered_hash_ids=[1, 2, 3]),
            "line 2: 3 answered_hash_ids for 605 tokens in blocks of 512: there must be 2",
        ),
        (line(answered_hash_ids=[2, 3]), "line 2: answered_hash_ids must begin with the 1 "),
        ('{"timestamp": 0}', "line 2: Object missing required field"),
        (json.dumps("\udfff"), "line 2: "),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, bad: str, says: str) -> None:
    with pytest.raises(ConfigError) as raised:
        trace.read(trace_file(tmp_path, line(), bad))
    assert says in str(raised.value)


def test_an_empty_or_absent_trace_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no request"):
        trace.read(trace_file(tmp_path, ""))
    with pytest.raises(ConfigError, match="No such file"):
        trace.read(tmp_path / "absent")


def test_equal_blocks_at_the_beginning_are_equal_pages() -> None:
    one = trace.keyed(Arrival(0.0, 1100, 1, (5, 6, 7)), 128).chains[0]
    two = trace.keyed(Arrival(0.0, 1100, 1, (5, 6, 8)), 128).chains[0]
    other = trace.keyed(Arrival(0.0, 1100, 1, (4, 6, 7)), 128).chains[0]
    # 1,099 tokens can be cached: eight pages of 128, four of them a block.
    assert len(one.keys) == 8 and one.keys == two.keys
    assert not set(one.keys) & set(other.keys)
    assert trace.keyed(Arrival(0.0, 512, 1, (5,)), 128).pages == 3


def test_spreading_and_scaling_keep_every_request() -> None:
    arrivals = [Arrival(float(number), 10, 1, (number,)) for number in range(50)]
    later = trace.spread(arrivals, 3.0, seed=1)
    assert later == trace.spread(arrivals, 3.0, seed=1) != trace.spread(arrivals, 3.0, seed=2)
    assert {one.blocks for one in later} == {one.blocks for one in arrivals}
    assert all(0 <= one.at_s - one.blocks[0] <= 3 for one in later)
    assert [one.at_s for one in trace.at_rate(arrivals, 2.0)] == [one.at_s / 2 for one in arrivals]


# -- profiles --


@pytest.mark.parametrize("name", shipped())
def test_a_shipped_profile_says_where_it_is_from(name: str) -> None:
    profile = load(name)
    assert profile.name == name and profile.source and profile.estimates


def test_a_profile_of_ones_own(tmp_path: Path) -> None:
    file = tmp_path / "own.json"
    file.write_bytes(msgspec.json.encode(PLAIN))
    assert load(str(file)) == PLAIN


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"hbm_tokens": -1}, "hbm_tokens"),
        ({"kv_bytes_per_token": 0}, "kv_bytes_per_token must be positive"),
        ({"colour": "blue"}, "unknown field `colour`"),
        ({"link": {"latency_s": 0.1}}, "bytes_per_s"),
    ],
)
def test_a_wrong_profile_is_refused(tmp_path: Path, changed: dict[str, object], says: str) -> None:
    file = tmp_path / "own.json"
    file.write_text(json.dumps(msgspec.to_builtins(PLAIN) | changed))
    with pytest.raises(ConfigError, match=says):
        load(str(file))


def test_an_unknown_profile_names_those_that_are_known() -> None:
    with pytest.raises(ConfigError, match="cpu-smollm2-135m"):
        load("no-such-profile")


# NVIDIA's table for Llama 3.3 70B FP8 on two H100, as the profile cites it: lengths of input and
# output, tokens generated a second under full load.
PUBLISHED = [
    (128, 128, 6378),
    (128, 2048, 6651),
    (500, 2000, 5222),
    (1000, 1000, 4205),
    (1000, 2000, 4146),
    (2048, 128, 762),
    (2048, 2048, 3082),
    (5000, 500, 898),
    (20000, 2000, 437),
]


@pytest.mark.parametrize(("prompt", "output", "published"), PUBLISHED)
def test_the_h100_profile_predicts_what_is_published(
    prompt: int, output: int, published: int
) -> None:
    profile = load("h100-llama-70b")
    context = prompt + output / 2
    streams = profile.hbm_tokens / context
    step_s = profile.decode.fixed_s + streams * (
        profile.decode.stream_s + context * profile.decode.context_token_s
    )
    request_s = profile.prefill.tokens_s(prompt, 0) + output * step_s / streams
    assert output / request_s == pytest.approx(published, rel=0.2)


# -- the command --


@pytest.mark.parametrize(
    ("name", "roles"),
    [("1P2D", "pdd"), ("3B", "bbb"), ("1p1D1B", "pdb"), ("2B1D", "bbd")],
)
def test_shapes(name: str, roles: str) -> None:
    assert [role.value[0] for role in parse_shape(name).roles] == list(roles)


@pytest.mark.parametrize("name", ["", "4", "4X", "0B", "4P", "9999B", "1P 1D", "P"])
def test_wrong_shapes(name: str) -> None:
    with pytest.raises(ConfigError, match="shape"):
        parse_shape(name)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--policy cost,best", "best"),
        ("--rate 0", "rate"),
        ("--rate x", "rate"),
        ("--requests 0", "requests"),
        ("--spread -1", "spread"),
        ("--until nan", "until"),
        ("--heartbeat-s 0", "heartbeat"),
        ("--bypass-tokens -5", "--bypass-tokens"),
        ("--hbm-tokens 99999999999999999999999", "--hbm-tokens"),
        ("--dram 99999999999TiB", "--dram"),
        ("--json /proc/nobody/file.json", "cannot be written"),
        ("--page-tokens 100", "must divide"),
        ("--dram 3parsecs", "3parsecs"),
        ("--eviction mru", "mru"),
        ("--profile nope", "nope"),
        ("--decode 0", "nobody decodes"),
    ],
)
def test_a_wrong_command_line_says_what_is_wrong(
    words: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--trace", "t", *words.split()]) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "shape"),
    [
        ("", "1P1D"),
        ("--prefill 0 --decode 0 --both 10", "10B"),
        ("--both 2", "2B"),
        ("--both 2 --decode 1", "1D2B"),
        ("--prefill 3", "3P1D"),
        ("--prefill 3 --both 0", "3P1D"),
    ],
)
def test_the_three_numbers_are_a_shape(words: str, shape: str) -> None:
    assert [one.name for one in parse_args(["--trace", "t", *words.split()]).shapes] == [shape]


def test_one_says_the_shape_or_its_numbers() -> None:
    with pytest.raises(ConfigError, match="say --shape, or --prefill"):
        parse_args(["--trace", "t", "--shape", "2B", "--both", "2"])


def test_figures_of_a_part_say_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = trace_file(tmp_path, line(), line(input_length=51200, hash_ids=list(range(100))))
    words = ["--trace", str(file), "--both", "1", "--hbm-tokens", "4096"]
    assert main(words) == 0
    shown = capsys.readouterr().out
    # Nor does the bound count who fits nowhere.
    alone, both = (shown.split(key)[1].split()[0] for key in ("TTFT mean ", "  TTFT "))
    assert float(alone.rstrip(",")) == pytest.approx(float(both), abs=0.1)
    assert "1 too long" in shown and "these are of the 1 requests that finished alone" in shown


def little_trace(folder: Path) -> Path:
    """Forty turns of eight conversations, with a system prompt that all share."""
    lines = []
    for number in range(40):
        talk, turn = number % 8, number // 8
        hashes = [0, *(100 * (talk + 1) + block for block in range(2 + turn))]
        tokens = 512 * len(hashes) - 100
        lines.append(
            line(
                timestamp=number * 500,
                input_length=tokens,
                output_length=40,
                hash_ids=hashes,
                session=f"talk-{talk}",
            )
        )
    return trace_file(folder, *lines)


def test_a_trace_goes_through_every_policy_and_shape(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = little_trace(tmp_path), tmp_path / "out.json"
    words = ["--trace", str(file), "--policy", ",".join(NAMES), "--shape", "1P1D,2B"]
    assert main([*words, "--rate", "1,4", "--json", str(out)]) == 0
    shown = capsys.readouterr().out
    told = json.loads(out.read_bytes())
    assert len(told["results"]) == 2 * 2 * len(NAMES)
    for one in told["results"]:
        assert one["finished"] == one["requests"] == 40 and one["unfinished"] == 0
        assert sum(one["tokens"].values()) == one["prompt_tokens"]
        assert one["tokens"]["computed"] < one["prompt_tokens"]
        assert f"{one['policy']}, {one['shape']}, {one['rate']:g} x" in shown
    assert told["profile"]["name"] == "h100-llama-70b"
    best = told["bound"]
    assert best["ttft_ms"]["mean"] <= min(one["ttft_ms"]["mean"] for one in told["results"])
    assert "at best, each request alone and all that came before in HBM: TTFT mean " in shown
    assert "TTFT mean" in shown


def test_the_module_runs_and_stops_early(tmp_path: Path) -> None:
    words = ["--trace", str(little_trace(tmp_path)), "--until", "4", "--requests", "30"]
    done = subprocess.run(
        [sys.executable, "-m", "sglang_memserve.simulate", *words],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "of 30 requests" in done.stdout and "(0 not finished" not in done.stdout


def test_a_reader_that_has_enough_gets_no_traceback(tmp_path: Path) -> None:
    words = [
        sys.executable,
        "-m",
        "sglang_memserve.simulate",
        "--trace",
        str(little_trace(tmp_path)),
    ]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as run:
        assert run.stdout is not None and run.stderr is not None
        run.stdout.close()
        assert run.stderr.read() == b""
        assert run.wait(60) == 1


def test_the_same_seed_gives_the_same_figures(tmp_path: Path) -> None:
    file = little_trace(tmp_path)

    def results(seed: int) -> object:
        out = tmp_path / "out.json"
        words = ["--trace", str(file), "--spread", "2", "--seed", str(seed), "--shape", "2P2D"]
        assert main([*words, "--json", str(out)]) == 0
        return json.loads(out.read_bytes())["results"]

    assert results(1) == results(1) != results(2)


def test_figures_that_cannot_be_written_are_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--trace", str(little_trace(tmp_path)), "--json", str(tmp_path)]
    assert main(words) == 2
    assert "--json" in capsys.readouterr().err


def test_spreads_are_of_the_values_themselves() -> None:
    assert spread([]).p99 == 0.0
    whole = spread([float(value) for value in range(1, 101)])
    assert (whole.mean, whole.p50, whole.p90, whole.p99) == (50.5, 50.0, 90.0, 99.0)
