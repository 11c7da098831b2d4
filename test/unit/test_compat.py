"""The pin and every symbol of SGLang that we touch."""

from __future__ import annotations

import ast
import inspect
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("sglang")

from sglang_memserve.plugin import compat

PLUGIN = Path(compat.__file__).parent
# A bare dotted name in a string is a hook's target.
TARGET = re.compile(r"sglang(\.\w+)+")


def test_the_installed_version_is_the_pin() -> None:
    assert compat.installed_version() == compat.SGLANG_VERSION


def test_the_pin_is_the_one_that_gets_installed() -> None:
    project = (PLUGIN.parents[2] / "pyproject.toml").read_text()
    assert f'"sglang=={compat.SGLANG_VERSION}"' in project


def test_every_symbol_resolves() -> None:
    assert compat.unresolved() == []


@pytest.mark.parametrize("name", sorted(compat.PARAMETERS))
def test_parameters(name: str) -> None:
    parameters = list(inspect.signature(pkgutil.resolve_name(name)).parameters)
    missing = [wanted for wanted in compat.PARAMETERS[name] if wanted not in parameters]
    assert missing == []


def used() -> Iterator[tuple[str, str]]:
    """(file name, dotted name) of everything the plugin takes from SGLang."""
    for file in sorted(PLUGIN.rglob("*.py")):
        if file.name == "compat.py":
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                if node.module.split(".")[0] == "sglang":
                    yield from ((file.name, f"{node.module}.{a.name}") for a in node.names)
            elif isinstance(node, ast.Import):
                yield from (
                    (file.name, a.name) for a in node.names if a.name.split(".")[0] == "sglang"
                )
            elif (
                isinstance(node, ast.Constant)
                and isinstance(node.value, str)
                and TARGET.fullmatch(node.value)
                and not node.value.startswith(("sglang.srt.plugins", "sglang.srt.platforms"))
            ):
                yield file.name, node.value


def test_nothing_of_sglang_is_used_that_is_not_listed() -> None:
    listed = set(compat.SYMBOLS) | set(compat.METHODS)
    unlisted = sorted({f"{file}: {name}" for file, name in used() if name not in listed})
    assert unlisted == []
