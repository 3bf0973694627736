"""Planning and committing at 64 to 16,384 ranks, beside the planner of DCP.

`python benchmarks/scale.py [--ranks 64,256,1024,4096,16384] [--tensors 1000] [--quick]`

The engine's own code plans, merges, commits and opens; only the ranks' messages and memory are not
there 16,384 times (`scale_ours`). The bounds are judged on the worst of all layouts. Then a model
of a cluster of stated hardware saves and restores with these plans and messages (`cluster_model`).
"""

from __future__ import annotations

import importlib.util
import math
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Final

from harness import GIB, MIB, Report, arguments, say, scratch, table

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from scale_ours import Case

MOST_FIRST_PLAN_S: Final = 0.2
MOST_STEADY_PLAN_S: Final = 0.005
MOST_COMMIT_S: Final = 2.0
MOST_MANIFEST_BYTES: Final = 1_000_000
MOST_OWN_EXPONENT: Final = 0.1
MOST_COORDINATOR_EXPONENT: Final = 1.05
MOST_LOAD_PLAN_S: Final = 1.0
LOAD_RANKS: Final = 4_096
ACROSS_DIMS: Final = ("jax_2d", "jax_3d")
DCP_GROWTH: Final = 1.1  # To foresee how long the next size takes.
DCP_RANKS_OF_LAYOUTS: Final = 256


def exponent(points: dict[int, float]) -> float:
    """Return the power of ranks that fits best: least squares of logarithms.

    >>> round(exponent({1: 3.0, 10: 30.0, 100: 300.0}), 6)
    1.0
    """
    x = [math.log(ranks) for ranks in points]
    y = [math.log(value) for value in points.values()]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    above = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return above / sum((a - mean_x) ** 2 for a in x)


def measure_ours(told: argparse.Namespace) -> dict[str, dict[int, Case]]:
    """Return the figures of every layout at every size."""
    from scale_layouts import JOBS
    from scale_ours import measure

    cases: dict[str, dict[int, Case]] = {}
    measure(JOBS["fsdp"](64, 64), 2, with_memory=False)  # Imports and first calls.
    for kind, make in JOBS.items():
        cases[kind] = {
            ranks: measure(
                make(ranks, told.tensors), told.rounds,
                with_memory=kind == "fsdp" and ranks == told.ranks[-1],
            )
            for ranks in told.ranks
        }  # fmt: skip
        say(f"{kind:8} planned")
    return cases


def show(cases: dict[str, dict[int, Case]], tensors: int) -> None:
    """Print the figures of every layout at the smallest and the largest size."""
    rows = []
    for kind, of_kind in cases.items():
        for ranks in sorted({min(of_kind), max(of_kind)}):
            case = of_kind[ranks]
            rows.append(
                (
                    kind, ranks, tensors, f"{1e3 * case.first_plan_s:.1f}",
                    f"{1e3 * case.steady_plan_s:.1f}", f"{1e3 * case.coordinator_first_s:.1f}",
                    f"{1e3 * case.commit_s:.1f}", f"{case.first_save_bytes / MIB:.1f}",
                    f"{case.steady_save_bytes / MIB:.2f}", f"{case.manifest_bytes / 1e3:.0f}",
                )
            )  # fmt: skip
    table(
        (
            "layout", "ranks", "tensors", "first plan ms", "steady ms", "coordinator plans ms",
            "commit ms", "first save kv MiB", "later kv MiB", "manifest kB",
        ),
        rows,
    )  # fmt: skip


def judge(report: Report, cases: dict[str, dict[int, Case]], ranks: int) -> None:
    """Add the figures that have bounds: the worst of all layouts."""

    def worst(of_case: Callable[[Case], float]) -> float:
        return max(of_case(of_kind[ranks]) for of_kind in cases.values())

    def steepest(of_case: Callable[[Case], float]) -> float:
        found = {
            kind: exponent({n: of_case(case) for n, case in of_kind.items()})
            for kind, of_kind in cases.items()
        }
        report.series.setdefault("exponents", []).append(found)
        return max(found.values())

    report.add(
        f"first_plan_of_a_rank_at_{ranks}_s", worst(lambda c: c.first_plan_s),
        at_most=MOST_FIRST_PLAN_S,
    )  # fmt: skip
    report.add(
        f"steady_plan_of_a_rank_at_{ranks}_s", worst(lambda c: c.steady_plan_s),
        at_most=MOST_STEADY_PLAN_S,
    )  # fmt: skip
    report.add(
        f"commit_at_the_coordinator_at_{ranks}_s", worst(lambda c: c.commit_s),
        at_most=MOST_COMMIT_S,
    )  # fmt: skip
    report.add(
        f"first_plan_at_the_coordinator_at_{ranks}_s", worst(lambda c: c.coordinator_first_s),
        at_most=MOST_COMMIT_S,
    )  # fmt: skip
    report.add(
        f"manifest_at_{ranks}_bytes", worst(lambda c: c.manifest_bytes),
        at_most=MOST_MANIFEST_BYTES,
    )  # fmt: skip
    if len(next(iter(cases.values()))) > 1:
        report.add(
            "first_plan_of_a_rank_exponent_in_ranks", steepest(lambda c: c.first_plan_s),
            at_most=MOST_OWN_EXPONENT,
        )  # fmt: skip
        report.add(
            "steady_plan_of_a_rank_exponent_in_ranks", steepest(lambda c: c.steady_plan_s),
            at_most=MOST_OWN_EXPONENT,
        )  # fmt: skip
        report.add(
            "commit_at_the_coordinator_exponent_in_ranks", steepest(lambda c: c.commit_s),
            at_most=MOST_COORDINATOR_EXPONENT,
        )  # fmt: skip
        report.add(
            "first_plan_at_the_coordinator_exponent_in_ranks",
            steepest(lambda c: c.coordinator_first_s), at_most=MOST_COORDINATOR_EXPONENT,
        )  # fmt: skip
    report.add(
        f"kv_bytes_of_a_later_save_per_rank_at_{ranks}",
        worst(lambda c: c.steady_save_bytes) / ranks,
    )
    report.add(
        f"kv_bytes_of_the_first_save_per_rank_at_{ranks}",
        worst(lambda c: c.first_save_bytes) / ranks,
    )
    report.add(
        f"coordinator_memory_of_a_commit_at_{ranks}_mib",
        worst(lambda c: c.commit_memory_bytes) / MIB,
    )
    report.add(
        f"rank_memory_of_its_first_plan_at_{ranks}_mib",
        worst(lambda c: c.plan_memory_bytes) / MIB,
    )


def measure_loads(report: Report, told: argparse.Namespace, place: Path) -> None:
    """Time one rank's load plan in a world of 4,096 (a quarter where the job is smaller).

    The other world has the same kind of layout, or is FSDP. From JAX meshes that cut the other dim
    a thousand times, the latter needs a bit of very many shards: that is told, without a bound.
    """
    from scale_layouts import JOBS, on_fsdp
    from scale_ours import measure_load

    ranks = told.ranks[-1]
    load_ranks = min(LOAD_RANKS, ranks // 4)
    rows, worst, worst_across = [], 0.0, 0.0
    for kind, make in JOBS.items():
        job = make(ranks, told.tensors)
        for other in dict.fromkeys((kind, "fsdp")):
            same = make(load_ranks, told.tensors)
            target = same if other == kind else on_fsdp(same, load_ranks)
            is_across = kind in ACROSS_DIMS and other == "fsdp"
            rounds = 1 if is_across else told.rounds
            case = measure_load(job, target, rounds, place / f"{kind}-{other}")
            if is_across:
                worst_across = max(worst_across, case.seconds)
            else:
                worst = max(worst, case.seconds)
            report.series.setdefault("load", {})[f"{kind} to {other}"] = asdict(case)
            ratio = case.read_bytes / max(1, case.needed_bytes)
            rows.append((kind, other, f"{1e3 * case.seconds:.1f}", case.num_files, f"{ratio:.2f}"))
    header = (f"saved on {ranks}", f"loaded on {load_ranks}", "plan ms", "files", "read / needed")
    table(header, rows)
    name = f"load_plan_of_a_rank_{ranks}_to_{load_ranks}"
    report.add(f"{name}_s", worst, at_most=MOST_LOAD_PLAN_S)
    report.add(f"{name}_across_dims_of_a_jax_mesh_s", worst_across)


def measure_tensors(report: Report, told: argparse.Namespace) -> None:
    """Measure FSDP with other numbers of tensors."""
    from scale_layouts import JOBS
    from scale_ours import measure

    rows = []
    for tensors in told.other_tensors:
        for ranks in (told.ranks[0], told.ranks[-1]):
            case = measure(JOBS["fsdp"](ranks, tensors), told.rounds, with_memory=False)
            shown = figures_of(case)
            report.series.setdefault("tensors", {})[f"{tensors} x {ranks}"] = shown
            rows.append((tensors, ranks, *(f"{value:.4g}" for value in shown.values())))
    if rows:
        table(("tensors", "ranks", *shown), rows)


def measure_dcp_growth(report: Report, told: argparse.Namespace) -> None:
    """Let DCP plan the same jobs, up to the size that it would not finish in time or memory."""
    from scale_dcp import measure_dcp
    from scale_layouts import JOBS

    rows, points = [], {}
    previous = None
    for ranks in told.ranks:
        if previous is not None:
            last_ranks, last = previous
            growth = ranks / last_ranks
            seconds = last.total_s * growth**DCP_GROWTH
            memory = last.memory_bytes * growth
            if seconds > told.dcp_limit_s or memory > told.dcp_limit_gib * GIB:
                report.facts["dcp stops at"] = (
                    f"{last_ranks} ranks; {ranks} would take {seconds:.0f} s and "
                    f"{memory / GIB:.1f} GiB"
                )
                break
        case = measure_dcp(JOBS["fsdp"](ranks, told.tensors))
        previous, points[ranks] = (ranks, case), case
        rows.append(("fsdp", ranks, *_dcp_row(case)))
    for kind, make in JOBS.items():
        if kind != "fsdp":
            ranks = min(DCP_RANKS_OF_LAYOUTS, told.ranks[-1])
            case = measure_dcp(make(ranks, told.tensors))
            report.series.setdefault("dcp of layouts", {})[f"{kind} x {ranks}"] = asdict(case)
            rows.append((kind, ranks, *_dcp_row(case)))
    table(
        (
            "DCP",
            "ranks",
            "local plan ms",
            "global plan s",
            "plans MiB",
            "metadata kB",
            "unpickle s",
        ),
        rows,
    )
    report.series["dcp"] = {ranks: asdict(case) for ranks, case in points.items()}
    largest = max(points)
    report.add(f"dcp_global_plan_at_{largest}_s", points[largest].global_plan_s)
    report.add(f"dcp_metadata_at_{largest}_bytes", points[largest].metadata_bytes)
    report.add(f"dcp_unpickle_of_metadata_at_{largest}_s", points[largest].unpickle_s)
    if len(points) > 1:
        found = exponent({n: case.global_plan_s for n, case in points.items()})
        report.add("dcp_global_plan_exponent_in_ranks", found)


def _dcp_row(case: Any) -> tuple[str, ...]:
    return (
        f"{1e3 * case.local_plan_s:.1f}", f"{case.global_plan_s:.2f}",
        f"{case.plans_bytes / MIB:.0f}", f"{case.metadata_bytes / 1e3:.0f}",
        f"{case.unpickle_s:.2f}",
    )  # fmt: skip


def figures_of(case: Case) -> dict[str, float]:
    """Return what is plotted of a case."""
    return {
        "first_plan_s": case.first_plan_s,
        "steady_plan_s": case.steady_plan_s,
        "coordinator_first_s": case.coordinator_first_s,
        "commit_s": case.commit_s,
        "first_save_bytes": case.first_save_bytes,
        "steady_save_bytes": case.steady_save_bytes,
        "manifest_bytes": case.manifest_bytes,
    }


def model(report: Report, case: Case) -> None:
    """Save and restore with this case's plans and messages on a modelled cluster."""
    import cluster_model

    scenarios = cluster_model.run(cluster_model.told_by(case))
    for line in cluster_model.lines(scenarios):
        say(line)
    report.series["cluster"] = cluster_model.series(scenarios)
    for name, value in cluster_model.figures(scenarios).items():
        report.add(name, value)


def main() -> int:
    """Measure, judge, model."""
    parser = arguments("Plan, commit and open with many ranks, beside DCP's planner.")
    parser.add_argument("--ranks", type=numbers, default=[64, 256, 1024, 4096, 16_384])
    parser.add_argument("--tensors", type=int, default=1000)
    parser.add_argument("--other-tensors", type=numbers, default=[500, 10_000])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dcp-limit-s", type=float, default=120.0)
    parser.add_argument("--dcp-limit-gib", type=float, default=8.0)
    parser.add_argument("--quick", action="store_true", help="a small one, to see that it runs")
    told = parser.parse_args()
    if importlib.util.find_spec("torch") is None:
        parser.error(
            "torch is missing, whose planner this compares with: pip install torch, or make setup"
        )
    if told.quick:
        told.ranks, told.tensors, told.other_tensors, told.rounds = [32, 128], 90, [], 2
    report = Report("scale")
    cases = measure_ours(told)
    show(cases, told.tensors)
    judge(report, cases, told.ranks[-1])
    report.series["ours"] = {
        kind: {ranks: figures_of(case) for ranks, case in of_kind.items()}
        for kind, of_kind in cases.items()
    }
    measure_tensors(report, told)
    with scratch(told.directory) as place:
        measure_loads(report, told, place)
    measure_dcp_growth(report, told)
    model(report, cases["hsdp"][told.ranks[-1]])
    return report.finish(told)


def numbers(text: str) -> Sequence[int]:
    """Return the numbers of `1,2,3`, sorted."""
    return sorted(int(part) for part in text.split(","))


if __name__ == "__main__":
    sys.exit(main())
