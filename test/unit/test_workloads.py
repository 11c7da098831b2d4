"""Workloads are functions of their seed, are read as they are written, and fit together."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from sglang_memserve.errors import ConfigError

from benchmark.workloads import registry, sharegpt
from benchmark.workloads.registry import get, warm_up
from benchmark.workloads.request import Workload, chain, first, read, write

# ShareGPT's text is not here.
GENERATED = [name for name in registry.WORKLOADS if name != "sharegpt"]


@pytest.mark.parametrize("name", GENERATED)
def test_the_same_seed_gives_the_same_requests(name: str) -> None:
    assert get(name, 7) == get(name, 7)
    assert get(name, 7).turns != get(name, 8).turns


@pytest.mark.parametrize("name", GENERATED)
def test_a_file_gives_back_what_was_written(name: str, tmp_path: Path) -> None:
    workload = get(name, 1)
    write(workload, tmp_path / "w.jsonl")
    assert get(str(tmp_path / "w.jsonl"), 1).turns == workload.turns


@pytest.mark.parametrize("workload", [*(get(name, 3) for name in GENERATED), warm_up()])
def test_prompts_fit_the_model(workload: Workload) -> None:
    """8,192 positions; a token is hardly less than two and a half characters of this text."""
    for turn in workload.turns:
        before = chain(workload.turns, turn)
        assert [t.after for t in before] == [None, *(t.turn for t in before[:-1])]
        characters = sum(len(m.content) for t in before for m in t.messages)
        assert characters / 2.5 + sum(t.max_tokens for t in before) < 8192


def test_the_control_shares_nothing() -> None:
    texts = [turn.messages[0].content[:24] for turn in get("control", 1).turns]
    assert len(set(texts)) == len(texts)


def test_the_first_requests_are_whole_conversations_so_far() -> None:
    cut = first(get("chat", 1), 30)
    assert len(cut.turns) == 30
    assert all(chain(cut.turns, turn) for turn in cut.turns)


def test_by_default_a_turn_follows_the_line_before(tmp_path: Path) -> None:
    file = tmp_path / "own.jsonl"
    line = '{"conversation": "%s", "turn": %d, "arrival_s": 0, "max_tokens": 1, '
    line += '"messages": [{"role": "user", "content": "hi"}]%s}\n'
    lines = [("a", 0, ""), ("b", 0, ""), ("a", 3, ""), ("a", 4, ', "after": 0'), ("b", 1, "")]
    file.write_text("".join(line % values for values in lines))
    assert [turn.after for turn in read(file).turns] == [None, None, 0, 0, 0]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is empty"),
        ("nonsense", "line 1"),
        ('{"conversation": "a"}', "missing required field"),
        (
            '{"conversation": "a", "turn": 1, "arrival_s": 0, "max_tokens": 1, "after": 0, '
            '"messages": [{"role": "user", "content": "hi"}]}',
            "comes after turn 0",
        ),
        (
            '{"conversation": "a", "turn": 1, "arrival_s": -1, "max_tokens": 1, '
            '"messages": [{"role": "user", "content": "hi"}]}',
            "a time from 0 on",
        ),
    ],
)
def test_a_file_that_is_none_is_refused(text: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "w.jsonl").write_text(text)
    with pytest.raises(ConfigError, match=says):
        read(tmp_path / "w.jsonl")


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no workload and no file 'chatt'"):
        get("chatt", 1)
    for name in ("react", "documents"):
        with pytest.raises(ConfigError, match="must hold"):
            get(name, 1, tmp_path)


def test_conversations_are_read_from_a_file_that_is_cut_off(tmp_path: Path) -> None:
    asked = [f"Question {number}? " + "Why? " * 100 for number in range(5)]
    parts = [
        {"from": who, "value": text}
        for said in asked
        for who, text in (("human", said), ("gpt", "word " * 200))
    ]
    talk = {"id": "x", "conversations": parts}
    odd = {"id": "y", "conversations": parts[1:]}
    text = json.dumps([talk, odd, *[talk] * 30])
    (tmp_path / sharegpt.FILE).write_text(text[: -len(json.dumps(talk)) // 2])
    made = sharegpt.make(1, tmp_path, conversations=20)
    assert {turn.max_tokens for turn in made.turns} == {25}
    assert [turn.messages[0].content for turn in made.turns[:4]] == asked[:4]
    with pytest.raises(ConfigError, match="has only 30"):
        sharegpt.make(1, tmp_path, conversations=40)
