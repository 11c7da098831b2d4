"""The programs and tables in the documents are what the code does."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from unit.agents import Rank

DOCS = Path(__file__).resolve().parents[2] / "docs"
LIMIT_S = 60.0
# NIXL of both programs keeps to this machine.
ENVIRONMENT = {**os.environ, "UCX_NET_DEVICES": "lo"}


def program(page: str) -> str:
    """The page's one block of Python that imports something."""
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), flags=re.DOTALL)
    (found,) = (block for block in blocks if block.startswith("import "))
    return str(found)


def run(file: Path, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, str(file), *arguments],
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        env=ENVIRONMENT,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_pool_alone(tmp_path: Path) -> None:
    file = tmp_path / "one.py"
    file.write_text(program("mempool.md"))
    assert run(file) == "4 pages of 16384 bytes\n"


def test_two_processes(tmp_path: Path) -> None:
    file = tmp_path / "two.py"
    file.write_text(program("transfer.md"))
    with subprocess.Popen(
        [sys.executable, str(file)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    ) as holder:
        try:
            assert holder.stdout is not None
            address = holder.stdout.readline().strip()
            lines = run(file, address).splitlines()
            assert lines == ["complete 4 4", "resized 33554432"]
            holder.communicate("\n", timeout=LIMIT_S)
        finally:
            holder.kill()
    assert holder.returncode == 0


def test_every_stat_is_explained(ranks: Callable[..., Rank]) -> None:
    section = (DOCS / "mempool.md").read_text().split("\n## Stats\n")[1]
    tables = section.split("\nIn the engine a rank also says")[0]
    names = re.findall(r"^\| (`.*?) \|", tables, flags=re.MULTILINE)
    explained = [name for cell in names for name in re.findall(r"`(\w+)`", cell)]
    assert sorted(explained) == sorted(ranks().stats())
