"""How often to save: the formulas against sums done otherwise, and a policy that watches a job."""

from __future__ import annotations

import logging
import math
import random
from concurrent.futures import Future
from typing import TYPE_CHECKING

import pytest

from shardckpt import Auto, Every
from shardckpt.errors import SaveFailedError
from shardckpt.policy import (
    FIRST_SAVE_CALLS,
    MTBF_OF_ONE_RANK_S,
    Policy,
    best_interval_s,
    choose,
    lost_part,
)
from shardckpt.schedule import WINDOW_CALLS, Schedule
from shardckpt.testing.coords import MemoryCoordHub

if TYPE_CHECKING:
    from collections.abc import Callable


class Clock:
    """A clock that is told the time."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Save:
    """A save that a test ends."""

    def __init__(self, save_s: float = 0.0) -> None:
        self.save_s = save_s
        self.fence_s = 0.0
        self.committed: Future[bool] = Future()


class Job:
    """A policy beside steps of a given length, and saves that drain for a given time."""

    def __init__(self, rule: Auto, num_ranks: int = 1) -> None:
        self.clock = Clock()
        self.policy = Policy(rule, num_ranks, monotonic=self.clock)

    def steps(self, count: int, seconds: float = 1.0) -> None:
        for _ in range(count):
            self.policy.called()
            self.clock.now += seconds

    def save(
        self,
        *,
        stall_s: float = 0.0,
        drain_steps: int = 2,
        slower: float = 1.0,
        end: Callable[[Future[bool]], None] = lambda f: f.set_result(True),
    ) -> None:
        """Save, train until it is over, and two calls more."""
        self.policy.called()
        save = Save(stall_s)
        self.clock.now += stall_s
        self.policy.began(save)
        self.clock.now += slower
        self.steps(drain_steps - 1, slower)
        end(save.committed)
        self.steps(3)


@pytest.mark.parametrize(("cost_s", "mtbf_s"), [(0.01, 1e4), (1, 1e4), (60, 1e4), (900, 1e4)])
def test_no_other_interval_loses_less(cost_s: float, mtbf_s: float) -> None:
    def lost(interval_s: float) -> float:
        return lost_part(interval_s, cost_s, drain_s=5, restart_s=100, mtbf_s=mtbf_s)

    best_s = best_interval_s(cost_s, mtbf_s)
    finely = min(lost(best_s * 1.01**k) for k in range(-300, 300))
    assert lost(best_s) <= finely * 1.001


def test_where_a_save_costs_more_than_failures_allow_the_interval_is_theirs() -> None:
    assert best_interval_s(200, 100) == 100


def test_the_lost_part_is_what_failing_jobs_lose() -> None:
    chance = random.Random(7)
    interval_s, cost_s, drain_s, restart_s, mtbf_s = 100.0, 10.0, 20.0, 50.0, 1000.0
    useful_s = total_s = 0.0
    for _ in range(40_000):
        life_s = chance.expovariate(1 / mtbf_s)
        total_s += life_s
        trained_s = life_s - restart_s - drain_s
        useful_s += interval_s * max(0, math.floor(trained_s / (interval_s + cost_s)))
    expected = lost_part(interval_s, cost_s, drain_s=drain_s, restart_s=restart_s, mtbf_s=mtbf_s)
    assert 1 - useful_s / total_s == pytest.approx(expected, abs=0.01)


def test_hopeless_jobs_lose_everything() -> None:
    assert lost_part(1e6, 1, drain_s=1, restart_s=1, mtbf_s=10) == 1


@pytest.mark.parametrize(
    ("cost_s", "drain_s", "max_overhead", "bound", "calls"),
    [
        (0.5, 3, 0.5, "the optimum", 100),
        (0.5, 3, 0.001, "max_overhead", 500),
        (0.5, 300, 0.5, "the storage", 330),
        (0.5, 3, 0.00001, "mtbf_s", 10_000),
        (0.0, 0.1, 0.01, "the storage", 1),
    ],
)
def test_what_bounds_the_interval(
    cost_s: float, drain_s: float, max_overhead: float, bound: str, calls: int
) -> None:
    choice = choose(
        cost_s=cost_s, drain_s=drain_s, call_s=1, mtbf_s=10_000, max_overhead=max_overhead
    )
    assert (choice.bound, choice.calls) == (bound, calls)


def test_stall_and_slower_steps_are_the_cost() -> None:
    job = Job(Auto(mtbf_s=1e4))
    job.steps(8)
    for _ in range(5):
        job.save(stall_s=0.3, drain_steps=4, slower=1.1)
    assert job.policy.choice is not None
    assert job.policy.choice.cost_s == pytest.approx(0.3 + 4 * 0.1, abs=0.01)
    assert job.policy.choice.drain_s == pytest.approx(0.3 + 4 * 1.1, abs=0.01)


def test_a_cost_is_seen_through_steps_that_vary_by_themselves() -> None:
    job, chance = Job(Auto(mtbf_s=1e4)), random.Random(3)
    for slower, cost_s in ((1.0, 0.02), (1.1, 0.52)):
        for _ in range(16):
            for _ in range(30):
                job.steps(1, chance.gauss(1, 0.05))
            job.save(stall_s=0.02, drain_steps=5, slower=slower * chance.gauss(1, 0.05))
        assert job.policy.choice is not None
        assert job.policy.choice.cost_s == pytest.approx(cost_s, abs=0.15)


def test_a_pause_while_a_save_drains_is_not_its_cost() -> None:
    job = Job(Auto(mtbf_s=1e4))
    job.steps(8)
    for _ in range(3):
        job.save(stall_s=0.1, drain_steps=1, slower=5000.0)  # A validation, or a clock that jumps.
    assert job.policy.choice is not None
    assert job.policy.choice.cost_s <= 0.1 + 2.01


def test_a_clock_that_runs_backwards_is_ignored() -> None:
    job = Job(Auto(mtbf_s=1e4))
    job.steps(8)
    job.clock.now -= 100
    job.steps(8)
    job.save(stall_s=0.1)
    assert job.policy.choice is not None
    assert job.policy.choice.cost_s == pytest.approx(0.1)


def test_storage_that_slows_makes_the_interval_longer_and_back() -> None:
    job = Job(Auto(mtbf_s=1000))
    job.steps(8)
    job.save(stall_s=0.05, drain_steps=2)
    fast = job.policy.calls
    job.save(stall_s=0.05, drain_steps=100)
    assert job.policy.calls >= 110
    for _ in range(5):
        job.save(stall_s=0.05, drain_steps=2)
    assert job.policy.calls == fast


def test_saves_that_fail_or_are_skipped_say_nothing() -> None:
    job = Job(Auto(mtbf_s=1e4))
    job.steps(8)
    job.save(stall_s=9, end=lambda f: f.set_exception(SaveFailedError("full")))
    job.save(stall_s=9, end=lambda f: f.set_result(False))
    assert job.policy.choice is None
    assert job.policy.calls == FIRST_SAVE_CALLS
    job.save(stall_s=0.1)
    assert job.policy.choice is not None
    assert job.policy.choice.cost_s == pytest.approx(0.1)


def test_the_reasons_are_one_line_and_said_again_only_when_they_change(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "shardckpt")
    job = Job(Auto(mtbf_s=1e4, max_overhead=0.5))
    job.steps(8)
    for _ in range(6):
        job.save(stall_s=0.5)
    (line,) = [r.getMessage() for r in caplog.records]
    assert "\n" not in line
    assert "saving at every 100. call" in line
    assert "the optimum" in line
    assert "a save costs 0.500 s" in line
    assert "every 10000 s (given)" in line
    job.save(drain_steps=1000)
    assert len(caplog.records) == 2
    assert "as the storage says" in caplog.records[1].getMessage()


def test_a_bound_that_cannot_be_kept_is_said(caplog: pytest.LogCaptureFixture) -> None:
    job = Job(Auto(mtbf_s=100, max_overhead=1e-6))
    job.steps(8)
    job.save(stall_s=1)
    assert job.policy.calls == 100
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "max_overhead=1e-06 cannot be kept" in record.getMessage()


def test_failures_usual_for_so_many_ranks() -> None:
    few, many = Job(Auto(), 8), Job(Auto(), 16_384)
    for job in (few, many):
        job.steps(8)
        job.save(stall_s=1)
    assert few.policy.calls > many.policy.calls
    assert pytest.approx(3.09 * 3600, rel=0.01) == MTBF_OF_ONE_RANK_S / 16_384


@pytest.mark.parametrize(
    "options",
    [
        {"max_overhead": 0.0}, {"max_overhead": 1.0}, {"max_overhead": math.nan},
        {"mtbf_s": 0.0}, {"mtbf_s": -1.0}, {"mtbf_s": math.nan}, {"mtbf_s": math.inf},
        {"restart_s": -1.0}, {"restart_s": math.nan},
    ],
)  # fmt: skip
def test_impossible_bounds_are_refused(options: dict[str, float]) -> None:
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=f"Auto {name} is {value}"):
        Auto(**options)


def test_an_interval_that_is_no_number_is_refused() -> None:
    with pytest.raises(ValueError, match="must be positive"):
        Every(s=math.nan)


@pytest.mark.parametrize("drain_s", [0.5, 6.0, 90.0])
def test_every_rank_saves_at_the_same_calls_and_none_begins_while_one_is_behind(
    drain_s: float,
) -> None:
    hub, clock = MemoryCoordHub(3), Clock()
    others = [Clock() for _ in range(2)]
    rule = Auto(mtbf_s=200, max_overhead=0.5)
    ranks = [
        Schedule(rule, hub.coord(r), prefix="p", timeout_s=1, monotonic=c)
        for r, c in enumerate([clock, *others])
    ]
    saved: list[list[int]] = [[], [], []]
    under_way: list[tuple[float, Save]] = []
    most = 0
    for step in range(600):
        for end_s, save in list(under_way):
            if end_s <= clock.now:
                save.committed.set_result(True)
                under_way.remove((end_s, save))
        for r, schedule in enumerate(ranks):
            if schedule.should_save(step):
                saved[r].append(step)
                schedule.saving()
                if r == 0:
                    save = Save(0.1)
                    under_way.append((clock.now + drain_s, save))
                    schedule.began(save)
        most = max(most, len(under_way))
        clock.now += 1.0
    assert saved[0] == saved[1] == saved[2]
    assert saved[0][0] == WINDOW_CALLS
    assert most <= 1
    gaps = {b - a for a, b in zip(saved[0][3:], saved[0][4:], strict=False)}
    expected = max(math.ceil(best_interval_s(0.1, 200)), math.ceil(1.1 * (drain_s + 1)))
    assert all(expected - 2 <= gap <= expected + 2 * WINDOW_CALLS for gap in gaps), gaps


def test_other_saves_of_the_program_count() -> None:
    hub, clock = MemoryCoordHub(1), Clock()
    rule = Auto(mtbf_s=1e4, max_overhead=0.5)
    schedule = Schedule(rule, hub.coord(0), prefix="p", timeout_s=1, monotonic=clock)
    asked = []
    for step in range(400):
        is_due = schedule.should_save(step)
        if is_due:
            asked.append(step)
        if is_due or step == 150:  # Its own rule: a save at step 150.
            schedule.saving()
            save = Save(0.5)
            schedule.began(save)
            clock.now += 0.1
            save.committed.set_result(True)
        clock.now += 1
    assert asked == [4, 104, 250, 350]


def test_a_job_goes_on_with_what_the_one_before_learned() -> None:
    before = Job(Auto(mtbf_s=1e4, max_overhead=0.5))
    before.steps(8)
    assert before.policy.learned == {}
    before.save(stall_s=0.5, drain_steps=3)
    after = Job(Auto(mtbf_s=1e4, max_overhead=0.5))
    after.policy.recall(before.policy.learned)
    assert after.policy.is_recalling
    after.steps(5)
    assert not after.policy.is_recalling
    assert after.policy.choice == before.policy.choice


@pytest.mark.parametrize("cost", ["nan", "-1", "inf", "much", ""])
def test_nonsense_that_was_saved_is_as_good_as_nothing(cost: str) -> None:
    job = Job(Auto(mtbf_s=1e4))
    learned = {"save_cost_s": cost, "save_durable_after_s": "1"}
    job.policy.recall(learned)
    job.policy.recall({})
    assert not job.policy.is_recalling
