"""Write all results as one page, benchmarks/results/README.md and its pictures, and the README's.

`python benchmarks/report.py [--results benchmarks/results]`

Reads the JSON files that the benchmarks wrote; measures nothing. Of the project's README it writes
what stands between two marks: what saving costs, beside other systems.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import matplotlib as mpl
import overhead_plots
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from collections.abc import Iterable

    from matplotlib.axes import Axes

ORDER: Final = (
    "limits", "overhead_vs_frequency", "stall", "durable", "save_load", "many_small", "memory",
    "reshard", "jax_peers", "policy", "scale", "many_ranks", "peers",
)  # fmt: skip
SHARED_FACTS: Final = (
    "cpu", "cores", "memory_gib", "kernel", "python", "torch", "shardckpt", "native",
)  # fmt: skip
MODES: Final = ("device", "compute")
README: Final = Path(__file__).parents[1] / "README.md"
COSTS_BEGIN: Final = "<!-- what it costs: written by benchmarks/report.py -->"
COSTS_END: Final = "<!-- end of what it costs -->"
SHOWN_INTERVAL: Final = "10"
OURS: Final = "shardckpt"
COLORS: Final = ("#b0413e", "#e3b23c", "#4c72b0", "#7f7f7f")
# The same bytes from the same data, so that a new picture is a new result.
mpl.rcParams.update({"svg.hashsalt": "shardckpt", "svg.fonttype": "none", "font.size": 9})


def main() -> int:
    """Read, draw, write."""
    parser = argparse.ArgumentParser(description="Write the page of all results.")
    here = Path(__file__).parent / "results"
    parser.add_argument("--results", type=Path, default=here, help="where the JSON files are")
    place: Path = parser.parse_args().results
    results = {
        name: json.loads((place / f"{name}.json").read_text())
        for name in ORDER if (place / f"{name}.json").exists()
    }  # fmt: skip
    lines = [
        "# Benchmark results", "",
        "Written by `make bench`; each figure is a ratio or a time of one run, in which what is "
        "compared took turns.",
        "", *_failures(results), "", *_machines(results),
    ]  # fmt: skip
    limits = results.get("limits", {"figures": {}})["figures"]
    for name, result in results.items():
        lines += ["", f"## {name}", "", *_figures(result, limits if name != "limits" else {})]
        lines += _missing(result["facts"])
        for picture in _pictures(name, result.get("series", {}), place):
            lines += ["", f"![{picture}]({picture})"]
    (place / "README.md").write_text("\n".join(lines) + "\n")
    if place == here:
        README.write_text(with_costs(README.read_text(), results.get("overhead_vs_frequency")))
    return 0


def with_costs(readme: str, overheads: dict[str, Any] | None) -> str:
    """Return the README with the costs of these results, if there are any, between its marks.

    Raises:
        ValueError: A mark is missing.
    """
    begin, end = readme.index(COSTS_BEGIN) + len(COSTS_BEGIN), readme.index(COSTS_END)
    lines = [] if overheads is None else _costs(overheads)
    return readme[:begin] + "\n" + "".join(f"{line}\n" for line in lines) + readme[end:]


def _costs(overheads: dict[str, Any]) -> list[str]:
    """Return the lines of the README's table."""
    facts, rows = overheads["facts"], []
    for side, of_side in overheads["series"].items():
        for name, of in of_side["systems"].items():
            at = of["intervals"][SHOWN_INTERVAL]
            seconds = of["best_interval"] * of_side["step_s"]
            rows.append((
                f"**{name}**, {side}" if name == OURS else f"{name}, {side}",
                f"{100 * statistics.median(at['overheads']):.1f} %",
                f"{1e3 * statistics.median(at['stalls_s']):.0f} ms",
                f"{of['durable_s']:.2f} s", f"{seconds:.0f} s",
                f"{100 * (1 - of['best_goodput']):.2f} %",
            ))  # fmt: skip
    header = (
        "system", f"longer by, a save every {SHOWN_INTERVAL} steps", "a save stalls",
        "durable after", "best: save every", "lost then, restarts included",
    )  # fmt: skip
    sides = " and ".join(
        f"{side} ({facts[f'{side} state MiB']} MiB of state, steps of {of['step_s']:.2f} s)"
        for side, of in overheads["series"].items()
    )
    return [
        f"Two training examples bound by computing, {sides}, on {facts['cores']} cores: the worst "
        "case, for nothing is idle that a save could use. "
        f"Best interval and loss for one failure in {facts['mtbf s'] / 3600:g} h and "
        f"{facts['restart s']:g} s to restart.",
        "",
        "![overhead by interval](benchmarks/results/overhead_vs_frequency.svg)", "",
        *_table(header, rows),
    ]  # fmt: skip


def _failures(results: dict[str, Any]) -> list[str]:
    missed = [
        f"{name}: {figure} is {f['value']:g}, must be {f['must']}"
        for name, result in results.items() for figure, f in result["figures"].items()
        if not f["ok"]
    ]  # fmt: skip
    judged = sum(bool(f["must"]) for r in results.values() for f in r["figures"].values())
    head = f"{judged - len(missed)} of {judged} bounds are met."
    return [head, *(["", "Missed:", ""] + [f"- {line}" for line in missed] if missed else [])]


def _machines(results: dict[str, Any]) -> list[str]:
    """Return a table with a row for every machine or set of versions that differs."""
    machines: dict[tuple[str, ...], list[str]] = {}
    for name, result in results.items():
        key = tuple(str(result["facts"].get(fact, "?")) for fact in SHARED_FACTS)
        machines.setdefault(key, []).append(name)
    rows = [(", ".join(names), *key) for key, names in machines.items()]
    return _table(("benchmarks", *SHARED_FACTS), rows)


def _figures(result: dict[str, Any], limits: dict[str, Any]) -> list[str]:
    facts = {k: v for k, v in result["facts"].items() if isinstance(v, int | float | str)}
    told = ", ".join(
        f"{k} {v}" for k, v in facts.items() if k not in SHARED_FACTS and k != "command"
    )
    rows = [
        (figure, f"{f['value']:g}", f["must"] or "", _met(f))
        for figure, f in result["figures"].items()
    ]
    lines = [f"`{result['facts']['command']}`" + (f": {told}" if told else ""), ""]
    lines += _table(("figure", "value", "must", "met"), rows)
    if limits:
        shown = ", ".join(
            f"{name.removesuffix('_gb_per_s').replace('_', ' ')} {f['value']:g}"
            for name, f in limits.items()
        )
        lines += ["", f"Limits of the machine, GB/s: {shown}."]
    return lines


def _met(figure: dict[str, Any]) -> str:
    if not figure["must"]:
        return ""
    return "yes" if figure["ok"] else "**no**"


def _missing(facts: dict[str, Any]) -> list[str]:
    missing = facts.get("cannot run here", {})
    return (
        ["", "Cannot run here:", ""] + [f"- {k}: {v}" for k, v in missing.items()]
        if missing
        else []
    )


def _table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    header = list(header)
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(cells) + " |" for cells in lines]


def _pictures(name: str, series: dict[str, Any], place: Path) -> list[str]:
    """Draw what a benchmark has to show and return the files' names."""
    if not series:
        return []
    if name == "stall":
        return [_stalls(series, place), _traces(series, place), _sizes(series, place)]
    if name == "durable":
        return [_speeds(series, place)]
    if name == "memory":
        return [_memory(series, place)]
    if name == "policy":
        return [_policy(series, place)]
    if name == "scale":
        return [_growth(series, place)]
    if name == "many_ranks":
        return [_operations(series, place)]
    if name == "overhead_vs_frequency":
        return overhead_plots.draw(series, place)
    return []


def _systems(series: dict[str, Any], mode: str) -> dict[str, Any]:
    return {
        key.removeprefix(f"{mode} "): value
        for key, value in series.items() if key.startswith(f"{mode} ")
    }  # fmt: skip


def _stalls(series: dict[str, Any], place: Path) -> str:
    """Draw the parts of the stall and the inflation of every system."""
    figure, axes = _axes(2, 2, 7.5)
    for row, mode in zip(axes, MODES, strict=True):
        systems = _systems(series, mode)
        names = list(systems)[::-1]
        left = [0.0] * len(names)
        for part, color in zip(systems[OURS]["parts_ms"], COLORS, strict=True):
            values = [max(0.0, systems[name]["parts_ms"][part]) for name in names]
            row[0].barh(names, values, left=left, label=part, color=color)
            left = [a + b for a, b in zip(left, values, strict=True)]
        row[0].set(title=f"{mode}-bound: stall of a save (medians of its parts)", xlabel="ms")
        row[0].legend()
        values = [1e3 * statistics.median(systems[name]["inflation_s"]) for name in names]
        row[1].barh(names, values, color=COLORS[2])
        row[1].set(title=f"{mode}-bound: inflation by a save (median)", xlabel="ms", yticks=[])
    return _write(figure, place, "stall.svg")


def _traces(series: dict[str, Any], place: Path) -> str:
    """Draw how long the steps around a save take."""
    figure, axes = _axes(1, 2, 4.0)
    for axis, mode in zip(axes[0], MODES, strict=True):
        for name, shown in _systems(series, mode).items():
            ours = name == OURS
            axis.plot(
                range(-1, len(shown["trace_s"]) - 1), shown["trace_s"], marker="o", label=name,
                zorder=3 if ours else 2, color=COLORS[0] if ours else None,
                linewidth=2.5 if ours else 1.0,
            )  # fmt: skip
        axis.set(
            title=f"{mode}-bound: steps until the save is drained (medians)",
            xlabel="step; step 0 ends in save()", ylabel="s", ylim=(0, None),
        )  # fmt: skip
        axis.xaxis.get_major_locator().set_params(integer=True)
    axes[0][0].legend(fontsize=7)
    return _write(figure, place, "steps.svg")


def _sizes(series: dict[str, Any], place: Path) -> str:
    figure, axes = _axes(1, 1, 3.0)
    points = {int(mib) / 1024: ms for mib, ms in series["stall ms by state MiB"].items()}
    axes[0][0].plot(list(points), list(points.values()), marker="o", color=COLORS[0])
    axes[0][0].set(
        title="Stall of shardckpt by size (median)", xlabel="GiB of state", ylabel="ms",
        ylim=(0, None),
    )  # fmt: skip
    return _write(figure, place, "sizes.svg")


def _speeds(series: dict[str, Any], place: Path) -> str:
    figure, axes = _axes(1, len(series), 3.5)
    for axis, (title, speeds) in zip(axes[0], series.items(), strict=True):
        names = sorted(speeds)[::-1]
        own = [name.startswith(("load", "save")) for name in names]
        medians = [statistics.median(speeds[name]) for name in names]
        axis.barh(names, medians, color=[COLORS[0] if o else COLORS[3] for o in own])
        for i, name in enumerate(names):
            axis.plot(speeds[name], [i] * len(speeds[name]), "k|", markersize=8)
        axis.set(title=title, xlabel="GB/s; medians and every round")
    return _write(figure, place, "durable.svg")


def _memory(series: dict[str, Any], place: Path) -> str:
    figure, axes = _axes(1, 1, 3.0)
    values = series["MiB beyond the state"]
    axes[0][0].plot(range(1, len(values) + 1), values, color=COLORS[0])
    axes[0][0].set(title="Memory beyond the state", xlabel="saves", ylabel="MiB", ylim=(0, None))
    return _write(figure, place, "memory.svg")


def _policy(series: dict[str, Any], place: Path) -> str:
    """Draw what fixed intervals lose, and what the policy does that knows nothing before."""
    columns = 3
    figure, axes = _axes(-(-len(series) // columns), columns, 6.5)
    figure.set_size_inches(12, 6.5)
    places = [place_ for row in axes for place_ in row]
    for axis, (name, scenario) in zip(places, series.items(), strict=False):
        percent = [100 * part for part in scenario["lost"]]
        axis.plot(scenario["interval_s"], percent, marker=".", color=COLORS[2], label="fixed")
        axis.axhline(100 * scenario["policy"], color=COLORS[0], label="Auto()")
        axis.set(title=name, xlabel="s between saves", ylabel="% of the time lost", xscale="log")
        axis.set_ylim(0, 4 * min(percent))
        axis.legend()
    return _write(figure, place, "policy.svg")


def _growth(series: dict[str, Any], place: Path) -> str:
    """Draw how times and sizes grow with the ranks, ours (every layout) against DCP's."""
    figure, axes = _axes(1, 3, 3.5)
    panels = (
        ("A rank's own plan", "s", "first_plan_s", 1.0, "local_plan_s"),
        ("Work of the coordinator", "s", "commit_s", 1.0, "global_plan_s"),
        ("Manifest and metadata", "MB", "manifest_bytes", 1e-6, "metadata_bytes"),
    )
    for axis, (title, unit, own, factor, of_dcp) in zip(axes[0], panels, strict=True):
        for number, points in enumerate(series["ours"].values()):
            label = OURS if not number else None
            _line(axis, points, own, factor, marker="o", color=COLORS[0], label=label)
        if own == "commit_s":
            for number, points in enumerate(series["ours"].values()):
                label = f"{OURS}, new structure" if not number else None
                _line(axis, points, "coordinator_first_s", factor, color=COLORS[1], label=label)
        _line(axis, series["dcp"], of_dcp, factor, marker="s", color=COLORS[3], label="dcp")
        axis.set(title=title, xlabel="ranks", ylabel=unit, xscale="log", yscale="log")
        axis.legend()
    return _write(figure, place, "scale.svg")


def _line(axis: Axes, points: dict[str, Any], of: str, factor: float, **how: Any) -> None:
    ranks = sorted(points, key=int)
    axis.plot([int(n) for n in ranks], [factor * points[n][of] for n in ranks], **how)


def _operations(series: dict[str, Any], place: Path) -> str:
    """Draw what a save asks of the key-value store, and the processor time of a rank."""
    figure, axes = _axes(1, 2, 3.5)
    for (framework, points), color in zip(series.items(), COLORS, strict=False):
        _line(
            axes[0][0],
            points,
            "operations of a save",
            1.0,
            marker="o",
            color=color,
            label=framework,
        )
        for of, style in (("an ordinary rank", "-"), ("the coordinator", "--")):
            _line(
                axes[0][1],
                points,
                f"cpu_s of {of}",
                1e3,
                marker="o",
                color=color,
                linestyle=style,
                label=f"{framework}, {of}",
            )
    axes[0][0].set(title="Calls of the key-value store by a save", ylabel="calls of all ranks")
    axes[0][1].set(title="Processor time of a save", ylabel="ms")
    for axis in axes[0]:
        axis.set(xlabel="processes", xscale="log", yscale="log")
        axis.legend()
    return _write(figure, place, "many_ranks.svg")


def _axes(rows: int, columns: int, height: float) -> tuple[Figure, list[list[Axes]]]:
    figure = Figure(figsize=(7.0 * max(1, columns), height), layout="constrained")
    return figure, [list(row) for row in figure.subplots(rows, columns, squeeze=False)]


def _write(figure: Figure, place: Path, name: str) -> str:
    figure.savefig(place / name, metadata={"Date": None})
    return name


if __name__ == "__main__":
    sys.exit(main())
