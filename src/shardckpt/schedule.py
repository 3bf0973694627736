"""When to save, decided alike on every rank.

Layer: schedule (with retention). A rule by steps is pure arithmetic. A rule by seconds is decided
by the coordinator one window of steps ahead: when it enters a window it announces whether the next
one begins with a save, so a rank only ever waits for a message that was sent a window ago.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

import msgspec

from shardckpt.coord.base import Coord, wait_for

if TYPE_CHECKING:
    from collections.abc import Callable

    from shardckpt.options import Every

WINDOW_STEPS: Final = 4


class _Due(msgspec.Struct, frozen=True):
    due: bool


class Schedule:
    """Answers `should_save`; called once per step, ascending, on every rank."""

    def __init__(
        self,
        rule: Every | None,
        coord: Coord,
        *,
        prefix: str,
        timeout_s: float,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """Start the clock.

        Args:
            rule: When to save; None never.
            coord: The job's key-value store.
            prefix: Namespace of the announcements.
            timeout_s: Deadline of the wait for one.
            monotonic: Clock of the coordinator.
        """
        self._rule = rule
        self._coord = coord
        self._prefix = prefix
        self._timeout_s = timeout_s
        self._monotonic = monotonic
        self._saved_at = monotonic()
        self._window: int | None = None
        self._is_due = False

    def saved(self) -> None:
        """Note that a save has begun."""
        self._saved_at = self._monotonic()

    def should_save(self, step: int) -> bool:
        """Return whether every rank saves at this step.

        Raises:
            DeadlineError: The coordinator's announcement did not come.
        """
        rule = self._rule
        if rule is None:
            return False
        by_steps = rule.steps is not None and step > 0 and step % rule.steps == 0
        return self._by_seconds(step, rule.s) or by_steps if rule.s is not None else by_steps

    def _by_seconds(self, step: int, every_s: float) -> bool:
        window = step // WINDOW_STEPS
        if window == self._window:
            return False
        is_first = self._window is None
        self._window = window
        is_due = False if is_first else self._announced(window)
        if self._coord.rank == 0:
            # A save announced for this window restarts the clock, so the next window is judged from
            # it.
            elapsed_s = 0.0 if is_due else self._monotonic() - self._saved_at
            self._coord.set(self._key(window + 1), msgspec.json.encode(_Due(elapsed_s >= every_s)))
            self._coord.delete(self._key(window - 2))
        return is_due

    def _announced(self, window: int) -> bool:
        data = wait_for(
            self._coord,
            self._key(window),
            what=f"the coordinator's word on saving at steps from {window * WINDOW_STEPS}",
            timeout_s=self._timeout_s,
        )
        return msgspec.json.decode(data, type=_Due).due

    def _key(self, window: int) -> str:
        return f"{self._prefix}/due/{window}"
