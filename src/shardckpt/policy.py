"""How often to save: the interval that loses least time, from what the running job is seen to pay.

Layer: schedule. Pure but for a logger: times come in, a number of calls of `should_save` comes out.
Only the coordinator asks it. A save costs what its calls and fences held the training up, and what
the steps until it was durable took longer than the others. The optimum is Daly's ("A higher order
estimate of the optimum checkpoint interval for restart dumps", 2006, equation 37); where a save is
cheap it is Young's, the square root of twice the cost times the mean time between failures.
"""

from __future__ import annotations

import logging
import math
import statistics
import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal, Protocol, final

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from concurrent.futures import Future

    from shardckpt.options import Auto

_logger = logging.getLogger("shardckpt")
# Llama 3 405B: 419 unexpected interruptions in 54 days on 16,384 GPUs ("The Llama 3 Herd of
# Models", 2024, section 3.3.4).
MTBF_OF_ONE_RANK_S: Final = 54 * 86_400 / 419 * 16_384
FIRST_SAVE_CALLS: Final = 4
_NUM_QUIET: Final = 64
_MIN_QUIET: Final = 3
_NUM_SAVES: Final = 16
# A save must be durable before the next begins, with something to spare.
_DRAIN_MARGIN: Final = 1.1
# A step that takes longer than this many undisturbed ones does something else, too.
_MOST_STEPS: Final = 3
# What a save adds to the facts that stand beside the state, for the job after this one.
_COST: Final = "save_cost_s"
_DRAIN: Final = "save_durable_after_s"
LEARNED: Final = frozenset({_COST, _DRAIN})
_WORTH_TELLING: Final = 0.2

Bound = Literal["the optimum", "max_overhead", "the storage", "mtbf_s"]


class Saving(Protocol):
    """A save under way, as `SaveHandle` is.

    Attributes:
        save_s: Seconds that `save` took.
        fence_s: Seconds of waits at fences.
        committed: Done once the save is over: True, or not saved.
    """

    save_s: float
    fence_s: float
    committed: Future[bool]


@dataclass(frozen=True, slots=True)
class Choice:
    """How often to save, and why.

    Attributes:
        calls: A save at every so many calls of `should_save`.
        interval_s: Their seconds.
        cost_s: What one save costs the training.
        drain_s: From the call of `save` to the commit.
        bound: What decided.
    """

    calls: int
    interval_s: float
    cost_s: float
    drain_s: float
    bound: Bound


def best_interval_s(cost_s: float, mtbf_s: float) -> float:
    """Return the seconds of work between two saves that lose the least time.

    Args:
        cost_s: What one save costs.
        mtbf_s: Mean time between failures.

    >>> round(best_interval_s(0.5, 10_000))
    100
    """
    if cost_s >= 2 * mtbf_s:
        return mtbf_s
    x = math.sqrt(cost_s / (2 * mtbf_s))
    return math.sqrt(2 * cost_s * mtbf_s) * (1 + x / 3 + x * x / 9) - cost_s


def lost_part(
    interval_s: float, cost_s: float, *, drain_s: float, restart_s: float, mtbf_s: float
) -> float:
    """Return the part of the time that is expected to be lost to saves, redone work and restarts.

    Args:
        interval_s: Work between two saves.
        cost_s: What one save costs the training.
        drain_s: How long a save takes to be of use.
        restart_s: From a failure to the first step again.
        mtbf_s: Mean time between failures, which come independently of each other.
    """
    late = (drain_s + restart_s) / mtbf_s
    cycle = (interval_s + cost_s) / mtbf_s
    if late + cycle > 50:  # Hardly any work is done at all.
        return 1.0
    return 1 - interval_s / (mtbf_s * math.exp(late) * math.expm1(cycle))


def choose(
    *, cost_s: float, drain_s: float, call_s: float, mtbf_s: float, max_overhead: float
) -> Choice:
    """Return how often to save.

    Args:
        cost_s: What one save costs the training.
        drain_s: From its beginning to its commit.
        call_s: Seconds from one call of `should_save` to the next.
        mtbf_s: Mean time between failures.
        max_overhead: Most of the time that saves may cost.
    """
    limits: dict[Bound, float] = {
        "the optimum": best_interval_s(cost_s, mtbf_s),
        "max_overhead": cost_s / max_overhead,
        "the storage": _DRAIN_MARGIN * drain_s,
    }
    bound = max(limits, key=limits.__getitem__)
    interval_s = limits[bound]
    if bound == "max_overhead" and interval_s > mtbf_s:
        # Within the bound a job would fail more often than it saves.
        bound, interval_s = "mtbf_s", max(mtbf_s, limits["the storage"])
    # Longer rather than shorter: what bounds the interval bounds it from below.
    calls = max(1, math.ceil(interval_s / call_s - 1e-9))
    return Choice(calls, calls * call_s, cost_s, drain_s, bound)


@dataclass(slots=True)
class _Watched:
    saving: Saving
    began_s: float
    ended_s: float | None = None
    told_s: float = 0.0


@final
class Policy:
    """Watches the job on the coordinator and says how often to save."""

    def __init__(
        self,
        rule: Auto,
        num_ranks: int,
        *,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """Start without a measured step.

        Args:
            rule: The bounds.
            num_ranks: Ranks of the job.
            monotonic: The clock.
        """
        self._rule = rule
        self._mtbf_s = rule.mtbf_s or MTBF_OF_ONE_RANK_S / num_ranks
        self._num_ranks = num_ranks
        self._monotonic = monotonic
        self._quiet: deque[float] = deque(maxlen=_NUM_QUIET)
        self._stalls: deque[float] = deque(maxlen=_NUM_SAVES)
        self._costs: deque[float] = deque(maxlen=_NUM_SAVES)
        self._drains: deque[float] = deque(maxlen=_MIN_QUIET)
        self._watched: list[_Watched] = []
        self._called_s: float | None = None
        # Since the last save was over.
        self._stalled_s = self._excess_s = 0.0
        self._told: Choice | None = None
        self.choice: Choice | None = None

    @property
    def calls(self) -> int:
        """A save at every so many calls of `should_save`; the first comes early, to be measured."""
        return FIRST_SAVE_CALLS if self.choice is None else self.choice.calls

    @property
    def is_behind(self) -> bool:
        """Whether a save takes longer than expected, so that the next one would have to wait."""
        limit_s = 0.0 if self.choice is None else self.choice.interval_s
        now_s = self._monotonic()
        return any(now_s - w.began_s > limit_s for w in self._watched)

    @property
    def is_recalling(self) -> bool:
        """Whether a save need not come early: what it costs is known from an earlier job."""
        return self.choice is None and bool(self._costs)

    @property
    def learned(self) -> dict[str, str]:
        """What `recall` takes."""
        if self.choice is None:
            return {}
        return {_COST: f"{self.choice.cost_s:.6g}", _DRAIN: f"{self.choice.drain_s:.6g}"}

    def recall(self, saved: Mapping[str, str]) -> None:
        """Begin with what an earlier job learned; nonsense is as good as nothing."""
        try:
            cost_s, drain_s = float(saved[_COST]), float(saved[_DRAIN])
        except (KeyError, ValueError):
            return
        if self.choice is None and 0 <= cost_s < math.inf and 0 <= drain_s < math.inf:
            self._costs.append(cost_s)
            self._stalls.append(0.0)
            self._drains.append(drain_s)

    def began(self, saving: Saving) -> None:
        """Take note of a save that `save` returned."""
        watched = _Watched(saving, self._monotonic() - saving.save_s)
        self._watched.append(watched)

        def ended(future: Future[bool]) -> None:
            watched.ended_s = self._monotonic()

        saving.committed.add_done_callback(ended)

    def called(self) -> None:
        """Take note of a call of `should_save`; a few microseconds."""
        now_s = self._monotonic()
        before_s, self._called_s = self._called_s, now_s
        if before_s is None or now_s < before_s:
            return
        self._take(before_s, now_s)

    def _take(self, before_s: float, now_s: float) -> None:
        seconds = now_s - before_s
        over = [w for w in self._watched if w.ended_s is not None and w.ended_s <= before_s]
        if over:
            self._watched = [w for w in self._watched if w not in over]
            self._settle(over)
        if not self._watched:
            self._quiet.append(seconds)
            if self.is_recalling and len(self._quiet) >= _MIN_QUIET:
                self._choose()
            return
        for watched in self._watched:
            stalled_s = watched.saving.save_s + watched.saving.fence_s
            seconds -= stalled_s - watched.told_s
            self._stalled_s += stalled_s - watched.told_s
            watched.told_s = stalled_s
        if len(self._quiet) >= _MIN_QUIET:
            undisturbed_s = statistics.median(self._quiet)
            self._excess_s += min(seconds, _MOST_STEPS * undisturbed_s) - undisturbed_s

    def _settle(self, over: list[_Watched]) -> None:
        """Turn saves that are over into a cost and a choice; those that overlap share the cost."""
        stalled_s, excess_s = self._stalled_s, self._excess_s
        self._stalled_s = self._excess_s = 0.0
        good = [w for w in over if w.saving.committed.exception() is None]
        good = [w for w in good if w.saving.committed.result()]
        if not good or len(self._quiet) < _MIN_QUIET:
            return
        self._stalls.append(stalled_s / len(good))
        self._costs.append((stalled_s + excess_s) / len(good))
        self._drains.append(max((w.ended_s or w.began_s) - w.began_s for w in good))
        self._choose()

    def _choose(self) -> None:
        rule = self._rule
        # Steps vary by themselves, so that one save may seem to cost less than it stalls.
        cost_s = max(statistics.median(self._costs), statistics.median(self._stalls))
        self.choice = choice = choose(
            cost_s=cost_s, drain_s=max(self._drains),
            call_s=max(statistics.median(self._quiet), 1e-6), mtbf_s=self._mtbf_s,
            max_overhead=rule.max_overhead,
        )  # fmt: skip
        told = self._told
        if (
            told is not None
            and told.bound == choice.bound
            and abs(choice.calls - told.calls) <= _WORTH_TELLING * told.calls
        ):
            return
        self._told = choice
        level = logging.WARNING if choice.bound == "mtbf_s" else logging.INFO
        _logger.log(level, "%s", self._reasons(choice))

    def _reasons(self, choice: Choice) -> str:
        lost = lost_part(
            choice.interval_s, choice.cost_s, drain_s=choice.drain_s,
            restart_s=self._rule.restart_s, mtbf_s=self._mtbf_s,
        )  # fmt: skip
        source = "given" if self._rule.mtbf_s else f"usual for {self._num_ranks} ranks"
        overhead = choice.cost_s / (choice.interval_s + choice.cost_s)
        line = (
            f"saving at every {choice.calls}. call ({choice.interval_s:.1f} s), as "
            f"{choice.bound} says: a save costs {choice.cost_s:.3f} s and is durable after "
            f"{choice.drain_s:.2f} s, failures come every {self._mtbf_s:.0f} s ({source}), so "
            f"{overhead:.2%} of the time goes into saves and {lost:.2%} is lost in all"
        )
        if choice.bound == "mtbf_s":
            line += (
                f"; max_overhead={self._rule.max_overhead:g} cannot be kept, it would save less "
                "often than the job fails"
            )
        return line
