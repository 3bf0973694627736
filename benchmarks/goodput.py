"""How much of a job's time is training, when it saves every so many steps and sometimes fails.

Arithmetic only. A save each `i` steps makes a cycle of `T = i * step + cost` seconds. Failures come
at a constant rate, one per `mtbf`, at any moment of a cycle alike. Each one loses what was trained
since the newest step that was durable, on average half a cycle and the time until a save is
durable, and a restart. So a cycle takes `T * (1 + (T / 2 + durable + restart) / mtbf)` in all, of
which `i * step` is useful. This holds while a cycle is short beside the time between failures.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

MOST_STEPS: Final = 100_000
GRID: Final = 1.01  # Factor between intervals that are looked at.


@dataclass(frozen=True, slots=True)
class Job:
    """What is the same whatever the interval.

    Attributes:
        step_s: Seconds of a step without saves.
        durable_s: Seconds from a save's begin until it survives a failure.
        restart_s: Seconds from a failure until training goes on from the restored state.
        mtbf_s: Mean seconds between failures.
    """

    step_s: float
    durable_s: float
    restart_s: float
    mtbf_s: float


def goodput(job: Job, interval: int, cost_s: float) -> float:
    """Return the share of time that is useful.

    Args:
        job: All but the saves.
        interval: Steps from one save to the next.
        cost_s: Seconds that training takes longer per save.
    """
    useful_s = interval * job.step_s
    cycle_s = useful_s + cost_s
    lost_s = cycle_s / 2 + job.durable_s + job.restart_s
    return useful_s / (cycle_s * (1 + lost_s / job.mtbf_s))


def cost_at(costs_s: Mapping[int, float], interval: int) -> float:
    """Return the cost of a save at any interval, from those measured.

    Between measured intervals it is on a line over the logarithm of the interval; outside of them
    it is that of the nearest: a save that meets no other costs the same at any distance.
    """
    known = sorted(costs_s)
    if interval <= known[0]:
        return costs_s[known[0]]
    for left, right in itertools.pairwise(known):
        if interval <= right:
            part = math.log(interval / left) / math.log(right / left)
            return costs_s[left] + part * (costs_s[right] - costs_s[left])
    return costs_s[known[-1]]


def intervals_to_try() -> list[int]:
    """Return whole numbers of steps, each about 1 % above the one before."""
    powers = range(int(math.log(MOST_STEPS) / math.log(GRID)) + 1)
    return sorted({round(GRID**power) for power in powers})


def curve(job: Job, costs_s: Mapping[int, float]) -> dict[int, float]:
    """Return the goodput by interval."""
    return {i: goodput(job, i, cost_at(costs_s, i)) for i in intervals_to_try()}


def best(job: Job, costs_s: Mapping[int, float]) -> tuple[int, float]:
    """Return the interval with the highest goodput, and that goodput."""
    found = curve(job, costs_s)
    interval = max(found, key=found.__getitem__)
    return interval, found[interval]
