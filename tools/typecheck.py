"""Run mypy over everything, with the router where imports find it.

``router/`` lies at the top level and is imported as ``sglang_memserve.router``; setuptools knows
that, mypy does not. So the package is laid out once more, as links, under ``build/typed``.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TYPED = ROOT / "build" / "typed" / "sglang_memserve"


def lay_out() -> None:
    TYPED.mkdir(parents=True, exist_ok=True)
    sources = {entry.name: entry for entry in (ROOT / "python" / "sglang_memserve").iterdir()}
    sources.pop("__pycache__", None)
    sources["router"] = ROOT / "router"
    for link in TYPED.iterdir():
        if link.name not in sources:
            link.unlink()
    for name, source in sources.items():
        link = TYPED / name
        if not link.is_symlink():
            link.symlink_to(source)


def main(arguments: list[str]) -> int:
    lay_out()
    # mypy stops at a folder without Python files; some are filled later than others.
    folders = [f for f in ("test", "tools", "benchmark") if any((ROOT / f).rglob("*.py"))]
    command = [sys.executable, "-m", "mypy", *arguments, str(TYPED.relative_to(ROOT))]
    command += [*folders, "sgl-kernel-ext/python"]
    return subprocess.run(command, cwd=ROOT, timeout=900).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
