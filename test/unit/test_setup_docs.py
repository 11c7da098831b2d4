"""What the README tells people to type exists."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
README = (ROOT / "README.md").read_text()


def make(*arguments: str) -> str:
    result = subprocess.run(
        ["make", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=30
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_every_make_target_that_is_named_exists() -> None:
    text = "".join(page.read_text() for page in PAGES)
    named = set(re.findall(r"(?:^|`)make ([a-z0-9-]+)", text, flags=re.MULTILINE))
    offered = set(re.findall(r"^  make ([a-z0-9-]+)", make("help"), flags=re.MULTILINE))
    assert {"demo", "test", "check", "setup"} <= named <= offered
    for target in named:
        assert make("--dry-run", target)


def test_help_is_what_bare_make_shows() -> None:
    assert make() == make("help")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


def test_every_module_that_is_named_exists() -> None:
    for module in set(re.findall(r"python -m (sglang_memserve[\w.]*)", README)):
        code = f"import importlib.util as u, sys; sys.exit(u.find_spec({module!r}) is None)"
        assert subprocess.run([sys.executable, "-c", code], timeout=30).returncode == 0, module


@pytest.mark.parametrize("module", ["launch_cluster", "demo", "demo_model", "router"])
def test_help_works(module: str) -> None:
    command = [sys.executable, "-m", f"sglang_memserve.{module}", "--help"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0 and "usage" in result.stdout, result.stderr


def test_flags_that_the_readme_names_are_accepted() -> None:
    command = [sys.executable, "-m", "sglang_memserve.launch_cluster", "--help"]
    text = subprocess.run(command, capture_output=True, text=True, timeout=60).stdout
    for flag in ("--prefill", "--decode", "--both", "--port", "--log-dir", "--json-ready"):
        assert flag in text and flag in README
