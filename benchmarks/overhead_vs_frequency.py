"""How much saving costs by how often one saves, beside what else saves, and how often one should.

`python benchmarks/overhead_vs_frequency.py [--gib 0.3] [--intervals 1 2 5 10 20 50 100] [--quick]`

The FSDP2 example trains on 2 ranks and the pjit example on 8 devices of one process, both bound by
computing, with a save every so many steps. Overhead is by how much the steps under a save, and the
saves, are longer than steps without, over the time without saves; medians over saves and rounds
(`overhead_runs`). The wait for the last save, the drain, is told apart. Every system takes its turn
with every interval between runs without saves. All make
their files durable: DCP by its own default, `torch.save` by a flush that is counted. At the
end every system saves, loads from the disk, and is compared bit for bit.

From the cost of a save, the time until it is durable and the time of a restore, goodput.py computes
which share of a job's time is useful under a rate of failures, and the interval that is best.
"""

from __future__ import annotations

import importlib.util
import statistics
import sys
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Final

import goodput
from harness import GIB, MIB, Report, arguments, refuse_unless_free, say, scratch, table
from overhead_runs import Found, Judged, Plan, judge, plan_for

from shardckpt.testing.ranks import run_ranks

if TYPE_CHECKING:
    import argparse
    from collections.abc import Mapping, Sequence

SIDES: Final = ("torch", "jax")
NEEDED: Final = {"torch": ("torch", "numpy"), "jax": ("jax", "optax", "grain")}
OPTIONAL: Final = {"orbax": "orbax-checkpoint", "matplotlib": "matplotlib"}
RANKS: Final = {"torch": 2, "jax": 1}
OURS: Final = "shardckpt"
JUDGED_INTERVAL: Final = 10
SETTLED_FROM: Final = 5  # Steps: from there on a save no longer meets the one before.
FEWEST_STEPS: Final = 6
QUICK_GIB: Final = 0.002
MOST: Final = 0.25
LEAST_OVERHEAD: Final = 0.005  # Of a peer: below this is noise.
LEAST_COST_S: Final = 1e-4
TIMEOUT_S: Final = 3600.0


def is_there(module: str) -> bool:
    """Return whether a package can be imported."""
    return importlib.util.find_spec(module) is not None


def sides_that_run(wanted: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Return the sides whose packages are installed, and what is missing for the others."""
    able, missing = [], {}
    for side in wanted:
        absent = [name for name in NEEDED[side] if not is_there(name)]
        if absent:
            missing[side] = f"not installed: pip install {' '.join(absent)}"
        else:
            able.append(side)
    for module, package in OPTIONAL.items():
        if not is_there(module) and (module != "orbax" or "jax" in able):
            missing[module] = f"not installed: pip install {package}"
    return able, missing


def names_of(side: str, told: argparse.Namespace) -> tuple[str, ...]:
    """Return the systems of a side that are asked for and installed."""
    if side == "torch":
        from overhead_torch import NAMES as EVERY
    else:
        from overhead_jax import NAMES as EVERY
    names = [n for n in EVERY if side == "torch" or is_there("orbax") or n == OURS]
    if told.quick:
        names = [n for n in names if n in QUICK_SYSTEMS]
    return tuple(names)


# One that blocks and one in the background; DCP's process takes long to start.
QUICK_SYSTEMS: Final = (
    OURS, "dcp.save", "dcp.async_save, thread", "orbax, AsyncCheckpointer",
)  # fmt: skip


def costs(found: Mapping[int, Found]) -> dict[int, float]:
    """Return the seconds that a save costs by interval, as goodput takes them.

    Where a save no longer meets the one before, all intervals count together: there the cost of a
    save is small beside the noise of a long run. It is never less than the stall, which is measured
    by itself.
    """
    settled = [i for i in found if i >= SETTLED_FROM and i < 50] or list(found)
    stall_s = {i: statistics.median(found[i].stalls_s) for i in found}
    cost_s = {i: max(LEAST_COST_S, stall_s[i], statistics.median(found[i].costs_s)) for i in found}
    together_s = statistics.median(c for i in settled for c in found[i].costs_s)
    stalls_s = statistics.median(s for i in settled for s in found[i].stalls_s)
    known = {i: cost_s[i] for i in found if i < min(settled)}
    return known | {min(settled): max(LEAST_COST_S, together_s, stalls_s)}


def durable_s(found: Mapping[int, Found]) -> float:
    """Return the seconds until a save is durable that does not meet the one before."""
    settled = [i for i in found if i >= SETTLED_FROM] or list(found)
    return statistics.median(s for i in settled for s in found[i].durables_s)


def judge_side(
    report: Report, side: str, judged: Judged, results: list[Any], told: argparse.Namespace
) -> None:
    """Print a side's tables, keep its series and add its figures."""
    report.facts[f"{side} step s"] = round(judged.step_s, 4)
    report.facts[f"{side} noise of a run %"] = round(100 * judged.noise, 2)
    intervals = sorted(next(iter(judged.found.values())))
    for title, of in (
        ("overhead %", lambda f: f"{100 * statistics.median(f.overheads):.2f}"),
        ("stall of a save ms", lambda f: f"{1e3 * statistics.median(f.stalls_s):.1f}"),
        ("of it back-pressure ms", lambda f: f"{1e3 * statistics.median(f.pressures_s):.1f}"),
        ("inflation by a save ms", lambda f: f"{1e3 * statistics.median(f.costs_s):.1f}"),
        ("drain s", lambda f: f"{statistics.median(f.drains_s):.2f}"),
    ):
        rows = [(name, *(of(found[i]) for i in intervals)) for name, found in judged.found.items()]
        table((f"{side}, {title}, a save every", *intervals), rows)
        say("")
    rows, systems = [], {}
    for name, found in judged.found.items():
        restore_s = statistics.median(max(r["restores_s"][name]) for r in results)
        job = goodput.Job(judged.step_s, durable_s(found), restore_s + told.restart_s, told.mtbf_s)
        by_interval = costs(found)
        best, share = goodput.best(job, by_interval)
        at = {
            i: goodput.goodput(
                job, i, max(LEAST_COST_S, statistics.median(found[i].costs_s),
                            statistics.median(found[i].stalls_s)),
            ) for i in intervals
        }  # fmt: skip
        rows.append((
            name, f"{1e3 * by_interval[max(by_interval)]:.1f}", f"{job.durable_s:.2f}",
            f"{restore_s:.2f}", best, f"{best * judged.step_s:.1f}", f"{100 * share:.3f}",
        ))  # fmt: skip
        systems[name] = {
            "intervals": {str(i): found[i].as_data() for i in intervals},
            "costs_s": {str(i): round(s, 5) for i, s in by_interval.items()},
            "durable_s": round(job.durable_s, 4), "restore_s": round(restore_s, 4),
            "goodput": {str(i): round(share, 6) for i, share in at.items()},
            "curve": {
                str(i): round(share, 6) for i, share in goodput.curve(job, by_interval).items()
                if i <= 10_000
            },
            "best_interval": best, "best_goodput": round(share, 6),
        }  # fmt: skip
        report.add(f"{side}_best_interval_steps, {name}", float(best))
        report.add(f"{side}_goodput_at_best_interval, {name}", share)
    table(
        (f"{side}, one failure in {told.mtbf_s:g} s", "cost of a save ms", "durable after s",
         "restore s", "best: save every", "s", "goodput %"),
        rows,
    )  # fmt: skip
    say("")
    report.series[side] = {
        "step_s": judged.step_s, "noise": judged.noise, "mtbf_s": told.mtbf_s, "systems": systems,
    }  # fmt: skip


def add_figures(report: Report, side: str, judged: Judged, peers: Sequence[str]) -> None:
    """Add the figures of the interval that is judged."""
    intervals = sorted(next(iter(judged.found.values())))
    every = JUDGED_INTERVAL if JUDGED_INTERVAL in intervals else intervals[len(intervals) // 2]
    overheads = {
        name: statistics.median(found[every].overheads) for name, found in judged.found.items()
    }
    for name, value in overheads.items():
        report.add(f"{side}_overhead_at_a_save_every_{every}_steps_percent, {name}", 100 * value)
    known = [overheads[name] for name in peers if name in overheads]
    if not known:
        report.facts[f"{side}: no ratio"] = "no peer that saves in the background ran"
        return
    label = "fsdp_example" if side == "torch" else "pjit_example"
    name = f"{label}_compute_bound_overhead_at_a_save_every_{every}_steps_per_best_async_peer"
    if min(known) < LEAST_OVERHEAD:
        report.facts[f"{side}: no ratio"] = (
            f"the best peer's overhead, {100 * min(known):.2f} %, is below "
            f"{100 * LEAST_OVERHEAD} %: noise"
        )
        return
    bound = MOST if side == "torch" and every == JUDGED_INTERVAL else None
    # Below 0 is noise.
    report.add(name, max(0.0, overheads[OURS]) / min(known), at_most=bound)


def needed_bytes(state_bytes: int, plan: Plan, num_systems: int) -> int:
    """Return the most that lies on the disk at once: a run's saves, two steps of each system."""
    in_a_run = max(plan.num_saves(interval) for interval in plan.intervals)
    return state_bytes * (in_a_run + 2 * num_systems + 1)


def run_side(side: str, told: argparse.Namespace, plan: Plan, report: Report) -> None:
    """Run one side and judge it."""
    if side == "torch":
        from overhead_torch import ASYNC_PEERS, measure
    else:
        from overhead_jax import ASYNC_PEERS, measure
    with scratch(told.directory) as place:
        results: list[Any] = run_ranks(
            RANKS[side], measure, place, int(told.gib * GIB), plan, names_of(side, told),
            timeout_s=TIMEOUT_S, directory=place / "ranks",
        )  # fmt: skip
    report.facts[f"{side} state MiB"] = round(sum(r["rank_bytes"] for r in results) / MIB)
    report.facts.setdefault("cannot run here", {}).update(results[0]["unable"])
    judged = judge([result["runs"] for result in results], names_of(side, told))
    judge_side(report, side, judged, results, told)
    add_figures(report, side, judged, ASYNC_PEERS)


def options() -> argparse.ArgumentParser:
    """Return the parser."""
    parser = arguments("Measure overhead and goodput by how often one saves.")
    add = parser.add_argument
    add("--gib", type=float, default=0.3, help="bytes of the whole state")
    add("--intervals", type=int, nargs="+", default=[1, 2, 5, 10, 20, 50, 100])
    add("--steps", type=int, default=FEWEST_STEPS, help="least steps of a run")
    add("--rounds", type=int, default=3, help="one less from 20 steps on, one from 50 on")
    add("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    add("--mtbf-s", type=float, default=3 * 3600.0, help="mean seconds between failures of a job")
    add("--restart-s", type=float, default=60.0, help="seconds from a failure until a restore")
    add("--quick", action="store_true", help="small and few: tries the script")
    return parser


def main() -> int:
    """Run both sides, judge, draw."""
    parser = options()
    told = parser.parse_args()
    if told.quick:
        told.gib, told.intervals, told.rounds = min(told.gib, QUICK_GIB), [1, 5], 1
    if min(*told.intervals, told.rounds, told.steps) < 1 or told.gib <= 0:
        parser.error("--intervals, --rounds and --steps must be at least 1, --gib above 0")
    sides, missing = sides_that_run(told.sides)
    for what, why in missing.items():
        say(f"{what}: {why}")
    if not sides:
        return 2
    plan = plan_for(set(told.intervals), told.rounds, told.steps)
    num_systems = max(len(names_of(side, told)) for side in sides)
    refuse_unless_free(parser, told.directory, needed_bytes(int(told.gib * GIB), plan, num_systems))
    report = Report("overhead_vs_frequency")
    report.facts |= {"mtbf s": told.mtbf_s, "restart s": told.restart_s}
    packages = ("jax", "orbax-checkpoint")
    report.facts |= {p: version(p) for p in packages if is_there(p.split("-")[0])}
    report.facts["cannot run here"] = dict(missing)
    for side in sides:
        run_side(side, told, plan, report)
    if told.json is not None and "matplotlib" not in missing:
        from overhead_plots import draw

        told.json.parent.mkdir(parents=True, exist_ok=True)
        for picture in draw(report.series, told.json.parent):
            say(f"drawn: {picture}")
    return report.finish(told)


if __name__ == "__main__":
    sys.exit(main())
