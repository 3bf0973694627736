"""When to save: alike on every rank, whatever the clocks and the steps asked for."""

from __future__ import annotations

import random

import pytest

from shardckpt.coord.single import SingleCoord
from shardckpt.options import Every
from shardckpt.schedule import WINDOW_CALLS, Schedule
from shardckpt.testing.coords import MemoryCoordHub


class Clock:
    """A clock that is told the time."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_rule_by_steps_is_pure_and_leaves_out_step_0() -> None:
    schedule = Schedule(Every(steps=5), SingleCoord(), prefix="p", timeout_s=1)
    assert [s for s in range(16) if schedule.should_save(s)] == [5, 10, 15]


def test_no_rule_never_saves() -> None:
    schedule = Schedule(None, SingleCoord(), prefix="p", timeout_s=1)
    assert not any(schedule.should_save(s) for s in range(100))


@pytest.mark.parametrize("stride", [1, 7])
def test_a_rule_by_seconds_saves_at_the_same_steps_on_ranks_whose_clocks_differ(
    stride: int,
) -> None:
    hub = MemoryCoordHub(3)
    clocks = [Clock() for _ in range(3)]
    ranks = [
        Schedule(Every(s=10), hub.coord(r), prefix="p", timeout_s=1, monotonic=clocks[r])
        for r in range(3)
    ]
    chance = random.Random(1)
    saved: list[list[int]] = [[], [], []]
    for step in range(0, 400 * stride, stride):
        clocks[0].now += 1.0
        clocks[1].now += 100.0
        for r, schedule in enumerate(ranks):
            if schedule.should_save(step):
                saved[r].append(step)
                schedule.saving()
        clocks[2].now = chance.uniform(0, 1e6)
    assert saved[0] == saved[1] == saved[2]
    gaps = [(b - a) // stride for a, b in zip(saved[0], saved[0][1:], strict=False)]
    assert saved[0]
    assert all(10 - WINDOW_CALLS <= gap <= 10 + 2 * WINDOW_CALLS for gap in gaps)


def test_both_rules_save_at_whichever_comes_first() -> None:
    clock = Clock()
    schedule = Schedule(
        Every(steps=100, s=8), SingleCoord(), prefix="p", timeout_s=1, monotonic=clock
    )
    saved = []
    for step in range(201):
        clock.now += 1
        if schedule.should_save(step):
            saved.append(step)
            schedule.saving()
    assert 100 in saved
    assert len(saved) > 10


def test_announcements_do_not_pile_up() -> None:
    hub = MemoryCoordHub(1)
    schedule = Schedule(Every(s=10), hub.coord(0), prefix="p", timeout_s=1)
    for step in range(10_000):
        schedule.should_save(step)
    assert len(hub.values) < 100


@pytest.mark.parametrize("rule", [{}, {"steps": 0}, {"s": 0}, {"steps": -1, "s": 5}])
def test_a_rule_that_never_or_always_fires_is_refused(rule: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="Every"):
        Every(**rule)
