"""A router host has no torch, no sglang and no nixl: importing the router must not ask for them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROUTER = Path(__file__).parents[2] / "router"

PROBE = """
import importlib, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
heavy = {"torch", "sglang", "nixl", "transformers"} & {name.split(".")[0] for name in sys.modules}
assert not heavy, f"importing the router also imports {sorted(heavy)}"
"""


def modules() -> list[str]:
    found = []
    for file in sorted(ROUTER.rglob("*.py")):
        parts = file.relative_to(ROUTER).with_suffix("").parts
        if parts[-1] == "__main__":
            continue
        name = ".".join(("sglang_memserve.router", *parts))
        found.append(name.removesuffix(".__init__"))
    return found


def test_the_router_imports_nothing_heavy() -> None:
    names = modules()
    assert "sglang_memserve.router.tree.reference" in names
    done = subprocess.run(
        [sys.executable, "-c", PROBE, *names],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_names_of_the_package_load_what_they_need_and_no_more() -> None:
    code = """
import sys, sglang_memserve
assert not {"numpy", "zmq"} & set(sys.modules), "the package alone loads libraries"
pool, agent = sglang_memserve.MemPool, sglang_memserve.RankAgent
from sglang_memserve import FetchRequest, Namespace, page_keys
assert not {"torch", "sglang", "nixl", "triton"} & set(sys.modules)
from sglang_memserve import NixlTransport
assert all(hasattr(sglang_memserve, name) for name in sglang_memserve.__all__)
assert not hasattr(sglang_memserve, "no_such_name")
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
