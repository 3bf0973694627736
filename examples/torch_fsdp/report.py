"""What the demo found: losses against the uninterrupted run, as a table and as a picture."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.axes import Axes

TOLERANCE: Final = 1e-5
_REFERENCE_RANKS: Final = 2
_COLOURS: Final = {1: "#d95f02", 2: "#1b6ca8", 3: "#2a9d5c"}
# Where the picture puts a difference of exactly nothing on its logarithmic axis.
_BIT_EQUAL: Final = 1e-11


@dataclass(frozen=True, slots=True)
class Phase:
    """One stretch of training.

    Attributes:
        name: Short name.
        ranks: Ranks it ran on.
        losses: Its losses by step.
        reference: Losses of the uninterrupted run by step.
        wall_s: Seconds it took, start-up included.
        what: What happened, in words.
        killed_at_step: Step whose save was interrupted, or None.
    """

    name: str
    ranks: int
    losses: dict[int, float]
    reference: dict[int, float]
    wall_s: float
    what: str
    killed_at_step: int | None

    @property
    def differences(self) -> dict[int, float]:
        """Relative difference by step; infinite where either side has no number."""
        return {
            step: _difference(loss, self.reference.get(step, math.inf))
            for step, loss in self.losses.items()
        }

    @property
    def largest_difference(self) -> float:
        """The largest relative difference; infinite where there are no losses at all."""
        return max(self.differences.values(), default=float("inf"))

    @property
    def holds(self) -> bool:
        """Whether it is bit-equal on as many ranks as the reference, else within 1e-5."""
        bound = 0.0 if self.ranks == _REFERENCE_RANKS else TOLERANCE
        return self.largest_difference <= bound


def _difference(loss: float, reference: float) -> float:
    found = abs(loss - reference) / reference
    # A loss that is no number must not slip through a maximum, which ignores it.
    return found if math.isfinite(found) else math.inf


def read_losses(metrics: Path) -> dict[int, float]:
    """Return the losses by step; a last line torn by a kill is left out."""
    lines = metrics.read_text().splitlines(keepends=True) if metrics.exists() else []
    parsed = [json.loads(line) for line in lines if line.endswith("\n")]
    return {line["step"]: line["loss"] for line in parsed}


def timeline(phases: list[Phase]) -> str:
    """Return the phases as a table."""
    head = ("phase", "ranks", "from", "steps", "wall s", "against the reference", "what happened")
    rows = [head, *(_row(phase) for phase in phases)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def _row(phase: Phase) -> tuple[str, ...]:
    found = phase.largest_difference
    verdict = "bit-equal" if found == 0 else f"differs by {found:.1e}"
    if phase.losses is phase.reference:
        verdict = "(is the reference)"
    elif not phase.holds:
        verdict += ", WRONG"
    first = str(min(phase.losses, default="-"))
    cells = (first, str(len(phase.losses)), f"{phase.wall_s:.1f}", verdict, phase.what)
    return (phase.name, str(phase.ranks), *cells)


def draw(phases: list[Phase], path: Path) -> Path:
    """Draw the losses and their differences from the reference; return the picture's path."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (top, bottom) = plt.subplots(
        2, 1, figsize=(11, 7), sharex=True, height_ratios=(3, 1.3), layout="constrained"
    )
    reference, *resumed = phases
    _draw_losses(top, reference, resumed)
    _draw_differences(bottom, resumed)
    for axes in (top, bottom):
        _mark_interruptions(axes, resumed)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    _name_interruptions(top, resumed)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


def _draw_losses(axes: Axes, reference: Phase, resumed: list[Phase]) -> None:
    steps, losses = _points(reference.losses)
    axes.plot(steps, losses, color="#c9c9c9", linewidth=7, label="2 ranks, uninterrupted")
    for phase in resumed:
        steps, losses = _points(phase.losses)
        colour = _COLOURS[phase.ranks]
        if phase.killed_at_step is None:
            label = f"resumed on {count(phase.ranks)}"
            axes.plot(steps, losses, "-o", color=colour, markersize=4, label=label)
        else:
            # Open circles: part of these steps was lost with the kill and trained again.
            label = f"{count(phase.ranks)}, killed while saving step {phase.killed_at_step}"
            axes.plot(steps, losses, "o", color=colour, markersize=4, label=label, mfc="none")
    axes.set_ylabel("training loss")
    axes.set_title(
        "One training run: killed in the middle of a save, resumed on 2, 3 and 1 ranks", pad=22
    )
    axes.legend(framealpha=1, edgecolor="none")


def _draw_differences(axes: Axes, resumed: list[Phase]) -> None:
    for phase in resumed:
        steps, found = _points(phase.differences)
        axes.plot(
            steps,
            [max(_BIT_EQUAL, value) for value in found],
            "o",
            markersize=3.5,
            color=_COLOURS[phase.ranks],
        )
    axes.axhline(TOLERANCE, color="#b00020", linewidth=1)
    axes.text(
        0,
        TOLERANCE * 0.8,
        "allowed on another number of ranks",
        va="top",
        fontsize=8,
        color="#b00020",
    )
    axes.set_yscale("log")
    axes.set_ylim(_BIT_EQUAL / 3, TOLERANCE * 10)
    axes.set_yticks([_BIT_EQUAL, 1e-9, 1e-7, 1e-5], ["bit-equal", "1e-9", "1e-7", "1e-5"])
    axes.minorticks_off()
    axes.set_ylabel("relative difference")
    axes.set_xlabel("step")


def _mark_interruptions(axes: Axes, resumed: list[Phase]) -> None:
    for phase in resumed[:-1]:
        if phase.losses:
            killed = phase.killed_at_step is not None
            axes.axvline(
                max(phase.losses) + 0.5,
                color="#b00020" if killed else "#888888",
                linestyle="-" if killed else "--",
                linewidth=1.2,
            )


def _name_interruptions(axes: Axes, resumed: list[Phase]) -> None:
    for phase, after in itertools.pairwise(resumed):
        verb = (
            "kill -9"
            if phase.killed_at_step is not None
            else f"{phase.ranks} to {count(after.ranks)}"
        )
        place = max(phase.losses, default=0) + 0.5
        axes.annotate(
            verb,
            (place, 1.01),
            xycoords=("data", "axes fraction"),
            ha="center",
            va="bottom",
            fontsize=9,
        )


def count(ranks: int) -> str:
    """Return "1 rank" or "n ranks"."""
    return f"{ranks} rank" + "s" * (ranks > 1)


def _points(by_step: dict[int, float]) -> tuple[list[int], list[float]]:
    steps = sorted(by_step)
    return steps, [by_step[step] for step in steps]
