"""The profile that is fitted to what was measured."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from sglang_memserve.router.simulate.profile import load

from benchmark.serving.calibrate import Timed, fit, off_by, profile_of
from benchmark.serving.servers import Sizes

WORK = [(1.0, 64.0, 0.0), (1.0, 512.0, 9e4), (2.0, 1024.0, 5e5), (1.0, 256.0, 3e5)]


def timed(figures: tuple[float, ...], slower: float = 1.0) -> list[Timed]:
    sums = [sum(a * b for a, b in zip(terms, figures, strict=True)) for terms in WORK]
    return [Timed(str(n), w, slower * s) for n, (w, s) in enumerate(zip(WORK, sums, strict=True))]


def test_figures_are_found_again() -> None:
    figures = (0.006, 0.0007, 2e-7)
    assert fit(timed(figures)) == pytest.approx(figures)
    assert off_by(timed(figures), figures) == dict.fromkeys("0123", 1.0)
    assert off_by(timed(figures, slower=2.0), figures) == dict.fromkeys("0123", 0.5)


def test_no_figure_is_negative() -> None:
    found = fit(timed((-0.02, 0.001, 1e-7)))
    assert found[0] == 0.0 and min(found) >= 0


@pytest.mark.parametrize("in_fleet", [False, True])
def test_the_simulator_takes_the_profile(tmp_path: Path, in_fleet: bool) -> None:
    file = tmp_path / "profile.json"
    made = profile_of((0.006, 0.0007, 2e-7), (0.01, 0.001, 1e-6), Sizes(), in_fleet=in_fleet)
    file.write_bytes(msgspec.json.encode(made))
    profile = load(str(file))
    assert (profile.prefill.token_s, profile.decode.stream_s) == (0.0007, 0.001)
    # A router that was asked through is in the fixed seconds already.
    assert (profile.hop_s == 0) == in_fleet
