"""The evaluation's commands, told nonsense: a sentence before anything is measured."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from benchmark import evaluation
from benchmark.harness import ROOT, report

CHAT = "--setup pool --workload control"


def run(module: str, words: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", f"benchmark.{module}", *words.split()]
    return subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=45, check=False)


@pytest.mark.parametrize(
    ("module", "words", "says"),
    [
        ("serving", f"{CHAT} --json {{folder}}", "cannot be written"),
        ("serving", f"{CHAT} --json /proc/nobody/file.json", "cannot be written"),
        ("serving", "--setup pool:nope --workload control", "pool:nope: --workload has control"),
        ("serving", "--setup pool:chat --workload control", "pool:chat: --workload has control"),
        ("serving.calibrate", "--profile {folder}", "cannot be written"),
        ("serving.calibrate", "--profile {folder}/p --rounds 0", "--rounds must be positive"),
        ("serving.validate", "--runs {bad} --traces {folder}", "bad.json has no results of"),
        ("serving.validate", "--runs {poor} --traces {folder}", "does not say its dram_mib"),
        ("evaluation", "--only nope", "no part 'nope'"),
        ("evaluation", "--quick --only load", "no part 'load'"),
        ("tables", "nope", "nope.json is not there"),
        ("tables", "{bad}", "bad.json has no results of"),
        ("tables", "micro-pool", "micro-pool has no answered runs"),
    ],
)
def test_nonsense_is_refused_before_anything_is_measured(
    tmp_path: Path, module: str, words: str, says: str
) -> None:
    bad, poor = tmp_path / "bad.json", tmp_path / "poor.json"
    bad.write_text("[1, 2")
    poor.write_text(json.dumps({"results": [{"setup": "pool", "ttft_ms": {}}]}))
    done = run(module, words.format(folder=tmp_path, bad=bad, poor=poor))
    assert done.returncode != 0
    assert says in done.stderr and "Traceback" not in done.stderr


def test_a_result_takes_the_place_of_another_whole(tmp_path: Path) -> None:
    file = tmp_path / "new" / "result.json"
    for results in ([1], [1, 2]):
        report("name", results, 0.0, file)
        assert json.loads(file.read_text())["results"] == results
    assert [one.name for one in file.parent.iterdir()] == ["result.json"]


def test_parts_record_into_folders_of_their_own() -> None:
    options = evaluation.build_parser().parse_args(["--record", "traces"])
    folders = []
    for part in evaluation.PARTS:
        argv = evaluation.command(part, options)
        folders.append(argv[argv.index("--record") + 1])
    assert len(set(folders)) == len(evaluation.PARTS)


def test_what_ends_the_evaluation_ends_its_part() -> None:
    part = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
    text = "import sys; from benchmark import evaluation; evaluation.exit_on_sigterm(); "
    text += f"evaluation.run([sys.executable, '-c', {part!r}])"
    argv = [sys.executable, "-c", text]
    with subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        # When it says who it is, whoever started it waits for it.
        child = psutil.Process(int(parent.stdout.readline()))
        try:
            parent.terminate()
            assert parent.wait(30) == 128 + signal.SIGTERM
            assert not psutil.wait_procs([child], timeout=10)[1]
        finally:
            parent.kill()
            with suppress(psutil.NoSuchProcess):
                child.kill()
