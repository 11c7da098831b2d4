"""Order of the whole run: what is quick and local first, real clusters last."""

from __future__ import annotations

import os
from pathlib import Path

import hypothesis
import pytest

# A gate that draws new cases would fail a change for what an earlier one broke: it repeats the same
# ones, and `make fuzz` and every run by hand look for new ones.
hypothesis.settings.register_profile("gate", derandomize=True)
if os.environ.get("CI"):
    hypothesis.settings.load_profile("gate")

_HERE = Path(__file__).parent
_ORDER = (
    "unit",
    "property",
    "contract",
    "simulation",
    "browser",
    "architecture",
    "gpu",
    "faults",
    "integration",
)


def _folder(item: pytest.Item) -> str:
    return item.path.relative_to(_HERE).parts[0] if _HERE in item.path.parents else ""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if _folder(item) == "integration":
            item.add_marker(pytest.mark.integration)
    rank = {name: place for place, name in enumerate(_ORDER)}
    items.sort(key=lambda item: rank.get(_folder(item), len(_ORDER)))
