"""What is written is what gets installed."""

from __future__ import annotations

import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]


def folders(root: Path, name: str) -> set[str]:
    """Dotted names of the package at ``root`` and of all below it."""
    below = {
        f"{name}.{'.'.join(file.parent.relative_to(root).parts)}"
        for file in root.rglob("__init__.py")
        if file.parent != root
    }
    return {name} | below


def test_every_package_is_in_the_list() -> None:
    """The list in pyproject.toml is explicit: a wheel leaves out what it does not name."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    written = folders(ROOT / "python" / "sglang_memserve", "sglang_memserve")
    written |= folders(ROOT / "router", "sglang_memserve.router")
    assert set(settings["packages"]) == written
