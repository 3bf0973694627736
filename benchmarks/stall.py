"""How long training waits for its saves, beside every way of DCP's `async_save`.

`python benchmarks/stall.py [--gib 1.5] [--saves 40] [--rounds 5] [--quick]`

The stall of a save is what the loop spends in waiting for the save before (back-pressure), in
`save()`, at the optimizer's fence, and in dispatching the next step more slowly. Its inflation is
the time of a run with saves less that of as many steps without, per save. All systems take turns in
an order drawn anew in every round; a turn lasts until the system is durable and drained, so this is
the steady state. First saves warm up. At the end a save made under way is loaded and compared bit
for bit with the state at `save()`, so a torn copy does not go unseen. Of ranks the slowest counts.
"""

from __future__ import annotations

import math
import os
import random
import resource
import statistics
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch
from harness import GIB, Report, arguments, say, scratch, table
from systems import OURS, PEERS, Shardckpt, System, open_peers
from torch import distributed
from torch_job import join_gloo
from trainee import Mode, Step, Trainee, state_mib

from shardckpt.testing.ranks import RankContext, run_ranks

if TYPE_CHECKING:
    from pathlib import Path

NONE: Final = "no saves"
MODES: Final[tuple[Mode, ...]] = ("device", "compute")
SIZES_GIB: Final = (0.25, 1.0, 4.0)
QUICK_GIB: Final = 0.02
# A compute-bound step of the main size outlasts most saves.
LEAST_STEPS: Final[dict[Mode, int]] = {"device": 2, "compute": 1}
WARM_UP_SAVES: Final = 2
SAVES_OF_A_SIZE: Final = 10
TIMEOUT_S: Final = 900.0
LEAST_INFLATION_S: Final = 1e-3  # Of a peer: below this is noise.
MOST: Final = {
    "stall_ratio": 1 / 20, "stall_ms": 10.0, "stall_p99_ms": 20.0, "sizes_ms": 5.0,
    "inflation_ratio": 1 / 4, "flush": 1.05, "cpu_s": 0.25,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Scenario:
    """What one set of ranks does.

    Attributes:
        gib: Bytes of the whole state.
        modes: Kinds of steps, one after the other.
        rounds: How often every peer gets its turn.
        ours: Turns of shardckpt in a round.
        idle: Turns without a save in a round.
        peers: Who else saves.
    """

    gib: float
    modes: tuple[Mode, ...]
    rounds: int
    ours: int
    idle: int
    peers: tuple[str, ...] = ()

    def turns(self, round_: int, able: list[str]) -> list[str]:
        """Return who has a turn, in an order that all ranks draw alike."""
        drawn = [OURS] * self.ours + [NONE] * self.idle + able
        random.Random(round_).shuffle(drawn)
        return drawn


@dataclass(slots=True)
class Turn:
    """One save and the steps after it, or as many steps without, on one rank.

    Attributes:
        pressure_s: Wait for the save before.
        save_s: The call.
        steps: Until the system was drained.
        num_disturbed: How many of these began before the save was durable.
        total_s: Of everything.
        cpu_s: Processor seconds of this rank and of the system's own processes.
    """

    pressure_s: float
    save_s: float
    steps: list[Step]
    num_disturbed: int
    total_s: float
    cpu_s: float

    def stall_s(self, dispatch_s: float) -> float:
        """Return the whole stall; `dispatch_s` is that of a first step without a save."""
        first = self.steps[0]
        return self.pressure_s + self.save_s + first.fence_s + first.dispatch_s - dispatch_s


class Bench:
    """One rank's side of a scenario."""

    def __init__(self, told: RankContext, place: Path, scenario: Scenario) -> None:
        """Build the trainee and warm up every system; all ranks."""
        torch.manual_seed(told.rank)
        torch.set_num_threads(1)
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")  # For DCP's process.
        join_gloo(told)
        self._rank = told.rank
        self._scenario = scenario
        self._step = 0
        self.trainee = Trainee(int(scenario.gib * GIB), told.world_size)
        self._ours = Shardckpt(self.trainee, place)
        peers, self.unable = open_peers(self.trainee, place, scenario.peers, self._step)
        self.systems: dict[str, System] = {OURS: self._ours, **peers}
        self.trainee.prepare("device")
        for system in self.systems.values():
            for _ in range(WARM_UP_SAVES if system is self._ours else 1):
                self._settle(system, "device")
                self._turn(system, "device")

    def run(self, mode: Mode) -> dict[str, list[Turn]]:
        """Return every turn of one kind of steps; all ranks."""
        self.trainee.prepare(mode)
        turns: dict[str, list[Turn]] = defaultdict(list)
        peers = [name for name in self.systems if name != OURS]
        for round_ in range(self._scenario.rounds):
            for name in self._scenario.turns(round_, peers):
                self._settle(self.systems.get(name), mode)
                turns[name].append(self._turn(self.systems.get(name), mode))
        self._check(mode)
        return dict(turns)

    def close(self) -> None:
        """End every system; all ranks."""
        for system in self.systems.values():
            system.close()
        distributed.destroy_process_group()

    def _settle(self, system: System | None, mode: Mode) -> None:
        """Clean up and take a step: a save follows training, not what another system left."""
        if self._rank == 0 and system is not None:
            system.tidy()
            os.sync()
        distributed.barrier()
        self.trainee.step(mode)

    def _turn(self, system: System | None, mode: Mode) -> Turn:
        trainee = self.trainee
        self._step += 1
        cpu_s = _cpu_s(system)
        started = waited = saved = time.perf_counter()
        if system is not None:
            trainee.before_update = system.before_update
            system.wait()
            waited = time.perf_counter()
            system.save(self._step)
            saved = time.perf_counter()
        steps: list[Step] = []
        num_disturbed = 0
        is_busy = True
        while is_busy or len(steps) < LEAST_STEPS[mode]:
            num_disturbed += system is not None and not system.is_durable()
            steps.append(trainee.step(mode))
            is_busy = trainee.slowest(system is not None and not system.is_drained()) > 0
        return Turn(
            waited - started, saved - waited, steps, num_disturbed,
            time.perf_counter() - started, _cpu_s(system) - cpu_s,
        )  # fmt: skip

    def _check(self, mode: Mode) -> None:
        """Compare a save made while training goes on with the state at `save()`.

        Raises:
            AssertionError: A bit differs.
        """
        self._settle(self._ours, mode)
        copies = [value.clone() for value in self.trainee.locals]
        self._turn(self._ours, mode)
        self._ours.load()
        for i, (value, copy) in enumerate(zip(self.trainee.locals, copies, strict=True)):
            if not torch.equal(value.view(torch.uint8), copy.view(torch.uint8)):
                raise AssertionError(f"{mode}: local tensor {i} differs from the state at save()")


def _cpu_s(system: System | None) -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime + (0.0 if system is None else system.child_cpu_s())


def measure(told: RankContext, place: Path, scenario: Scenario) -> dict[str, Any]:
    """Return every turn of every mode; all ranks."""
    bench = Bench(told, place, scenario)
    turns = {mode: bench.run(mode) for mode in scenario.modes}
    bench.close()
    return {
        "turns": turns,
        "unable": bench.unable,
        "rank_bytes": bench.trainee.rank_bytes,
        "copy_s": bench.trainee.copy_s,
    }


@dataclass(slots=True)
class Judged:
    """One system in one mode, over all ranks.

    Attributes:
        stalls_s: Of every save, on the rank that waited longest.
        parts_s: Medians of the stall's parts.
        inflations_s: Of every save.
        cpu_s: Median per save, on the rank that used most.
        disturbed: Median time of a step before the save was durable, per undisturbed step.
        window_s: The least time from a step's begin to its optimizer.
        trace_s: Seconds of an undisturbed step, of the one that ends in `save()`, of those after it
            until all is drained; medians over saves.
    """

    stalls_s: list[float]
    parts_s: dict[str, float]
    inflations_s: list[float]
    cpu_s: float
    disturbed: float
    window_s: float
    trace_s: list[float]


def judge(ranks: list[list[Turn]], idle: list[list[Turn]]) -> Judged:
    """Return the figures of one system's turns; `[rank][turn]`, beside the turns without saves."""
    step_s = statistics.median(step.total_s for turn in idle[0] for step in turn.steps)
    cpu_s = [statistics.median(turn.cpu_s / len(turn.steps) for turn in turns) for turns in idle]
    dispatch_s = [statistics.median(turn.steps[0].dispatch_s for turn in turns) for turns in idle]
    turns = list(zip(*ranks, strict=True))
    stalls_s = [
        max(turn.stall_s(d) for turn, d in zip(of_ranks, dispatch_s, strict=True))
        for of_ranks in turns
    ]
    inflations_s = [max(t.total_s for t in of) - len(of[0].steps) * step_s for of in turns]
    disturbed = [
        max(turn.steps[i].total_s for turn in of)
        for of in turns
        for i in range(min(len(of[0].steps), max(1, *(turn.num_disturbed for turn in of))))
    ]
    slowest_parts = {
        "back-pressure": [max(t.pressure_s for t in of) for of in turns],
        "save()": [max(t.save_s for t in of) for of in turns],
        "fence": [max(t.steps[0].fence_s for t in of) for of in turns],
        "dispatch": [
            max(t.steps[0].dispatch_s - d for t, d in zip(of, dispatch_s, strict=True))
            for of in turns
        ],
    }
    longest = statistics.median_low([len(of[0].steps) for of in turns])
    trace_s = [step_s, step_s + statistics.median(slowest_parts["save()"])]
    trace_s += [
        statistics.median(of[0].steps[i].total_s for of in turns if i < len(of[0].steps))
        for i in range(longest)
    ]
    return Judged(
        stalls_s,
        {name: statistics.median(values) for name, values in slowest_parts.items()},
        inflations_s,
        max(
            statistics.median(t.cpu_s - len(t.steps) * used for t in turns_of)
            for turns_of, used in zip(ranks, cpu_s, strict=True)
        ),
        statistics.median(disturbed) / step_s,
        min(step.window_s for of in turns for turn in of for step in turn.steps),
        trace_s,
    )


def stall_ms(results: list[Any]) -> float:
    """Return the median stall of shardckpt in device-bound steps."""
    of_rank = [result["turns"]["device"] for result in results]
    judged = judge([turns[OURS] for turns in of_rank], [turns[NONE] for turns in of_rank])
    return 1e3 * statistics.median(judged.stalls_s)


def percentile_99(values: list[float]) -> float:
    """Return the value that 99 of 100 do not exceed; of fewer than 100 the largest."""
    return sorted(values)[math.ceil(0.99 * len(values)) - 1]


def judge_mode(report: Report, mode: Mode, results: list[Any]) -> None:
    """Print every system beside the others and add the figures of the main size."""
    of_rank = [result["turns"][mode] for result in results]
    idle = [turns[NONE] for turns in of_rank]
    found = {
        name: judge([turns[name] for turns in of_rank], idle)
        for name in of_rank[0] if name != NONE
    }  # fmt: skip
    rows = []
    for name, judged in found.items():
        parts = [f"{1e3 * seconds:.2f}" for seconds in judged.parts_s.values()]
        rows.append((
            name, len(judged.stalls_s), f"{1e3 * statistics.median(judged.stalls_s):.2f}",
            f"{1e3 * percentile_99(judged.stalls_s):.2f}", *parts,
            f"{statistics.median(judged.inflations_s):.3f}",
            f"{statistics.fmean(judged.inflations_s):.3f}",
            f"{judged.cpu_s:.3f}", f"{judged.disturbed:.3f}",
        ))  # fmt: skip
        report.series[f"{mode} {name}"] = {
            "stall_ms": [round(1e3 * s, 3) for s in judged.stalls_s],
            "parts_ms": {part: round(1e3 * s, 3) for part, s in judged.parts_s.items()},
            "inflation_s": [round(s, 4) for s in judged.inflations_s],
            "cpu_s": round(judged.cpu_s, 3),
            "trace_s": [round(s, 4) for s in judged.trace_s],
        }
    table(
        (f"{mode}-bound", "saves", "stall ms", "p99", "back-pr.", "save()", "fence", "dispatch",
         "inflation s", "mean", "cpu s", "disturbed"),
        rows,
    )  # fmt: skip
    ours = found.pop(OURS)
    undisturbed = [step.total_s for turn in idle[0] for step in turn.steps]
    report.facts[f"{mode}-bound step s"] = round(statistics.median(undisturbed), 4)
    stall_s = statistics.median(ours.stalls_s)
    name = f"{mode}_bound"
    report.add(f"{name}_stall_median_ms", 1e3 * stall_s, at_most=MOST["stall_ms"])
    report.add(
        f"{name}_stall_p99_ms", 1e3 * percentile_99(ours.stalls_s), at_most=MOST["stall_p99_ms"]
    )
    inflation_s = statistics.median(ours.inflations_s)
    report.add(f"{name}_inflation_per_save_s", inflation_s)
    if found:
        best_s = min(statistics.median(peer.stalls_s) for peer in found.values())
        report.add(
            f"{name}_stall_per_stall_of_best_dcp", stall_s / best_s, at_most=MOST["stall_ratio"]
        )
        best_s = min(statistics.median(peer.inflations_s) for peer in found.values())
        report.add(
            f"{name}_inflation_per_inflation_of_best_dcp",
            inflation_s / max(best_s, LEAST_INFLATION_S), at_most=MOST["inflation_ratio"],
        )  # fmt: skip
    if mode == "device":
        report.add(
            f"{name}_step_time_during_flush_per_undisturbed", ours.disturbed,
            at_most=MOST["flush"],
        )  # fmt: skip
        report.add(f"{name}_cpu_s_per_rank_and_save", ours.cpu_s, at_most=MOST["cpu_s"])
    report.add(
        f"{name}_time_before_update_per_copy_time", ours.window_s / results[0]["copy_s"],
        at_least=2.0,
    )  # fmt: skip


def main() -> int:
    """Run every size and judge."""
    parser = arguments("Measure how long training waits for its saves.")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--gib", type=float, default=1.5, help="main size of the whole state")
    parser.add_argument("--saves", type=int, default=40, help="of shardckpt, in each mode")
    parser.add_argument("--rounds", type=int, default=5, help="saves of each peer in each mode")
    parser.add_argument("--quick", action="store_true", help="small and few: tries the script")
    told = parser.parse_args()
    sizes: tuple[float, ...] = SIZES_GIB
    if told.quick:
        told.gib, told.saves, told.rounds, sizes = QUICK_GIB, 4, 1, (4 * QUICK_GIB,)
    peers = tuple(PEERS)[:1] if told.quick else tuple(PEERS)
    ours = max(1, told.saves // told.rounds)
    main_size = Scenario(told.gib, MODES, told.rounds, ours, max(1, ours // 2), peers)
    report = Report("stall")
    with scratch(told.directory) as place:

        def run(scenario: Scenario, name: str) -> list[Any]:
            return run_ranks(
                told.ranks, measure, place / name, scenario,
                timeout_s=TIMEOUT_S, directory=place / f"{name}-ranks",
            )  # fmt: skip

        results = run(main_size, "main")
        report.facts["state_mib"] = state_mib(results)
        report.facts["copy_s"] = round(results[0]["copy_s"], 4)
        report.facts["cannot run here"] = results[0]["unable"]
        for mode in MODES:
            judge_mode(report, mode, results)
        stalls_ms = {state_mib(results): stall_ms(results)}
        for gib in sizes:
            saves = min(told.saves, SAVES_OF_A_SIZE)
            results = run(Scenario(gib, ("device",), 1, saves, 3), f"{gib:g}-gib")
            stalls_ms[state_mib(results)] = stall_ms(results)
            say(f"{gib:g} GiB: stall {stall_ms(results):.2f} ms")
    report.series["stall ms by state MiB"] = {
        str(mib): round(ms, 3) for mib, ms in sorted(stalls_ms.items())
    }
    report.add(
        "stall_median_largest_less_smallest_over_sizes_ms",
        max(stalls_ms.values()) - min(stalls_ms.values()), at_most=MOST["sizes_ms"],
    )  # fmt: skip
    for name, why in report.facts["cannot run here"].items():
        say(f"{name}: cannot run here: {why}")
    return report.finish(told)


if __name__ == "__main__":
    sys.exit(main())
