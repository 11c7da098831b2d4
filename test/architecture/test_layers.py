"""Imports point down only. The layers and who may use which heavy library are the tables below."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = "sglang_memserve"
BASE = frozenset({"types", "errors"})
LOW = BASE | {"kernels", "config"}
SAYING = LOW | {"protocol", "hashing", "checksums"}

# What each part may import besides itself. A part is a folder or a module of the package.
ALLOWED: dict[str, frozenset[str]] = {
    # The package itself: names for programs of one's own, loaded when they are asked for.
    "": SAYING | {"mempool", "transfer"},
    "types": frozenset(),
    "errors": frozenset(),
    "kernels": BASE,
    "config": BASE,
    "hashing": LOW,
    "checksums": BASE,
    "protocol": SAYING,
    "index": SAYING,
    "memory": SAYING,
    "transfer": SAYING,
    "pool": SAYING | {"index", "memory"},
    "mempool": SAYING | {"index", "memory", "transfer", "pool"},
    "plugin": SAYING | {"mempool", "index", "memory", "transfer", "pool"},
    "router": SAYING | {"index"},
    # An entry of the router's alone.
    "simulate": SAYING | {"router"},
}
# Entries stand on top of everything, but the plugin and the router meet in none of them: they
# start each other as processes.
ENTRIES = SAYING | {"mempool", "plugin", "cluster", "demo", "demo_model", "tiny_model"}
ENTRIES |= {"launch_server", "startup"}

# Inside the router: its folders and modules from the lowest up, and what each may import besides
# itself. A cycle between folders fails here too.
_PURE = {"values", "tree", "cost", "policy"}
_TALK = {"http", "prompt"}
ROUTER: dict[str, set[str]] = {
    "": set(),
    "values": set(),
    "tree": {"values"},
    "cost": {"values"},
    "policy": {"values", "cost"},
    "http": set(),
    "prompt": set(),
    "members": {"values", "cost", "http"},
    "metrics": {"tree", "http", "members"},
    "request": _PURE | _TALK | {"members", "metrics"},
    "control": _PURE | _TALK | {"members", "metrics", "request"},
    "simulate": _PURE | {"http", "members", "request"},
    "dashboard": _PURE | {"http", "members", "metrics", "request", "control"},
    "flags": set(),
    "config": {"values", "flags", "policy", "http"},
    "watching": _PURE
    | _TALK
    | {"members", "metrics", "request", "control", "dashboard", "flags", "config"},
}
ROUTER["app"] = set(ROUTER) - {""}
ROUTER["processes"] = set(ROUTER) - {""}
ROUTER["__main__"] = set(ROUTER) - {""}

# The only parts that may import a heavy library, at any depth of their code.
HEAVY: dict[str, frozenset[str]] = {
    "sglang": frozenset({"plugin", "launch_server", "demo"}),
    "nixl": frozenset({"transfer"}),
    "triton": frozenset({"memory"}),
    "torch": frozenset(
        {"plugin", "memory", "mempool", "kernels", "launch_server", "demo_model", "tiny_model"}
    ),
}


@dataclass(frozen=True)
class Import:
    part: str
    file: str
    line: int
    target: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.part} imports {self.target}"


def sources() -> Iterator[tuple[str, Path]]:
    """(dotted module name, file) of everything in the package."""
    for folder, prefix in (
        (ROOT / "python" / PACKAGE, PACKAGE),
        (ROOT / "router", f"{PACKAGE}.router"),
    ):
        for file in sorted(folder.rglob("*.py")):
            parts = file.relative_to(folder).with_suffix("").parts
            name = ".".join((prefix, *parts))
            yield name.removesuffix(".__init__"), file


def imports(module: str, file: Path) -> Iterator[Import]:
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    part = part_of(module)
    shown = str(file.relative_to(ROOT))
    for node in ast.walk(ast.parse(file.read_text(), str(file))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(part, shown, node.lineno, alias.name)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, base] if base else above)
            # `from package import name` may import a module: the finer name tells.
            for alias in node.names:
                yield Import(part, shown, node.lineno, f"{base}.{alias.name}")


def part_of(module: str) -> str:
    """``sglang_memserve.transfer.nixl`` -> ``transfer``; the package itself is ``""``."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


ALL = [found for module, file in sources() for found in imports(module, file)]
INSIDE = [found for found in ALL if found.target.split(".")[0] == PACKAGE]
MODULES = {module for module, _ in sources()}


def test_the_walk_finds_the_package() -> None:
    assert {"types", "router", "protocol"} <= {part_of(module) for module in MODULES}
    assert any(found.part == "router" and "types" in found.target for found in INSIDE)


@pytest.mark.parametrize("part", sorted({part_of(module) for module in MODULES}))
def test_imports_point_down(part: str) -> None:
    allowed = ALLOWED.get(part, ENTRIES) | {part}
    wrong = [
        str(found)
        for found in INSIDE
        if found.part == part
        and part_of(found.target) not in allowed
        # Names of the package's own __init__ (its version) are free for all.
        and f"{PACKAGE}.{part_of(found.target)}" in MODULES
    ]
    assert not wrong, "\n".join(wrong)


def test_folders_of_the_router_point_down() -> None:
    router = f"{PACKAGE}.router"
    wrong = []
    for module, file in sources():
        if module != router and not module.startswith(f"{router}."):
            continue
        folder = _folder(module, router)
        for found in imports(module, file):
            if found.target.startswith(f"{router}."):
                target = _folder(found.target, router)
                if target != folder and target not in ROUTER[folder]:
                    wrong.append(f"{found.file}:{found.line}: {folder} imports {target}")
    assert not wrong, "\n".join(wrong)
    assert set(ROUTER) == {_folder(m, router) for m in MODULES if m.startswith(router)}


def _folder(module: str, package: str) -> str:
    return module.removeprefix(package).lstrip(".").split(".")[0]


@pytest.mark.parametrize("library", sorted(HEAVY))
def test_heavy_libraries_stay_where_they_belong(library: str) -> None:
    wrong = [
        str(found)
        for found in ALL
        if found.target.split(".")[0] == library and found.part not in HEAVY[library]
    ]
    assert not wrong, "\n".join(wrong)


def test_no_folder_shadows_the_router() -> None:
    assert not (ROOT / "python" / PACKAGE / "router").exists()
