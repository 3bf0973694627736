"""The policy that chooses the interval, against the best fixed interval in hindsight.

`python benchmarks/policy.py [--traces 200] [--quick]`

A trace is a row of lives of a job, each ended by a failure. Gaps between failures are exponential,
or Weibull with a shape below 1 (failures that come in bunches), with the mean that Llama 3's
training saw. In every life the job trains steps of varying length, and saves: a save stops it,
makes its steps longer until it is durable, and is of use from then on. The real `Schedule` and
`Policy` decide, with the clock of the simulated job, and know what the life before learned. What is
lost is all time but the work that a durable save holds when the failure comes; restarts cost every
rule alike and are left out. The same traces are run under fixed intervals; which of these is best
is only known afterwards.
"""

from __future__ import annotations

import math
import random
import statistics
import sys
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from harness import Report, arguments, say, table

from shardckpt import Auto
from shardckpt.coord.single import SingleCoord
from shardckpt.policy import MTBF_OF_ONE_RANK_S, best_interval_s
from shardckpt.schedule import Schedule

if TYPE_CHECKING:
    from collections.abc import Callable

NUM_RANKS: Final = 16_384
MTBF_S: Final = MTBF_OF_ONE_RANK_S / NUM_RANKS
NUM_LIVES: Final = 8
STEP_S: Final = 10.0
STEP_DEVIATION: Final = 0.02
MOST_LOST: Final = 1.05
# Fixed intervals from an eighth to eight times the optimum of the formula.
GRID: Final = [2 ** (k / 4) for k in range(-12, 13)]
MAX_IN_FLIGHT: Final = 2


@dataclass(frozen=True, slots=True)
class Storage:
    """What a save costs in one part of the job's time.

    Attributes:
        stall_s: Seconds that it stops the training.
        slower: Steps take this many times as long until it is durable.
        drain_s: Seconds until it is durable.
    """

    stall_s: float
    slower: float
    drain_s: float


@dataclass(frozen=True, slots=True)
class Scenario:
    """One kind of job.

    Attributes:
        storage: From the beginning of a trace.
        later: From a third of the trace on.
        shape: Of the Weibull distribution of failures; 1 is exponential.
    """

    storage: Storage
    later: Storage
    shape: float


OVERLAPPED: Final = Storage(stall_s=0.02, slower=1.01, drain_s=30.0)
BLOCKING: Final = Storage(stall_s=45.0, slower=1.0, drain_s=45.0)
COPYING: Final = Storage(stall_s=2.0, slower=1.1, drain_s=60.0)
SLOW: Final = Storage(stall_s=2.0, slower=1.1, drain_s=600.0)
SCENARIOS: Final = {
    "overlapped, exponential": Scenario(OVERLAPPED, OVERLAPPED, 1.0),
    "overlapped, Weibull 0.7": Scenario(OVERLAPPED, OVERLAPPED, 0.7),
    "copying, exponential": Scenario(COPYING, COPYING, 1.0),
    "blocking, exponential": Scenario(BLOCKING, BLOCKING, 1.0),
    "blocking, Weibull 0.7": Scenario(BLOCKING, BLOCKING, 0.7),
    "storage slows, exponential": Scenario(COPYING, SLOW, 1.0),
}


class Save:
    """A save of the simulated job."""

    def __init__(self, stall_s: float) -> None:
        """Begin it."""
        self.save_s = stall_s
        self.fence_s = 0.0
        self.committed: Future[bool] = Future()


class Life:
    """One life of the job: from a start to a failure."""

    def __init__(self, storage: Callable[[float], Storage], seed: int) -> None:
        """Start the clock.

        Args:
            storage: What a save costs, by the seconds of this life.
            seed: Of the steps' lengths.
        """
        self.now_s = 0.0
        self._storage = storage
        self._chance = random.Random(seed)
        self._under_way: list[tuple[float, float, Save]] = []
        self._worked_s = 0.0
        self._durable_s = 0.0

    def clock(self) -> float:
        """Return the time."""
        return self.now_s

    def run(
        self,
        life_s: float,
        should_save: Callable[[int], bool],
        began: Callable[[Save], None],
    ) -> float:
        """Train until the failure; return the seconds that are lost with it."""
        gauss = self._chance.gauss
        step = 0
        while self.now_s < life_s:
            if should_save(step):
                self._save(began)
            step += 1
            slower = self._storage(self.now_s).slower if self._under_way else 1.0
            work_s = STEP_S * max(0.5, gauss(1.0, STEP_DEVIATION))
            self._pass(work_s * slower, life_s)
            if self.now_s < life_s:
                self._worked_s += work_s
        return life_s - self._durable_s

    def _save(self, began: Callable[[Save], None]) -> None:
        asked_s = self.now_s
        while len(self._under_way) >= MAX_IN_FLIGHT:
            self._pass(self._under_way[0][0] - self.now_s, math.inf)
        storage = self._storage(self.now_s)
        self._pass(storage.stall_s, math.inf)
        save = Save(self.now_s - asked_s)
        # One save is written after the other.
        first_s = max([self.now_s - storage.stall_s, *(end for end, _, _ in self._under_way)])
        self._under_way.append((first_s + storage.drain_s, self._worked_s, save))
        began(save)

    def _pass(self, seconds: float, life_s: float) -> None:
        then_s = self.now_s + seconds
        while self._under_way and self._under_way[0][0] <= min(then_s, life_s):
            end_s, worked_s, save = self._under_way.pop(0)
            self.now_s = max(self.now_s, end_s)
            self._durable_s = worked_s
            save.committed.set_result(True)
        self.now_s = then_s


def lives_of(scenario: Scenario, seed: int, num_lives: int) -> list[float]:
    """Return the seconds from each start to its failure, with the mean that is expected."""
    chance = random.Random(seed)
    scale_s = MTBF_S / math.gamma(1 + 1 / scenario.shape)
    return [chance.weibullvariate(scale_s, scenario.shape) for _ in range(num_lives)]


def lost_s(scenario: Scenario, seed: int, num_lives: int, calls: int | None) -> float:
    """Return the seconds that one trace loses.

    Args:
        scenario: The job.
        seed: Of the trace.
        num_lives: Failures in it.
        calls: A save at every so many steps; None lets the policy choose.
    """
    lives = lives_of(scenario, seed, num_lives)
    slows_s = sum(lives) / 3
    lost = before_s = 0.0
    learned: dict[str, str] = {}
    for number, life_s in enumerate(lives):
        began_s = before_s

        def storage(now_s: float, began_s: float = began_s) -> Storage:
            return scenario.storage if began_s + now_s < slows_s else scenario.later

        life = Life(storage, seed * num_lives + number)
        if calls is None:
            schedule = Schedule(
                Auto(max_overhead=0.5, mtbf_s=MTBF_S), SingleCoord(),
                prefix="policy", timeout_s=1.0, monotonic=life.clock,
            )  # fmt: skip

            schedule.recall(learned)

            def asked(step: int, schedule: Schedule = schedule) -> bool:
                is_due = schedule.should_save(step)
                if is_due:
                    schedule.saving()
                return is_due

            lost += life.run(life_s, asked, schedule.began)
            # A save that is durable carries it into the next life.
            learned = schedule.learned or learned
        else:
            lost += life.run(life_s, lambda step: step > 0 and step % calls == 0, lambda save: None)
        before_s += life_s
    return lost


def judge(report: Report, name: str, scenario: Scenario, num_traces: int) -> None:
    """Run one scenario under all rules and add its figure."""
    cost_s = scenario.storage.stall_s
    cost_s += (scenario.storage.slower - 1) * scenario.storage.drain_s
    best = best_interval_s(cost_s, MTBF_S) / STEP_S
    fixed = sorted({max(1, round(best * factor)) for factor in GRID})

    def mean(calls: int | None) -> float:
        return statistics.fmean(
            lost_s(scenario, seed, NUM_LIVES, calls) for seed in range(num_traces)
        )

    total_s = statistics.fmean(
        sum(lives_of(scenario, seed, NUM_LIVES)) for seed in range(num_traces)
    )
    lost = {calls: mean(calls) / total_s for calls in fixed}
    chosen = mean(None) / total_s
    hindsight = min(lost, key=lost.__getitem__)
    table(
        (name, "lost"),
        [
            ("policy", f"{chosen:.3%}"),
            *((f"every {calls * STEP_S:.0f} s", f"{part:.3%}") for calls, part in lost.items()),
        ],
    )
    say("")
    report.series[name] = {
        "interval_s": [calls * STEP_S for calls in fixed],
        "lost": [round(part, 6) for part in lost.values()],
        "policy": round(chosen, 6),
    }
    key = name.replace(", ", "_").replace(" ", "_").replace(".", "")
    report.add(f"{key.lower()}_lost_per_best_fixed", chosen / lost[hindsight], at_most=MOST_LOST)


def main() -> int:
    """Simulate and judge."""
    parser = arguments("The policy against fixed intervals, on traces of failures.")
    parser.add_argument("--traces", type=int, default=200)
    parser.add_argument("--quick", action="store_true", help="few traces: tries the script")
    told = parser.parse_args()
    report = Report("policy")
    report.facts |= {"mtbf_s": round(MTBF_S), "step_s": STEP_S, "lives per trace": NUM_LIVES}
    for name, scenario in SCENARIOS.items():
        judge(report, name, scenario, 2 if told.quick else told.traces)
    return report.finish(told)


if __name__ == "__main__":
    sys.exit(main())
