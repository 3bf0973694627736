"""Durable saves and loads of one state by every system that installs here, shardckpt among them.

`make bench-peers`, or `python benchmarks/peers.py [--gib 1] [--rounds 5] [--quick]`

On the side of torch one FSDP2 state with AdamW moments lies on 2 ranks; on the side of JAX arrays
of the same shapes lie on 2 devices of 1 process. All write to one directory, taking turns in an
order that is swapped from round to round. A save counts until it is done and its files and names
are flushed: shardckpt does that by itself, after every other one all its files and directories are
flushed here, which is nearly free for what is flushed already, and counts. A save blocks until the
state may change, with nothing beside it that would hide a copy. Every load is compared bit for bit.
What is not installed or does not run is listed with the reason.
"""

from __future__ import annotations

import statistics
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any, Final

from harness import GIB, MIB, Report, arguments, refuse_unless_free, say, scratch, table
from overhead_vs_frequency import sides_that_run

from shardckpt.testing.ranks import run_ranks

if TYPE_CHECKING:
    import argparse
    from pathlib import Path

SIDES: Final = ("torch", "jax")
RANKS: Final = {"torch": 2, "jax": 1}
LAYOUT: Final = {"torch": "2 ranks, a process each", "jax": "1 process, 2 devices"}
OURS: Final = "shardckpt"
COLUMNS: Final = ("save", "blocks", "load cold", "load warm")
PACKAGES: Final = (
    "torch", "safetensors", "torchsnapshot", "bytecheckpoint", "jax", "orbax-checkpoint",
    "tensorstore",
)  # fmt: skip
KEPT: Final = 3  # Checkpoints of a system at once, at most.
QUICK_GIB: Final = 0.05
TIMEOUT_S: Final = 1800.0


def versions() -> dict[str, str]:
    """Return what is installed of all packages that are compared."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def rows_of(seconds: dict[str, dict[str, list[float]]], disk: dict[str, int]) -> list[list[str]]:
    """Return a row for every system: medians and ranges in seconds, and MiB on disk."""
    return [
        [name]
        + [
            f"{statistics.median(of[c]):.2f} ({min(of[c]):.2f}-{max(of[c]):.2f})"
            if c != "blocks"
            else f"{statistics.median(of[c]):.3f} ({min(of[c]):.3f}-{max(of[c]):.3f})"
            for c in COLUMNS
        ]
        + [f"{disk[name] / MIB:.0f}"]
        for name, of in seconds.items()
    ]


def losses(side: str, seconds: dict[str, dict[str, list[float]]]) -> list[str]:
    """Return a line for every column in which another system is faster than shardckpt."""
    found = []
    for column in COLUMNS:
        median = {name: statistics.median(of[column]) for name, of in seconds.items()}
        for name, value in sorted(median.items(), key=lambda item: item[1]):
            if value < median[OURS]:
                found.append(
                    f"{side}, {column}: {name} {value:.3f} s, shardckpt {median[OURS]:.3f} s"
                )
    return found


def judge_side(report: Report, side: str, results: list[Any]) -> None:
    """Print a side's table, keep its series, and add its figures."""
    first = results[0]
    seconds, disk = first["seconds"], first["disk_bytes"]
    report.facts[f"{side} state MiB"] = round(sum(r["rank_bytes"] for r in results) / MIB)
    for name, why in first["unable"].items():
        report.facts["cannot run here"][f"{side}: {name}"] = why
    table((f"{side}, s", *COLUMNS, "MiB on disk"), rows_of(seconds, disk))
    report.series[side] = {
        "seconds": {
            name: {c: [round(v, 4) for v in of[c]] for c in COLUMNS} for name, of in seconds.items()
        },
        "disk_bytes": {name: disk[name] for name in seconds},
    }
    others = [name for name in seconds if name != OURS]
    if OURS not in seconds or not others:
        report.facts[f"{side}: no ratio"] = "fewer than two systems ran"
        return
    for column in COLUMNS:
        median = {name: statistics.median(of[column]) for name, of in seconds.items()}
        best = min(median[name] for name in others)
        report.add(f"{side}_{column.replace(' ', '_')}_s", median[OURS])
        report.add(f"{side}_{column.replace(' ', '_')}_time_per_best_peer", median[OURS] / best)


def page(report: Report) -> str:
    """Return peers.md."""
    facts = report.facts
    lines = [
        "# Beside what else there is", "",
        f"`make bench-peers`, which runs `{facts['command']}` in an environment of its own. "
        f"{facts['cpu']}, {facts['cores']} cores, {facts['memory_gib']} GiB, Linux "
        f"{facts['kernel']}, Python {facts['python']}. "
        + ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
        + f". {facts['rounds']} rounds, medians and ranges.",
        "",
        "**save**: until all files and names are flushed; shardckpt flushes by itself, after every "
        "other one all its files and directories are flushed by the benchmark, and that counts. "
        "**blocks**: until the state may change, with no step beside it that would hide a copy. "
        "**load cold** and **warm**: files out of the page cache, and in it. Every load was "
        "compared with what was saved, bit for bit. Only shardckpt checks a checksum of all bytes "
        "it loads. Files per rank (torch.save, safetensors, torchsnapshot as used here) "
        "load on as many ranks only.",
    ]  # fmt: skip
    for side, series in report.series.items():
        state = f"{facts[f'{side} state MiB']} MiB, {LAYOUT[side]}"
        lines += ["", f"## {side}: {state}", ""]
        lines += _markdown(
            (*("system", "save, s", "blocks, s", "load cold, s", "load warm, s"), "MiB on disk"),
            rows_of(series["seconds"], series["disk_bytes"]),
        )
        if OURS in series["seconds"]:
            slower = losses(side, series["seconds"])
            head = "Where another one is faster than shardckpt:" if slower else (
                "In no column is another one faster than shardckpt."
            )  # fmt: skip
            lines += ["", head, *(["", *(f"- {line}" for line in slower)] if slower else [])]
    if facts["cannot run here"]:
        lines += ["", "## Did not run", ""]
        lines += [f"- {name}: {why}" for name, why in facts["cannot run here"].items()]
    return "\n".join(lines) + "\n"


def _markdown(header: tuple[str, ...], rows: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *rows)]


def run_side(side: str, told: argparse.Namespace, place: Path) -> list[Any]:
    """Return what every rank of a side measured."""
    if side == "torch":
        from peers_torch import NAMES, measure
    else:
        from peers_jax import NAMES, measure
    return run_ranks(
        RANKS[side], measure, place, int(told.gib * GIB), told.rounds, NAMES,
        timeout_s=TIMEOUT_S, directory=place / "ranks",
    )  # fmt: skip


def main() -> int:
    """Run both sides and write the page."""
    parser = arguments("Save and load one state with every system that is installed.")
    parser.add_argument("--gib", type=float, default=1.0, help="bytes of the whole state")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--quick", action="store_true", help="small and one round")
    told = parser.parse_args()
    if told.quick:
        told.gib, told.rounds = QUICK_GIB, 1
    if told.rounds < 1 or told.gib <= 0:
        parser.error("--rounds must be at least 1, --gib above 0")
    sides, missing = sides_that_run(told.sides)
    for what, why in missing.items():
        say(f"{what}: {why}")
    if not sides:
        return 2
    num_systems = 7 if "torch" in sides else 5
    refuse_unless_free(parser, told.directory, int(told.gib * GIB) * (num_systems + KEPT))
    report = Report("peers")
    report.facts["versions"] = versions()
    report.facts["rounds"] = told.rounds
    report.facts["cannot run here"] = dict(missing)
    for side in sides:
        with scratch(told.directory) as place:
            judge_side(report, side, run_side(side, told, place))
    if told.json is not None:
        told.json.parent.mkdir(parents=True, exist_ok=True)
        told.json.with_suffix(".md").write_text(page(report))
    for name, why in report.facts["cannot run here"].items():
        say(f"did not run: {name}: {why}")
    return report.finish(told)


if __name__ == "__main__":
    sys.exit(main())
