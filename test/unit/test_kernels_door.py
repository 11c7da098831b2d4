"""``kernels.native()``: what is offered, and what is said where nothing is."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType

import pytest
from sglang_memserve import kernels


@pytest.fixture(autouse=True)
def _asked_anew() -> Iterator[None]:
    kernels.native.cache_clear()
    yield
    kernels.native.cache_clear()


def test_what_is_built_has_everything_that_is_asked_for() -> None:
    ops = kernels.native()
    if ops is None:
        pytest.skip("no native code")
    assert kernels._why_not(sys.modules["sgl_kernel_ext.ops"]) is None


def test_an_older_build_is_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    older = ModuleType("sgl_kernel_ext.ops")
    older.NATIVE, older.copy_rows, older.page_keys = True, None, None  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sgl_kernel_ext.ops", older)
    assert kernels.native() is None
    assert "older than this package" in caplog.text and "paged_attention" in caplog.text


def test_what_is_switched_off_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    off = ModuleType("sgl_kernel_ext.ops")
    off.NATIVE, off.WHY_NOT_NATIVE = False, "MEMSERVE_NATIVE=0"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sgl_kernel_ext.ops", off)
    assert kernels.native() is None
    assert "MEMSERVE_NATIVE=0" in caplog.text
