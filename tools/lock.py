"""Resolve ``requirements/lock.txt`` from ``pyproject.toml``; what is locked and fits stays.

``--upgrade`` takes the newest of everything that the project's own pins allow.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "requirements" / "lock.txt"
HEADER = """\
# Exact versions of the whole working set (all extras), tried together on Linux x86-64,
# Python 3.11 to 3.13. Written by `make lock`; no addresses and no hashes, so any registry will do.
"""


def main(arguments: list[str]) -> int:
    uv = Path(sys.executable).parent / "uv"
    command = [str(uv), "pip", "compile", "-q", "--no-annotate", "--no-header"]
    # The oldest Python served, and the platform tag that SGLang's wheel asks for.
    command += ["--python-version", "3.11", "--python-platform", "x86_64-manylinux_2_34"]
    command += ["--extra", "engine", "--extra", "dev", "--extra", "eval"]
    command += ["--output-file", str(LOCK)]
    command += ["pyproject.toml", *arguments]
    result = subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, timeout=600)
    if result.returncode != 0:
        return result.returncode
    pins = [line for line in LOCK.read_text().splitlines() if line and not line.startswith("#")]
    LOCK.write_text(HEADER + "\n".join(pins) + "\n")
    print(f"{len(pins)} packages in {LOCK.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
