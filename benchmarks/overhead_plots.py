"""Pictures of overhead_vs_frequency: overhead and goodput by how often one saves.

Reads the result's series; measures nothing. Each picture is written as SVG and as PNG.
"""

from __future__ import annotations

import math
import statistics
from typing import TYPE_CHECKING, Any, Final

import matplotlib as mpl
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.axes import Axes

TITLES: Final = {
    "torch": "torch: FSDP2 example, 2 ranks",
    "jax": "JAX: pjit example, 1 process x 8 devices",
}
OURS_COLOR: Final = "#b0413e"
COLORS: Final = ("#4c72b0", "#e3b23c", "#55a868", "#8172b3", "#7f7f7f")
LEAST_PERCENT: Final = 0.01  # Below this, and below 0, stands a hollow mark at the axis.
SHOWN_OF_GOODPUT: Final = 0.05
mpl.rcParams.update({"svg.hashsalt": "shardckpt", "svg.fonttype": "none", "font.size": 9})


def draw(series: dict[str, Any], place: Path) -> list[str]:
    """Draw both pictures and return the names of the SVG files."""
    return [
        _draw(series, place, "overhead_vs_frequency", _overheads),
        _draw(series, place, "goodput_vs_frequency", _goodputs),
    ]


def _draw(series: dict[str, Any], place: Path, name: str, one: Any) -> str:
    figure = Figure(figsize=(6.5 * max(1, len(series)), 4.5), layout="constrained")
    axes = figure.subplots(1, len(series), squeeze=False)[0]
    for axis, (side, of_side) in zip(axes, series.items(), strict=True):
        one(axis, side, of_side)
    figure.savefig(place / f"{name}.png", dpi=150, metadata={"Software": None})
    figure.savefig(place / f"{name}.svg", metadata={"Date": None})
    return f"{name}.svg"


def _styles(systems: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return how each system is drawn: ours in one color, those that block dashed."""
    others = iter(COLORS * 2)
    found = {}
    for name in systems:
        ours = name.startswith("shardckpt")
        blocks = name.endswith(("overlap=False", "dcp.save", "Checkpointer", "per rank"))
        blocks = blocks and "Async" not in name
        found[name] = {
            "color": OURS_COLOR if ours else next(others), "linewidth": 2.2 if ours else 1.3,
            "linestyle": "--" if blocks else "-", "zorder": 3 if ours else 2,
        }  # fmt: skip
    return found


def _overheads(axis: Axes, side: str, of_side: dict[str, Any]) -> None:
    for name, style in _styles(of_side["systems"]).items():
        found = of_side["systems"][name]["intervals"]
        rounds = {int(i): [100 * v for v in of["overheads"]] for i, of in found.items()}
        middle = {i: statistics.median(values) for i, values in rounds.items()}
        told = [value if value > LEAST_PERCENT else math.nan for value in middle.values()]
        axis.plot(list(middle), told, marker="o", markersize=4, label=name, **style)
        nothing = [i for i, value in middle.items() if value <= LEAST_PERCENT]
        axis.plot(
            nothing, [LEAST_PERCENT] * len(nothing), linestyle="", marker="v", zorder=3,
            markerfacecolor="none", color=style["color"],
        )  # fmt: skip
    noise = 100 * of_side["noise"]
    axis.axhspan(LEAST_PERCENT, max(noise, LEAST_PERCENT), color="#000000", alpha=0.06, zorder=0)
    axis.annotate(
        f"below {noise:.1f} %: short runs without saves differ as much\n"
        "hollow: no longer than without saves", (0.02, 0.12),
        xycoords="axes fraction", va="bottom", fontsize=7, color="#555555",
    )  # fmt: skip
    axis.set(
        xscale="log", yscale="log", title=f"{TITLES[side]}, step {of_side['step_s']:.2f} s",
        xlabel="steps from save to save", ylabel="overhead, % of the time without saves",
    )  # fmt: skip
    _plain_ticks(axis, sorted(int(i) for i in found))
    axis.legend(fontsize=8)
    axis.grid(alpha=0.3)


def _goodputs(axis: Axes, side: str, of_side: dict[str, Any]) -> None:
    styles = _styles(of_side["systems"])
    for name, style in styles.items():
        system = of_side["systems"][name]
        curve = {int(i): 100 * share for i, share in system["curve"].items()}
        axis.plot(list(curve), list(curve.values()), label=name, **style)
        measured = {int(i): 100 * share for i, share in system["goodput"].items()}
        axis.plot(list(measured), list(measured.values()), "o", markersize=3, color=style["color"])
        best, share = system["best_interval"], 100 * system["best_goodput"]
        axis.plot([best], [share], marker="*", markersize=13, color=style["color"],
                  markeredgecolor="black", zorder=5)  # fmt: skip
    top = max(100 * system["best_goodput"] for system in of_side["systems"].values())
    low = min(100 * system["best_goodput"] for system in of_side["systems"].values())
    span = max(top - low, 100 * SHOWN_OF_GOODPUT)
    hours = of_side["mtbf_s"] / 3600
    axis.set(
        xscale="log", ylim=(top - 1.5 * span, top + 0.1 * span),
        title=f"{TITLES[side]}, one failure in {hours:g} h",
        xlabel="steps from save to save; stars: the best, dots: measured, lines: computed",
        ylabel="goodput, % of all time",
    )  # fmt: skip
    axis.legend(fontsize=8, loc="lower center")
    axis.grid(alpha=0.3)


def _plain_ticks(axis: Axes, values: list[int]) -> None:
    axis.set_xticks(values, labels=[str(value) for value in values])
    axis.set_xticks([], minor=True)
