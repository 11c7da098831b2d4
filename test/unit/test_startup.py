"""What an operator sees while a server starts, and of its flags before SGLang is imported."""

from __future__ import annotations

import importlib.util
import io
import re
import sys
import time
from types import SimpleNamespace

import pytest
import sglang_memserve.plugin
from sglang_memserve import launch_server
from sglang_memserve.startup import StartUp

LIMIT_S = 10.0


def until_lines(out: io.StringIO, count: int) -> list[str]:
    end = time.monotonic() + LIMIT_S
    while len(lines := out.getvalue().splitlines()) < count:
        assert time.monotonic() < end, lines
        time.sleep(0.005)
    return lines


def test_the_stage_is_said_again_and_again_until_it_is_ready() -> None:
    out = io.StringIO()
    with StartUp("importing", out, every_s=0.01) as startup:
        assert all(re.fullmatch(r"\[ +\d\.\d s\] importing", line) for line in until_lines(out, 2))
        startup.stage("starting")
        until_lines(out, len(out.getvalue().splitlines()) + 2)
        startup.ready()
        startup.ready()
    lines = out.getvalue().splitlines()
    assert [line.split("] ")[1] for line in lines[-2:]] == ["starting", "ready"]
    time.sleep(0.05)
    assert out.getvalue().splitlines() == lines


def test_a_start_that_fails_says_nothing_more() -> None:
    out = io.StringIO()
    with pytest.raises(OSError, match="no"), StartUp("importing", out, every_s=0.01):
        raise OSError("no")
    said = out.getvalue()
    time.sleep(0.05)
    assert out.getvalue() == said and "ready" not in said


def test_our_own_flags_are_shown_before_sglang_is_imported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before: list[str] = []

    def engine_help() -> str:
        before.append(capsys.readouterr().out)
        return "options:\n  --tp-size TP\n"

    boot = SimpleNamespace(engine_help=engine_help)
    monkeypatch.setitem(sys.modules, "sglang_memserve.plugin.boot", boot)
    monkeypatch.setattr(sglang_memserve.plugin, "boot", boot, raising=False)
    assert launch_server.run(["--model-path", "x", "--help"]) == 0
    assert "usage" in before[0] and "--mempool-dram" in before[0]
    assert "--tp-size" in capsys.readouterr().out


def test_our_own_flags_are_shown_without_sglang(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert launch_server.run(["-h"]) == 0
    shown = capsys.readouterr().out
    assert "--role" in shown and "not installed" in shown
