"""One run of training steps with a save every so often, and what it says about overhead.

Layer: shared by the sides of torch and JAX; imports neither. A run of `interval` saves before the
step in the middle of each interval, so every save is followed by steps that it may disturb. Runs of
one interval form a group: every system takes its turn in a drawn order, and before, between and
after them are short runs without saves. A step counts by how much longer it takes than the median
of the undisturbed steps around it: those of the run in which no save is under way, and of the runs
without saves before and after. So a machine that gets slower for a minute is not taken for a save.
Deleting old checkpoints is not timed for peers; shardckpt deletes its own during the run.
"""

from __future__ import annotations

import random
import statistics
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Protocol

from harness import say

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

NONE: Final = "no saves"
LEAST_IDLE_STEPS: Final = 3
MOST_IDLE_STEPS: Final = 8
FEW_ROUNDS_FROM: Final = 20  # Steps of an interval: one round less.
ONE_ROUND_FROM: Final = 50


class Trains(Protocol):
    """What takes steps."""

    before_update: Callable[[], None]

    def step(self) -> float:
        """Take a step; return the seconds that its update waited for a save's copies."""

    def gather(self) -> None:
        """Return when all ranks are here."""


class Saves(Protocol):
    """One way to save.

    Attributes:
        in_flight: Most saves that are under way at once.
    """

    in_flight: int

    def step_began(self, step: int) -> None:
        """Hear that a step begins."""

    def make_room(self) -> None:
        """Return when another save may begin: back-pressure."""

    def save(self, step: int) -> None:
        """Begin a save."""

    def before_update(self) -> None:
        """Return when the state may change."""

    def is_durable(self) -> bool:
        """Return whether the last save is durable, as this rank knows."""

    def wait(self) -> None:
        """Return when the last save is durable."""

    def tidy(self) -> None:
        """Delete what is not needed, untimed; rank 0 alone."""

    def load(self) -> None:
        """Read the last save."""

    def close(self) -> None:
        """End."""


@dataclass(slots=True)
class Save:
    """One save on one rank, in seconds.

    Attributes:
        pressure_s: Wait until another save may begin.
        call_s: The call.
        step: Index in the run of the step before which it began.
        fence_s: What the next update waited.
        durable_s: From the begin until it was seen to be durable, at the end of a step.
        steps: Steps that began until then.
    """

    pressure_s: float
    call_s: float
    step: int
    fence_s: float = 0.0
    durable_s: float = 0.0
    steps: int = 0

    @property
    def stall_s(self) -> float:
        """Return the seconds that training stood still."""
        return self.pressure_s + self.call_s + self.fence_s


@dataclass(slots=True)
class Run:
    """Some steps of one rank.

    Attributes:
        steps: How many.
        steps_s: Seconds of each, the save before it included.
        loop_s: Seconds of all steps and saves.
        drain_s: Seconds from there until the last save was durable.
        saves: Every save.
        number: Place among the group's runs with saves.
    """

    steps: int
    steps_s: list[float] = field(default_factory=list)
    loop_s: float = 0.0
    drain_s: float = 0.0
    saves: list[Save] = field(default_factory=list)
    number: int = 0


@dataclass(frozen=True, slots=True)
class Plan:
    """What is run.

    Attributes:
        intervals: Steps from save to save.
        steps: Of a run, by interval.
        rounds: How often each group of short intervals is run.
    """

    intervals: tuple[int, ...]
    steps: Mapping[int, int]
    rounds: int

    def rounds_of(self, interval: int) -> int:
        """Return the rounds of an interval: long ones take their time once."""
        if interval >= ONE_ROUND_FROM:
            return 1
        return max(1, self.rounds - (interval >= FEW_ROUNDS_FROM))

    def num_saves(self, interval: int) -> int:
        """Return the saves of one run."""
        return len([i for i in range(self.steps[interval]) if i % interval == interval // 2])

    def groups(self) -> list[tuple[int, int]]:
        """Return (round, interval) of every group, rounds one after the other."""
        return [(r, i) for r in range(self.rounds) for i in self.intervals if r < self.rounds_of(i)]


def plan_for(intervals: Sequence[int], rounds: int, least_steps: int) -> Plan:
    """Return a plan: 8 saves at every step, at least 3 up to 10 steps, 2 at 20, then 1."""
    saves = {1: 8, 2: 5}
    steps = {}
    for interval in sorted(intervals):
        after = 3 if interval <= 10 else 2 if interval < ONE_ROUND_FROM else 1
        steps[interval] = max(least_steps, interval * saves.get(interval, after))
    return Plan(tuple(sorted(intervals)), steps, rounds)


class Course:
    """Runs all groups on one rank and keeps what each run took."""

    def __init__(self, trainee: Trains, systems: Mapping[str, Saves], rank: int) -> None:
        """Take what trains and who saves; every system has saved once."""
        self._trainee, self._systems, self._rank = trainee, systems, rank
        self._step = 1000
        self.runs: dict[tuple[int, int, str], list[Run]] = {}

    def run(self, plan: Plan, label: str) -> None:
        """Run every group; all ranks."""
        for round_, interval in plan.groups():
            began = time.perf_counter()
            order = [*self._systems]
            random.Random(f"{round_} {interval}").shuffle(order)
            steps = plan.steps[interval]
            idle = max(LEAST_IDLE_STEPS, min(MOST_IDLE_STEPS, steps // 4))
            turns = [NONE, *(turn for system in order for turn in (system, NONE))]
            for turn, name in enumerate(turns):
                run = self._run(name, interval, idle if name == NONE else steps)
                run.number = turn // 2
                self.runs.setdefault((round_, interval, name), []).append(run)
            if self._rank == 0:
                took_s = time.perf_counter() - began
                say(f"{label}: round {round_}, a save every {interval} steps: {took_s:.0f} s")

    def _run(self, name: str, interval: int, steps: int) -> Run:
        trainee, system, run = self._trainee, self._systems.get(name), Run(steps)
        if system is not None:
            trainee.before_update = system.before_update
        trainee.gather()
        trainee.step()
        began = time.perf_counter()
        begins: list[float] = []
        for i in range(steps):
            step_began = time.perf_counter()
            self._step += 1
            saves_now = system is not None and i % interval == interval // 2
            if system is not None:
                system.step_began(self._step)
                if saves_now:
                    begins.append(time.perf_counter())
                    run.saves.append(_save(system, self._step, i))
                    under_way = 0 if system.is_durable() else system.in_flight
                    _note_durable(run, begins, len(begins) - under_way)
            fence_s = trainee.step()
            if saves_now:
                run.saves[-1].fence_s = fence_s
            run.steps_s.append(time.perf_counter() - step_began)
            if system is not None and begins and system.is_durable():
                _note_durable(run, begins, len(begins))
        run.loop_s = time.perf_counter() - began
        if system is not None:
            system.wait()
            _note_durable(run, begins, len(begins))
            trainee.gather()
            run.drain_s = time.perf_counter() - began - run.loop_s
            if self._rank == 0:
                system.tidy()
        trainee.before_update = _nothing
        trainee.gather()
        return run


def _save(system: Saves, step: int, index: int) -> Save:
    began = time.perf_counter()
    system.make_room()
    ready = time.perf_counter()
    system.save(step)
    return Save(ready - began, time.perf_counter() - ready, index)


def _note_durable(run: Run, begins: list[float], num: int) -> None:
    """Note for each of the first saves that was not durable before that it is now."""
    now = time.perf_counter()
    for save, began in list(zip(run.saves, begins, strict=True))[: max(0, num)]:
        if not save.durable_s:
            save.durable_s = now - began
            save.steps = max(1, len(run.steps_s) - save.step)


def _nothing() -> None:
    """Stand for a system that needs no word before an update."""


@dataclass(slots=True)
class Found:
    """One system at one interval.

    Attributes:
        overheads: Seconds that saves make the steps longer, as a share of those without; one value.
        costs_s: The same per save; one value.
        loop_overheads: Time of the loop over that of as many steps of the runs without saves beside
            it, less 1; per round, for who would rather have the plain time.
        stalls_s: Of every save, on the rank that stood still longest.
        pressures_s: The back-pressure in it.
        durables_s: Of every save until it was durable.
        drains_s: Wait for the last save; per round.
    """

    overheads: list[float] = field(default_factory=list)
    costs_s: list[float] = field(default_factory=list)
    loop_overheads: list[float] = field(default_factory=list)
    stalls_s: list[float] = field(default_factory=list)
    pressures_s: list[float] = field(default_factory=list)
    durables_s: list[float] = field(default_factory=list)
    drains_s: list[float] = field(default_factory=list)

    def as_data(self) -> dict[str, list[float]]:
        """Return what is written down."""
        return {
            name: [round(value, 5) for value in getattr(self, name)]
            for name in self.__dataclass_fields__
        }


@dataclass(slots=True)
class Judged:
    """All of one side.

    Attributes:
        step_s: A step without saves; median over runs.
        noise: Standard deviation of a group's runs without saves, as a share; median.
        found: By system and interval.
    """

    step_s: float
    noise: float
    found: dict[str, dict[int, Found]]


def judge(
    ranks: Sequence[Mapping[tuple[int, int, str], list[Run]]], names: Sequence[str]
) -> Judged:
    """Compare steps in which saves are under way with those around; of ranks the slowest counts.

    Of steps that are equally long after a save the median counts, over all saves and rounds.

    Args:
        ranks: What each rank's course kept.
        names: The order of the systems in the answer.
    """
    bases_s: list[float] = []
    noises = []
    found: dict[str, dict[int, Found]] = {}
    # By system and interval, then by steps since the save: how much longer a step took, as a share.
    longer: dict[tuple[str, int], dict[int, list[float]]] = {}
    for (round_, interval, name), runs in ranks[0].items():
        of_ranks = [r[round_, interval, name] for r in ranks]
        if name == NONE:
            loops_s = [max(r.loop_s for r in each) for each in zip(*of_ranks, strict=True)]
            noises.append(statistics.stdev(loops_s) / statistics.fmean(loops_s))
            continue
        into = found.setdefault(name, {}).setdefault(interval, Found())
        idle = [r[round_, interval, NONE] for r in ranks]
        for i, run in enumerate(runs):
            each = [r[i] for r in of_ranks]
            beside = [
                step_s
                for number in (run.number, run.number + 1)
                for step_s in _slowest([r[number] for r in idle])
            ]
            disturbed = _disturbed(each)
            steps_s = _slowest(each)
            free = [s for at, s in enumerate(steps_s) if at not in disturbed]
            base_s = statistics.median(beside + free)
            bases_s.append(base_s)
            for at, since in disturbed.items():
                of = longer.setdefault((name, interval), {}).setdefault(since, [])
                of.append(steps_s[at] / base_s - 1)
            idle_s = run.steps * statistics.fmean(beside)
            into.loop_overheads.append(max(r.loop_s for r in each) / idle_s - 1)
            into.drains_s.append(max(r.drain_s for r in each))
            for saves in zip(*(r.saves for r in each), strict=True):
                into.stalls_s.append(max(s.stall_s for s in saves))
                into.pressures_s.append(max(s.pressure_s for s in saves))
                into.durables_s.append(max(s.durable_s for s in saves))
    step_s = statistics.median(bases_s)
    for (name, interval), of_steps in longer.items():
        into = found[name][interval]
        steps = sum(len(of) * statistics.median(of) for of in of_steps.values())
        into.costs_s.append(step_s * steps / len(into.stalls_s))
        into.overheads.append(into.costs_s[0] / (interval * step_s))
    ordered = {name: found[name] for name in names if name in found}
    return Judged(step_s, statistics.median(noises), ordered)


def _slowest(of_ranks: Sequence[Run]) -> list[float]:
    """Return the seconds of each step on the rank that took longest."""
    return [max(steps) for steps in zip(*(run.steps_s for run in of_ranks), strict=True)]


def _disturbed(of_ranks: Sequence[Run]) -> dict[int, int]:
    """Return the steps in which a save was under way, and how many steps ago the last one began."""
    since: dict[int, int] = {}
    for saves in zip(*(run.saves for run in of_ranks), strict=True):
        begin = saves[0].step
        for at in range(begin, min(begin + max(s.steps for s in saves), of_ranks[0].steps)):
            since[at] = at - begin
    return since


def open_systems(
    makers: Mapping[str, Callable[[], Saves]], trainee: Trains
) -> tuple[dict[str, Saves], dict[str, str]]:
    """Open every system and let each save twice around a step; all ranks.

    Returns:
        Those that run here, and of each other one why it does not.
    """
    able: dict[str, Saves] = {}
    unable: dict[str, str] = {}
    for name, make in makers.items():
        try:
            system = make()
            for step in range(2):
                system.make_room()
                system.save(step)
                system.before_update()
                system.wait()
                trainee.step()
        except Exception as error:  # What cannot run here is told, not left out.
            unable[name] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
        else:
            able[name] = system
    return able, unable
