"""``python -m benchmark.pictures``: the figures of docs/evaluation.md, from committed results.

Needs matplotlib (the extra ``eval``). A figure whose results are not there is left out, and so
named.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib

from benchmark.harness import ROOT
from benchmark.results import Missing, Run, load, merged

matplotlib.use("Agg")

from matplotlib import pyplot as plt

PICTURES = ROOT / "docs" / "pictures"
_DPI = 110
# Colours that stay apart for colour-blind eyes (Okabe and Ito); stock grey, MemServe blue.
_COLOURS = {
    "stock": "#999999",
    "stock-round-robin": "#bbbbbb",
    "stock-cache-aware": "#888888",
    "stock-cache-aware-tuned": "#555555",
    "stock-large-cache-aware-tuned": "#222222",
    "pool": "#0072b2",
    "no-pool": "#56b4e9",
    "no-pool-session": "#009e73",
    "pool-session": "#cc79a7",
    "pool-prefix": "#f0e442",
    "pool-least-load": "#d55e00",
    "pool-round-robin": "#e69f00",
    "1p1d": "#f0e442",
    "vllm": "#d55e00",
    "vllm-1p1d": "#e69f00",
}
_OTHERS = ("#009e73", "#cc79a7", "#0072b2", "#d55e00", "#56b4e9", "#e69f00", "#000000")


def _runs(name: str) -> list[Run]:
    return merged(load(name))


def colour(setup: str, place: int) -> str:
    return _COLOURS.get(setup, _OTHERS[place % len(_OTHERS)])


def in_order(values: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(values))


def _places(groups: int, place: int, of: int) -> list[float]:
    """Where the bars of one kind stand, side by side with the others in each group."""
    return [index + (place - (of - 1) / 2) * 0.8 / of for index in range(groups)]


def bars(runs: Sequence[Run], title: str, file: str, *, told: bool = False) -> None:
    """Mean and P99 of TTFT, and mean JCT: a group of bars a workload, a bar a set-up. ``told``:
    each with its figure."""
    workloads = in_order([run["workload"] for run in runs])
    setups = in_order([run["setup"] for run in runs])
    panels = (("ttft_ms", "mean", "mean TTFT, s"), ("ttft_ms", "p99", "P99 TTFT, s"),
              ("jct_ms", "mean", "mean JCT, s"))  # fmt: skip
    figure, axes = plt.subplots(1, len(panels), figsize=(13, 3.8))
    for axis, (what, which, label) in zip(axes, panels, strict=True):
        for place, setup in enumerate(setups):
            by_workload = {r["workload"]: r for r in runs if r["setup"] == setup}
            heights = [
                by_workload[w][what][which] / 1e3 if w in by_workload else 0 for w in workloads
            ]
            at = _places(len(workloads), place, len(setups))
            made = axis.bar(at, heights, 0.8 / len(setups), label=setup, color=colour(setup, place))
            if told:
                axis.bar_label(made, fmt="%.2f")
        axis.set_xticks(range(len(workloads)), workloads)
        axis.set_ylabel(label)
        axis.spines[["top", "right"]].set_visible(False)
    _finish(figure, axes[0], title, file)


def by_load(runs: Sequence[Run], title: str, file: str) -> None:
    panels = (("ttft_ms", "mean", "mean TTFT, s"), ("ttft_ms", "p99", "P99 TTFT, s"),
              ("jct_ms", "mean", "mean JCT, s"))  # fmt: skip
    figure, axes = plt.subplots(1, len(panels), figsize=(13, 3.8))
    for place, setup in enumerate(in_order([run["setup"] for run in runs])):
        own = sorted((r for r in runs if r["setup"] == setup), key=lambda run: float(run["rate"]))
        for axis, (what, which, label) in zip(axes, panels, strict=True):
            axis.plot([r["rate"] for r in own], [r[what][which] / 1e3 for r in own], marker="o",
                      label=setup, color=colour(setup, place))  # fmt: skip
            axis.set_xlabel("load, times the workload's own speed")
            axis.set_ylabel(label)
            axis.set_yscale("log")
            axis.spines[["top", "right"]].set_visible(False)
    _finish(figure, axes[0], title, file)


def distributions(runs: Sequence[Run], title: str, file: str) -> None:
    """Share of requests answered within a time."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 3.8))
    for axis, (what, label) in zip(
        axes, (("ttft_ms", "TTFT, s"), ("jct_ms", "JCT, s")), strict=True
    ):
        for place, run in enumerate(runs):
            values = sorted(value / 1e3 for value in run["samples"][what])
            shares = [(index + 1) / len(values) for index in range(len(values))]
            axis.step(values, shares, where="post", label=run["setup"],
                      color=colour(run["setup"], place))  # fmt: skip
        axis.set_xscale("log")
        axis.set_xlabel(label)
        axis.set_ylabel("share of requests")
        axis.spines[["top", "right"]].set_visible(False)
    _finish(figure, axes[0], title, file)


def funnel(runs: Sequence[Run], title: str, file: str) -> None:
    """Where the prompt's tokens came from, as the router counted them."""
    stages = (("prompt_tokens", "prompt"), ("best_in_fleet_tokens", "held by one instance"),
              ("selected_tokens", "held where it went"), ("transferred_tokens", "moved"),
              ("cached_tokens", "not computed"))  # fmt: skip
    figure, axis = plt.subplots(figsize=(9, 3.8))
    for place, run in enumerate(runs):
        counts = dict(run["router"])
        counts["selected_tokens"] = sum(
            counts.get(f"selected_tokens_{t}", 0) for t in ("hbm", "dram")
        )
        heights = [100 * counts.get(name, 0) / counts["prompt_tokens"] for name, _ in stages]
        at = _places(len(stages), place, len(runs))
        label = f"{run['setup']}, {run['workload']}"
        axis.bar(at, heights, 0.8 / len(runs), label=label, color=_OTHERS[place % len(_OTHERS)])
    axis.set_xticks(range(len(stages)), [label for _, label in stages])
    axis.set_ylabel("% of prompt tokens")
    axis.spines[["top", "right"]].set_visible(False)
    _finish(figure, axis, title, file)


def simulated(runs: Sequence[Run], title: str, file: str) -> None:
    panels = (("ttft_ms", "mean", "mean TTFT, s"), ("jct_ms", "mean", "mean JCT, s"),
              ("tpot_ms", "mean", "mean TPOT, ms"))  # fmt: skip
    lines = in_order([f"{run['shape']} {run['policy']}" for run in runs])
    figure, axes = plt.subplots(1, len(panels), figsize=(13, 3.8))
    for place, name in enumerate(lines):
        own = sorted(
            (r for r in runs if f"{r['shape']} {r['policy']}" == name),
            key=lambda run: float(run["rate"]),
        )
        for axis, (what, which, label) in zip(axes, panels, strict=True):
            scale = 1 if what == "tpot_ms" else 1e3
            axis.plot([r["rate"] for r in own], [r[what][which] / scale for r in own], marker="o",
                      label=name, color=_OTHERS[place % len(_OTHERS)],
                      linestyle="--" if "approximate" in name else "-")  # fmt: skip
            axis.set_xlabel("rate, times the trace's")
            axis.set_ylabel(label)
            axis.set_yscale("log")
            axis.spines[["top", "right"]].set_visible(False)
    _finish(figure, axes[0], title, file)


def _finish(figure: Any, legend_of: Any, title: str, file: str) -> None:
    handles, labels = legend_of.get_legend_handles_labels()
    figure.suptitle(title, fontsize=11)
    figure.legend(handles, labels, loc="lower center", ncols=min(5, len(labels)), frameon=False,
                  fontsize=9)  # fmt: skip
    figure.tight_layout(rect=(0, 0.04 + 0.05 * ((len(labels) + 4) // 5), 1, 1))
    PICTURES.mkdir(parents=True, exist_ok=True)
    # No time and version inside, so that the same results give the same file.
    figure.savefig(PICTURES / f"{file}.png", dpi=_DPI, metadata={"Software": None})
    plt.close(figure)


def _main() -> None:
    bars(_runs("evaluation-main"), "Two instances, one core each, every workload", "workloads")


def _load() -> None:
    runs = _runs("evaluation-load")
    for workload in in_order([run["workload"] for run in runs]):
        own = [run for run in runs if run["workload"] == workload]
        by_load(own, f"{workload} by load", f"{workload}-load")


def _distributions() -> None:
    for workload in ("chat", "react"):
        runs = [run for run in _runs("evaluation-main") if run["workload"] == workload]
        distributions(runs, f"{workload}: share of requests within a time", f"{workload}-cdf")


def _funnel() -> None:
    runs = [
        r for r in _runs("evaluation-main") if r["setup"] == "pool" and r["workload"] != "control"
    ]
    funnel(runs, "MemServe, two instances: where prompt tokens came from", "funnel")


def _designs() -> None:
    # The step with a fleet of its own was measured last.
    runs = sorted(_runs("evaluation-designs"), key=lambda r: ("-" not in r["setup"], r["setup"]))
    bars(runs, "Chat with separate roles: caching switched on one by one", "designs",
         told=True)  # fmt: skip


def _shapes() -> None:
    bars(_runs("evaluation-shapes"), "Two instances of either kind, twice the speed", "shapes",
         told=True)  # fmt: skip


def _small_hbm() -> None:
    runs = _runs("evaluation-small-hbm")
    chat = [run for run in runs if run["workload"] == "chat"]
    distributions(chat, "chat, 4,096 KV slots an instance: share within a time", "small-hbm-cdf")
    bars(runs + _runs("evaluation-memory"), "4,096 KV slots an instance", "small-hbm")


def _routing() -> None:
    bars(_runs("evaluation-routing"), "Questions on documents by routing", "routing")


def _documents() -> None:
    by_load(_runs("evaluation-documents"), "documents by load and routing", "documents-load")


def _validated() -> None:
    """Points: measured; lines: simulated, on one profile."""
    runs = [run for run in load("simulate-validation", "measured") if run["setup"] == "pool"]
    workloads = in_order([run["workload"] for run in runs])
    panels = (("ttft_mean_ms", "mean TTFT, s"), ("jct_mean_ms", "mean JCT, s"))
    figure, axes = plt.subplots(1, len(panels), figsize=(11, 3.8))
    for place, workload in enumerate(workloads):
        own = sorted((r for r in runs if r["workload"] == workload), key=lambda r: float(r["rate"]))
        rates = [run["rate"] for run in own]
        for axis, (what, label) in zip(axes, panels, strict=True):
            axis.plot(rates, [r["simulated"][what] / 1e3 for r in own], color=colour("", place),
                      label=f"{workload}, simulated")  # fmt: skip
            axis.plot(rates, [r["measured"][what] / 1e3 for r in own], color=colour("", place),
                      marker="o", linestyle="", label=f"{workload}, measured")  # fmt: skip
            axis.set_xlabel("load, times the workload's own speed")
            axis.set_ylabel(label)
            axis.spines[["top", "right"]].set_visible(False)
    for axis in axes:
        # Once all is drawn: it ends the scaling by what is drawn.
        axis.set_ylim(bottom=0)
    title = "pool: the simulator beside real replays"
    _finish(figure, axes[0], title, "simulated-and-measured")


def _simulated() -> None:
    runs = load("simulate-conversation-4p4d") + load("simulate-conversation-8b")
    simulated(runs, "Simulated: an hour of a chat service, 8 instances", "simulated")


FIGURES: dict[str, Callable[[], None]] = {
    "workloads": _main,
    "load": _load,
    "distributions": _distributions,
    "funnel": _funnel,
    "small-hbm": _small_hbm,
    "documents": _documents,
    "designs": _designs,
    "shapes": _shapes,
    "routing": _routing,
    "validated": _validated,
    "simulated": _simulated,
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmark.pictures", description=__doc__)
    parser.add_argument("--only", choices=FIGURES)
    options = parser.parse_args()
    for name, draw in FIGURES.items():
        if options.only in (None, name):
            try:
                draw()
            except Missing as missing:
                print(f"{name}: left out, {missing}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
