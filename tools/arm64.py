"""Compile the kernels for 64-bit ARM, whatever this machine is: they must not need x86.

The compiler is zig's, from the registry, in an environment of its own that goes afterwards. Only
the kernels: what binds them to Python is the same on all processors, and needs Python's headers.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
KERNELS = ROOT / "sgl-kernel-ext"
COMPILER = "ziglang==0.17.1"
LIMIT_S = 300
BINDINGS = ("module", "integers")


def main() -> int:
    uv = shutil.which("uv", path=str(Path(sys.executable).parent)) or "uv"
    sources = [
        source
        for source in sorted((KERNELS / "csrc").glob("*.cpp"))
        if not source.stem.endswith(BINDINGS)
    ]
    zig = [uv, "run", "--no-project", "--with", COMPILER, "python", "-m", "ziglang"]
    failed = []
    with tempfile.TemporaryDirectory() as folder:
        for source in sources:
            command = [*zig, "c++", "-target", "aarch64-linux-gnu", "-std=c++17", "-O2"]
            command += ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-attributes"]
            command += [f"-I{KERNELS / 'include'}", "-c", str(source)]
            command += ["-o", str(Path(folder) / f"{source.stem}.o")]
            if subprocess.run(command, timeout=LIMIT_S, check=False).returncode != 0:
                failed.append(source.name)
    if failed:
        print(f"not for arm64: {', '.join(failed)}")
        return 1
    print(f"{len(sources)} files compile for arm64")
    return 0


if __name__ == "__main__":
    sys.exit(main())
