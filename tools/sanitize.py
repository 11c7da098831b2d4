"""Run the tests of the native code under AddressSanitizer and UBSan.

Builds sgl-kernel-ext once more, under ``build/sanitized``, and puts that before the installed one.
What Python itself never frees is not ours to report, so leaks are not looked for.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILT = ROOT / "build" / "sanitized"
TESTS = [
    "test/contract/test_kernels.py",
    "test/contract/test_engine_kernels.py",
    "test/contract/test_attention_kernels.py",
    "test/contract/test_attention_refusals.py",
    "test/contract/test_engine_elementwise.py",
    "test/contract/test_engine_refusals.py",
    "test/contract/test_engine_decoder.py",
    "test/contract/test_merged_tree.py",
    "test/property/test_global_tree.py",
]


def runtime(compiler: str) -> str:
    """What is loaded first, since Python was linked with neither: AddressSanitizer, and the C++
    library whose throwing of exceptions it wraps."""
    paths = []
    for name in ("libasan.so", "libstdc++.so"):
        command = [compiler, f"-print-file-name={name}"]
        asked = subprocess.run(command, capture_output=True, text=True, timeout=60)
        path = Path(asked.stdout.strip())
        if asked.returncode != 0 or not path.is_absolute():
            raise SystemExit(f"{compiler} has no {name}; install its sanitizer libraries")
        paths.append(str(path.resolve()))
    return " ".join(paths)


def build() -> None:
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation"]
    command += ["--upgrade", "--target", str(BUILT)]
    command += ["--config-settings", "cmake.define.SGL_KERNEL_EXT_SANITIZE=ON"]
    command += ["--config-settings", f"build-dir={ROOT / 'build' / 'kernels-sanitized'}"]
    if subprocess.run([*command, str(ROOT / "sgl-kernel-ext")], timeout=1200).returncode != 0:
        raise SystemExit("the sanitized build failed; the reason is above")


def main(arguments: list[str]) -> int:
    libraries = runtime(os.environ.get("CXX", "g++"))
    build()
    environment = {
        **os.environ,
        "LD_PRELOAD": libraries,
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONPATH": str(BUILT),
    }
    check = "import sgl_kernel_ext._native as n, sys; sys.exit('sanitized' not in n.__file__)"
    subprocess.run([sys.executable, "-c", check], env=environment, check=True, timeout=120)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-s",
        "-p",
        "no:cacheprovider",
        *TESTS,
        *arguments,
    ]
    return subprocess.run(command, cwd=ROOT, env=environment, timeout=1800).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
